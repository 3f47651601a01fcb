"""Methods as Lightning modules; one file each. Networks, losses and metrics are plain and usable alone."""

from lightning_modules.autoencoder import Autoencoder
from lightning_modules.base import Method, SegmentationMethod
from lightning_modules.blur_residual import BlurResidual
from lightning_modules.coranet import CoraNet
from lightning_modules.fae import FAE
from lightning_modules.flair_threshold import FlairThreshold
from lightning_modules.habitat_maps import Habitats
from lightning_modules.mean_teacher import MeanTeacher
from lightning_modules.multi_rater import MultiRater
from lightning_modules.reciprocal_adversarial import ReciprocalAdversarial
from lightning_modules.robustness import Robustness
from lightning_modules.semi_supervised import SemiSupervised
from lightning_modules.spin import SPiN
from lightning_modules.supervised import Supervised
from lightning_modules.umm import UMM

__all__ = [
    "FAE",
    "UMM",
    "Autoencoder",
    "BlurResidual",
    "CoraNet",
    "FlairThreshold",
    "Habitats",
    "MeanTeacher",
    "Method",
    "MultiRater",
    "ReciprocalAdversarial",
    "Robustness",
    "SPiN",
    "SegmentationMethod",
    "SemiSupervised",
    "Supervised",
]
