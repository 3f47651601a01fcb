"""Plain supervised segmentation: one network, one loss. The base line of every comparison."""

from lightning_modules.segmentation import SegmentationMethod


class Supervised(SegmentationMethod):
    """Trains `network` on labeled samples with `loss`, in 2D, 2.5D or 3D; all of it is in the base."""
