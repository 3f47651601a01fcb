"""Methods as Lightning modules; one file each. Networks, losses and metrics are plain and usable alone."""

from lightning_modules.anomaly.autoencoder import Autoencoder
from lightning_modules.anomaly.blur_residual import BlurResidual
from lightning_modules.anomaly.flair_threshold import FlairThreshold
from lightning_modules.base import Method
from lightning_modules.cascade import Cascade
from lightning_modules.evaluation.ensemble import Ensemble
from lightning_modules.evaluation.missing_modalities import MissingModalities
from lightning_modules.evaluation.robustness import Robustness
from lightning_modules.evaluation.stochastic import Stochastic
from lightning_modules.habitats.fae import FAE
from lightning_modules.habitats.habitats import Habitats
from lightning_modules.raters.multi_rater import MultiRater
from lightning_modules.segmentation import SegmentationMethod
from lightning_modules.semi_supervised.base import SemiSupervised
from lightning_modules.semi_supervised.co_learning import CoLearning
from lightning_modules.semi_supervised.copy_paste import CopyPaste
from lightning_modules.semi_supervised.coranet import CoraNet
from lightning_modules.semi_supervised.cross_pseudo_supervision import CrossPseudoSupervision
from lightning_modules.semi_supervised.entropy_minimization import EntropyMinimization
from lightning_modules.semi_supervised.mean_teacher import MeanTeacher
from lightning_modules.semi_supervised.pi_model import PiModel
from lightning_modules.semi_supervised.pseudo_label import PseudoLabel
from lightning_modules.semi_supervised.temporal_ensembling import TemporalEnsembling
from lightning_modules.semi_supervised.ua_mt import UAMT
from lightning_modules.semi_supervised.virtual_adversarial_training import VirtualAdversarialTraining
from lightning_modules.supervised.cascaded_3d_unet import CascadedUNet3D
from lightning_modules.supervised.dints_topology_search import DiNTSTopologySearch
from lightning_modules.supervised.modality_pairing import ModalityPairing
from lightning_modules.supervised.multiplane_unetpp import MultiplaneUNetPP
from lightning_modules.supervised.reciprocal_adversarial import ReciprocalAdversarial
from lightning_modules.supervised.residual_unet_localization import LocalizedUNet
from lightning_modules.supervised.spin import SPiN
from lightning_modules.supervised.supervised import Supervised
from lightning_modules.supervised.two_phase_omt import TwoPhaseOMT
from lightning_modules.supervised.umm import UMM
from lightning_modules.supervised.unet_context_encoding_uncertainty import UNetContextEncoding
from lightning_modules.supervised.vae_unet_hausdorff_loss import VAEUNetHausdorff

__all__ = [
    "FAE",
    "UAMT",
    "UMM",
    "Autoencoder",
    "BlurResidual",
    "Cascade",
    "CascadedUNet3D",
    "CoLearning",
    "CopyPaste",
    "CoraNet",
    "CrossPseudoSupervision",
    "DiNTSTopologySearch",
    "Ensemble",
    "EntropyMinimization",
    "FlairThreshold",
    "Habitats",
    "LocalizedUNet",
    "MeanTeacher",
    "Method",
    "MissingModalities",
    "ModalityPairing",
    "MultiRater",
    "MultiplaneUNetPP",
    "PiModel",
    "PseudoLabel",
    "ReciprocalAdversarial",
    "Robustness",
    "SPiN",
    "SegmentationMethod",
    "SemiSupervised",
    "Stochastic",
    "Supervised",
    "TemporalEnsembling",
    "TwoPhaseOMT",
    "UNetContextEncoding",
    "VAEUNetHausdorff",
    "VirtualAdversarialTraining",
]
