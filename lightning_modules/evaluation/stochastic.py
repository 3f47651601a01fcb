"""What repeated stochastic answers of a trained method say about its uncertainty."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch

from lesionbench.batch import Batch
from lesionbench.errors import SuiteError, unknown
from lesionbench.prediction import Prediction
from lesionbench.ranges import AtLeastTwo, NotNegative
from lesionbench.target import RegionSigmoid
from lesionbench.task import Task
from lightning_modules.evaluation.checkpoint_test import CheckpointTest
from lightning_modules.inferers import GROUPS, Move, Transformed
from lightning_modules.uncertainty import RunningMoments, active_dropout, mc_dropout


class Stochastic(CheckpointTest):
    """Asks a checkpoint many times, with dropout, noise or moved copies drawn anew, and answers with the mean of what it says.

    Dropout at test time is that of Gal & Ghahramani (ICML 2016), copies and noise those of Wang et al. (Neurocomputing 2019). The answer
    without any draw is the member `plain`. Labels follow from the mean as the method under test makes them. Uncertainty maps, of every
    region as a yes or no, in nats, mean over regions: `entropy` of the mean, `expected_entropy` of a pass, and what is between them,
    `mutual_information`, on which the passes disagree; `entropy_<region>` where there are several regions. Passes are summed, not kept.

    Args:
        passes: at least 2.
        dropout: its dropout layers draw.
        noise: standard deviation of Gaussian noise on the image, in units of the normalized image; 0 = none. Missing channels stay as they are.
        moves: `flips` or `dihedral` (see `inferers.GROUPS`): a move drawn for each pass, its maps moved back; None = none.
        options: `checkpoint`, the method that is tested, and what else `CheckpointTest` takes.

    Raises:
        SuiteError: options out of range, passes that would be all alike, a method without region probabilities or, with `moves`, without inferer.
    """

    def __init__(
        self,
        task: Task,
        *,
        checkpoint: str,
        passes: AtLeastTwo = 20,
        dropout: bool = True,
        noise: NotNegative = 0.0,
        moves: Literal["flips", "dihedral"] | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(passes, int) or passes < 2:
            raise SuiteError(f"model.passes={passes}: expected a whole number, at least 2")
        if noise < 0:
            raise SuiteError(f"model.noise={noise}: expected a standard deviation, at least 0")
        if not dropout and not noise and moves is None:
            raise SuiteError("model.dropout=false, model.noise=0, model.moves=null: all passes would be alike; draw one of them")
        if moves is not None and moves not in GROUPS:
            raise unknown("moves (model.moves)", moves, GROUPS)
        super().__init__(task, checkpoint=checkpoint, **options)  # after what can be said without the checkpoint
        if dropout and not active_dropout(self.method):
            raise SuiteError(
                f"model.dropout=true: {checkpoint} has no dropout layer that could draw; train it with dropout (as model.network.dropout=0.3), "
                "or say model.dropout=false and model.noise=0.1 or model.moves=flips"
            )
        self.passes, self.dropout, self.noise = passes, dropout, float(noise)
        self.group: Callable[[int], list[Move]] | None = None
        if moves is not None:
            if not hasattr(self.method, "inferer"):
                raise SuiteError(f"model.moves={moves}: {type(self.method).__name__} has no inferer that could move a case")
            self.group = GROUPS[moves]

    def predict_case(self, batch: Batch) -> Prediction:
        plain = self.method.predict_case(batch)
        if plain.regions is None:
            raise SuiteError(f"model.checkpoint holds a {type(self.method).__name__}, which gives no region probabilities")
        moments = RunningMoments(mutual_information=True)
        for _ in range(self.passes):
            with mc_dropout(self.method) if self.dropout else nullcontext(), self._moved():
                regions = self.method.predict_case(self._noisy(batch)).regions.clamp(0, 1)  # sums of classes round to more than 1
            moments.update(torch.stack([regions, 1 - regions], dim=1))  # every region is an item of the batch: is or is not
        mean = moments.mean[:, 0]
        uncertainty = {
            "entropy": moments.entropy.mean(dim=0)[0],
            "expected_entropy": moments.expected_entropy.mean(dim=0)[0],
            "mutual_information": moments.mutual_information.mean(dim=0)[0],
        }
        if len(self.task.regions) > 1:
            uncertainty |= {f"entropy_{name}": part[0] for name, part in zip(self.task.regions, moments.entropy, strict=True)}
        target = getattr(self.method, "target", None) or RegionSigmoid(self.task)
        return Prediction(mean, target.labels(mean[None])[0], uncertainty=uncertainty, members={"plain": replace(plain, uncertainty={})})

    def _noisy(self, batch: Batch) -> Batch:
        if not self.noise:
            return batch
        noise = self.noise * torch.randn_like(batch["image"])
        return {**batch, "image": batch["image"] + noise * batch["channel_mask"][:, :, None, None, None]}

    @contextmanager
    def _moved(self) -> Iterator[None]:
        """Inside, the method under test predicts a copy of the case moved at random."""
        if self.group is None:
            yield
            return
        whole = self.method.inferer
        self.method.average(lambda inferer: Transformed(inferer, self._one))
        try:
            yield
        finally:
            self.method.inferer = whole

    def _one(self, axis: int) -> list[Move]:
        moves = self.group(axis) if self.group else []
        return [moves[int(torch.randint(len(moves), ()))]]
