"""Callbacks and the default logger: what is watched, kept and written while the Trainer runs."""

from callbacks.agreement import AgreementFigure
from callbacks.calibration import Calibration
from callbacks.case_table import CaseTable
from callbacks.checkpoint import BestAndLast
from callbacks.cost import Cost
from callbacks.csv_logger import CurvesLogger
from callbacks.cycle_average import CycleAverage
from callbacks.figures import OverlayFigures, montage
from callbacks.flair_baseline import FlairBaseline
from callbacks.nan_guard import NanGuard, NonFiniteLoss
from callbacks.nifti_writer import NiftiWriter
from callbacks.progress import LineProgress, progress_bar
from callbacks.pseudo_label_quality import PseudoLabelQuality
from callbacks.rewind import Rewind
from callbacks.risk_coverage import RiskCoverage
from callbacks.trial_pruner import TrialPruner
from callbacks.uncertain_region import UncertainRegion
from callbacks.uncertainty_calibration import UncertaintyCalibration
from callbacks.wandb_run import WandbRun

__all__ = [
    "AgreementFigure",
    "BestAndLast",
    "Calibration",
    "CaseTable",
    "Cost",
    "CurvesLogger",
    "CycleAverage",
    "FlairBaseline",
    "LineProgress",
    "NanGuard",
    "NiftiWriter",
    "NonFiniteLoss",
    "OverlayFigures",
    "PseudoLabelQuality",
    "Rewind",
    "RiskCoverage",
    "TrialPruner",
    "UncertainRegion",
    "UncertaintyCalibration",
    "WandbRun",
    "montage",
    "progress_bar",
]
