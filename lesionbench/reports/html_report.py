"""A comparison as one HTML file that needs nothing beside it: tables, plots, pictures, and the tables again as LaTeX and CSV to copy."""

import base64
import csv
import html
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lesionbench.reports.comparison import Comparison
from lesionbench.reports.html_page import Section, note, page, table
from lesionbench.reports.report import warned_kinds
from lesionbench.reports.runs import Values
from lesionbench.reports.sheets import Sheet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURES = ("best", "median", "worst")
SMOOTHED = 40  # points of a training curve that is drawn
PARAMETERS, SECONDS = "parameters", "wall_s"
ACROSS = 3  # panels beside each other
LABEL = 44  # characters of a name on one line of a plot
POINTS, FEWEST_POINTS = 200, 20  # drawn of a box at most, and at most in spite of FIGURE_POINTS
FIGURE_POINTS = 20_000  # of all boxes of a figure


def write_html(comparison: Comparison, path: Path | str) -> Path:
    """Writes the report to `path` and returns it. Curves, calibration and pictures are read from the run folders that count."""
    sections = [
        Section("Results", parts=[_sheet(sheet) for sheet in comparison.sheets()]),
        Section("Spread over cases", parts=list(_boxes(comparison))),
        Section("Differences to the baseline", _differences(comparison)),
        Section("Training", _training(comparison)),
        Section("Calibration", _calibration(comparison)),
        Section("Risk and coverage", _risk_coverage(comparison)),
        Section("Cost", _costs(comparison)),
        _pictures(comparison),
        Section("Runs", _runs(comparison)),
    ]
    remarks = "".join(note(line) for line in [comparison.caption, *comparison.remarks()] if line)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page("Comparison by " + ", ".join(comparison.group_by), remarks, sections), encoding="utf-8")
    return path


# --- tables ----------------------------------------------------------------------------------------------------------------------


def _sheet(sheet: Sheet) -> Section:
    copies = "".join(
        f"<details><summary>{kind}</summary><button type=button onclick=copy_text(this)>copy</button><pre>{html.escape(text)}</pre></details>"
        for kind, text in (("LaTeX", latex(sheet)), ("CSV", comma_separated(sheet)))
    )
    return Section(sheet.name or sheet.title, table(sheet) + copies, heading=sheet.title)


def latex(sheet: Sheet) -> str:
    """The sheet as a `tabular` with booktabs rules; lines of one cell are joined by a space."""
    rows = [" & ".join(_tex(cell) for cell in row) + r" \\" for row in [sheet.columns, *sheet.rows]]
    columns = "l" * sheet.fixed + "r" * (len(sheet.columns) - sheet.fixed)
    return "\n".join([rf"\begin{{tabular}}{{{columns}}}", r"\toprule", rows[0], r"\midrule", *rows[1:], r"\bottomrule", r"\end{tabular}"])


def _tex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "<": "$<$", ">": "$>$"}
    special |= {character: "\\" + character for character in "&%$#_{}"}
    return "".join(special.get(character, character) for character in text.replace("\n", " "))


def comma_separated(sheet: Sheet) -> str:
    """The sheet as CSV; lines of one cell are joined by a space."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([[cell.replace("\n", " ") for cell in row] for row in [sheet.columns, *sheet.rows]])
    return out.getvalue()


# --- plots -----------------------------------------------------------------------------------------------------------------------


def _boxes(comparison: Comparison) -> Iterator[Section]:
    """One figure per metric: a panel per region, a box per group and member over all cases, seeds and folds, every case a point."""
    for metric in dict.fromkeys(cell[3] for cell in comparison.values):
        cells = [cell for cell in comparison.values if cell[3] == metric]
        regions, names = (list(dict.fromkeys(part)) for part in zip(*((cell[2], cell[:2]) for cell in cells), strict=True))
        figure, axes = _rows([_name(name) for name in names], len(regions))
        heights, limit = _heights(names), max(FEWEST_POINTS, min(POINTS, FIGURE_POINTS // len(cells)))
        by_region = {region: [cell for cell in cells if cell[2] == region] for region in regions}
        points, thinned = [], False
        for axis, (region, shown) in zip(axes, by_region.items(), strict=True):
            measured = {cell: _measured(comparison.values[cell]) for cell in shown}
            numbers = [values for values, *_ in measured.values()]
            boxes = axis.boxplot(
                numbers, positions=[heights[cell[:2]] for cell in shown], orientation="horizontal", showmeans=True, showfliers=False,
                patch_artist=True, widths=0.7, manage_ticks=False,
            )  # fmt: skip
            for patch, color in zip(boxes["boxes"], _colors(comparison, [cell[0] for cell in shown]), strict=True):
                patch.set(facecolor=color, alpha=0.6)
            axis.set_xlim(span(end for values in numbers for end in (*values[:1], *values[-1:])))
            axis.set_title(region or "(case)", fontsize=9)
            axis.set_xlabel(metric, fontsize=9)
            for cell, found in measured.items():
                points.append(_points(axis, heights[cell[:2]], found, limit))
                thinned |= len(found[0]) > limit
                if not len(found[0]):
                    axis.text(0.02, heights[cell[:2]], "no value", fontsize=8, va="center", transform=axis.get_yaxis_transform())
        caption = "Boxes: quartiles and median; whiskers: the last values within 1.5 interquartile ranges; triangle: mean. "
        caption += f"Points: {f'of every box at most {limit} values, evenly over their ranks' if thinned else 'every case'}; hold the pointer over one for its name."
        svg = _svg(figure, metric).replace("</svg>", f"{''.join(points)}</svg>")
        yield Section(metric, _figure(svg, caption))


def _measured(values: Values) -> tuple[np.ndarray, list[str], list[Any]]:
    """The finite values (n,) in ascending order, with their cases and seeds."""
    numbers = np.array([value for cases in values.values() for value in cases.values()])
    order = np.argsort(numbers, kind="stable")
    order = order[np.isfinite(numbers[order])]
    cases = [case for cases in values.values() for case in cases]
    seeds = [seed for seed, cases in values.items() for _ in cases]
    return numbers[order], [cases[i] for i in order], [seeds[i] for i in order]


def _points(axis: Any, height: float, measured: tuple[np.ndarray, list[str], list[Any]], limit: int) -> str:
    """Measured values as SVG circles with names, about `height`; of more than `limit` as many, evenly, with both ends."""
    values, cases, seeds = measured
    kept = np.arange(len(values)) if len(values) <= limit else np.linspace(0, len(values) - 1, limit).round().astype(int)
    several = len(set(seeds)) > 1
    beside = (np.arange(len(kept)) * 0.618034 % 1 - 0.5) * 0.5  # the golden ratio spreads neighbors, and is the same every time
    places = axis.transData.transform(np.column_stack([values[kept], height + beside]))
    top = axis.figure.get_figheight() * axis.figure.dpi
    names = (html.escape(f"{cases[i]}, seed {seeds[i]}" if several else cases[i]) for i in kept)
    circles = "".join(
        f"<circle cx='{x:.1f}' cy='{top - y:.1f}' r='1.7'><title>{name}: {value:.4g}</title></circle>"
        for name, value, (x, y) in zip(names, values[kept].tolist(), places.tolist(), strict=True)
    )
    return f"<g class='cases' fill='#222' fill-opacity='.5'>{circles}</g>"


def span(values: Iterable[float]) -> tuple[float, float]:
    """Ends of an axis that shows these values: a little beyond the finite ones, a tenth around a single one, (0, 1) without any."""
    known = np.array([value for value in values if math.isfinite(value)])
    if not known.size:
        return 0.0, 1.0
    low, high = float(known.min()), float(known.max())
    size = max(abs(low), abs(high))
    margin = 0.04 * (high - low) if high - low > 1e-6 * size else 0.1 * size or 0.5
    return low - margin, high + margin


def _differences(comparison: Comparison) -> str:
    """Mean paired difference to the baseline with its bootstrap interval, one panel per metric."""
    if comparison.baseline is None or not comparison.tests:
        return note("Give compare.baseline=<a group> for paired tests.")
    metrics = list(dict.fromkeys(test["metric"] for test in comparison.tests))
    names = list(dict.fromkeys((t["group"], t["member"], t["region"]) for t in comparison.tests))
    figure, axes = _rows([f"{_name(name)} {name[2]}" for name in names], len(metrics))
    heights = _heights(names)
    for axis, metric in zip(axes, metrics, strict=True):
        tests = [t for t in comparison.tests if t["metric"] == metric]
        places = [heights[t["group"], t["member"], t["region"]] for t in tests]
        colors = _colors(comparison, [t["group"] for t in tests])
        axis.hlines(places, [t["ci_low"] for t in tests], [t["ci_high"] for t in tests], colors=colors, lw=2)
        axis.scatter([t["mean_difference"] for t in tests], places, s=16, c=colors, zorder=2)
        axis.axvline(0, color="0.5", lw=0.8)
        axis.set_xlim(span([0.0, *(t[name] for t in tests for name in ("ci_low", "mean_difference", "ci_high"))]))
        axis.set_title(f"{metric} ({tests[0]['better']} is better)", fontsize=9)
    return _figure(_svg(figure, "differences"), f"Difference to {comparison.baseline}, mean and 95 % interval.")


def _training(comparison: Comparison) -> str:
    """Training loss and validation curves, mean and range over the runs of a group."""
    names = ("train/loss", *dict.fromkeys(name for name in comparison.objectives.values() if name))
    curves = {group: _curves(folders, names) for group, folders in comparison.folders.items()}
    drawn = [name for name in names if any(found.get(name) for found in curves.values())]
    if not drawn:
        return note("No run has a training curve.")
    figure, axes = _axes(len(drawn))
    colors = dict(zip(curves, _colors(comparison, curves), strict=True))
    for axis, name in zip(axes, drawn, strict=True):
        bands = {group: _band(found[name]) for group, found in curves.items() if found.get(name)}
        for group, (at, mean, low, high) in bands.items():
            axis.plot(at, mean, "o-" if len(at) == 1 else "-", ms=4, color=colors[group], lw=1.3, label=group)
            axis.fill_between(at, low, high, color=colors[group], alpha=0.15, lw=0)
        axis.set_xlim(span(step for band in bands.values() for step in band[0]))
        axis.set_ylim(span(value for band in bands.values() for part in band[2:] for value in part))
        axis.set_xlabel("iteration", fontsize=9)
        axis.set_title(name, fontsize=9)
    shown = [group for group, found in curves.items() if found]
    return _figure(_svg(figure, "training"), "Mean and range over the runs of a group.", _legend(comparison, shown))


def _curves(folders: Sequence[str], names: Sequence[str]) -> dict[str, list[np.ndarray]]:
    """Curve name -> one array (points, 2) of iterations and values for each run that has it."""
    found: dict[str, list[np.ndarray]] = {}
    for path in (path for path in (Path(folder) / "metrics.csv" for folder in folders) if path.exists()):
        text = path.read_text(encoding="utf-8")
        for name in names:
            points = re.findall(rf"^(\d+),[^,\n]*,{re.escape(name)},(\S+)$", text, re.MULTILINE)
            if points:
                found.setdefault(name, []).append(np.array(points, dtype=float))
    return found


def _band(curves: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Iterations, mean, smallest and largest value of several runs, averaged over stretches where there are too many points to see."""
    steps = np.unique(np.concatenate([curve[:, 0] for curve in curves]))
    edges = np.array([stretch[0] for stretch in np.array_split(steps, min(len(steps), SMOOTHED))])
    values = np.full((len(curves), len(edges)), np.nan)
    for row, curve in zip(values, curves, strict=True):
        known = curve[np.isfinite(curve[:, 1])]
        place = np.searchsorted(edges, known[:, 0], side="right") - 1
        count = np.bincount(place, minlength=len(edges))
        row[count > 0] = (np.bincount(place, known[:, 1], len(edges)) / np.maximum(count, 1))[count > 0]
    kept = ~np.isnan(values).all(axis=0)
    shown = values[:, kept]
    return edges[kept], np.nanmean(shown, axis=0), np.nanmin(shown, axis=0), np.nanmax(shown, axis=0)


def _calibration(comparison: Comparison) -> str:
    """Share of true voxels against predicted probability, per region, over the test cases of all runs of a group."""
    pooled: dict[str, dict[str, dict[int, np.ndarray]]] = {}
    for group, folders in comparison.folders.items():
        for folder in folders:
            for (region, place), counts in _calibration_counts(Path(folder) / "test" / "calibration.csv").items():
                table = pooled.setdefault(region, {}).setdefault(group, {})
                table[place] = table.get(place, 0) + counts
    if not pooled:
        return note("No run has region probabilities.")
    figure, axes = _axes(len(pooled))
    shown = [group for group in comparison.folders if any(group in groups for groups in pooled.values())]
    colors = dict(zip(shown, _colors(comparison, shown), strict=True))
    for axis, (region, groups) in zip(axes, pooled.items(), strict=True):
        axis.plot([0, 1], [0, 1], color="0.6", lw=0.8)
        for group, table in groups.items():
            voxels, probability, true = np.array([table[place] for place in sorted(table)]).T
            axis.plot(probability / voxels, true / voxels, "o-", ms=3, lw=1, color=colors[group], label=group)
        axis.set_title(region, fontsize=9)
        axis.set_xlabel("predicted probability", fontsize=9)
    axes[0].set_ylabel("share of true voxels", fontsize=9)
    return _figure(_svg(figure, "calibration"), "The gray line is perfect calibration.", _legend(comparison, shown))


def _calibration_counts(path: Path) -> dict[tuple[str, int], np.ndarray]:
    """(region, bin) -> (voxels, sum of probabilities, true voxels) of the main prediction."""
    if not path.exists():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["member"] == "" and float(row["voxels"])]
    return {(r["region"], int(r["bin"])): np.array([float(r[k]) for k in ("voxels", "probability", "true")]) for r in rows}


def _risk_coverage(comparison: Comparison) -> str:
    """Share of wrong voxels when the most uncertain are left out, mean over the runs of a group, for each uncertainty map of the main prediction."""
    pooled: dict[str, dict[str, list[np.ndarray]]] = {}
    for group, folders in comparison.folders.items():
        for folder in folders:
            for name, curve in _risk_curves(Path(folder) / "test" / "risk_coverage.csv").items():
                pooled.setdefault(name, {}).setdefault(group, []).append(curve)
    if not pooled:
        return note("No run was tested with callbacks=[default,risk_coverage].")
    figure, axes = _axes(len(pooled))
    shown = [group for group in comparison.folders if any(group in groups for groups in pooled.values())]
    colors = dict(zip(shown, _colors(comparison, shown), strict=True))
    for axis, (name, groups) in zip(axes, pooled.items(), strict=True):
        for group, curves in groups.items():
            left_out, risk, best = np.mean(curves, axis=0)
            axis.plot(left_out, risk, lw=1, color=colors[group], label=group)
            axis.plot(left_out, best, ":", lw=1, color=colors[group])
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("share of voxels left out", fontsize=9)
        axis.set_xscale("log")
        axis.set_ylim(0)
    axes[0].set_ylabel("share of wrong voxels", fontsize=9)
    return _figure(
        _svg(figure, "risk"), "The most uncertain voxels are left out first. Dotted: if the wrong ones were.", _legend(comparison, shown)
    )


def _risk_curves(path: Path) -> dict[str, np.ndarray]:
    """Uncertainty map -> shares left out, risks and least risks (3, N) of the main prediction, less the point where nothing is left out."""
    if not path.exists():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["member"] == "" and float(row["left_out"])]
    names = dict.fromkeys(row["map"] for row in rows)
    return {n: np.array([[float(r[k]) for r in rows if r["map"] == n] for k in ("left_out", "risk", "best")]) for n in names}


def _costs(comparison: Comparison) -> str:
    """The first metric, averaged over regions, against parameters and training time."""
    records = comparison.cells or comparison.dataset
    first = records[0]["metric"]
    means: dict[str, list[float]] = {}
    for record in records:
        if record["member"] == "" and record["metric"] == first and math.isfinite(record["mean"]):
            means.setdefault(record["group"], []).append(record["mean"])
    groups = [group for group in comparison.groups if group["group"] in means]
    colors = _colors(comparison, [group["group"] for group in groups])
    figure, axes = _axes(2)
    for axis, cost in zip(axes, (PARAMETERS, SECONDS), strict=True):
        for group, color in zip(groups, colors, strict=True):
            if math.isfinite(group[cost]):
                axis.plot(group[cost], np.mean(means[group["group"]]), "o", color=color, label=group["group"])
        axis.set_xlabel({PARAMETERS: "parameters", SECONDS: "seconds of training"}[cost], fontsize=9)
        spent = [line.get_xdata()[0] for line in axis.get_lines()]
        if spent and 0 < 10 * min(spent) <= max(spent):  # over less than a decade a logarithmic axis writes its labels over each other
            axis.set_xscale("log")
    axes[0].set_ylabel(f"{first}, mean over regions", fontsize=9)
    return _figure(_svg(figure, "cost"), "", _legend(comparison, [group["group"] for group in groups]))


def _pictures(comparison: Comparison) -> Section:
    """Best, median and worst case of the first run of every group, side by side."""
    rows = []
    for name in PICTURES:
        cells = []
        for group, folders in comparison.folders.items():
            path = next((p for p in (Path(f) / "figures" / f"{name}.png" for f in folders) if p.exists()), None)
            if path is not None:
                data = base64.b64encode(path.read_bytes()).decode()
                cells.append(
                    f"<figure><figcaption>{html.escape(group)}</figcaption><img alt='' src='data:image/png;base64,{data}'></figure>"
                )
        if cells:
            rows.append(Section(f"{name} case of each", f"<div class=pictures>{''.join(cells)}</div>"))
    return Section("Pictures", "" if rows else note("No run has pictures."), rows)


def _runs(comparison: Comparison) -> str:
    listed = "".join(
        f"<details><summary>{html.escape(group)}: {len(folders)} run(s)</summary><pre>{html.escape(chr(10).join(folders))}</pre></details>"
        for group, folders in comparison.folders.items()
    )
    return listed + "".join(note(f"The integrity check of the data: {html.escape(line)}") for line in _warnings(comparison))


def _warnings(comparison: Comparison) -> list[str]:
    """What the check of the data of any run warned of, each kind once."""
    summaries = (Path(folder) / "summary.json" for folders in comparison.folders.values() for folder in folders)
    kinds = (line for path in summaries if path.exists() for line in warned_kinds(json.loads(path.read_text())))
    return list(dict.fromkeys(kinds))


# --- figures ---------------------------------------------------------------------------------------------------------------------


def _axes(count: int) -> tuple["Figure", list[Any]]:
    """Panels with axes of their own, `ACROSS` in a row."""
    rows, columns = -(-count // ACROSS), min(count, ACROSS)
    width, height = 4.4 * columns, 3.4 * rows
    figure, axes = _panels(count, rows, columns, (width, height), sharey=False)
    figure.subplots_adjust(
        left=0.75 / width, right=1 - 0.25 / width, bottom=0.55 / height, top=1 - 0.35 / height, wspace=0.75 / 3.5, hspace=0.9 / 2.5
    )
    for axis in axes:
        axis.locator_params(nbins=6)
    return figure, axes


def _rows(labels: Sequence[str], count: int) -> tuple["Figure", list[Any]]:
    """Panels that share one named row for each label, the first on top; room for the names is reckoned from their length."""
    rows, columns = -(-count // ACROSS), min(count, ACROSS)
    names = [_folded(label) for label in labels]
    lines = max(name.count("\n") + 1 for name in names)
    left = 0.3 + 0.065 * max(len(line) for name in names for line in name.split("\n"))
    body = 0.2 + max(0.3, 0.08 + 0.14 * lines) * len(names)
    width, height = left + 3.6 * columns, (body + 0.8) * rows
    figure, axes = _panels(count, rows, columns, (width, height), sharey=True)
    figure.subplots_adjust(
        left=left / width, right=1 - 0.25 / width, bottom=0.5 / height, top=1 - 0.3 / height, wspace=0.14, hspace=0.8 / body
    )
    axes[0].set_yticks(range(len(names)), names[::-1])
    axes[0].set_ylim(-0.6, len(names) - 0.4)
    for axis in axes:
        axis.locator_params(axis="x", nbins=5)
    return figure, axes


def _folded(label: str) -> str:
    """A name on lines of about `LABEL` characters, broken after spaces, underscores and slashes."""
    lines = [""]
    for word in re.findall(r"[^\s_/]*[\s_/]*", label):
        if lines[-1] and len(lines[-1]) + len(word) > LABEL:
            lines.append("")
        lines[-1] += word
    return "\n".join(lines)


def _panels(count: int, rows: int, columns: int, size: tuple[float, float], sharey: bool) -> tuple["Figure", list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=72)  # of SVG: a pixel is a point
    axes = list(figure.subplots(rows, columns, sharey=sharey, squeeze=False).flat)
    for axis in axes:
        axis.ticklabel_format(useOffset=False)  # "0.8", not "1e-3+8e-1"
        axis.tick_params(labelsize=8)
    for axis in axes[count:]:
        axis.remove()
    return figure, axes[:count]


def _heights(names: Sequence[Any]) -> dict[Any, int]:
    """Name -> where its row is, the first on top."""
    return {name: len(names) - 1 - place for place, name in enumerate(names)}


def _svg(figure: "Figure", name: str) -> str:
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):  # text stays text; ids differ between the plots of a page
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return f"<div class=plot style='--w:{figure.get_figwidth() * 72:.0f}pt'>{text[text.index('<svg') :]}</div>"


def _figure(plot: str, caption: str, legend: str = "") -> str:
    """A plot with the legend and the caption (plain text) below."""
    below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{plot}{legend}{below}</figure>"


def _legend(comparison: Comparison, groups: Sequence[str]) -> str:
    from matplotlib.colors import to_hex

    colors = map(to_hex, _colors(comparison, groups))
    entries = (f"<li><i style='background:{color}'></i>{html.escape(group)}</li>" for group, color in zip(groups, colors, strict=True))
    return f"<ul class=legend>{''.join(entries)}</ul>"


def _colors(comparison: Comparison, groups: Iterable[str]) -> list[Any]:
    """The color of each of these groups, the same in all plots."""
    import matplotlib

    palette, places = matplotlib.colormaps["tab20"], {group: place for place, group in enumerate(comparison.folders)}
    return [palette(places[group] % 20) for group in groups]


def _name(cell: Sequence[str]) -> str:
    return f"{cell[0]}: {cell[1]}" if cell[1] else cell[0]
