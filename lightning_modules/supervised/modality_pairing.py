"""Modality-pairing learning: branches for groups of modalities whose last features are made to agree (Wang et al., BrainLes 2020)."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from lesionbench.batch import Batch
from lesionbench.errors import SuiteError
from lesionbench.ranges import NotNegative
from lesionbench.task import Task
from lightning_modules.losses.modality_pairing import PairingLoss
from lightning_modules.segmentation import SegmentationMethod


class ModalityPairing(SegmentationMethod):
    """Supervised training of a network with branches, plus `mp_weight` times the modality-pairing loss of their last features.

    Wang, Zhang, Hou, Liu, Tian, Zhong, Zhang, He, "Modality-pairing learning for brain tumor segmentation", BrainLes 2020, Eq. 5:
    L = L_Dice + L_CE + 0.5 L_MP, the first two on every head. A network of one branch (`fusion=early`) has no pairs, and training is
    that of `Supervised`. `train/correlation` is the features' correlation (flat, whatever the mode), also where the weight is 0.

    Args:
        network: called with (in_channels, out_channels, channels=<their names>), in training mode returns `logits` and `features`, one
            map per branch: see `networks.PairedUNet`.
        mp: the loss, given the list of features.
        mp_weight: its weight, 0.5 in the paper; 0 leaves it out.
        mp_warmup: the weight rises linearly from 0 over so many batches, or below 1 over that share of the training. The term is easy
            to satisfy early on, by features that are merely alike.

    Raises:
        SuiteError: a negative weight or warm-up, or a network that returns no features.
    """

    takes_inputs = False  # its branches are groups of modalities

    def __init__(
        self,
        task: Task,
        *,
        network: Callable[..., nn.Module],
        mp: nn.Module | None = None,
        mp_weight: NotNegative = 0.5,
        mp_warmup: NotNegative = 0,
        **options: Any,
    ) -> None:
        if mp_weight < 0 or mp_warmup < 0:
            raise SuiteError(f"model.mp_weight={mp_weight} model.mp_warmup={mp_warmup}: neither can be negative")
        super().__init__(task, network=partial(network, channels=task.channels), **options)
        self.mp, self.correlation = mp or PairingLoss(), PairingLoss("flat")
        self.mp_weight, self.mp_warmup = mp_weight, mp_warmup

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        output = self(batch["image"])
        if not isinstance(output, Mapping) or "features" not in output:
            raise SuiteError(
                f"ModalityPairing needs a network that returns features by branch (networks.PairedUNet), not {type(self.network).__name__}"
            )
        total = supervised = self.supervised(output, batch)
        terms = {"supervised": supervised}
        if len(output["features"]) > 1:
            with torch.no_grad():
                terms["correlation"] = -self.correlation(output["features"])
            if self.mp_weight:
                terms["mp"] = self.mp(output["features"])
                total = supervised + self.weight() * terms["mp"]
        self.log_terms(loss=total, **terms)
        return total

    def weight(self) -> float:
        """Weight of the pairing loss in this batch."""
        return self.mp_weight * self.warmup_factor(self.mp_warmup)
