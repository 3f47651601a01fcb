"""Figures of the habitat analysis: Kaplan-Meier curves, stability by number of clusters, the search and its surrogate."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_modules.habitats.bayesopt import EvaluationLog, Search, Surrogate
from lightning_modules.habitats.survival import Survival, log_rank, testable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOW, HIGH = "#0072B2", "#D55E00"  # of Okabe and Ito's colors


def _new_figure(width: float, height: float) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: "Figure", path: Path) -> Path:
    """Writes a PNG file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    return path


def kaplan_meier_figure(groups: Mapping[str, tuple[Survival, np.ndarray]]) -> "Figure":
    """Survival curves of the two risk groups with 95 % bands, p and numbers at risk; one panel for each set of patients."""
    figure = _new_figure(4.6 * len(groups), 4.2)
    panels = figure.subplots(2, len(groups), squeeze=False, gridspec_kw={"height_ratios": [5, 1]})
    for (title, (survival, high)), ax, below in zip(groups.items(), panels[0], panels[1], strict=True):
        known = survival.known
        _curves(ax, below, survival.days[known], survival.died[known], high[known])
        p = f"log-rank p = {log_rank(survival, high):.3g}" if testable(survival, high) else "too few patients or deaths for a test"
        ax.set_title(f"{title} patients: {p}", fontsize=10)
    return figure


def _curves(ax: Any, below: Any, days: np.ndarray, died: np.ndarray, high: np.ndarray) -> None:
    from lifelines import KaplanMeierFitter
    from matplotlib.ticker import MaxNLocator

    last = days.max() if len(days) else 1
    ticks = [t for t in MaxNLocator(5, integer=True).tick_values(0, last) if t <= last]
    for row, (name, group, color) in enumerate((("low risk", ~high, LOW), ("high risk", high, HIGH))):
        if group.any():
            KaplanMeierFitter().fit(days[group], died[group], label=name).plot_survival_function(ax=ax, color=color, ci_alpha=0.15)
        for tick in ticks:
            below.text(tick, 1 - row, str(int((days[group] >= tick).sum())), ha="center", va="center", fontsize=8, color=color)
    ax.set_xticks(ticks, [""] * len(ticks))
    ax.set(xlabel="", ylabel="survival", ylim=(0, 1.03))
    below.set(xlim=ax.get_xlim(), ylim=(-0.6, 1.6), yticks=[], xlabel="days, and numbers at risk")
    below.set_xticks(ticks)
    for side in ("top", "right", "left"):
        below.spines[side].set_visible(False)


def clusters_figure(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Stability and Calinski-Harabasz index by number of clusters, rows as `stages.by_clusters` gives them."""
    figure = _new_figure(7.5, 3.2)
    stability, quality = figure.subplots(1, 2)
    for name, color in zip(dict.fromkeys(r["encoder"] for r in rows), (LOW, "0.5"), strict=False):
        own = [r for r in rows if r["encoder"] == name]
        k = [r["clusters"] for r in own]
        stability.errorbar(
            k, [r["stability"] for r in own], [r["stability_std"] for r in own], color=color, label=name, marker="o", capsize=3
        )
        quality.plot(k, [r["calinski_harabasz"] for r in own], color=color, label=name, marker="o")
    ticks = sorted({int(r["clusters"]) for r in rows})
    stability.set(xlabel="habitats", xticks=ticks, ylabel="stability 1 - Ls (mean ± std of divisions)")
    quality.set(xlabel="habitats", xticks=ticks, ylabel="Calinski-Harabasz index", yscale="log")
    quality.legend(frameon=False, fontsize=8)
    return figure


def search_figure(search: Search, log: EvaluationLog) -> "Figure":
    """The evaluations in order with the best so far, and the surrogate fitted to all of them over theta with the points evaluated."""
    figure = _new_figure(9, 3.4)
    order, plane = figure.subplots(1, 2)
    number, losses = np.arange(1, len(log.rows) + 1), np.array(log.losses)
    order.plot(number, np.minimum.accumulate(losses), color="black", label="best joint loss")
    order.scatter(number, losses, s=14, color="black", label="joint loss")
    for name, color in (("stability_loss", LOW), ("significance_loss", HIGH)):
        order.plot(number, [row[name] for row in log.rows], color=color, lw=0.8, alpha=0.7, label=name.replace("_", " "))
    order.set(xlabel="evaluation")
    order.legend(frameon=False, fontsize=7, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, columnspacing=1, handletextpad=0.4)
    _surrogate(figure, plane, search, log)
    return figure


def _surrogate(figure: "Figure", ax: Any, search: Search, log: EvaluationLog) -> None:
    points = np.array([(t.quantile, t.clusters) for t in log.thetas])
    if len(points) > 2:
        settings = search.settings()
        mean, _ = Surrogate(search, log.thetas, log.losses).predict(settings)
        steps = search.clusters[1] - search.clusters[0] + 1
        (left, right), (bottom, top) = search.quantile, search.clusters
        image = ax.imshow(
            mean.reshape(steps, -1), origin="lower", aspect="auto", cmap="viridis_r", extent=(left, right + 1e-6, bottom - 0.5, top + 0.5)
        )
        figure.colorbar(image, ax=ax, label="posterior mean of the loss")
    ax.scatter(*points.T, s=14, color="white", edgecolors="black", linewidths=0.6)
    ax.scatter(log.best.quantile, log.best.clusters, s=70, marker="*", color=HIGH, edgecolors="black", linewidths=0.6)
    ax.set(xlabel="outlier quantile", ylabel="habitats")
