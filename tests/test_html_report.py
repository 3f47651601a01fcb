"""The HTML report holds every table, plot and picture in one file, and its numbers are those of the runs."""

import csv
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.collections import PathCollection

from callbacks import Calibration
from callbacks.calibration import COLUMNS
from lesionbench.prediction import CaseResult, Prediction
from lesionbench.reports import html_report
from lesionbench.reports.comparison import compare
from lesionbench.reports.html_page import Section, _sort_keys, page, table
from lesionbench.reports.html_report import _band, _calibration_counts, _curves, _training, comma_separated, latex, span, write_html
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


def section(text, name):
    """The part of the page below the heading `name`, to the next of the same level."""
    heading = re.search(rf"<h([23])>{re.escape(name)}</h", text)
    return text[heading.end() :].partition(f"<h{heading[1]}>")[0]


def circles(text):
    """(name, value as shown, x, y) of every point."""
    found = re.findall(r"<circle cx='([\d.]+)' cy='([\d.]+)' r='[\d.]+'><title>(.*?): (\S+)</title></circle>", text)
    return [(name, value, float(x), float(y)) for x, y, name, value in found]


def test_every_case_is_a_point_with_its_name(runs, tmp_path):
    comparison = compare([runs], baseline="a")
    text = write_html(comparison, tmp_path / "report.html").read_text()
    drawn = circles(section(text, "Spread over cases"))
    names = [f"{case}, seed {seed}" for case in CASES for seed in (0, 1)]
    assert sorted(name for name, *_ in drawn) == sorted(names * 2 * 2 * 2)  # groups, regions, metrics
    values = [f"{v:.4g}" for cases in comparison.values.values() for seed in cases.values() for v in seed.values()]
    assert sorted(value for _, value, *_ in drawn) == sorted(values)
    assert "Points: every case" in text
    assert write_html(comparison, tmp_path / "again.html").read_text() == text


def test_points_are_where_the_axis_has_their_values(tmp_path, monkeypatch):
    make_run(tmp_path, values=dict(zip(CASES, [0.1, 0.2, 0.4, math.nan, 0.8, math.nan, 0.5, 0.5], strict=True)))
    kept = {}
    original = html_report._svg
    monkeypatch.setattr(html_report, "_svg", lambda figure, name: kept.setdefault(name, figure) and original(figure, name))
    text = write_html(compare([tmp_path]), tmp_path / "report.html").read_text()
    drawn, axis = circles(text), kept["dice"].axes[0]
    assert [value for _, value, *_ in drawn] == ["0.1", "0.2", "0.4", "0.5", "0.5", "0.8"]
    frame = axis.get_window_extent()
    low, high = axis.get_xlim()
    for name, value, x, y in drawn:
        assert name in CASES  # one seed: not named
        assert x == pytest.approx(frame.x0 + (float(value) - low) / (high - low) * frame.width, abs=0.1)
        assert y == pytest.approx(kept["dice"].bbox.height - axis.transData.transform((0, 0))[1], abs=0.3 * frame.height)
    assert len({y for *_, y in drawn}) == 6  # those of one value lie beside each other


def test_of_many_cases_some_are_drawn_evenly_and_the_caption_says_so(tmp_path, monkeypatch):
    for name in ("a", "b"):
        make_run(tmp_path, name, values={f"c{i}": i / 1000 for i in range(1001)})
    text = write_html(compare([tmp_path]), tmp_path / "report.html").read_text()
    values = [float(value) for _, value, *_ in circles(text)]
    assert len(values) == 2 * html_report.POINTS
    assert (min(values), max(values)) == (0, 1)
    assert max(np.diff(sorted(set(values)))) < 2 / html_report.POINTS
    assert f"of every box at most {html_report.POINTS} values, evenly over their ranks" in text
    monkeypatch.setattr(html_report, "FIGURE_POINTS", 100)  # however many boxes there are
    assert len(circles(write_html(compare([tmp_path]), tmp_path / "report.html").read_text())) == 2 * 50


def test_ends_of_axes():
    assert span([0.2, 0.7, math.nan, math.inf]) == pytest.approx((0.18, 0.72))
    assert span([0.8, 0.8 + 1e-12]) == pytest.approx((0.72, 0.88))
    assert span([0.0]) == (-0.5, 0.5)
    assert span([-300.0]) == pytest.approx((-330, -270))
    assert span([math.nan]) == span([]) == (0, 1)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [0.0, 0.1 + 0.2, 1.0, 373.13, 1e6])
@pytest.mark.parametrize("cases", [CASES, CASES[:1]])
def test_axes_of_equal_values_have_a_range_and_distinct_ticks(tmp_path, monkeypatch, value, cases):
    for name in ("a", "b"):
        folder = make_run(
            tmp_path,
            name,
            values=dict.fromkeys(cases, value),
            config={"objective": {"name": "val/dice"}},
            cost={"parameters": 1e6, "wall_s": 1.0},
        )
        (folder / "metrics.csv").write_text(f"iteration,epoch,name,value\n2,0,val/dice,{value}\n4,0,val/dice,{value}\n")
    figures = {}
    monkeypatch.setattr(html_report, "_svg", lambda figure, name: figures.setdefault(name, figure) and "")
    write_html(compare([tmp_path], baseline="a"), tmp_path / "report.html")
    for name, sides in {"dice": "x", "differences": "x", "training": "xy", "cost": "xy"}.items():
        figures[name].canvas.draw()
        for axis in figures[name].axes:
            for side in sides:
                low, high = getattr(axis, f"get_{side}lim")()
                assert high - low > 1e-3 * abs(high)
                ticks = [tick.get_text() for tick in getattr(axis, f"get_{side}ticklabels")()]
                assert len(set(ticks)) == len(ticks) > 1
                assert getattr(axis, f"{side}axis").get_offset_text().get_text() in ("", "1e6")


def test_ticks_of_values_near_each_other_are_whole_numbers_of_their_own(tmp_path, monkeypatch):
    """Not the end of one, with the rest of it as an offset beside the axis."""
    make_run(tmp_path, values={case: 1234.5 + i / 1000 for i, case in enumerate(CASES)})
    figures = {}
    monkeypatch.setattr(html_report, "_svg", lambda figure, name: figures.setdefault(name, figure) and "")
    write_html(compare([tmp_path]), tmp_path / "report.html")
    figures["dice"].canvas.draw()
    ticks = [tick.get_text() for tick in figures["dice"].axes[0].get_xticklabels()]
    assert len(set(ticks)) == len(ticks) > 1
    assert all(tick.startswith("1234.5") for tick in ticks[1:-1])


def test_many_regions_stand_in_rows_and_long_names_on_lines(tmp_path, monkeypatch):
    figures = {}
    monkeypatch.setattr(html_report, "_svg", lambda figure, name: figures.setdefault(name, figure) and "")
    name = "a_method_with_a_long_name/on_a_benchmark_with_a_long_name_too"
    make_run(tmp_path, name, rows=[row(c, region=f"r{i}", dice=0.5) for c in CASES for i in range(10)])
    write_html(compare([tmp_path]), tmp_path / "report.html")
    axes = figures["dice"].axes
    assert [axis.get_title() for axis in axes] == [f"r{i}" for i in range(10)]
    assert figures["dice"].get_figwidth() < 16
    label = axes[0].get_yticklabels()[0].get_text()
    assert label.replace("\n", "") == name
    assert max(map(len, label.split("\n"))) <= html_report.LABEL


def test_contents_lead_to_every_heading(runs, tmp_path):
    text = write_html(compare([runs], baseline="a"), tmp_path / "report.html").read_text()
    contents, _, rest = text.partition("</nav>")
    links = re.findall(r"<a href='#([^']+)'>(.*?)</a>", contents)
    headings = re.findall(r"<section id=([\w-]+)><h[23]>(.*?)</h[23]>", rest)
    assert [target for target, _ in links] == [name for name, _ in headings]
    assert len(headings) == len(set(headings)) == len(re.findall("<h[23]>", rest))
    assert [title for _, title in links[:6]] == ["Results", "dice", "hd95_mm", "runs and cost", "dice, tests", "hd95_mm, tests"]


def test_styles_of_screen_and_print(runs, tmp_path):
    text = write_html(compare([runs]), tmp_path / "report.html").read_text()
    style = text.partition("<style>")[2].partition("</style>")[0]
    screen, _, printed = style.partition("@media print{")
    anywhere, _, wide = screen.partition("@media screen and (min-width:1000px){")
    assert "position:sticky" in wide  # beside the text; above it where narrow, and on paper
    assert "sticky" not in anywhere + printed
    assert not re.search(r"(body|main)\{[^}]*max-width", style)  # the page's width is used
    assert ".scroll,.plot{overflow-x:auto" in anywhere
    for rule in (".scroll,.plot,pre{overflow:visible}", "tr,figure,figcaption,svg,img{break-inside:avoid}", "details::details-content"):
        assert rule in printed
    assert "beforeprint" in text
    assert all(box.startswith("<table") for box in re.findall(r"<div class=scroll[^>]*>(.{6})", text))
    assert text.count("<table") == text.count("<div class=scroll ")


def test_numbers_are_sorted_as_numbers():
    column = ["0.9 ± 0.1\n0.8 [0.1, 0.9]", "1,234", "-", "", "<0.001", "-0.5", "+2.0\n[-, -]", "3/1/0", "n<6", "inf"]
    found = [None if math.isnan(key) else key for key in _sort_keys(column, named=False)]
    assert found == [0.9, 1234, None, None, 0, -0.5, 2, 3, None, math.inf]
    assert _sort_keys(["seed=10", "seed=9", "model.lr=1e-05"], named=True) == [10, 9, 1e-5]
    assert np.isnan(_sort_keys(["seed=10", "3d_unet"], named=True)).all()
    text = table(Sheet("t", ["group", "WT"], [["a_b/c, d", "0.5"], ["<e>", "-"]], fixed=1))
    assert "<td>a_<wbr>b/<wbr>c, <wbr>d</td><td class=n data-v='0.5'>0.5</td>" in text
    assert "<td>&lt;e&gt;</td><td class=n>-</td>" in text
    assert text.count("<th scope=col><button type=button") == 2
    assert "data-v='Infinity'" in table(Sheet("t", ["group", "hd95"], [["a", "inf"]], fixed=1))


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the browser chromium")
def test_a_click_on_a_column_sorts_and_no_width_makes_the_page_scroll(tmp_path):
    rows = [["b", "10.5"], ["a10", "-"], ["a9", "9.25"], ["c", "1,000"], ["d", ""], ["e", "<0.001"]]
    wide = Sheet("wide", ["group", *(f"column number {i}" for i in range(40))], [["a", *["0.123 ± 0.456"] * 40]], fixed=1)
    clicks = """
    const order=()=>[...document.querySelectorAll('tbody')[0].rows].map(r=>r.cells[0].textContent).join(' ');
    const heads=document.querySelectorAll('thead')[0].querySelectorAll('button'),found=[];
    for(const at of [1,1,0,0]){heads[at].click();found.push(order()+' '+heads[at].parentNode.getAttribute('aria-sort'))}
    found.push(document.documentElement.scrollWidth<=innerWidth);
    document.body.dataset.found=found.join('|');
    """
    body = "".join(table(sheet) for sheet in (Sheet("t", ["group", "WT"], rows, fixed=1), wide))
    text = page("title", "", [Section("one", body)]).replace("</body>", f"<script>{clicks}</script></body>")
    (tmp_path / "page.html").write_text(text)
    for width in (700, 1300):
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
        shown = subprocess.run(
            [*command, f"--window-size={width},900", f"file://{tmp_path / 'page.html'}"],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        assert re.search('data-found="(.*?)"', shown.stdout)[1].split("|") == [
            "e a9 b c a10 d ascending",
            "c b a9 e a10 d descending",  # cells without a value stay last
            "a9 a10 b c d e ascending",
            "e d c b a10 a9 descending",
            "true",
        ]


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
