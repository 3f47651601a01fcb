"""Processes that read and prepare data: they heed the process that started them, and no signal that is sent to all."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import parent_process
from typing import Any

from torch.utils.data import DataLoader

from lesionbench.stopping import STOPS

_LINUX = hasattr(signal, "sigtimedwait")  # elsewhere a signal does not tell who sent it


class WorkerLoader(DataLoader):
    """A `DataLoader` whose workers are `shielded`; give it `heed_parent` for its `worker_init_fn`."""

    def __iter__(self) -> Any:
        with shielded():
            return super().__iter__()


@contextmanager
def shielded() -> Iterator[None]:
    """Processes started in here do not get SIGTERM and SIGINT, which schedulers and terminals send to a whole group; they call `heed_parent`.

    The process that starts them decides what becomes of its work, and needs them until then.
    """
    if not _LINUX:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # which they inherit
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def heed_parent(*_: Any) -> None:
    """In a process started under `shielded`: ends it when its parent asks for that by a signal, or has died."""
    if _LINUX:
        threading.Thread(target=_heed, args=(parent_process().pid,), daemon=True).start()


def _heed(parent: int) -> None:
    while os.getppid() == parent:
        received = signal.sigtimedwait(STOPS, 2.0)  # seconds
        if received is not None and received.si_pid == parent:
            break
    os._exit(0)  # with an error the parent, which may be ending itself, would raise one
