"""Data sets as Lightning data modules; one file each."""

from datamodules.acdc import ACDC
from datamodules.atlas import Atlas
from datamodules.base import CaseDataModule
from datamodules.bids import BIDS
from datamodules.brats import BraTS
from datamodules.cubes import Cubes
from datamodules.decathlon import Decathlon
from datamodules.folder import Folder
from datamodules.ibsr import IBSR
from datamodules.images import Images
from datamodules.left_atrium import LeftAtrium
from datamodules.nnunet import NNUNet
from datamodules.preprocessing import Preprocessing
from datamodules.qubiq import QUBIQ
from datamodules.sampling import Sampling
from datamodules.simulated.blobs import Blobs
from datamodules.simulated.context_toy import ContextToy
from datamodules.simulated.ellipses import Ellipses
from datamodules.simulated.lesion_insertion import LesionInsertion
from datamodules.simulated.modality_toy import ModalityToy
from datamodules.simulated.semi_real import SemiReal
from datamodules.simulated.simulated import Simulated
from datamodules.simulated.thick_slices import ThickSlices
from datamodules.simulated.toy_brains import ToyBrains
from datamodules.split import Split
from datamodules.tumor_voxels import TumorVoxels

__all__ = [
    "ACDC",
    "BIDS",
    "IBSR",
    "QUBIQ",
    "Atlas",
    "Blobs",
    "BraTS",
    "CaseDataModule",
    "ContextToy",
    "Cubes",
    "Decathlon",
    "Ellipses",
    "Folder",
    "Images",
    "LeftAtrium",
    "LesionInsertion",
    "ModalityToy",
    "NNUNet",
    "Preprocessing",
    "Sampling",
    "SemiReal",
    "Simulated",
    "Split",
    "ThickSlices",
    "ToyBrains",
    "TumorVoxels",
]
