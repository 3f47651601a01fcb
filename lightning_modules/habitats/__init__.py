"""Intra-tumor habitats (Li et al., BrainLes 2021) as plain estimators with `fit` and `predict`; one file per step, no Lightning."""

from lightning_modules.habitats.bayesopt import EvaluationLog, Search, Theta, run_search
from lightning_modules.habitats.encoder import EncoderSettings, fit_encoder
from lightning_modules.habitats.pipeline import HabitatModel, HabitatObjective, HabitatSettings, Tumor

__all__ = [
    "EncoderSettings",
    "EvaluationLog",
    "HabitatModel",
    "HabitatObjective",
    "HabitatSettings",
    "Search",
    "Theta",
    "Tumor",
    "fit_encoder",
    "run_search",
]
