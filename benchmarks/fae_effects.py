"""The claimed effects of the FAE and of the joint loss on synthetic voxels with planted regions and survival.

    python benchmarks/fae_effects.py stability 10 11 12 13     # (a) how stable K-means is on raw and on encoded voxels
    python benchmarks/fae_effects.py joint 30 31 32            # (b) what each weight of the joint loss picks
    python benchmarks/fae_effects.py smooth 10 11 12 13 14     # (c) Bayesian optimization against random search on smooth functions
    python benchmarks/fae_effects.py table 30 10 11 12 13      # (c) the same on the loss table of the first seed, for the other seeds
    python benchmarks/fae_effects.py figures 30                # a search on the patients of (b), and their survival: docs/images

Each prints CSV rows (the last one writes pictures); the numbers are seeds.
"""

import csv
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from lesionbench.keyed import numpy_generator
from lightning_modules.habitats import EncoderSettings, HabitatObjective, HabitatSettings, Search, Theta, Tumor, run_search
from lightning_modules.habitats.bayesopt import EvaluationLog
from lightning_modules.habitats.pipeline import calinski_harabasz, survival_of
from lightning_modules.habitats.survival import log_rank

CENTROIDS = np.array([(0.2, 0.2, 0.2), (0.8, 0.3, 0.3), (0.3, 0.8, 0.5), (0.7, 0.7, 0.8), (0.5, 0.5, 0.15)])
PLANTED = len(CENTROIDS)
ENCODERS = {"raw": "none", "ae": "ae", "ensemble": "ensemble", "fae": "fae"}
QUANTILES = (0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
TRAIN, VOXELS = 120, 150  # training patients of (b), and voxels of each
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
FITTING = {"epochs": 20, "batch_size": 512, "lr": 3e-3}


def planted_shares(count: int, seed: int) -> np.ndarray:
    """Share of each planted region (count, 5) of every patient: Dirichlet(3)."""
    return numpy_generator("planted shares", seed).dirichlet(np.full(PLANTED, 3.0), count)


def hidden_shares(count: int, seed: int) -> np.ndarray:
    """Shares (count, 5) of which half belong to the second and the fifth region, 5 to 50 % of it to the fifth; the rest is Dirichlet(3)."""
    rng = numpy_generator("hidden shares", seed)
    first, third, fourth = rng.dirichlet(np.full(3, 3.0), count).T / 2
    hidden = rng.uniform(0.05, 0.5, count) / 2
    return np.stack([first, 0.5 - hidden, third, fourth, hidden], axis=1)


def simulate_patients(
    count: int, voxels: int, seed: int, shares: Callable[[int, int], np.ndarray] = planted_shares, decisive: int = 1, scattered: bool = True
) -> tuple[list[Tumor], list[np.ndarray]]:
    """Patients with five planted regions in three modalities, whose survival depends on the share of the region `decisive`.

    Comes with the regions (N,) of their voxels, from 0.

    Each patient has an offset (sd 0.05) and a gain (lognormal, sd 0.1); the third modality is exponentiated; 2 % of the voxels are
    outliers, 1 + Exp(4) times as large in each modality. Death ~ Exp(400 exp(-0.9 z)) days with z the standardized share, censoring
    ~ Exp(1500). Voxels fill a box: in no order, or (`scattered`) those of the second region over all of it and the others region by region.

    Args:
        shares: (count, seed) -> share of every region (count, 5).
        decisive: from 0.
    """
    rng = numpy_generator("planted habitats", seed)
    proportions = shares(count, seed)
    share = proportions[:, decisive]
    z = (share - share.mean()) / share.std()
    death, censoring = rng.exponential(400 * np.exp(-0.9 * z)), rng.exponential(1500, count)
    side = math.isqrt(voxels // 2)
    positions = np.stack(np.unravel_index(np.arange(voxels), (-(-voxels // side**2), side, side)), axis=1)
    tumors, regions = [], []
    for number in range(count):
        region = rng.choice(PLANTED, voxels, p=proportions[number])
        if scattered:
            region = _arranged(region, rng)
        x = CENTROIDS[region] + rng.normal(0, 0.07, (voxels, 3))
        x = x * rng.lognormal(0, 0.1, 3) + rng.normal(0, 0.05, 3)
        x[:, 2] = np.exp(2 * x[:, 2])
        wild = rng.random(voxels) < 0.02
        x[wild] *= 1 + rng.exponential(4, (wild.sum(), 3))
        days, died = min(death[number], censoring[number]), death[number] <= censoring[number]
        tumors.append(Tumor(f"p{number:03d}", x.astype(np.float32), positions, float(days), bool(died)))
        regions.append(region)
    return tumors, regions


def simulate_hidden(count: int, voxels: int, seed: int) -> tuple[list[Tumor], list[np.ndarray]]:
    """Patients of (b): survival follows the fifth region, which four clusters merge with a neighbor, mostly the second; voxels lie in no order."""
    return simulate_patients(count, voxels, seed, hidden_shares, decisive=PLANTED - 1, scattered=False)


def _arranged(region: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The regions (N,) in the order of the voxels of the box: the second scattered, the others sorted."""
    arranged = np.ones_like(region)
    others = np.sort(region[region != 1])
    arranged[np.sort(rng.choice(len(region), len(others), replace=False))] = others
    return arranged


def settings(encoder: str = "fae", **changes: object) -> HabitatSettings:
    """The settings of these experiments."""
    return HabitatSettings(**{"encoder": EncoderSettings(kind=encoder, **FITTING), "voxels_per_patient": None, **changes})


def stability_by_encoder(
    seed: int,
    patients: int = 40,
    voxels: int = 250,
    clusters: tuple[int, ...] = (3, 4, 5, 6),
    scalings: tuple[str, ...] = ("zscore", "minmax"),
    encoders: tuple[str, ...] = tuple(ENCODERS),
) -> list[dict]:
    """(a) Stability 1 - Ls and Calinski-Harabasz index by encoder, scaling and number of clusters; no voxel is filtered out."""
    (tumors, _), rows = simulate_patients(patients, voxels, seed), []
    for scaling in scalings:
        for name in encoders:
            objective = HabitatObjective(tumors, settings(ENCODERS[name], scaling=scaling, alpha=1.0), seed)
            latent = objective.encoders[1.0].transform(objective.sample)
            for k in clusters:
                losses = objective.stability(latent, objective.patient, k)
                quality = calinski_harabasz(latent, _habitats(objective, latent, k))
                found = {"stability": 1 - losses.mean(), "stability_std": losses.std(), "calinski_harabasz": quality}
                rows.append({"seed": seed, "scaling": scaling, "encoder": name, "clusters": k, **found})
    return rows


def _habitats(objective: HabitatObjective, latent: np.ndarray, clusters: int) -> np.ndarray:
    from lightning_modules.habitats.clustering import HabitatClustering

    return HabitatClustering(clusters, "effects", objective.seed).fit(latent).predict(latent)


def loss_table(objective: HabitatObjective, quantiles: tuple[float, ...] = QUANTILES, most: int = 7) -> list[dict]:
    """(b) Both losses and the training p of every setting of a grid."""
    names = ("stability_loss", "significance_loss", "p_train", "kept")
    rows = []
    for theta in (Theta(q, k) for q in quantiles for k in range(3, most + 1)):
        found = objective(theta)
        rows.append({"quantile": theta.quantile, "clusters": theta.clusters, **{n: found[n] for n in names}})
    return rows


def training_objective(seed: int) -> HabitatObjective:
    """The joint loss of the training patients of (b)."""
    return HabitatObjective(simulate_hidden(TRAIN + 300, VOXELS, seed)[0][:TRAIN], settings(), seed)


def joint_loss(row: dict, alpha: float) -> float:
    """L of a row of `loss_table`."""
    return alpha * row["stability_loss"] + (1 - alpha) * row["significance_loss"]


def choices(seed: int, train: int = TRAIN, test: int = 300, voxels: int = VOXELS, **grid: object) -> list[dict]:
    """(b) The setting that each weight of the stability loss picks, and what it is worth in held-out patients, which nothing was chosen by.

    Where several settings have the same loss (p below its floor and alpha 0), the smallest training p decides. `p_test` is the held-out
    patients' log-rank p; `recovered` the correlation, over them, of the planted share of the fifth region with that of the habitat that
    follows it best; `rand` the adjusted Rand index of their habitats and the planted regions.
    """
    from sklearn.metrics import adjusted_rand_score

    (tumors, regions), planted = simulate_hidden(train + test, voxels, seed), hidden_shares(train + test, seed)[train:, -1]
    objective, held_out, rows, known = HabitatObjective(tumors[:train], settings(), seed), tumors[train:], [], {}
    table = loss_table(objective, **grid)
    for alpha in ALPHAS:
        best = min(table, key=lambda row: (joint_loss(row, alpha), row["p_train"]))
        theta = Theta(best["quantile"], best["clusters"])
        if theta not in known:
            model, _ = objective.fit(theta)
            found = [model.predict(t.values, t.positions) for t in held_out]
            high = np.array([f.high_risk for f in found])
            shares = np.array([[f.features[f"fraction_{k + 1}"] for k in range(theta.clusters)] for f in found])
            known[theta] = {
                "p_test": log_rank(survival_of(held_out), high),
                "recovered": max(np.corrcoef(planted, share)[0, 1] for share in shares.T if share.std() > 0),
                "rand": adjusted_rand_score(np.concatenate(regions[train:]), np.concatenate([f.labels for f in found])),
            }
        rows.append({"seed": seed, "alpha": alpha, **best, **known[theta]})
    return rows


class TableSearch(Search):
    """A search among the settings of a table."""

    def quantiles(self) -> np.ndarray:
        return np.array(QUANTILES)


def regret_on_table(table: list[dict], alpha: float, strategy: str, seed: object) -> float:
    """(c) Best loss after 10 + 20 evaluations, less the smallest of the table."""
    losses = {(row["quantile"], row["clusters"]): joint_loss(row, alpha) for row in table}
    search = TableSearch(strategy=strategy, quantile=(QUANTILES[0], QUANTILES[-1]))
    return _regret(search, lambda t: losses[t.quantile, t.clusters], min(losses.values()), seed)


def bowl(theta: Theta) -> float:
    """A smooth function of both parameters with minimum 0 at (0.7, 5)."""
    return (theta.quantile - 0.7) ** 2 + (theta.clusters - 5) ** 2 / 4


def branin(theta: Theta) -> float:
    """The Branin function with the quantile as x1 in [-5, 10] and the clusters 0..15 as x2, less its smallest value among them."""
    x, y = 15 * theta.quantile - 5, float(theta.clusters - 2)
    return (y - 5.1 / (4 * math.pi**2) * x**2 + 5 / math.pi * x - 6) ** 2 + 10 * (1 - 1 / (8 * math.pi)) * math.cos(x) + 10


SMOOTH = {"bowl": (bowl, Search(quantile=(0, 1))), "branin": (branin, Search(quantile=(0, 1), clusters=(2, 17)))}


def regret_on_function(name: str, strategy: str, seed: object, iterations: int = 10) -> float:
    """(c) Regret after 10 + 2 `iterations` evaluations of a smooth function."""
    function, space = SMOOTH[name]
    search = Search(strategy=strategy, quantile=space.quantile, clusters=space.clusters, iterations=iterations)
    smallest = min(function(Theta(float(q), int(k))) for q, k in search.settings())
    return _regret(search, function, smallest, seed)


def _regret(search: Search, loss: object, smallest: float, seed: object) -> float:
    log = EvaluationLog()
    run_search(search, lambda theta: {"loss": loss(theta)}, log, seed=seed)
    return min(log.losses) - smallest


def draw(seed: int, folder: Path) -> None:
    """Searches on the patients of (b) with alpha = 0.75 and draws the search and the survival of the training and 300 held-out patients."""
    from lightning_modules.habitats.figures import kaplan_meier_figure, save, search_figure

    (tumors, _), search, log = simulate_hidden(TRAIN + 300, VOXELS, seed), Search(), EvaluationLog()
    objective = HabitatObjective(tumors[:TRAIN], settings(alpha=0.75), seed)
    model, training = objective.fit(run_search(search, objective, log, seed=seed))
    held_out = [model.predict(t.values, t.positions) for t in tumors[TRAIN:]]
    parts = {"training": (tumors[:TRAIN], training), "held-out": (tumors[TRAIN:], held_out)}
    groups = {name: (survival_of(own), np.array([f.high_risk for f in found])) for name, (own, found) in parts.items()}
    save(search_figure(search, log), folder / "fae_search.png")
    save(kaplan_meier_figure(groups), folder / "fae_kaplan_meier.png")


def _print(rows: list[dict]) -> None:
    writer = csv.DictWriter(sys.stdout, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def main(experiment: str, *seeds: str) -> None:
    """Prints the table of one experiment."""
    import torch

    torch.set_num_threads(1)
    numbers = [int(s) for s in seeds]
    if experiment == "stability":
        _print([row for s in numbers for row in stability_by_encoder(s)])
    elif experiment == "joint":
        _print([row for s in numbers for row in choices(s)])
    elif experiment == "table":
        table = loss_table(training_objective(numbers[0]))
        _print(
            [
                {"alpha": alpha, "strategy": s, "seed": n, "regret": regret_on_table(table, alpha, s, n)}
                for alpha in (1.0, 0.5) for s in ("bo", "random") for n in numbers[1:]
            ]
        )  # fmt: skip
    elif experiment == "figures":
        draw(numbers[0], Path(__file__).parent.parent / "docs" / "images")
    elif experiment == "smooth":
        _print(
            [
                {"function": f, "strategy": s, "seed": n, "regret": regret_on_function(f, s, n)}
                for f in SMOOTH for s in ("bo", "random") for n in numbers
            ]
        )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
