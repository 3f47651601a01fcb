"""Methods as Lightning modules; one file each. Networks, losses and metrics are plain and usable alone."""

from lightning_modules.base import Method, SegmentationMethod
from lightning_modules.supervised import Supervised
from lightning_modules.umm import UMM

__all__ = ["UMM", "Method", "SegmentationMethod", "Supervised"]
