"""Cascaded 3D U-Nets: one network for each region, each of which is shown what those before it said."""

from collections.abc import Mapping
from typing import Any, Literal

import torch

from lesionbench.batch import Batch
from lesionbench.errors import SuiteError
from lesionbench.task import Task
from lightning_modules.cascade import Cascade


class CascadedUNet3D(Cascade):
    """A round of the cascade: the network sees the image and the maps of its forerunners (Luu & Pavlovskiy, BrainLes 2021, Sections 3.1, 3.6).

    The rounds are the stages of an experiment: whole tumor, then tumor core shown the whole tumor, then enhancing tumor shown both.

    Args:
        given: `mask`, probabilities above 1/2 as in the paper, or `probability`, as they are.
        options: what `Cascade` takes.
    """

    shows_maps = True

    def __init__(self, task: Task, *, given: Literal["mask", "probability"] = "mask", **options: Any) -> None:
        super().__init__(task, **options)
        self.given = given

    def shown(self, image: torch.Tensor, maps: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Image (B, M, *spatial) and the maps (B, R, *spatial) of all forerunners behind it.

        Raises:
            SuiteError: a training batch without one of the maps.
        """
        lacking = [name for name in self.forerunners if name not in maps]
        if lacking:
            raise SuiteError(f"there is no map {', '.join(lacking)} for a training case; a stage {{run: maps}} writes it for all of them")
        channels = [maps[name].to(image) for name in self.forerunners]
        return torch.cat([image, *((c > 0.5).to(image) if self.given == "mask" else c for c in channels)], dim=1)

    def compute_loss(self, batch: Batch) -> torch.Tensor:
        return self.supervised(self(self.shown(batch["image"], batch)), batch)

    def draw(self, batch: Batch, known: Mapping[str, torch.Tensor]) -> torch.Tensor:
        seen = {**batch, "image": self.shown(batch["image"], known)}
        if "outside" in batch:  # beyond the border of a case there is no lesion
            none = batch["outside"].new_zeros(len(batch["outside"]), seen["image"].shape[1] - batch["image"].shape[1])
            seen["outside"] = torch.cat([batch["outside"], none], dim=1)
        return super().draw(seen, known)
