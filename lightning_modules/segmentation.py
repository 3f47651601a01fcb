"""`SegmentationMethod`: networks that draw maps; the base of every method that segments."""

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

import torch
from torch import nn

from lesionbench.batch import Batch
from lesionbench.errors import SuiteError
from lesionbench.prediction import Prediction
from lesionbench.target import ClassSoftmax, Target
from lesionbench.task import Task
from lightning_modules.base import Method
from lightning_modules.inferers import Inferer
from lightning_modules.losses import DeepSupervision
from lightning_modules.networks.contract import Output, logits_of, with_own_loss


class SegmentationMethod(Method):
    """One network that draws one set of maps; several-network methods override `predict_maps`.

    Args:
        network: called with (in_channels, out_channels), returns the network.
        loss: called with (logits or output dict, target).
        target: called with the task, returns the `Target`; softmax over classes by default.
        inferer: called with (image, predictor, slice axis): see `lightning_modules.inferers`.
    """

    takes_inputs = True
    tables: Sequence[str] | None = ()

    def __init__(
        self,
        task: Task,
        *,
        network: Callable[..., nn.Module],
        loss: nn.Module,
        inferer: Inferer,
        target: Callable = ClassSoftmax,
        **training: Any,
    ) -> None:
        super().__init__(task, **training)
        self.target: Target = target(task)
        kind = getattr(loss, "kind", None)
        if kind is not None and kind != self.target.kind:
            raise SuiteError(
                f"model.loss={type(loss).__name__} is for {kind} outputs, model.target={type(self.target).__name__} gives {self.target.kind}; change one of them"
            )
        self.network = network(in_channels=task.in_channels, out_channels=self.target.out_channels)
        self.loss = loss if isinstance(loss, DeepSupervision) else DeepSupervision(loss)  # without heads it is the plain loss
        if getattr(inferer, "divisor", 0) is None:
            fitted: Any = copy(inferer)
            fitted.divisor = getattr(self.network, "divisor", 1)
            inferer = fitted
        self.inferer = inferer

    def check(self, data: Any) -> None:
        super().check(data)
        self.check_patch(data, self.network)

    def check_patch(self, data: Any, network: nn.Module) -> None:
        """Refuses patches that a network does not take.

        Raises:
            SuiteError: says what it needs.
        """
        patch = getattr(data, "patch", None)
        if patch is None or not hasattr(network, "min_size"):
            return
        flat = len(patch) == 3 and network.dimensions == 2
        sides = [s for axis, s in enumerate(patch) if not (flat and axis == self.task.slice_axis)]
        if len(sides) != network.dimensions:
            raise SuiteError(
                f"patch={list(patch)} has {len(sides)} sides, {type(network).__name__} is a {network.dimensions}D network; "
                "for slices also data.view, model/inferer and model.network.dimensions change: see docs/configuration.md"
            )
        fits = all(s >= m and s % d == 0 for s, m, d in zip(sides, network.min_size, network.divisor, strict=True))
        if not fits or network.fixed_size not in (None, tuple(sides)):
            needs = network.fixed_size or f"at least {network.min_size}, each side divisible by {network.divisor}"
            raise SuiteError(f"patch={list(patch)} does not fit {type(network).__name__}, which needs {needs}")

    def forward(self, image: torch.Tensor) -> Output:
        """Image (B, M, *spatial of the view) -> logits (B, K, *spatial) or a dict with `logits`."""
        return self.network(image)

    def training_target(self, batch: Batch) -> torch.Tensor:
        """What the loss compares the logits of a batch with."""
        return self.target.encode(batch["label"])

    def supervised(self, output: Output, batch: Batch) -> torch.Tensor:
        """The loss of a network's output on a labeled batch; the network's own loss is added."""
        return with_own_loss(self.loss(output, self.training_target(batch)), output)

    def compute_loss(self, batch: Batch) -> torch.Tensor:
        """The loss of a batch."""
        return self.supervised(self(batch["image"]), batch)

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        loss = self.compute_loss(batch)
        self.log_terms(loss=loss)
        return loss

    def predict_maps(self, view: torch.Tensor) -> dict[str, torch.Tensor]:
        """Maps of one view that may be averaged: `probabilities` (B, K, *spatial) for the target, and any further ones by name."""
        return {"probabilities": self.target.activate(logits_of(self(view)))}

    def predict_case(self, batch: Batch) -> Prediction:
        maps = self.infer(batch, self.predict_maps)
        return self.decode(maps["probabilities"])

    def decode(self, maps: torch.Tensor) -> Prediction:
        """Blended maps (1, K, X, Y, Z) -> prediction of the one case."""
        regions = self.target.decode(maps)
        return Prediction(regions=regions[0], labels=self.target.labels(regions)[0])

    def to_native(self, prediction: Prediction, geometry: Any) -> Prediction:
        native = super().to_native(prediction, geometry)
        if geometry.resampled != geometry.canonical:  # labels follow from resampled probabilities, not from resampled labels
            for _, part in native.flat():
                if part.regions is not None:
                    part.labels = self.target.labels(part.regions[None])[0]
        return native
