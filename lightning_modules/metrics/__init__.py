"""Metrics: plain NumPy functions on masks and maps, `CaseMetrics` that turns one case into result rows, `PerCaseResults` that collects
the rows of all cases on all ranks, and `DatasetMetrics` that measures the voxels of all cases on all ranks as one set.
"""

from lightning_modules.metrics.agreement import q_dice, volume_recall_rate
from lightning_modules.metrics.brats import brats2023, brats2026, tissue_lesions
from lightning_modules.metrics.case_metrics import CaseMetrics
from lightning_modules.metrics.dataset_metrics import DatasetMetrics
from lightning_modules.metrics.lesions import lesion_counts, lesion_dice, lesion_f1
from lightning_modules.metrics.overlap import overlap_metrics
from lightning_modules.metrics.per_case import PerCaseResults
from lightning_modules.metrics.slices import largest_components, slice_metrics
from lightning_modules.metrics.surface import grid_diagonal, surface_distances, surface_metrics
from lightning_modules.metrics.uncertainty import auroc, average_precision, brier_score, calibration_error, qu_brats

__all__ = [
    "CaseMetrics",
    "DatasetMetrics",
    "PerCaseResults",
    "auroc",
    "average_precision",
    "brats2023",
    "brats2026",
    "brier_score",
    "calibration_error",
    "grid_diagonal",
    "largest_components",
    "lesion_counts",
    "lesion_dice",
    "lesion_f1",
    "overlap_metrics",
    "q_dice",
    "qu_brats",
    "slice_metrics",
    "surface_distances",
    "surface_metrics",
    "tissue_lesions",
    "volume_recall_rate",
]
