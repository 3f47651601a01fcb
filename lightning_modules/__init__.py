"""Methods as Lightning modules; one file each. Networks, losses and metrics are plain and usable alone."""

from lightning_modules.base import Method, SegmentationMethod
from lightning_modules.fae import FAE
from lightning_modules.habitat_maps import Habitats
from lightning_modules.supervised import Supervised

__all__ = ["FAE", "Habitats", "Method", "SegmentationMethod", "Supervised"]
