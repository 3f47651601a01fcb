"""Data sets as Lightning data modules; one file each."""

from datamodules.base import CaseDataModule
from datamodules.brats import BraTS
from datamodules.folder import Folder
from datamodules.images import Images
from datamodules.preprocessing import Preprocessing
from datamodules.sampling import Sampling
from datamodules.simulated import Simulated
from datamodules.split import Split
from datamodules.tumor_voxels import TumorVoxels

__all__ = ["BraTS", "CaseDataModule", "Folder", "Images", "Preprocessing", "Sampling", "Simulated", "Split", "TumorVoxels"]
