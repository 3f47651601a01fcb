"""Drawings of cases: three orthogonal slices with truth, prediction, error and uncertainty; a montage of cases; a plot of the scores.

Arrays come on canonical (right, anterior, superior) axes. Slices are drawn in radiological orientation: the patient's right is on the
left of axial and coronal slices, anterior on the left of sagittal ones.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lesionbench.task import Task

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours that stand out on grey, told apart with any colour vision
PALETTE = ("#56B4E9", "#E69F00", "#CC79A7", "#F0E442", "#009E73", "#D55E00", "#0072B2")
MISSED, EXTRA = "#0072B2", "#D55E00"
VIEWS = {"axial": (2, (0, 1), "RL"), "coronal": (1, (0, 2), "RL"), "sagittal": (0, (1, 2), "AP")}
PANEL = 2.3  # inches, width of the widest panel


@dataclass
class View:
    """One slice, as drawn: rows from top to bottom, columns from left to right.

    Attributes:
        name: `axial`, `coronal` or `sagittal`.
        index: of the slice on its canonical axis.
        size: width and height, in mm or voxels.
        image: (C, h, w), the channels that are drawn.
        truth, prediction: region masks (R, h, w), or None.
        maps: name -> (h, w), uncertainties or scores.
    """

    name: str
    index: int
    size: tuple[float, float]
    image: np.ndarray
    truth: np.ndarray | None = None
    prediction: np.ndarray | None = None
    maps: dict[str, np.ndarray] = field(default_factory=dict)


def slices(
    image: np.ndarray,
    truth: np.ndarray | None,
    prediction: np.ndarray | None,
    maps: dict[str, np.ndarray],
    spacing: Sequence[float],
) -> list[View]:
    """The three slices with the largest cut through the truth (else the prediction, else the middle), cropped to what is not empty.

    A voxel counts once for every region that it belongs to, so that inner regions are seen too.

    Args:
        image: (C, X, Y, Z). truth, prediction: region masks (R, X, Y, Z). maps: name -> (X, Y, Z). spacing: of the three axes.
    """
    where = next((m.sum(axis=0) for m in (truth, prediction) if m is not None and m.any()), None)
    full = np.any(image != 0, axis=0) if where is None else np.any(image != 0, axis=0) | (where > 0)
    box = _box(full)
    views = []
    for name, (axis, plane, _) in VIEWS.items():
        others = tuple(a for a in range(3) if a != axis)
        start, stop = box[axis].start, box[axis].stop
        index = (start + stop) // 2 if where is None else int(where.sum(axis=others).argmax())
        cut = [slice(None) if a == axis else box[a] for a in range(3)]
        cut[axis] = index
        place = (..., *cut)
        u, v = plane
        views.append(
            View(
                name,
                index,
                ((box[u].stop - box[u].start) * spacing[u], (box[v].stop - box[v].start) * spacing[v]),
                _displayed(image[place]).astype(np.float16),
                None if truth is None else _displayed(truth[place]),
                None if prediction is None else _displayed(prediction[place]),
                {k: _displayed(m[place]).astype(np.float16) for k, m in maps.items()},
            )
        )
    return views


def _box(mask: np.ndarray) -> list[slice]:
    """Bounding box of a mask; the whole array where it is empty."""
    box = []
    for axis in range(3):
        places = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
        box.append(slice(int(places[0]), int(places[-1]) + 1) if places.size else slice(0, mask.shape[axis]))
    return box


def _displayed(plane: np.ndarray) -> np.ndarray:
    """(..., u, v) with u to the right or the front and v to the front or the top -> (..., rows, columns)."""
    return np.ascontiguousarray(np.swapaxes(plane, -1, -2)[..., ::-1, ::-1])


def case_figure(title: str, subtitle: str, views: list[View], channels: Sequence[str], regions: Sequence[str], markers: bool) -> "Figure":
    """Rows: the three views; columns: each channel, truth, prediction, error, and every further map. Fewer columns than views change places
    with them, so that a figure is never taller than wide.

    Args:
        title, subtitle: the case, and its scores.
        views: of `slices`.
        channels: names of the drawn channels.
        regions: names, outermost first.
        markers: whether directions are known (R/L, A/P letters and a note on orientation).
    """
    first = views[0]
    drawn = [*channels]
    drawn += ["truth"] * (first.truth is not None) + ["prediction"] * (first.prediction is not None)
    drawn += ["error"] * (first.truth is not None and first.prediction is not None) + [*first.maps]
    down = len(drawn) < len(views)  # what is drawn goes down, the views go across
    heights = [max(v.size[1] for v in views)] * len(drawn) if down else [v.size[1] for v in views]
    canvas = _Canvas(
        len(views) if down else len(drawn), heights, max(max(v.size) for v in views), square=True, bars=down and bool(first.maps)
    )
    windows = [gray_range([v.image[c] for v in views]) for c in range(len(channels))]
    limits = {name: _limits([v.maps[name] for v in views]) for name in first.maps}
    for v, view in enumerate(views):
        for d, name in enumerate(drawn):
            row, column = (d, v) if down else (v, d)
            ax = canvas.panel(row, column, *view.size)
            if d >= len(channels) and name in first.maps:
                shown = ax.imshow(
                    view.maps[name].astype(np.float32), cmap="inferno", aspect="auto", vmin=limits[name][0], vmax=limits[name][1]
                )
                if v == len(views) - 1:
                    canvas.colorbar(shown, row, column)
            else:
                channel = d if d < len(channels) else 0
                _gray(ax, view.image[channel], windows[channel])
                _overlay(ax, view, name if d >= len(channels) else "")
            place = f"{view.name} {view.index}"
            if row == 0:
                ax.set_title(place if down else name, fontsize=9, pad=4)
            if column == 0:
                ax.set_ylabel(name if down else place, fontsize=8, labelpad=3)
            if d == 0 and markers:
                _mark(ax, VIEWS[view.name][2])
    legend = [(name, PALETTE[r % len(PALETTE)]) for r, name in enumerate(regions)] if {"truth", "prediction"} & set(drawn) else []
    legend += [("missed", MISSED), ("extra", EXTRA)] if "error" in drawn else []
    canvas.finish(title, subtitle, legend, "radiological: patient's right on the left" if markers else "")
    return canvas.figure


class _Canvas:
    """A figure of panels in columns of one width, with room for titles above and legends below; all sizes in inches.

    Args:
        heights: of the rows, in the units in which panels are given.
        largest: what fills a column, in these units.
        square: smaller panels rather than a figure that is taller than wide.
        bars: room for color bars at the end of rows instead of under columns.
    """

    LEFT, RIGHT, BARS, TOP, BOTTOM, GAP = 0.35, 0.15, 0.6, 0.78, 0.62, 0.06

    def __init__(self, columns: int, heights: Sequence[float], largest: float, square: bool = False, bars: bool = False) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.bars = bars
        self.width = max(self.LEFT + columns * (PANEL + self.GAP) + (self.BARS if bars else self.RIGHT), 4.5)
        around = self.TOP + self.GAP * (len(heights) - 1) + self.BOTTOM
        self.scale = PANEL / largest
        if square:
            self.scale = min(self.scale, (self.width - around) / sum(heights))
        self.heights = [height * self.scale for height in heights]
        self.height = around + sum(self.heights)
        self.figure = Figure(figsize=(self.width, self.height))
        FigureCanvasAgg(self.figure)

    def panel(self, row: int, column: int, width: float, height: float) -> "Axes":
        width, height = width * self.scale, height * self.scale
        left = self.LEFT + column * (PANEL + self.GAP) + (PANEL - width) / 2
        top = self.TOP + sum(self.heights[:row]) + row * self.GAP + (self.heights[row] - height) / 2
        ax = self._axes(left, top, width, height)
        ax.set_facecolor("black")
        ax.set_xticks([])
        ax.set_yticks([])
        return ax

    def colorbar(self, shown: Any, row: int, column: int) -> None:
        """Of a map: under its column, or at the end of its row."""
        if self.bars:
            top, height = self.TOP + sum(self.heights[:row]) + row * self.GAP, self.heights[row]
            ax = self._axes(self.width - self.BARS + self.GAP, top + 0.1 * height, 0.08, 0.8 * height)
        else:
            left = self.LEFT + column * (PANEL + self.GAP) + 0.1 * PANEL
            ax = self._axes(left, self.height - self.BOTTOM + 0.07, 0.8 * PANEL, 0.08)
        self.figure.colorbar(shown, cax=ax, orientation="vertical" if self.bars else "horizontal")
        ax.tick_params(labelsize=7, length=2, pad=1)

    def _axes(self, left: float, top: float, width: float, height: float) -> "Axes":
        place = (left / self.width, 1 - (top + height) / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(place)

    def finish(self, title: str, subtitle: str, legend: list[tuple[str, Any]], note: str) -> None:
        from matplotlib.patches import Patch

        left = self.LEFT / self.width
        self.figure.text(left, 1 - 0.2 / self.height, title, fontsize=11, weight="bold", va="center")
        self.figure.text(left, 1 - 0.42 / self.height, subtitle, fontsize=9, va="center")
        if legend:
            patches = [Patch(facecolor=color, label=name) for name, color in legend]
            place = {"loc": "lower left", "bbox_to_anchor": (left, 0.16 / self.height), "borderaxespad": 0}
            self.figure.legend(handles=patches, ncols=len(patches), fontsize=8, frameon=False, handlelength=1, columnspacing=1, **place)
        self.figure.text(left, 0.1 / self.height, note, fontsize=7, color="0.4", va="center")


def _gray(ax: "Axes", image: np.ndarray, window: tuple[float, float]) -> None:
    ax.imshow(image.astype(np.float32), cmap="gray", aspect="auto", vmin=window[0], vmax=window[1], interpolation="nearest")


def _overlay(ax: "Axes", view: View, name: str) -> None:
    if name == "truth":
        _contours(ax, view.truth)
    elif name == "prediction":
        _contours(ax, view.prediction)
    elif name == "error":
        _paint(ax, (view.truth & ~view.prediction).any(axis=0), MISSED)
        _paint(ax, (view.prediction & ~view.truth).any(axis=0), EXTRA)


def _contours(ax: "Axes", masks: np.ndarray) -> None:
    """Regions from the outermost to the innermost, in thinner lines, so that neither of two that share a border is hidden."""
    for r, mask in enumerate(masks):
        if min(mask.shape) > 1 and mask.any():
            color, values = PALETTE[r % len(PALETTE)], np.pad(mask, 1).astype(np.float32)
            at = np.arange(-1, mask.shape[1] + 1), np.arange(-1, mask.shape[0] + 1)
            ax.contourf(*at, values, levels=[0.5, 1.5], colors=[color], alpha=0.25)
            ax.contour(*at, values, levels=[0.5], colors=[color], linewidths=1.2 + 0.9 * min(len(masks) - 1 - r, 3))
    ax.set_xlim(-0.5, masks.shape[2] - 0.5)
    ax.set_ylim(masks.shape[1] - 0.5, -0.5)


def _paint(ax: "Axes", mask: np.ndarray, color: str) -> None:
    from matplotlib.colors import to_rgb

    rgba = np.zeros((*mask.shape, 4), np.float32)
    rgba[mask] = (*to_rgb(color), 0.8)
    ax.imshow(rgba, aspect="auto", interpolation="nearest")


def _mark(ax: "Axes", letters: str) -> None:
    for x, side, letter in ((0.02, "left", letters[0]), (0.98, "right", letters[1])):
        ax.text(x, 0.5, letter, transform=ax.transAxes, color="white", fontsize=8, ha=side, va="center")


def gray_range(planes: Iterable[np.ndarray]) -> tuple[float, float]:
    """Grey range: the 1st to 99.5th percentile of what is not exactly 0, and 0 where that is darker."""
    values = np.concatenate([p[p != 0].astype(np.float32).ravel() for p in planes])
    values = values[np.isfinite(values)]
    if not values.size:
        return 0.0, 1.0
    low, high = np.percentile(values, [1, 99.5])
    low = min(float(low), 0.0)
    return low, max(float(high), low + 1e-6)


def _limits(planes: Iterable[np.ndarray]) -> tuple[float, float]:
    values = np.concatenate([p.astype(np.float32).ravel() for p in planes])
    values = values[np.isfinite(values)]
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
    return low, max(high, low + 1e-6)


def score_figure(rows: Sequence[dict[str, Any]], regions: Sequence[str]) -> "Figure":
    """Box and every case's point of Dice, and of the 95 % Hausdorff distance where it was measured, for each region."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    distance = next((name for row in rows for name in row if name.startswith("hd95")), None)
    metrics = ["dice", *([distance] if distance else [])]
    figure = Figure(figsize=(len(metrics) * (1.4 + 0.7 * len(regions)), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for ax, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        for r, region in enumerate(regions):
            values = np.array([row[metric] for row in rows if row["region"] == region and row.get(metric) is not None], dtype=float)
            values = values[np.isfinite(values)]
            jitter = (np.arange(values.size) * 0.618034 % 1 - 0.5) * 0.3  # spread evenly, the same every time
            ax.scatter(r + jitter, values, s=14, color=PALETTE[r % len(PALETTE)], edgecolors="0.2", linewidths=0.4, zorder=3)
            if values.size:
                ax.boxplot(values, positions=[r], widths=0.5, showfliers=False, medianprops={"color": "black"})
        ax.set_xticks(range(len(regions)), regions, rotation=30 if max(map(len, regions)) > 6 else 0)
        ax.set_xlim(-0.6, len(regions) - 0.4)
        ax.set_title({"dice": "Dice", "hd95_mm": "HD95 (mm)", "hd95_vox": "HD95 (voxels)"}.get(metric, metric), fontsize=10)
        ax.grid(axis="y", color="0.9")
        ax.set_axisbelow(True)
        if metric == "dice":
            ax.set_ylim(-0.03, 1.03)
        else:
            ax.set_ylim(bottom=0)
    figure.suptitle(f"{len({row['case'] for row in rows})} cases", fontsize=9)
    return figure


def montage(cases: Sequence[tuple[str, Any, Any, Task, Sequence[float]]], path: Path | str) -> Path:
    """Writes a grid, one row per case and one column per channel: the axial slice with the largest label, and its regions.

    Args:
        cases: (title, image (M, X, Y, Z), class indices (X, Y, Z) or None, task, spacing) of each; tensors or arrays.
        path: PNG file.
    """
    drawn = []
    for title, image, label, task, spacing in cases:
        truth = None if label is None else masks_of(label, task)
        drawn.append((title, slices(np.asarray(image), truth, None, {}, spacing)[0], task))
    tasks = [task for *_, task in drawn]
    sizes = [(view.size[0] / max(view.size), view.size[1] / max(view.size)) for _, view, _ in drawn]  # each as large as it goes
    canvas = _Canvas(max(len(t.channels) for t in tasks), [height for _, height in sizes], 1)
    for row, (title, view, task) in enumerate(drawn):
        for column, channel in enumerate(task.channels):
            ax = canvas.panel(row, column, *sizes[row])
            _gray(ax, view.image[column], gray_range([view.image[column]]))
            if view.truth is not None:
                _contours(ax, view.truth)
            if row == 0 or task.channels != tasks[row - 1].channels:
                ax.set_title(channel, fontsize=9, pad=4)
            if column == 0:
                ax.set_ylabel(title, fontsize=8, labelpad=3)
                if task.unit == "mm":
                    _mark(ax, "RL")
    legend = [(name, PALETTE[r % len(PALETTE)]) for r, name in enumerate(tasks[0].region_names)]
    canvas.finish(f"{len(drawn)} cases", "", legend, "radiological: patient's right on the left" if tasks[0].unit == "mm" else "")
    return save(canvas.figure, path)


@dataclass
class BandView:
    """One slice of a case that several raters drew; arrays (u, v) on canonical axes.

    Attributes:
        case: its id.
        score: its Q-Dice.
        raters: number of raters of the case.
        size: voxel size along u and v.
        image: gray values.
        drawn, predicted: share of raters, measured and predicted, in [0, 1].
    """

    case: str
    score: float
    raters: int
    size: tuple[float, float]
    image: np.ndarray
    drawn: np.ndarray
    predicted: np.ndarray


def band_figure(views: Mapping[str, BandView], raters: int) -> "Figure":
    """Rows: cases by name of the row; columns: the image, and over it bands of how many raters marked a pixel, measured and predicted.

    Shares are rounded to a number of the case's raters; the color is that of the share, the same for any number of raters.

    Args:
        raters: largest number of raters, for the legend.
    """
    from matplotlib import colormaps

    colors = colormaps["viridis"]
    shown = {name: {k: _displayed(getattr(v, k)) for k in ("image", "drawn", "predicted")} for name, v in views.items()}
    sizes = {n: (s["image"].shape[1] * views[n].size[0], s["image"].shape[0] * views[n].size[1]) for n, s in shown.items()}
    sizes = {n: (width / max(width, height), height / max(width, height)) for n, (width, height) in sizes.items()}
    canvas = _Canvas(3, [height for _, height in sizes.values()], 1)
    for row, (name, view) in enumerate(views.items()):
        for column, kind in enumerate(("image", "drawn", "predicted")):
            ax = canvas.panel(row, column, *sizes[name])
            _gray(ax, shown[name]["image"], gray_range([shown[name]["image"]]))
            if kind != "image":
                share = np.round(shown[name][kind] * view.raters) / view.raters
                ax.imshow(np.where((share > 0)[..., None], colors(share) * (1, 1, 1, 0.6), 0), aspect="auto", interpolation="nearest")
            if row == 0:
                ax.set_title({"image": "image", "drawn": "raters", "predicted": "prediction"}[kind], fontsize=9, pad=4)
            if column == 0:
                ax.set_ylabel(f"{name}: {view.case}\nQ-Dice {view.score:.3f}", fontsize=8, labelpad=3)
    legend = [(f"{c} of {raters}", colors(c / raters)) for c in range(1, raters + 1)]
    canvas.finish("Rater agreement", "raters who mark a pixel", legend, "")
    return canvas.figure


def masks_of(labels: Any, task: Task) -> np.ndarray:
    """Class indices (X, Y, Z) -> region masks (R, X, Y, Z)."""
    import torch

    return task.region_masks(torch.as_tensor(labels)).numpy()


def save(figure: "Figure", path: Path | str) -> Path:
    """Writes a PNG file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path
