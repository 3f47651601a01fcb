"""The whole pipeline as one estimator, and the joint loss of its hyper-parameters (Algorithm 2 of Li et al., BrainLes 2021).

filter -> scale -> encode -> K-means -> label map -> texture and fractions -> two risk groups. Nothing here needs Lightning.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lesionbench.errors import SuiteError, unknown
from lesionbench.keyed import numpy_generator
from lesionbench.written import whole
from lightning_modules.habitats.bayesopt import Theta
from lightning_modules.habitats.clustering import HabitatClustering
from lightning_modules.habitats.encoder import EncoderSettings, build_encoder, encode, fit_encoder
from lightning_modules.habitats.outliers import MODES, OutlierFilter
from lightning_modules.habitats.risk_groups import RiskGroups
from lightning_modules.habitats.scaling import KINDS, Scaling
from lightning_modules.habitats.stability import stability_losses
from lightning_modules.habitats.survival import (
    SIGNIFICANCE_SCALES,
    Survival,
    excess_deaths,
    log_rank,
    significance_loss,
    significant_habitats,
)
from lightning_modules.habitats.texture import FEATURES, texture_features

TEXTURES = ("3d", "2d")


@dataclass(frozen=True)
class HabitatSettings:
    """Everything that the search leaves alone.

    Attributes:
        encoder: see `EncoderSettings`.
        filter_mode: of the `OutlierFilter`.
        min_kept: share of the voxels that must be left by the filter; below, Ls = 1 and p = 1 without any fit.
        scaling: of the modalities (see `Scaling`).
        voxels_per_patient: drawn from every patient for all that is fitted; None = all. Label maps are made of every voxel.
        repeats, share: of the stability loss.
        texture: `3d`, or `2d` within the slices of `slice_axis`.
        alpha: weight of the stability loss in the joint loss, in [0, 1].
        significance, tau, p_floor: of the significance loss.

    Raises:
        SuiteError: an unknown choice, or a number out of range.
    """

    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    filter_mode: str = "upper"
    min_kept: float = 0.3
    scaling: str = "minmax"
    voxels_per_patient: int | None = 2000
    repeats: int = 10
    share: float = 0.7
    texture: str = "3d"
    slice_axis: int = 2
    alpha: float = 0.5
    significance: str = "unit"
    tau: float = 0.05
    p_floor: float = 1e-4

    def __post_init__(self) -> None:
        choices = {"filter_mode": MODES, "scaling": KINDS, "texture": TEXTURES, "significance": SIGNIFICANCE_SCALES}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise unknown(f"habitats.{name}", getattr(self, name), known)
        ranges = {
            "alpha": (0 <= self.alpha <= 1, "a weight in [0, 1]"),
            "min_kept": (0 <= self.min_kept <= 1, "a share in [0, 1]"),
            "share": (0 < self.share < 1, "a share between 0 and 1"),
            "repeats": (self.repeats >= 1, "1 or more"),
            "voxels_per_patient": (self.voxels_per_patient is None or self.voxels_per_patient >= 1, "1 or more, or null for all"),
            "tau": (self.tau > 0, "a p above 0"),
            "p_floor": (0 < self.p_floor < 1, "a p between 0 and 1"),
        }
        for name, (fits, expected) in ranges.items():
            if not fits:
                raise SuiteError(f"habitats.{name}={getattr(self, name)}: expected {expected}")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "HabitatSettings":
        """The inverse of `dataclasses.asdict`."""
        return cls(**{**data, "encoder": EncoderSettings(**data["encoder"])})


@dataclass(frozen=True)
class Tumor:
    """The tumor voxels of one case.

    Attributes:
        case: identifier.
        values: modalities (N, M), may be memory-mapped.
        positions: grid position (N, 3) of every voxel, integers.
        days, died: survival; NaN where it is not known, and for all cases of a patient but one.
        patient: whose case it is; "" = a patient of its own.
    """

    case: str
    values: np.ndarray
    positions: np.ndarray
    days: float = float("nan")
    died: bool = False
    patient: str = ""


def survival_of(tumors: Sequence[Tumor]) -> Survival:
    """The survival of these patients."""
    return Survival(np.array([t.days for t in tumors], dtype=float), np.array([t.died for t in tumors], dtype=bool))


@dataclass
class FittedEncoder:
    """Filter, scaling and encoder of one quantile.

    Attributes:
        kept: share of the training voxels that the filter left; where it was too small, nothing else was fitted (None).
    """

    outliers: OutlierFilter
    kept: float
    scaling: Scaling | None = None
    network: nn.Module | None = None

    def transform(self, values: np.ndarray) -> np.ndarray:
        """Modalities (N, M), clipped to the cut-offs -> latent features (N, L)."""
        return encode(self.network, self.scaling.transform(self.outliers.clip(values)))


class EncoderFits:
    """Encoders by quantile, each fitted once: from memory, from `folder`, or now.

    Args:
        sample: training voxels (N, M).
        names: of the modalities.
        start: weights that every fit starts from; None = initial weights, the same for every quantile.
        folder: None = only in memory.
    """

    def __init__(
        self,
        sample: np.ndarray,
        settings: HabitatSettings,
        seed: object = 0,
        *,
        names: tuple[str, ...] | None = None,
        start: Mapping[str, torch.Tensor] | None = None,
        folder: Path | None = None,
    ) -> None:
        self.sample, self.settings, self.seed, self.names, self.start, self.folder = sample, settings, seed, names, start, folder
        self._fits: dict[float, FittedEncoder] = {}

    def __getitem__(self, quantile: float) -> FittedEncoder:
        if quantile not in self._fits:
            self._fits[quantile] = self._read(quantile) or self._fit(quantile)
        return self._fits[quantile]

    def _parts(self, quantile: float) -> FittedEncoder:
        outliers = OutlierFilter(quantile, self.settings.filter_mode).fit(self.sample)
        return FittedEncoder(outliers, float(outliers.keep(self.sample).mean()))

    def _fit(self, quantile: float) -> FittedEncoder:
        fitted = self._parts(quantile)
        if fitted.kept >= self.settings.min_kept:
            inside = self.sample[fitted.outliers.keep(self.sample)]
            fitted.scaling = Scaling(self.settings.scaling, self.names).fit(inside)
            fitted.network = fit_encoder(fitted.scaling.transform(inside), self.settings.encoder, self.seed, start=self.start)
            self._write(quantile, fitted)
        return fitted

    def _path(self, quantile: float) -> Path | None:
        return None if self.folder is None else self.folder / f"quantile={quantile:.4f}.pt"

    def _write(self, quantile: float, fitted: FittedEncoder) -> None:
        path = self._path(quantile)
        if path is not None:
            with whole(path) as temporary:
                torch.save(fitted.network.state_dict(), temporary)

    def _read(self, quantile: float) -> FittedEncoder | None:
        """Weights come from the file; cut-offs and scaling follow from the sample again."""
        path = self._path(quantile)
        if path is None or not path.exists():
            return None
        fitted = self._parts(quantile)
        fitted.scaling = Scaling(self.settings.scaling, self.names).fit(self.sample[fitted.outliers.keep(self.sample)])
        fitted.network = build_encoder(self.settings.encoder, self.sample.shape[1], self.seed).requires_grad_(False).eval()
        fitted.network.load_state_dict(torch.load(path, weights_only=True))
        return fitted


@dataclass(frozen=True)
class HabitatPrediction:
    """What the fitted pipeline says about one patient.

    Attributes:
        labels: habitat of every voxel (N,), from 1.
        features: the nine texture features and the fraction of every habitat, by name.
        high_risk: whether the patient belongs to the high-risk group.
    """

    labels: np.ndarray
    features: dict[str, float]
    high_risk: bool


class HabitatModel:
    """The pipeline for one theta: fitted on training patients, then applied to any patient with nothing refitted."""

    def __init__(self, theta: Theta, settings: HabitatSettings, encoder: FittedEncoder, seed: object = 0) -> None:
        self.theta, self.settings, self.encoder, self.seed = theta, settings, encoder, seed
        self.clustering = HabitatClustering(theta.clusters, seed, "final")
        self.significant, self.risk = (0, 1), RiskGroups()

    def fit_habitats(self, latent: np.ndarray, sample: np.ndarray) -> np.ndarray:
        """Clusters latent features (N, L) of the voxels `sample` (N, M) and returns their habitats (N,), from 0.

        Habitats are numbered by their mean in the first modality, so that fractions mean the same in every fit.
        """
        labels = self.clustering.fit(latent).predict(latent)
        means = [sample[labels == k, 0].mean() if (labels == k).any() else np.inf for k in range(self.theta.clusters)]
        order = np.argsort(means, kind="stable")
        self.clustering.reorder(order)
        return np.argsort(order, kind="stable")[labels]

    def fit_groups(self, features: Sequence[Mapping[str, float]], survival: Survival) -> np.ndarray:
        """Finds the significant habitats and the risk groups of the training patients; returns who is at high risk (N,), bool."""
        fractions = np.array([[f[name] for name in self._fractions] for f in features])
        self.significant = significant_habitats(fractions, survival)
        table = np.array([self._vector(f) for f in features])
        self.risk.fit(table)
        high = self.risk.predict(table).astype(bool)
        excess = excess_deaths(survival, high)
        self.risk.orient(excess)
        return high if excess[0] <= excess[1] else ~high

    @property
    def _fractions(self) -> list[str]:
        return [f"fraction_{k + 1}" for k in range(self.theta.clusters)]

    def _vector(self, features: Mapping[str, float]) -> np.ndarray:
        """F (11,): texture and the fractions of the two significant habitats."""
        return np.array([*(features[n] for n in FEATURES), *(features[self._fractions[k]] for k in self.significant)])

    def label(self, values: np.ndarray, chunk: int = 1 << 16) -> np.ndarray:
        """Habitats (N,), from 1, of voxels (N, M); `values` is read in chunks."""
        parts = [self.clustering.predict(self.encoder.transform(values[i : i + chunk])) for i in range(0, len(values), chunk)]
        return np.concatenate(parts).astype(np.int8) + np.int8(1)

    def describe(self, labels: np.ndarray, positions: np.ndarray) -> dict[str, float]:
        """Texture features and fractions of labels (N,) at grid positions (N, 3)."""
        plane = self.settings.slice_axis if self.settings.texture == "2d" else None
        share = np.bincount(labels, minlength=self.theta.clusters + 1)[1:] / len(labels)
        texture = texture_features(label_map(labels, positions), self.theta.clusters, plane)
        return {**texture, **dict(zip(self._fractions, share.tolist(), strict=True))}

    def predict(self, values: np.ndarray, positions: np.ndarray) -> HabitatPrediction:
        """Habitats, features and risk group of a patient with voxels (N, M) at grid positions (N, 3)."""
        labels = self.label(values)
        features = self.describe(labels, positions)
        return HabitatPrediction(labels, features, bool(self.risk.predict(self._vector(features)[None])[0]))

    def state(self) -> dict[str, Any]:
        """All that was fitted, as plain data and tensors."""
        arrays = {
            "low": self.encoder.outliers.low, "high": self.encoder.outliers.high, "shift": self.encoder.scaling.shift,
            "scale": self.encoder.scaling.scale, "centroids": self.clustering.centroids, "mean": self.risk.mean, "std": self.risk.std,
            "medoids": self.risk.medoids,
        }  # fmt: skip
        return {
            "theta": asdict(self.theta),
            "settings": asdict(self.settings),
            "kept": self.encoder.kept,
            "significant": list(self.significant),
            "arrays": {k: torch.from_numpy(np.array(v)) for k, v in arrays.items()},
            "network": dict(self.encoder.network.state_dict()),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "HabitatModel":
        """The inverse of `state`."""
        arrays = {k: v.cpu().numpy() for k, v in state["arrays"].items()}
        settings, theta = HabitatSettings.from_dict(state["settings"]), Theta(**state["theta"])
        outliers, scaling = OutlierFilter(theta.quantile, settings.filter_mode), Scaling(settings.scaling)
        outliers.low, outliers.high, scaling.shift, scaling.scale = (arrays[k] for k in ("low", "high", "shift", "scale"))
        network = build_encoder(settings.encoder, len(outliers.high)).requires_grad_(False).eval()
        network.load_state_dict(state["network"])
        model = cls(theta, settings, FittedEncoder(outliers, state["kept"], scaling, network))
        model.clustering.centroids, model.significant = arrays["centroids"], tuple(state["significant"])
        model.risk.mean, model.risk.std, model.risk.medoids = (arrays[k] for k in ("mean", "std", "medoids"))
        return model


def label_map(labels: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Labels (N,) from 1 at grid positions (N, 3) -> the box around them (X, Y, Z), 0 elsewhere."""
    low = positions.min(axis=0)
    box = np.zeros(positions.max(axis=0) - low + 1, labels.dtype)
    box[tuple((positions - low).T)] = labels
    return box


def sample_voxels(tumors: Sequence[Tumor], count: int | None, seed: object) -> tuple[np.ndarray, np.ndarray]:
    """At most `count` voxels of every case (None = all), drawn without replacement: values (N, M) and number of the patient (N,)."""
    values, patient = [], []
    numbers = {name: n for n, name in enumerate(dict.fromkeys(t.patient or t.case for t in tumors))}
    for tumor in tumors:
        chosen = slice(None)
        if count is not None and len(tumor.values) > count:
            chosen = np.sort(numpy_generator("sample", seed, tumor.case).choice(len(tumor.values), count, replace=False))
        values.append(np.asarray(tumor.values[chosen], dtype=np.float32))
        patient.append(np.full(len(values[-1]), numbers[tumor.patient or tumor.case]))
    return np.concatenate(values), np.concatenate(patient)


class HabitatObjective:
    """theta -> L(theta) = alpha Ls + (1 - alpha) Lp, on training patients alone.

    Patient divisions and initializations belong to the seed and not to theta, so that settings are compared under the same draws.

    Args:
        tumors: the training patients; those without a survival time count for everything but the log-rank test.
        names: of the modalities, for error messages.
        start, folder: see `EncoderFits`.

    Raises:
        SuiteError: alpha < 1 and survival data that no test can use.
    """

    def __init__(
        self,
        tumors: Sequence[Tumor],
        settings: HabitatSettings,
        seed: object = 0,
        *,
        names: tuple[str, ...] | None = None,
        start: Mapping[str, torch.Tensor] | None = None,
        folder: Path | None = None,
    ) -> None:
        self.tumors, self.settings, self.seed = list(tumors), settings, seed
        self.survival = survival_of(self.tumors)
        if settings.alpha < 1:
            self.survival.require_events()
        self.sample, self.patient = sample_voxels(self.tumors, settings.voxels_per_patient, seed)
        self.encoders = EncoderFits(self.sample, settings, seed, names=names, start=start, folder=folder)

    def __call__(self, theta: Theta) -> dict[str, float]:
        """Results of one setting: `loss`, its two terms, p, what they were made from, and seconds per step (`s_*`)."""
        clock = _Clock()
        with clock("encoder"):
            encoder = self.encoders[theta.quantile]
        if encoder.network is None:
            return self._row(encoder.kept, np.array([1.0]), 1.0, float("nan"), clock)
        kept = encoder.outliers.keep(self.sample)
        latent = encoder.transform(self.sample[kept])
        with clock("stability"):
            losses = self.stability(latent, self.patient[kept], theta.clusters)
        with clock("clusters"):
            model = HabitatModel(theta, self.settings, encoder, self.seed)
            quality = calinski_harabasz(latent, model.fit_habitats(latent, self.sample[kept]))
        _, high = self._groups(model, clock)
        return self._row(encoder.kept, losses, log_rank(self.survival, high), quality, clock)

    def stability(self, latent: np.ndarray, patient: np.ndarray, clusters: int) -> np.ndarray:
        """Stability losses of the divisions that belong to the seed."""
        return stability_losses(
            latent, patient, clusters, repeats=self.settings.repeats, share=self.settings.share, seed=("stability", self.seed)
        )

    def fit(self, theta: Theta) -> tuple[HabitatModel, list[HabitatPrediction]]:
        """The pipeline fitted with theta, as the evaluation of theta had it, and what it says about the training patients.

        Raises:
            SuiteError: the filter leaves too few voxels.
        """
        encoder = self.encoders[theta.quantile]
        if encoder.network is None:
            raise SuiteError(
                f"quantile {theta.quantile:g} leaves {encoder.kept:.0%} of the voxels, less than habitats.min_kept={self.settings.min_kept:g}; "
                "raise the lower end of habitats.search.quantile"
            )
        model, kept = HabitatModel(theta, self.settings, encoder, self.seed), encoder.outliers.keep(self.sample)
        model.fit_habitats(encoder.transform(self.sample[kept]), self.sample[kept])
        described, high = self._groups(model, _Clock())
        return model, [HabitatPrediction(labels, f, bool(h)) for (labels, f), h in zip(described, high, strict=True)]

    def _groups(self, model: HabitatModel, clock: "_Clock") -> tuple[list[tuple[np.ndarray, dict[str, float]]], np.ndarray]:
        with clock("labels"):
            maps = [model.label(t.values) for t in self.tumors]
        with clock("texture"):
            features = [model.describe(labels, t.positions) for labels, t in zip(maps, self.tumors, strict=True)]
        with clock("groups"):
            high = model.fit_groups(features, self.survival)
        return list(zip(maps, features, strict=True)), high

    def _row(self, kept: float, losses: np.ndarray, p: float, quality: float, clock: "_Clock") -> dict[str, float]:
        s, stable = self.settings, float(losses.mean())
        significance = significance_loss(p, s.significance, tau=s.tau, p_floor=s.p_floor)
        return {
            "loss": s.alpha * stable + (1 - s.alpha) * significance,
            "stability_loss": stable,
            "stability_std": float(losses.std()),
            "significance_loss": significance,
            "p_train": p,
            "calinski_harabasz": quality,
            "kept": kept,
            **{f"s_{name}": clock.seconds.get(name, 0.0) for name in ("encoder", "stability", "clusters", "labels", "texture", "groups")},
        }


def calinski_harabasz(latent: np.ndarray, labels: np.ndarray) -> float:
    """The Calinski-Harabasz index; NaN where there is one cluster only."""
    from sklearn.metrics import calinski_harabasz_score

    found = len(np.unique(labels))
    return float(calinski_harabasz_score(latent, labels)) if 1 < found < len(latent) else float("nan")


class _Clock:
    """Wall time by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Any:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
