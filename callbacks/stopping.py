"""Training that stops between two batches when a signal asks for it."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.strategies.launchers import _MultiProcessingLauncher
from pytorch_lightning.trainer.call import _interrupt
from pytorch_lightning.trainer.connectors.signal_connector import _SignalConnector
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch.multiprocessing import ProcessExitedException

from lesionbench.stopping import STOPS, Stopped, end_forked, request

REQUEUE = getattr(signal, "SIGUSR2", None)
"""On which the launcher submitit queues a job again and ends it at once; None on Windows."""


@contextmanager
def stopped_between_batches(trainer: pl.Trainer) -> Iterator[None]:
    """While `trainer` fits, SIGTERM and SIGINT let the batch, or the case of a validation, be finished and end the training then.

    Ahead of the first batch they end it at once. Several processes stop at the same batch, whichever of them was asked, and finish a
    validation first. A handler of SIGUSR2 is put off until the training has ended.

    Raises:
        Stopped: once the training has ended because it was asked to.
    """
    signals = Signals(trainer)
    trainer._signal_connector = signals
    if trainer.world_size > 1:
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = signals.agree
    numbers = [*STOPS, *([REQUEUE] if REQUEUE and callable(signal.getsignal(REQUEUE)) else [])]
    before = {number: signal.signal(number, signals.ask) for number in numbers}
    try:
        yield
    except (SIGTERMException, Stopped, ProcessExitedException):  # the last for processes that were forked
        if request.number is None:
            raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if request.number is not None:
        if request.number == REQUEUE:
            before[REQUEUE](REQUEUE, signals.frame)  # ends this process, if it is the job's first
        raise Stopped(request.number)


class Signals(_SignalConnector):
    """Lightning's, less its handler of SIGTERM, which talks to other processes wherever this one may be."""

    def __init__(self, trainer: pl.Trainer) -> None:
        super().__init__(trainer)
        self.frame: FrameType | None = None
        self._process, self._registered = os.getpid(), False

    def ask(self, number: int, frame: FrameType | None) -> None:
        """The handler, also of processes that are forked."""
        self.frame = self.frame or frame
        first, launcher = request.number is None, self.trainer.strategy.launcher
        early = not self._registered or self.trainer.sanity_checking
        if os.getpid() != self._process:  # forked: the process that it comes from says when to end at once
            request.number = request.number or number
            if early:
                end_forked(number)
            return
        if launcher is not None and (first or request.ends(number)):
            launcher.kill(number if first else signal.SIGKILL)  # the signal may have been sent to this process alone
        request.made(number)
        if first and early and not isinstance(launcher, _MultiProcessingLauncher):  # which has others train and waits for them
            raise Stopped(number)

    def register_signal_handlers(self) -> None:
        kept = {number: signal.getsignal(number) for number in STOPS}
        super().register_signal_handlers()
        for number, handler in kept.items():
            self._register_signal(number, handler)
        self._registered = True

    @property
    def received_sigterm(self) -> bool:
        """What the loops ask after every batch; several processes have to agree on it first."""
        return request.number is not None and self.trainer.world_size == 1

    @received_sigterm.setter
    def received_sigterm(self, value: Any) -> None:
        pass  # Lightning's way to start with

    def agree(self) -> None:
        """Called in every process ahead of every batch: all stop here, if any of them was asked to."""
        trainer = self.trainer
        asked = trainer.strategy.reduce_boolean_decision(request.number is not None, all=False)
        window = getattr(trainer.lightning_module, "accumulate", 1)
        if not asked or (trainer.fit_loop.epoch_loop.batch_idx + 1) % window:  # summed gradients differ: wait for the step
            return
        request.number = request.number or signal.SIGTERM
        # an error of another process than the first would have Lightning kill the first
        error = SIGTERMException(128 + request.number if trainer.is_global_zero else 0)
        if os.getpid() != self._process:  # Lightning tells callbacks of an exception in the process that forked this one
            _interrupt(trainer, error)
        raise error
