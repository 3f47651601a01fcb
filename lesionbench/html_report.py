"""A comparison as one HTML file that needs nothing beside it: tables, plots, pictures, and the tables again as LaTeX and CSV to copy."""

import base64
import csv
import html
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lesionbench.comparison import Comparison, Sheet

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
        regions = list(dict.fromkeys(cell[2] for cell in cells))
        figure, axes = _axes(len(regions), height=1.2 + 0.3 * max(sum(c[2] == r for c in cells) for r in regions), share_y=False)
        for axis, region in zip(axes, regions, strict=True):
            shown = [cell for cell in cells if cell[2] == region][::-1]
            boxes = axis.boxplot(
                [comparison.values[c] for c in shown], orientation="horizontal", showmeans=True, patch_artist=True, widths=0.6
            )
            for patch, cell in zip(boxes["boxes"], shown, strict=True):
                patch.set_facecolor(_color(comparison, cell[0]))
            axis.set_yticks(range(1, len(shown) + 1), [_name(c) for c in shown], fontsize=8)
            axis.set_title(region or "(case)", fontsize=9)
            axis.set_xlabel(metric)
        yield metric, figure


def _differences(comparison: Comparison) -> str:
    """Mean paired difference to the baseline with its bootstrap interval, one panel per metric."""
    if not comparison.tests:
        return "<p class=note>Give compare.baseline=&lt;a group&gt; for paired tests.</p>"
    metrics = list(dict.fromkeys(test["metric"] for test in comparison.tests))
    most = max(sum(t["metric"] == m for t in comparison.tests) for m in metrics)
    figure, axes = _axes(len(metrics), height=1.2 + 0.22 * most, share_y=False)
    for axis, metric in zip(axes, metrics, strict=True):
        tests = [t for t in comparison.tests if t["metric"] == metric][::-1]
        for place, test in enumerate(tests):
            axis.plot([test["ci_low"], test["ci_high"]], [place, place], color=_color(comparison, test["group"]), lw=2)
            axis.plot(test["mean_difference"], place, "o", color=_color(comparison, test["group"]), ms=4)
        axis.axvline(0, color="0.5", lw=0.8)
        axis.set_yticks(range(len(tests)), [_name((t["group"], t["member"])) + f" {t['region']}" for t in tests], fontsize=7)
        axis.set_title(f"{metric} ({tests[0]['better']} is better)", fontsize=9)
    figure.suptitle(f"difference to {comparison.baseline}, 95 % interval", fontsize=9)
    return _svg(figure, "differences")


def _training(comparison: Comparison) -> str:
    """Training loss and validation curves, mean and range over the runs of a group."""
    names = ("train/loss", *dict.fromkeys(name for name in comparison.objectives.values() if name))
    curves = {group: _curves(folders, names) for group, folders in comparison.folders.items()}
    drawn = [name for name in names if any(found.get(name) for found in curves.values())]
    if not drawn:
        return "<p class=note>No run has a training curve.</p>"
    figure, axes = _axes(len(drawn), height=3.2, share_y=False)
    for axis, name in zip(axes, drawn, strict=True):
        for group, found in curves.items():
            if not found.get(name):
                continue
            at, mean, low, high = _band(found[name])
            axis.plot(at, mean, color=_color(comparison, group), lw=1.3, label=group)
            axis.fill_between(at, low, high, color=_color(comparison, group), alpha=0.15, lw=0)
        axis.set_xlabel("iteration")
        axis.set_title(name, fontsize=9)
    axes[-1].legend(fontsize=7)
    return _svg(figure, "training") + "<p class=note>Mean and range over the runs of a group.</p>"


def _curves(folders: Sequence[str], names: Sequence[str]) -> dict[str, list[dict[int, float]]]:
    """Curve name -> one {iteration: value} for each run that has it."""
    found: dict[str, list[dict[int, float]]] = {}
    for folder in folders:
        path = Path(folder) / "metrics.csv"
        lines = path.read_text(encoding="utf-8").splitlines()[1:] if path.exists() else []
        values: dict[str, dict[int, float]] = {}
        for line in lines:
            iteration, _, name, value = line.split(",", 3)
            if name in names:
                values.setdefault(name, {})[int(iteration)] = float(value)
        for name, curve in values.items():
            found.setdefault(name, []).append(curve)
    return found


def _band(curves: Sequence[Mapping[int, float]]) -> tuple[list[float], list[float], list[float], list[float]]:
    """Iterations, mean, smallest and largest value of several runs, averaged over stretches where there are too many points to see."""
    steps = sorted({step for curve in curves for step in curve})
    stretches = np.array_split(np.array(steps), min(len(steps), SMOOTHED))
    at, mean, low, high = [], [], [], []
    for stretch in stretches:
        per_run = [np.nanmean([c[s] for s in stretch if s in c]) for c in curves if any(s in c and math.isfinite(c[s]) for s in stretch)]
        if per_run:
            at.append(float(stretch.mean()))
            mean.append(float(np.mean(per_run)))
            low.append(min(per_run))
            high.append(max(per_run))
    return at, mean, low, high


def _calibration(comparison: Comparison) -> str:
    """Share of true voxels against predicted probability, per region, over the test cases of all runs of a group."""
    pooled: dict[str, dict[tuple[str, str], np.ndarray]] = {}
    for group, folders in comparison.folders.items():
        for folder in folders:
            for (region, place), counts in _reliability(Path(folder) / "test" / "reliability.csv").items():
                table = pooled.setdefault(region, {}).setdefault(group, {})
                table[place] = table.get(place, 0) + counts
    if not pooled:
        return "<p class=note>No run has region probabilities.</p>"
    figure, axes = _axes(len(pooled), height=3.4, share_y=True)
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


def _reliability(path: Path) -> dict[tuple[str, int], np.ndarray]:
    """(region, bin) -> (voxels, sum of probabilities, true voxels) of the main prediction."""
    if not path.exists():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["member"] == "" and float(row["voxels"])]
    return {(r["region"], int(r["bin"])): np.array([float(r[k]) for k in ("voxels", "probability", "true")]) for r in rows}


def _costs(comparison: Comparison) -> str:
    """The first metric, averaged over regions, against parameters and training time."""
    first = comparison.cells[0]["metric"]
    figure, axes = _axes(2, height=3.2, share_y=True)
    for axis, cost in zip(axes, (PARAMETERS, SECONDS), strict=True):
        for group in comparison.groups:
            cells = [c["mean"] for c in comparison.cells if (c["group"], c["member"], c["metric"]) == (group["group"], "", first)]
            if cells and math.isfinite(group[cost]):
                axis.plot(group[cost], np.nanmean(cells), "o", color=_color(comparison, group["group"]), label=group["group"])
        axis.set_xlabel({PARAMETERS: "parameters", SECONDS: "seconds of training"}[cost])
        axis.set_xscale("log" if axis.get_lines() and min(line.get_xdata()[0] for line in axis.get_lines()) > 0 else "linear")
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


def _axes(count: int, height: float, share_y: bool) -> tuple["Figure", list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * count + 1, height), layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(1, count, sharey=share_y)))


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
