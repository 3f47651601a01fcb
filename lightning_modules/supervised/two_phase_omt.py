"""Two-phase optimal mass transportation for segmentation (Lin, Li, Huang, Lin, Yueh, Yau, BrainLes 2021)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lesionbench.batch import Batch
from lesionbench.cubes import CUBE
from lesionbench.errors import SuiteError, unknown
from lesionbench.prediction import Prediction
from lesionbench.ranges import Count
from lesionbench.task import Task
from lightning_modules.networks.contract import logits_of
from lightning_modules.segmentation import SegmentationMethod
from lightning_modules.transport.density import Transport
from lightning_modules.transport.warp import Warp


class TwoPhaseOMT(SegmentationMethod):
    """Maps a brain to a cube in which what matters is magnified, segments the cube, and carries the answer back.

    It is trained on cubes (`transport.stages.write_cubes`) and predicts cases as they are: the density of phase I is that of the guiding
    modality; the network `first` finds the region in that cube, and the density of phase II is raised in the grown region. A case that is a
    cube already (attribute `cube`), such as those of validation, is not mapped again. Voxels without signal in any modality are background.

    Args:
        cube: sides of the cube in voxels, which the network must take.
        transport: how maps are made.
        first: factory of the network of phase I, called like `network` with one output, which is not trained here; its weights come with
            `init_from` (`init_prefix={network: first}`). None = there is no second phase.
        channel: guiding modality.
        region: what `first` finds.

    Raises:
        SuiteError: an unknown channel or region, a cube that the network does not take.
    """

    takes_inputs = False

    def __init__(
        self,
        task: Task,
        *,
        cube: Sequence[Count] = (128, 128, 128),
        transport: Transport,
        first: Callable[..., nn.Module] | None = None,
        channel: str = "flair",
        region: str = "WT",
        **options: Any,
    ) -> None:
        super().__init__(task, **options)
        for kind, name, known in [("channel", channel, task.channels), ("region", region, task.region_names)]:
            if name not in known:
                raise unknown(f"model.{kind}", name, known)
        self.cube, self.transport, self.channel, self.region = tuple(cube), transport, channel, region
        self._check_cube()
        self.first = None if first is None else first(in_channels=task.in_channels, out_channels=1).requires_grad_(False)

    def _check_cube(self) -> None:
        divisor, least = (getattr(self.network, name, (1, 1, 1)) for name in ("divisor", "min_size"))
        fixed = getattr(self.network, "fixed_size", None)
        if len(self.cube) != 3 or len(divisor) != 3:
            raise SuiteError(f"model.cube={list(self.cube)}: three sides, and a 3D network")
        fits = all(side >= m and side % d == 0 for side, m, d in zip(self.cube, least, divisor, strict=True))
        if not fits or fixed not in (None, self.cube):
            needs = fixed or f"sides of at least {least}, divisible by {divisor}"
            raise SuiteError(f"model.cube={list(self.cube)} (patch) does not fit {type(self.network).__name__}, which needs {needs}")

    def on_train_start(self) -> None:
        self.train()  # Lightning, which warns of modules in evaluation mode, has looked by now

    def train(self, mode: bool = True) -> "TwoPhaseOMT":
        """Lightning's and torch's switch; the network of phase I stays in evaluation mode."""
        super().train(mode)
        if self.first is not None:
            self.first.eval()
        return self

    def predict_case(self, batch: Batch) -> Prediction:
        if batch["attributes"][0].get(CUBE):
            return super().predict_case(batch)
        warp = self.warp(batch)
        maps = self._asked(batch, warp, self.predict_maps)["probabilities"]
        return self.decode(self._back(batch, warp, maps))

    def warp(self, batch: Batch, tumor: torch.Tensor | None = None) -> Warp:
        """The map of the one case of `batch`: of phase I without `first`, else of phase II.

        Args:
            tumor: mask (X, Y, Z), bool, of `region` to magnify in phase II; None = what `first` finds.
        """
        if self.first is not None and tumor is None:
            tumor = self.found(batch)
        return self._warp(batch, None if self.first is None else tumor)

    def found(self, batch: Batch) -> torch.Tensor:
        """Where `first` finds the region in the one case of `batch`: (X, Y, Z), bool."""
        warp = self._warp(batch, None)
        maps = self._asked(batch, warp, lambda cube: {"found": logits_of(self.first(cube)).sigmoid()})["found"]
        return self._back(batch, warp, maps)[0, 0] > 0.5

    def _warp(self, batch: Batch, tumor: torch.Tensor | None) -> Warp:
        gray = batch["image"][0, self.task.channels.index(self.channel)]
        return self.transport.warp(gray, batch["brain_mask"][0, 0], tumor)

    def pull(self, batch: Batch, warp: Warp) -> tuple[torch.Tensor, torch.Tensor]:
        """The image (M, *cube) of the one case of `batch` in the cube, and where in the box of the brain (3, *cube) each voxel comes from."""
        psi = warp.inverse(self.cube)
        return warp.pull(batch["image"][0], psi), psi

    def _asked(self, batch: Batch, warp: Warp, predictor: Callable[[torch.Tensor], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return self.infer({"image": self.pull(batch, warp)[0][None]}, predictor)

    def _back(self, batch: Batch, warp: Warp, maps: torch.Tensor) -> torch.Tensor:
        """Maps (1, K, *cube) on the network grid (1, K, X, Y, Z), 0 outside of the brain."""
        return warp.push(maps[0])[None] * batch["brain_mask"]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        origin: Mapping[str, Any] | None = getattr(getattr(self._trainer, "datamodule", None), "origin", None)
        if origin is not None:  # it has seen cubes, and will be given cases as those that they were made from
            checkpoint["lesionbench"]["preprocessing"] = origin["preprocessing"]
