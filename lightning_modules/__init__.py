"""Methods as Lightning modules; one file each. Networks, losses and metrics are plain and usable alone."""

from lightning_modules.autoencoder import Autoencoder
from lightning_modules.base import Method, SegmentationMethod
from lightning_modules.blur_residual import BlurResidual
from lightning_modules.co_learning import CoLearning
from lightning_modules.copy_paste import CopyPaste
from lightning_modules.coranet import CoraNet
from lightning_modules.cross_pseudo import CrossPseudo
from lightning_modules.ensemble import Ensemble
from lightning_modules.entropy_minimization import EntropyMinimization
from lightning_modules.fae import FAE
from lightning_modules.flair_threshold import FlairThreshold
from lightning_modules.habitat_maps import Habitats
from lightning_modules.mean_teacher import MeanTeacher
from lightning_modules.missing_modalities import MissingModalities
from lightning_modules.modality_pairing import ModalityPairing
from lightning_modules.multi_rater import MultiRater
from lightning_modules.pi_model import PiModel
from lightning_modules.pseudo_label import PseudoLabel
from lightning_modules.reciprocal_adversarial import ReciprocalAdversarial
from lightning_modules.robustness import Robustness
from lightning_modules.semi_supervised import SemiSupervised
from lightning_modules.spin import SPiN
from lightning_modules.supervised import Supervised
from lightning_modules.temporal_ensembling import TemporalEnsembling
from lightning_modules.ua_mt import UAMT
from lightning_modules.umm import UMM
from lightning_modules.virtual_adversarial import VirtualAdversarial

__all__ = [
    "FAE",
    "UAMT",
    "UMM",
    "Autoencoder",
    "BlurResidual",
    "CoLearning",
    "CopyPaste",
    "CoraNet",
    "CrossPseudo",
    "Ensemble",
    "EntropyMinimization",
    "FlairThreshold",
    "Habitats",
    "MeanTeacher",
    "Method",
    "MissingModalities",
    "ModalityPairing",
    "MultiRater",
    "PiModel",
    "PseudoLabel",
    "ReciprocalAdversarial",
    "Robustness",
    "SPiN",
    "SegmentationMethod",
    "SemiSupervised",
    "Supervised",
    "TemporalEnsembling",
    "VirtualAdversarial",
]
