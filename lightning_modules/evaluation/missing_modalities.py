"""How a trained method answers when some of the modalities are missing at test time."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch

from lesionbench.batch import Batch
from lesionbench.errors import SuiteError, unknown
from lesionbench.prediction import Prediction
from lesionbench.task import Task
from lightning_modules.evaluation.checkpoint_test import CheckpointTest


class MissingModalities(CheckpointTest):
    """Tests a checkpoint with all modalities and with subsets of them: each subset is a member of the prediction, named `t1ce+flair`.

    A missing modality is what it is in a case without its file: 0 in the image (where intensities are z-scores, the mean), False in
    `channel_mask`. So members have all metrics, and tables and paired tests of `job=compare` cover them. A method that has not been
    trained with `data.channel_dropout` has never seen such images.

    Args:
        subsets: lists of the modalities that are there; None = every subset but the whole and the empty one, smallest first.
        options: `checkpoint`, the method that is tested, and what else `CheckpointTest` takes.

    Raises:
        SuiteError: an unknown modality, or a subset without any.
    """

    def __init__(self, task: Task, *, subsets: Sequence[Sequence[str]] | None = None, **options: Any) -> None:
        if subsets is None:
            subsets = [s for count in range(1, len(task.channels)) for s in combinations(task.channels, count)]
        for subset in subsets:
            if not subset:
                raise SuiteError("model.subsets holds an empty list; a subset names the modalities that are there, one at least")
            for name in subset:
                if name not in task.channels:
                    raise unknown("modality (model.subsets)", name, task.channels)
        super().__init__(task, **options)  # after what can be said without the checkpoint
        self.subsets = {"+".join(c for c in task.channels if c in subset): set(subset) for subset in subsets}

    def predict_case(self, batch: Batch) -> Prediction:
        prediction = self.method.predict_case(batch)
        for name, subset in self.subsets.items():
            there = torch.tensor(
                [*(c in subset for c in self.task.channels), *(False for _ in self.task.inputs)], device=batch["image"].device
            )
            there = there & batch["channel_mask"]
            kept = there | torch.arange(there.shape[-1], device=there.device).ge(len(self.task.channels))  # further inputs stay
            image = batch["image"] * kept[:, :, None, None, None]
            beyond = {"outside": batch["outside"] * kept} if "outside" in batch else {}
            prediction.members[name] = self.method.predict_case({**batch, "image": image, "channel_mask": there, **beyond})
        return prediction
