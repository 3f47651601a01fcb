"""Data sets as Lightning data modules; one file each."""

from datamodules.acdc import ACDC
from datamodules.atlas import Atlas
from datamodules.base import CaseDataModule
from datamodules.blobs import Blobs
from datamodules.brats import BraTS
from datamodules.ellipses import Ellipses
from datamodules.folder import Folder
from datamodules.ibsr import IBSR
from datamodules.images import Images
from datamodules.left_atrium import LeftAtrium
from datamodules.modality_toy import ModalityToy
from datamodules.planting import Planting
from datamodules.preprocessing import Preprocessing
from datamodules.qubiq import QUBIQ
from datamodules.sampling import Sampling
from datamodules.semi_real import SemiReal
from datamodules.simulated import Simulated
from datamodules.split import Split
from datamodules.thick_slices import ThickSlices
from datamodules.toy_brains import ToyBrains
from datamodules.tumor_voxels import TumorVoxels

__all__ = [
    "ACDC",
    "IBSR",
    "QUBIQ",
    "Atlas",
    "Blobs",
    "BraTS",
    "CaseDataModule",
    "Ellipses",
    "Folder",
    "Images",
    "LeftAtrium",
    "ModalityToy",
    "Planting",
    "Preprocessing",
    "Sampling",
    "SemiReal",
    "Simulated",
    "Split",
    "ThickSlices",
    "ToyBrains",
    "TumorVoxels",
]
