"""What a method says about one case: the common currency of metrics, result rows, figures, writers and ensembles."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lesionbench.geometry import Geometry


@dataclass
class Prediction:
    """Prediction for one case; every map has the same spatial shape (X, Y, Z). All parts are optional.

    Attributes:
        regions: region probabilities (R, X, Y, Z) in [0, 1], in the task's region order.
        labels: class indices (X, Y, Z), int8.
        scores: anomaly scores (X, Y, Z), any range, higher = more abnormal.
        uncertainty: name -> map (X, Y, Z), higher = less certain.
        members: predictions of branches, students, the teacher or ensemble members, measured beside the main one.
        table: name -> number, case-level results (a class probability, a risk, a volume).
    """

    regions: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    uncertainty: dict[str, torch.Tensor] = field(default_factory=dict)
    members: dict[str, "Prediction"] = field(default_factory=dict)
    table: dict[str, float] = field(default_factory=dict)

    def map(self, continuous: Callable[[torch.Tensor], torch.Tensor], discrete: Callable[[torch.Tensor], torch.Tensor]) -> "Prediction":
        """Applies `continuous` to every float map and `discrete` to label maps; maps come and go as (C, X, Y, Z)."""

        def one(x: torch.Tensor | None, f: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor | None:
            return None if x is None else f(x[None])[0]

        return replace(
            self,
            regions=None if self.regions is None else continuous(self.regions),
            labels=one(self.labels, discrete),
            scores=one(self.scores, continuous),
            uncertainty={k: one(v, continuous) for k, v in self.uncertainty.items()},
            members={k: m.map(continuous, discrete) for k, m in self.members.items()},
        )

    def region_entropy(self) -> torch.Tensor | None:
        """Entropy of each region's own probability (R, X, Y, Z), in nats, at most log 2; None without probabilities."""
        if self.regions is None:
            return None
        p = self.regions.float().clamp(0, 1)  # sums of classes round to more than 1
        return torch.special.entr(p) + torch.special.entr(1 - p)

    def flat(self, name: str = "") -> Iterator[tuple[str, "Prediction"]]:
        """This prediction under `name` (the main one is ""), then every member under `name/member`."""
        yield name, self
        for member, prediction in self.members.items():
            yield from prediction.flat(f"{name}/{member}" if name else member)


@dataclass
class CaseResult:
    """What `validation_step`, `test_step` and `predict_step` hand to callbacks: one whole case, ready to measure, draw or write.

    Attributes:
        case, patient, site: identifiers.
        prediction: on the grid of `geometry` (native grid) unless `native` is False (then on the network grid).
        truth: class indices (X, Y, Z) on the same grid as `prediction`, -1 = ignore; None where there is no label.
        image: network-grid, normalized image (M, x, y, z); `Geometry.to_native` brings it to the native grid.
        geometry: how to get from the network grid to the native one.
        rows: the case's result rows (see `lesionbench.results`).
        native: whether `prediction` and `truth` lie on the native grid.
    """

    case: str
    patient: str
    site: str
    prediction: Prediction
    truth: torch.Tensor | None
    image: torch.Tensor
    geometry: Geometry
    rows: list[dict[str, Any]] = field(default_factory=list)
    native: bool = True

    @property
    def spacing(self) -> tuple[float, ...]:
        """Voxel size along the axes of `prediction`."""
        return self.geometry.native_spacing if self.native else self.geometry.network_spacing

    def to(self, device: torch.device | str) -> "CaseResult":
        """The same with its maps on `device`. `Trainer.predict` calls it on every result that it returns, with the CPU."""

        def moved(maps: torch.Tensor) -> torch.Tensor:
            return maps.to(device)

        truth = None if self.truth is None else moved(self.truth)
        return replace(self, prediction=self.prediction.map(moved, moved), truth=truth, image=moved(self.image))

    def image_on_grid(self) -> torch.Tensor:
        """The image (M, X, Y, Z) on the grid of `prediction`; 0 outside the crop."""
        return self.geometry.to_native(self.image) if self.native else self.image
