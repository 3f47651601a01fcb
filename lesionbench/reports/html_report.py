"""A comparison as one HTML file that needs nothing beside it: tables, plots, pictures, and the tables again as LaTeX and CSV to copy."""

import base64
import csv
import html
import io
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lesionbench.reports.comparison import Comparison
from lesionbench.reports.sheets import Sheet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURES = ("best", "median", "worst")
SMOOTHED = 40  # points of a training curve that is drawn
PARAMETERS, SECONDS = "parameters", "wall_s"


def write_html(comparison: Comparison, path: Path | str) -> Path:
    """Writes the report to `path` and returns it. Curves, calibration and pictures are read from the run folders that count."""
    sections = [
        _section("Results", "".join(_sheet(sheet) for sheet in comparison.sheets())),
        _section("Spread over cases", "".join(_svg(figure, name) for name, figure in _boxes(comparison))),
        _section("Differences to the baseline", _differences(comparison)),
        _section("Training", _training(comparison)),
        _section("Calibration", _calibration(comparison)),
        _section("Cost", _costs(comparison)),
        _section("Pictures", _pictures(comparison)),
        _section("Runs", _runs(comparison)),
    ]
    title = "Comparison by " + ", ".join(comparison.group_by)
    remarks = "".join(f"<p class=note>{html.escape(line)}</p>" for line in [comparison.caption, *comparison.remarks()] if line)
    page = f"<!doctype html><html lang=en><head><meta charset=utf-8><title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>"
    page += f"<h1>{html.escape(title)}</h1>{remarks}{''.join(sections)}<script>{_SCRIPT}</script></body></html>\n"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _section(title: str, body: str) -> str:
    return f"<h2>{html.escape(title)}</h2>{body}"


# --- tables ----------------------------------------------------------------------------------------------------------------------


def _sheet(sheet: Sheet) -> str:
    head = "".join(f"<th>{_lines(name)}</th>" for name in sheet.columns)
    rows = "".join("<tr>" + "".join(f"<td>{_lines(cell)}</td>" for cell in row) + "</tr>" for row in sheet.rows)
    copies = "".join(
        f"<details><summary>{kind}</summary><button onclick=copy_text(this)>copy</button><pre>{html.escape(text)}</pre></details>"
        for kind, text in (("LaTeX", latex(sheet)), ("CSV", comma_separated(sheet)))
    )
    return f"<h3>{html.escape(sheet.title)}</h3><table><tr>{head}</tr>{rows}</table>{copies}"


def _lines(text: str) -> str:
    return "<br>".join(html.escape(line) for line in text.split("\n"))


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


def _boxes(comparison: Comparison) -> Iterable[tuple[str, "Figure"]]:
    """One figure per metric: a panel per region, a box per group and member over all cases, seeds and folds."""
    for metric in dict.fromkeys(cell[3] for cell in comparison.values):
        cells = [cell for cell in comparison.values if cell[3] == metric]
        regions, names = (list(dict.fromkeys(part)) for part in zip(*((cell[2], cell[:2]) for cell in cells), strict=True))
        figure, axes = _rows([_name(name) for name in names], len(regions))
        for axis, region in zip(axes, regions, strict=True):
            shown = [cell for cell in cells if cell[2] == region]
            places = [_place(names, cell[:2]) for cell in shown]
            boxes = axis.boxplot(
                [comparison.values[c] for c in shown], positions=places, orientation="horizontal", showmeans=True, patch_artist=True,
                widths=0.6, manage_ticks=False,
            )  # fmt: skip
            for patch, cell in zip(boxes["boxes"], shown, strict=True):
                patch.set_facecolor(_color(comparison, cell[0]))
            axis.set_title(region or "(case)", fontsize=9)
            axis.set_xlabel(metric)
        yield metric, figure


def _differences(comparison: Comparison) -> str:
    """Mean paired difference to the baseline with its bootstrap interval, one panel per metric."""
    if comparison.baseline is None or not comparison.tests:
        return "<p class=note>Give compare.baseline=&lt;a group&gt; for paired tests.</p>"
    metrics = list(dict.fromkeys(test["metric"] for test in comparison.tests))
    names = list(dict.fromkeys((t["group"], t["member"], t["region"]) for t in comparison.tests))
    figure, axes = _rows([f"{_name(name)} {name[2]}" for name in names], len(metrics))
    for axis, metric in zip(axes, metrics, strict=True):
        tests = [t for t in comparison.tests if t["metric"] == metric]
        places = [_place(names, (t["group"], t["member"], t["region"])) for t in tests]
        colors = [_color(comparison, t["group"]) for t in tests]
        axis.hlines(places, [t["ci_low"] for t in tests], [t["ci_high"] for t in tests], colors=colors, lw=2)
        axis.scatter([t["mean_difference"] for t in tests], places, s=16, c=colors, zorder=2)
        axis.axvline(0, color="0.5", lw=0.8)
        axis.set_title(f"{metric} ({tests[0]['better']} is better)", fontsize=9)
    return f"<p>Difference to {html.escape(comparison.baseline)}, mean and 95 % interval.</p>{_svg(figure, 'differences')}"


def _training(comparison: Comparison) -> str:
    """Training loss and validation curves, mean and range over the runs of a group."""
    names = ("train/loss", *dict.fromkeys(name for name in comparison.objectives.values() if name))
    curves = {group: _curves(folders, names) for group, folders in comparison.folders.items()}
    drawn = [name for name in names if any(found.get(name) for found in curves.values())]
    if not drawn:
        return "<p class=note>No run has a training curve.</p>"
    figure, axes = _axes(len(drawn))
    for axis, name in zip(axes, drawn, strict=True):
        for group, found in curves.items():
            if not found.get(name):
                continue
            at, mean, low, high = _band(found[name])
            axis.plot(at, mean, "o-" if len(at) == 1 else "-", ms=4, color=_color(comparison, group), lw=1.3, label=group)
            axis.fill_between(at, low, high, color=_color(comparison, group), alpha=0.15, lw=0)
        axis.set_xlabel("iteration")
        axis.set_title(name, fontsize=9)
    axes[-1].legend(fontsize=7)
    return _svg(figure, "training") + "<p class=note>Mean and range over the runs of a group.</p>"


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
        return "<p class=note>No run has region probabilities.</p>"
    figure, axes = _axes(len(pooled))
    for axis, (region, groups) in zip(axes, pooled.items(), strict=True):
        axis.plot([0, 1], [0, 1], color="0.6", lw=0.8)
        for group, table in groups.items():
            voxels, probability, true = np.array([table[place] for place in sorted(table)]).T
            axis.plot(probability / voxels, true / voxels, "o-", ms=3, lw=1, color=_color(comparison, group), label=group)
        axis.set_title(region, fontsize=9)
        axis.set_xlabel("predicted probability")
    axes[0].set_ylabel("share of true voxels")
    axes[-1].legend(fontsize=7)
    return _svg(figure, "calibration")


def _calibration_counts(path: Path) -> dict[tuple[str, int], np.ndarray]:
    """(region, bin) -> (voxels, sum of probabilities, true voxels) of the main prediction."""
    if not path.exists():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["member"] == "" and float(row["voxels"])]
    return {(r["region"], int(r["bin"])): np.array([float(r[k]) for k in ("voxels", "probability", "true")]) for r in rows}


def _costs(comparison: Comparison) -> str:
    """The first metric, averaged over regions, against parameters and training time."""
    records = comparison.cells or comparison.dataset
    first = records[0]["metric"]
    figure, axes = _axes(2)
    for axis, cost in zip(axes, (PARAMETERS, SECONDS), strict=True):
        for group in comparison.groups:
            known = [r["mean"] for r in records if (r["group"], r["member"], r["metric"]) == (group["group"], "", first)]
            known = [mean for mean in known if math.isfinite(mean)]
            if known and math.isfinite(group[cost]):
                axis.plot(group[cost], np.mean(known), "o", color=_color(comparison, group["group"]), label=group["group"])
        axis.set_xlabel({PARAMETERS: "parameters", SECONDS: "seconds of training"}[cost])
        spent = [line.get_xdata()[0] for line in axis.get_lines()]
        if spent and 0 < 10 * min(spent) <= max(spent):  # over less than a decade a logarithmic axis writes its labels over each other
            axis.set_xscale("log")
    axes[0].set_ylabel(f"{first}, mean over regions")
    if axes[-1].get_lines():
        axes[-1].legend(fontsize=7)
    return _svg(figure, "cost")


def _pictures(comparison: Comparison) -> str:
    """Best, median and worst case of the first run of every group, side by side."""
    rows = []
    for name in PICTURES:
        cells = []
        for group, folders in comparison.folders.items():
            path = next((p for p in (Path(f) / "figures" / f"{name}.png" for f in folders) if p.exists()), None)
            if path is not None:
                data = base64.b64encode(path.read_bytes()).decode()
                cells.append(f"<figure><figcaption>{html.escape(group)}</figcaption><img src='data:image/png;base64,{data}'></figure>")
        if cells:
            rows.append(f"<h3>{name} case of each</h3><div class=row>{''.join(cells)}</div>")
    return "".join(rows) or "<p class=note>No run has pictures.</p>"


def _runs(comparison: Comparison) -> str:
    return "".join(
        f"<details><summary>{html.escape(group)}: {len(folders)} run(s)</summary><pre>{html.escape(chr(10).join(folders))}</pre></details>"
        for group, folders in comparison.folders.items()
    )


def _axes(count: int) -> tuple["Figure", list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4 * count, 3.4))
    axes = figure.subplots(1, count, squeeze=False)[0]
    figure.subplots_adjust(left=0.75 / (4.4 * count), right=1 - 0.15 / (4.4 * count), bottom=0.16, top=0.9)
    for axis in axes:
        axis.locator_params(nbins=6)
    return figure, list(axes)


def _rows(labels: Sequence[str], panels: int) -> tuple["Figure", list[Any]]:
    """Panels that share one named row for each label, the first on top; room for the names is reckoned from their length."""
    from matplotlib.figure import Figure

    left, height = 0.3 + 0.065 * max(len(label) for label in labels), 1.0 + 0.24 * len(labels)
    width = left + 3.6 * panels
    figure = Figure(figsize=(width, height))
    axes = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    figure.subplots_adjust(left=left / width, right=1 - 0.1 / width, bottom=0.5 / height, top=1 - 0.3 / height, wspace=0.08)
    axes[0].set_yticks(range(len(labels)), list(labels)[::-1], fontsize=8)
    axes[0].set_ylim(-0.6, len(labels) - 0.4)
    for axis in axes:
        axis.locator_params(axis="x", nbins=5)
    return figure, list(axes)


def _place(names: Sequence[Any], name: Any) -> int:
    return len(names) - 1 - names.index(name)


def _svg(figure: "Figure", name: str) -> str:
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):  # text stays text; ids differ between the plots of a page
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return f"<div class=plot>{text[text.index('<svg') :]}</div>"


def _color(comparison: Comparison, group: str) -> Any:
    import matplotlib

    return matplotlib.colormaps["tab20"](list(comparison.folders).index(group) % 20)


def _name(cell: Sequence[str]) -> str:
    return f"{cell[0]}: {cell[1]}" if cell[1] else cell[0]


_STYLE = """
body{font:14px/1.4 sans-serif;margin:2em auto;max-width:1500px;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:.5em 0}td,th{border:1px solid #ccc;padding:.25em .6em;text-align:left;vertical-align:top}
th{background:#f3f3f3}h2{border-bottom:2px solid #ddd;margin-top:2em}.note{color:#666}.plot svg{max-width:100%;height:auto}
.row{display:flex;gap:1em;overflow-x:auto}figure{margin:0}figure img{max-width:640px}pre{background:#f7f7f7;padding:.6em;overflow-x:auto}
details{margin:.3em 0}
"""
_SCRIPT = "function copy_text(b){navigator.clipboard.writeText(b.nextElementSibling.textContent);b.textContent='copied'}"
