"""How a trained method answers when some of the modalities are missing at test time."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch

from lesionbench.batch import Batch
from lesionbench.checkpoint import load_method
from lesionbench.errors import SuiteError, unknown
from lesionbench.prediction import Prediction
from lesionbench.task import Task
from lightning_modules.base import Method


class MissingModalities(Method):
    """Tests a checkpoint with all modalities and with subsets of them: each subset is a member of the prediction, named `t1ce+flair`.

    A missing modality is what it is in a case without its file: 0 in the image (where intensities are z-scores, the mean), False in
    `channel_mask`. So members have all metrics, and tables and paired tests of `job=compare` cover them. A method that has not been
    trained with `data.channel_dropout` has never seen such images.

    Args:
        checkpoint: of the method that is tested.
        subsets: lists of the modalities that are there; None = every subset but the whole and the empty one, smallest first.
        trust: further packages whose classes a checkpoint may build.

    Raises:
        SuiteError: an unknown modality, or a subset without any.
    """

    def __init__(
        self, task: Task, *, checkpoint: str, subsets: Sequence[Sequence[str]] | None = None, trust: Sequence[str] = (), **options: Any
    ) -> None:
        super().__init__(task, **options)
        if subsets is None:
            subsets = [s for count in range(1, len(task.channels)) for s in combinations(task.channels, count)]
        for subset in subsets:
            if not subset:
                raise SuiteError("model.subsets holds an empty list; a subset names the modalities that are there, one at least")
            for name in subset:
                if name not in task.channels:
                    raise unknown("modality (model.subsets)", name, task.channels)
        self.subsets = {"+".join(c for c in task.channels if c in subset): set(subset) for subset in subsets}
        self.method = load_method(checkpoint, trust)[0].requires_grad_(False)

    def predict_case(self, batch: Batch) -> Prediction:
        prediction = self.method.predict_case(batch)
        for name, subset in self.subsets.items():
            there = torch.tensor([c in subset for c in self.task.channels], device=batch["image"].device)
            there = there & batch["channel_mask"]
            image = batch["image"] * there[:, :, None, None, None]
            beyond = {"outside": batch["outside"] * there} if "outside" in batch else {}
            prediction.members[name] = self.method.predict_case({**batch, "image": image, "channel_mask": there, **beyond})
        return prediction

    def mirror(self, axes: Sequence[int]) -> None:
        """From now on predicts with test-time mirroring along these axes."""
        self.method.mirror(axes)

    def measure(self, *args: Any, **options: Any) -> list[dict]:
        return self.method.measure(*args, **options)

    def to_native(self, prediction: Prediction, geometry: Any) -> Prediction:
        return self.method.to_native(prediction, geometry)
