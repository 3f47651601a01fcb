"""Losses: `loss(logits, target) -> scalar`, target from `Target.encode`, -1 = ignored everywhere, computed in float32.

`kind` says what target a loss takes: `softmax` (class indices (B, 1, *spatial)) or `sigmoid` (region masks (B, R, *spatial)).
Losses of another form: `VAT` (a network and an image), `PairingLoss` (features of branches) and those between a network and its critic.
"""

from lightning_modules.losses.adversarial import critic_loss, fooling_loss, gradient_penalty
from lightning_modules.losses.class_balanced import ClassBalancedCE
from lightning_modules.losses.compound import DiceCE, DiceTopK, RegionBCEDice, RegionTopKDice
from lightning_modules.losses.cross_entropy import CrossEntropy, Focal, RegionBCE, RegionFocal, RegionTopK, TopK
from lightning_modules.losses.deep_supervision import DeepSupervision
from lightning_modules.losses.dice import GeneralizedDice, RegionDice, SoftDice
from lightning_modules.losses.distance import boundary_loss, one_sided_hausdorff
from lightning_modules.losses.modality_pairing import PairingLoss
from lightning_modules.losses.vat import VAT

__all__ = [
    "VAT",
    "ClassBalancedCE",
    "CrossEntropy",
    "DeepSupervision",
    "DiceCE",
    "DiceTopK",
    "Focal",
    "GeneralizedDice",
    "PairingLoss",
    "RegionBCE",
    "RegionBCEDice",
    "RegionDice",
    "RegionFocal",
    "RegionTopK",
    "RegionTopKDice",
    "SoftDice",
    "TopK",
    "boundary_loss",
    "critic_loss",
    "fooling_loss",
    "gradient_penalty",
    "one_sided_hausdorff",
]
