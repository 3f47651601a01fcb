"""Methods as Lightning modules; one file each. Networks, losses and metrics are plain and usable alone."""

from lightning_modules.autoencoder import Autoencoder
from lightning_modules.base import Method, SegmentationMethod
from lightning_modules.blur_residual import BlurResidual
from lightning_modules.flair_threshold import FlairThreshold
from lightning_modules.supervised import Supervised

__all__ = ["Autoencoder", "BlurResidual", "FlairThreshold", "Method", "SegmentationMethod", "Supervised"]
