"""The HTML report holds every table, plot and picture in one file, and its numbers are those of the runs."""

import csv
import json
import math
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.collections import PathCollection

from callbacks import Calibration
from callbacks.calibration import COLUMNS
from lesionbench.prediction import CaseResult, Prediction
from lesionbench.reports.comparison import compare
from lesionbench.reports.html_report import _band, _calibration_counts, _curves, _training, comma_separated, latex, write_html
from lesionbench.reports.sheets import Sheet
from lesionbench.task import Task
from tests.test_comparison import make_run, row

CASES = [f"c{i}" for i in range(8)]
PIXEL = bytes.fromhex("89504e470d0a1a0a")


def dressed(folder, name):
    """Adds the curves, calibration counts and pictures that a real run leaves."""
    lines = ["iteration,epoch,name,value", "1,0,train/loss,1.0", "2,0,train/loss,0.5", f"2,0,val/dice,{0.5 if name == 'a' else 0.6}"]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    with open(folder / "test" / "calibration.csv", "w") as file:
        csv.writer(file).writerows([COLUMNS, ["", "WT", 0, 90, 9.0, 9], ["", "WT", 1, 10, 8.0, 4], ["teacher", "WT", 0, 5, 1.0, 1]])
    (folder / "figures").mkdir()
    for kind in ("best", "median", "worst"):
        (folder / "figures" / f"{kind}.png").write_bytes(PIXEL + f"{name}-{kind}".encode())


@pytest.fixture
def runs(tmp_path):
    rng = np.random.default_rng(0)
    for name, level in (("a", 0.6), ("b & <c>", 0.8)):
        for seed in (0, 1):
            values = [
                row(c, region=r, dice=float(v), hd95_mm=float(10 * v))
                for r in ("WT", "ET")
                for c, v in zip(CASES, rng.uniform(level - 0.1, level, len(CASES)), strict=True)
            ]
            config = {"objective": {"name": "val/dice", "mode": "max"}}
            folder = make_run(
                tmp_path,
                name,
                seed,
                rows=values,
                folder=f"{name[0]}/{seed}",
                config=config,
                cost={"parameters": 1e6, "wall_s": 10.0 + seed},
            )
            dressed(folder, name[0])
    return tmp_path


class Tags(HTMLParser):
    """Counts tags and checks that they close."""

    def __init__(self):
        super().__init__()
        self.count, self.open = {}, []

    def handle_starttag(self, tag, attributes):
        self.count[tag] = self.count.get(tag, 0) + 1
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_everything_is_in_one_file(runs, tmp_path):
    comparison = compare([runs], baseline="a")
    text = write_html(comparison, tmp_path / "out" / "report.html").read_text()
    tags = Tags()
    tags.feed(text)
    assert not [t for t in tags.open if t not in ("html", "body")]
    assert tags.count["img"] == 2 * 3
    assert tags.count["table"] == len(comparison.sheets())
    assert tags.count["svg"] == 2 + 1 + 1 + 1 + 1  # boxes of two metrics, differences, training, calibration, cost
    assert not re.search(r"""(src|href)=['"](?!data:|#)""", re.sub(r'xlink:href="#', "", text))
    assert "b &amp; &lt;c&gt;" in text
    assert "<c>" not in text
    for sheet in comparison.sheets():
        for cell in (cell for line in sheet.rows for cell in line):
            assert all(part in text for part in cell.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").split("\n"))


def test_a_bare_run_has_a_report_too(tmp_path):
    make_run(tmp_path, values=dict.fromkeys(CASES, 0.5))
    text = write_html(compare([tmp_path]), tmp_path / "report.html").read_text()
    for line in ("No run has a training curve", "No run has region probabilities", "No run has pictures", "compare.baseline"):
        assert line in text


def test_a_comparison_of_values_over_all_voxels_alone(tmp_path):
    """As of detectors whose metrics are measured data-set-wise: no case has a value, the cost plot shows what there is."""
    for name, auroc in (("a", 0.7), ("b", 0.9)):
        folder = make_run(tmp_path, name, values=dict.fromkeys(CASES, 0.5), cost={"parameters": 1e6, "wall_s": 5.0})
        (folder / "test" / "dataset.json").write_text(json.dumps({"": {"WT": {"auroc": auroc}}}))
    comparison = compare([tmp_path], metrics=["auroc"])
    assert not comparison.cells
    text = write_html(comparison, tmp_path / "report.html").read_text()
    assert "auroc, mean over regions" in text


def test_plots_show_the_numbers_under_the_right_names(runs, tmp_path, monkeypatch):
    figures = {}
    monkeypatch.setattr("lesionbench.reports.html_report._svg", lambda figure, name: figures.setdefault(name, figure) and "")
    comparison = compare([runs], baseline="a")
    write_html(comparison, tmp_path / "report.html")
    names = [label.get_text() for label in figures["dice"].axes[0].get_yticklabels()]
    heights = dict(zip(names, figures["dice"].axes[0].get_yticks(), strict=True))
    for axis in figures["dice"].axes:
        means = {float(line.get_ydata()[0]): float(line.get_xdata()[0]) for line in axis.get_lines() if line.get_marker() == "^"}
        for group in ("a", "b & <c>"):
            (cell,) = [c for c in comparison.cells if (c["group"], c["region"], c["metric"]) == (group, axis.get_title(), "dice")]
            assert means[heights[group]] == pytest.approx(cell["mean"])
    axis = figures["differences"].axes[0]
    places = dict(zip([label.get_text() for label in axis.get_yticklabels()], axis.get_yticks(), strict=True))
    (points,) = [c for c in axis.collections if isinstance(c, PathCollection)]
    drawn = {float(y): float(x) for x, y in points.get_offsets()}
    for test in (t for t in comparison.tests if t["metric"] == "dice"):
        assert drawn[places[f"{test['group']} {test['region']}"]] == pytest.approx(test["mean_difference"])
    (curve, *_) = [line for line in figures["calibration"].axes[0].get_lines() if line.get_label() == "a"]
    assert np.allclose(curve.get_xydata(), [[0.1, 0.1], [0.8, 0.4]])  # predicted, true
    cost = {line.get_label(): line.get_xydata()[0] for line in figures["cost"].axes[1].get_lines()}
    for group in ("a", "b & <c>"):
        score = np.mean([c["mean"] for c in comparison.cells if (c["group"], c["metric"]) == (group, "dice")])
        assert np.allclose(cost[group], [10.5, score])


@pytest.mark.filterwarnings("error")
def test_curves_of_one_point_and_metrics_without_a_value_are_drawn(tmp_path):
    folder = make_run(tmp_path, values=dict.fromkeys(CASES, math.nan), config={"objective": {"name": "val/dice"}}, cost={"parameters": 1e6})
    (folder / "metrics.csv").write_text("iteration,epoch,name,value\n2,0,val/dice,0.5\n")
    comparison = compare([tmp_path])
    write_html(comparison, tmp_path / "report.html")
    drawn = []

    def kept(figure, name):
        drawn.extend(figure.axes[0].get_lines())
        return ""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lesionbench.reports.html_report._svg", kept)
        _training(comparison)
    (line,) = drawn
    assert line.get_marker() == "o"  # a line through one point is not seen


def test_latex_and_csv_of_a_sheet():
    sheet = Sheet("dice", ["group", "WT_1"], [["50% & <a>", "0.8 ± 0.1\n0.7"], ['say "x", y', "\\"]], fixed=1)
    assert latex(sheet).split("\n") == [
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"group & WT\_1 \\",
        r"\midrule",
        r"50\% \& $<$a$>$ & 0.8 $\pm$ 0.1 0.7 \\",
        r'say "x", y & \textbackslash{} \\',
        r"\bottomrule",
        r"\end{tabular}",
    ]
    assert list(csv.reader(comma_separated(sheet).splitlines())) == [
        ["group", "WT_1"],
        ["50% & <a>", "0.8 ± 0.1 0.7"],
        ['say "x", y', "\\"],
    ]


def test_curves_by_hand(runs):
    found = _curves([str(runs / "a" / "0"), str(runs / "a" / "1"), str(runs / "nowhere")], ["train/loss", "val/dice"])
    assert {name: [c.tolist() for c in curves] for name, curves in found.items()} == {
        "train/loss": [[[1, 1.0], [2, 0.5]]] * 2,
        "val/dice": [[[2, 0.5]]] * 2,
    }
    two = [np.array([[1, 1.0], [2, 3.0]]), np.array([[1, 2.0]])]
    assert [part.tolist() for part in _band(two)] == [[1, 2], [1.5, 3], [1, 3], [2, 3]]
    at, mean, low, high = _band([np.array([[i, 1.0 if i % 2 else math.nan] for i in range(400)])])
    assert len(at) == 40
    assert set(mean) == set(low) == set(high) == {1.0}


def test_calibration_counts_are_those_of_the_main_prediction(runs):
    table = _calibration_counts(runs / "a" / "0" / "test" / "calibration.csv")
    assert {k: v.tolist() for k, v in table.items()} == {("WT", 0): [90, 9, 9], ("WT", 1): [10, 8, 4]}
    assert _calibration_counts(runs / "no such file") == {}


def test_calibration_callback_by_hand(tmp_path):
    task = Task(("t1",), {"background": 0, "lesion": 1})
    callback = Calibration(str(tmp_path), bins=4)
    callback.on_test_epoch_start(None, None)
    module = SimpleNamespace(task=task)
    for probabilities, labels in [([0.0, 0.3, 0.6, 1.0], [0, 1, 0, 1]), ([0.9, 0.9, 0.1, 0.2], [1, -1, 0, 0])]:
        regions = torch.tensor(probabilities).reshape(1, 4, 1, 1)
        inner = Prediction(regions=1 - regions)
        prediction = Prediction(regions=regions, members={"other": inner})
        truth = torch.tensor(labels, dtype=torch.int8).reshape(4, 1, 1)
        callback.on_test_batch_end(None, module, CaseResult("c", "c", "", prediction, truth, None, None, native=False), None, 0)
    trainer = SimpleNamespace(is_global_zero=True, world_size=1)
    callback.on_test_epoch_end(trainer, module)
    table = _calibration_counts(tmp_path / "test" / "calibration.csv")
    assert {k[1]: v.tolist() for k, v in table.items()} == {
        0: pytest.approx([3, 0.3, 0]),
        1: pytest.approx([1, 0.3, 1]),
        2: pytest.approx([1, 0.6, 0]),
        3: pytest.approx([2, 1.9, 2]),  # the second 0.9 is at a voxel to ignore
    }
    assert "other,lesion,0,2" in (tmp_path / "test" / "calibration.csv").read_text()
