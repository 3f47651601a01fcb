"""Metrics: plain NumPy functions on masks and maps, `CaseMetrics` that turns one case into result rows, and `PerCaseResults` that
collects the rows of all cases on all ranks.

Names are looked up when first used, so that a function on masks does not pay for importing torchmetrics.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "CaseMetrics": "case_metrics",
    "PerCaseResults": "per_case",
    "Ranking": "uncertainty",
    "auroc": "uncertainty",
    "average_precision": "uncertainty",
    "brier_score": "uncertainty",
    "calibration_error": "uncertainty",
    "grid_diagonal": "surface",
    "lesion_counts": "lesions",
    "lesion_dice": "lesions",
    "lesion_f1": "lesions",
    "overlap_metrics": "overlap",
    "q_dice": "agreement",
    "surface_distances": "surface",
    "surface_metrics": "surface",
    "volume_recall_rate": "agreement",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
