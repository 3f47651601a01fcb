"""Segmentation learned from several raters, scored as a map of how many of them agree."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from lesionbench.batch import Batch
from lesionbench.errors import SuiteError
from lesionbench.prediction import Prediction
from lesionbench.task import Task
from lightning_modules.raters.rater_targets import AgreementClasses, DecoderPerRater, RaterTarget
from lightning_modules.segmentation import SegmentationMethod


class MultiRater(SegmentationMethod):
    """One network per task, trained on all raters of a case at once; by default agreement levels are classes.

    Zukovec, Dular & Spiclin, "Modeling multi-annotator uncertainty as multi-class segmentation problem", BrainLes 2021. The other
    strategies that it discusses are targets too (`lightning_modules.raters.rater_targets`).

    Args:
        target: called with the task, returns a `RaterTarget`.
        decodings: further decodings of the same maps (see the target), measured as members of the prediction.

    Raises:
        SuiteError: a target that is none for raters or lacks a decoding, decoders that the network does not have; before training also
            cases without raters or with more than the task has.
    """

    def __init__(self, task: Task, *, target: Callable = AgreementClasses, decodings: Sequence[str] = (), **options: Any) -> None:
        super().__init__(task, target=target, **options)
        if not isinstance(self.target, RaterTarget):
            raise SuiteError(f"MultiRater needs a target for raters (model/target=agreement), got {type(self.target).__name__}")
        for decoding in decodings:
            self.target.check(decoding)
        if isinstance(self.target, DecoderPerRater) and not getattr(self.network, "own_decoders", False):
            raise SuiteError("model/target=decoder_per_rater needs a decoder per output: model.network.own_decoders=true (dynunet, nnunet)")
        self.decodings = tuple(decodings)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        data = self.trainer.datamodule
        for case in data.parts["train"]:  # on every rank the same
            if not 1 <= len(case.raters) <= self.task.raters:
                raise SuiteError(f"case {case.id} has {len(case.raters)} raters, the task says 1 to {self.task.raters}")
            self.target.learn(case.id, torch.from_numpy(data.store.open(case).raters()))

    def training_target(self, batch: Batch) -> torch.Tensor:
        return self.target.encode_raters(batch["raters"], batch["rater_mask"], batch["case"], self.generator("rater"))

    def compute_loss(self, batch: Batch) -> torch.Tensor:
        return self.target.loss_terms * super().compute_loss(batch)

    def decode(self, maps: torch.Tensor) -> Prediction:
        members = {name: self._prediction(self.target.read(maps, name)) for name in self.decodings}
        return replace(self._prediction(self.target.decode(maps)), members=members)

    def _prediction(self, regions: torch.Tensor) -> Prediction:
        return Prediction(regions=regions[0], labels=self.target.labels(regions)[0])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["lesionbench"]["target"] = self.target.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if "target" in checkpoint.get("lesionbench", {}):
            self.target.load(checkpoint["lesionbench"]["target"])
