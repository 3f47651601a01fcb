import csv
import io
import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import yaml
from scipy import stats

from lesionbench.errors import SuiteError
from lesionbench.reports.comparison import compare
from lesionbench.reports.runs import SIMULATED, find_runs, read_run
from lesionbench.reports.statistics import bootstrap_interval, differences, holm, paired_tests
from lesionbench.results import write_json, write_rows
from tests.harness import run

CASES = [f"c{i}" for i in range(8)]


def make_run(root, experiment="a", seed=0, values=None, fold=None, folder=None, status="finished", config=None, cost=None, rows=None):
    """A run folder whose dice of each case is `values` (case -> dice), region WT; or with the given `rows`."""
    folder = root / (folder or f"{experiment}/fold{fold}/seed={seed}")
    settings = {"experiment": experiment, "seed": seed, "data": {"name": "real", "split": {"fold": fold}}, **(config or {})}
    if rows is None:
        rows = [row(case, dice=value) for case, value in (values or {}).items()]
    write_rows(folder / "test" / "cases.csv", rows)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    write_json(folder / "summary.json", {"experiment": experiment, "seed": seed, "status": status, "cost": cost or {}})
    return folder


def row(case, region="WT", member="", **metrics):
    return {"case": case, "patient": case, "site": "", "member": member, "region": region, **metrics}


def series(*values):
    return dict(zip(CASES, values, strict=False))


def only(records, **wanted):
    found = [r for r in records if all(r[k] == v for k, v in wanted.items())]
    assert len(found) == 1, found
    return found[0]


def printed(comparison, width):
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width)
    console.print(comparison.table(width))
    return console.file.getvalue()


# --- statistics


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]).tolist() == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]).tolist() == pytest.approx([1.0, 1.0])
    assert holm([0.02, math.nan, 0.03]).tolist() == pytest.approx([0.04, math.nan, 0.04], nan_ok=True)
    assert holm([]).size == 0


def test_paired_tests_equal_scipy_and_hand_values():
    generator = np.random.default_rng(0)
    a, b = generator.normal(0.2, 1, 12), generator.normal(0, 1, 12)
    result = paired_tests(a, b)
    assert result.p_wilcoxon == stats.wilcoxon(a, b).pvalue
    assert result.p_ttest == pytest.approx(stats.ttest_rel(a, b).pvalue)
    small = paired_tests([3, 2, 5, 4], [1, 2, 2, math.nan])  # differences 2, 0, 3
    assert (small.n, small.missing, small.higher, small.equal, small.lower) == (3, 1, 2, 1, 0)
    assert small.mean_difference == pytest.approx(5 / 3)
    assert small.dz == pytest.approx((5 / 3) / math.sqrt(7 / 3))  # squares about 5/3: (1 + 25 + 16) / 9 / 2


def test_no_p_value_under_six_pairs():
    a = [1.0, 2, 3, 4, 5, 7]
    b = [0.0, 0, 0, 0, 0, 0]
    assert math.isnan(paired_tests(a[:5], b[:5]).p_wilcoxon)
    assert math.isnan(paired_tests(a[:5], b[:5]).p_ttest)
    assert paired_tests(a, b).p_wilcoxon == pytest.approx(2 / 2**6)
    assert math.isnan(paired_tests([*a[:5], math.nan], b).p_wilcoxon)


def test_degenerate_differences():
    a = np.linspace(0.1, 0.8, 8)
    same = paired_tests(a, a)
    assert (same.p_wilcoxon, same.p_ttest, same.dz, same.equal) == (1, 1, 0, 8)
    constant = paired_tests(a + 0.1, a)  # no spread: a t-test would divide by rounding errors
    assert math.isnan(constant.p_ttest)
    assert math.isnan(constant.dz)
    assert constant.p_wilcoxon == pytest.approx(2 / 2**8)
    assert differences([0.1 + 0.2, math.nan, math.inf], [0.3, 1, math.inf]).tolist() == [0, 0]
    assert paired_tests([], []).n == 0


def test_bootstrap_interval():
    x = np.random.default_rng(1).normal(3, 2, 400)
    low, high = bootstrap_interval(x, "a")
    assert (low, high) == bootstrap_interval(x, "a")
    assert (low, high) != bootstrap_interval(x, "b")
    half = 1.96 * x.std() / math.sqrt(400)  # the normal limit
    assert (low, high) == pytest.approx((x.mean() - half, x.mean() + half), abs=0.1 * half)
    inner = bootstrap_interval(x, "a", level=0.5)
    assert low < inner[0] < inner[1] < high
    assert bootstrap_interval([2.0, 2.0], 0) == (2, 2)
    assert all(map(math.isnan, bootstrap_interval([2.0], 0)))
    assert bootstrap_interval(np.arange(300_000.0), 0, draws=7)[0] == pytest.approx(150_000, rel=0.01)  # in blocks of 3


# --- pooling and sums


def test_folds_are_pooled_before_the_mean_and_std_goes_over_seeds(tmp_path):
    # seed 0: cases .2 .4 | .9 -> mean .5;  seed 1: .4 .6 | .8 -> mean .6. A mean of fold means would give (.3 + .9) / 2 = .6 for seed 0.
    make_run(tmp_path, seed=0, fold=0, values={"c0": 0.2, "c1": 0.4}, cost={"parameters": 10, "wall_s": 1.0})
    make_run(tmp_path, seed=0, fold=1, values={"c2": 0.9}, cost={"parameters": 10, "wall_s": 2.0})
    make_run(tmp_path, seed=1, fold=0, values={"c0": 0.4, "c1": 0.6}, cost={"parameters": 10, "wall_s": 3.0})
    make_run(tmp_path, seed=1, fold=1, values={"c2": 0.8}, cost={"parameters": 10, "wall_s": None})
    result = compare([tmp_path])
    cell = only(result.cells)
    assert cell["mean"] == pytest.approx(0.55)
    assert cell["std"] == pytest.approx(math.sqrt(0.005))
    assert (cell["n_seeds"], cell["n_folds"], cell["n_cases"], cell["missing"]) == (2, 2, 3, 0)
    assert (cell["q25"], cell["median"], cell["q75"]) == pytest.approx((0.4, 0.5, 0.75))  # of .2 .4 .4 .6 .8 .9
    group = only(result.groups)
    assert (group["runs"], group["seeds"], group["folds"], group["cases"]) == (4, 2, 2, 3)
    assert (group["parameters"], group["wall_s"]) == (10, 2.0)
    assert math.isnan(group["samples_per_s"])
    assert result.tests == []


def test_nan_is_left_out_and_counted_and_one_seed_has_no_std(tmp_path):
    rows = [row("c0", precision=0.5), row("c1", precision=math.nan), row("c2", precision=0.7), row("c0", region="", volume=3.0)]
    make_run(tmp_path, rows=rows)
    result = compare([tmp_path], metrics=["precision"])
    cell = only(result.cells)
    assert (cell["mean"], cell["missing"], cell["n_cases"]) == (pytest.approx(0.6), 1, 3)
    assert math.isnan(cell["std"])
    assert "0.600\n" in result.sheets()[0].rows[0][1]  # no ± without a second seed
    assert "1 missing" in result.sheets()[0].rows[0][1]


@pytest.mark.filterwarnings("error")
def test_infinite_values_are_compared_without_a_warning(tmp_path):
    # lesionwise_hd95_mean of a case where nothing is matched; the second case is infinite on both sides, a tie
    for name, first in (("a", 2.0), ("b", math.inf)):
        for seed in (0, 1):
            values = [first, math.inf, 1.0, 2.0, 3.0, 4.0, 5.0]
            make_run(tmp_path, name, seed, rows=[row(f"c{n}", lesionwise_hd95_mean=value) for n, value in enumerate(values)])
    result = compare(tmp_path, metrics=["lesionwise_hd95_mean"], baseline="a", out=tmp_path / "out")
    assert [cell["mean"] for cell in result.cells] == [math.inf, math.inf]
    test = only(result.tests)
    assert (test["better"], test["wins"], test["ties"], test["losses"]) == ("lower", 0, 6, 1)


def test_default_metrics_and_choices(tmp_path):
    rows = [
        row(case, region, member, dice=0.5, hd95_mm=4.0, hd95_pooled_vox=3.0, precision=0.1)
        for case in CASES
        for region in ("WT", "TC")
        for member in ("", "teacher")
    ]
    make_run(tmp_path, rows=rows)
    result = compare(tmp_path)
    assert list(dict.fromkeys(c["metric"] for c in result.cells)) == ["dice", "hd95_mm", "hd95_pooled_vox"]
    assert len(result.cells) == 3 * 2 * 2
    chosen = compare(tmp_path, metrics="prec*", regions=["TC"], members=[""])
    cell = only(chosen.cells)
    assert (cell["metric"], cell["region"], cell["member"]) == ("precision", "TC", "")
    for choice, message in [
        ({"metrics": ["dise"]}, "Unknown metric 'dise'; did you mean 'dice'"),
        ({"regions": ["WZ"]}, "Unknown region 'WZ'; did you mean 'WT'"),
        ({"members": ["techer"]}, "did you mean 'teacher'"),
        ({"baseline": "b"}, "Unknown baseline 'b'. Known: a"),
    ]:
        with pytest.raises(SuiteError) as error:
            compare(tmp_path, **choice)
        assert message in str(error.value)


def test_no_default_metric_is_an_error_that_names_what_there_is(tmp_path):
    make_run(tmp_path, rows=[row("c0", auroc=0.5)])
    with pytest.raises(SuiteError, match="there are auroc"):
        compare(tmp_path)


# --- groups


def test_different_test_cases_are_refused(tmp_path):
    make_run(tmp_path, "a", values=series(0.1, 0.2, 0.3))
    make_run(tmp_path, "b", values={"c1": 0.1, "x": 0.5})
    with pytest.raises(SuiteError) as error:
        compare(tmp_path)
    assert "'a', seed 0: lacks 1 of 4: x" in str(error.value)
    assert "'b', seed 0: lacks 2 of 4: c0, c2" in str(error.value)


def test_a_seed_without_one_fold_is_refused_and_the_unfinished_run_is_named(tmp_path):
    for seed in (0, 1):
        make_run(tmp_path, seed=seed, fold=0, values={"c0": 0.2})
    make_run(tmp_path, seed=0, fold=1, values={"c1": 0.4})
    late = make_run(tmp_path, seed=1, fold=1, values={"c1": 0.4}, status="running")
    with pytest.raises(SuiteError) as error:
        compare(tmp_path)
    assert "'a', seed 1: lacks 1 of 2: c1" in str(error.value)
    assert f"{late} (running)" in str(error.value)


def test_unfinished_runs_are_left_out_and_listed(tmp_path):
    make_run(tmp_path, seed=0, values={"c0": 0.2})
    failed = make_run(tmp_path, seed=1, values={"c0": 0.9}, status="failed")
    untested = make_run(tmp_path, seed=2, values={"c0": 0.9})
    (untested / "test" / "cases.csv").unlink()
    killed = make_run(tmp_path, seed=3, values={"c0": 0.9})
    (killed / "summary.json").rename(killed / "environment.json")
    result = compare(tmp_path)
    assert only(result.cells)["mean"] == pytest.approx(0.2)
    assert result.left_out == {
        str(failed): "failed",
        str(untested): "finished without test/cases.csv",
        str(killed): "no summary.json",
    }
    assert f"Left out: {failed} (failed)" in result.markdown()
    with pytest.raises(SuiteError, match="no finished and tested run"):
        compare(failed)


def test_group_by_nested_keys(tmp_path):
    for loss in ("Dice", "Focal"):
        for rate in (0.1, 0.2):
            for seed in (0, 1):
                config = {"model": {"loss": {"_target_": loss}, "lr": rate}}
                make_run(tmp_path, seed=seed, folder=f"{loss}{rate}{seed}", values={"c0": rate + seed, "c1": rate}, config=config)
    result = compare(tmp_path, group_by=["model.loss._target_", "model.lr"], baseline="Focal, 0.2")
    dice, focal = "model.loss._target_=Dice, model.lr=", "model.loss._target_=Focal, model.lr="
    assert [g["group"] for g in result.groups] == [f"{dice}0.2", f"{focal}0.2", f"{dice}0.1", f"{focal}0.1"]
    assert result.baseline == f"{focal}0.2"
    assert only(result.cells, group=f"{dice}0.1")["mean"] == pytest.approx(0.35)  # seeds are replicates: (.1 + .6) / 2
    by_seed = compare(tmp_path, group_by=["model.loss._target_", "model.lr", "seed"])
    assert only(by_seed.cells, group=f"{dice}0.1, seed=1")["mean"] == pytest.approx(0.6)
    assert len(by_seed.groups) == 8
    with pytest.raises(SuiteError, match=r"different configs(.|\n)*differ in model.lr\."):
        compare(tmp_path, group_by="model.loss._target_")


def test_what_tells_runs_apart_is_named_not_where_they_lie(tmp_path):
    for loss in ("Dice", "Focal"):
        where = str(tmp_path / loss)
        config = {"run_folder": where, "callbacks": {f"a{i}": {"folder": f"{where}/x"} for i in range(6)}, "model": {"loss": loss}}
        make_run(tmp_path, folder=loss, values={"c0": 0.5}, config=config)
    with pytest.raises(SuiteError, match=r"They differ in model.loss\. Add"):
        compare(tmp_path)


def test_unknown_key_names_the_nearest(tmp_path):
    make_run(tmp_path, "a", values={"c0": 0.2}, config={"model": {"loss": {"_target_": "Dice"}, "lr": 1}})
    make_run(tmp_path, "b", values={"c0": 0.2}, config={"model": {"mc_samples": 4}})
    for key, message in [
        ("model.los._target_", "Unknown config key 'model.los'; did you mean 'model.loss'? Known: model.loss, model.lr, model.mc_samples"),
        ("modle.loss", "Unknown config key 'modle'; did you mean 'model'?"),
        ("model.lr.x", "Unknown config key 'model.lr.x'"),
    ]:
        with pytest.raises(SuiteError) as error:
            compare(tmp_path, group_by=[key])
        assert message in str(error.value)
    result = compare(tmp_path, group_by="model.mc_samples")  # a key of one method only
    assert {g["group"] for g in result.groups} == {"model.mc_samples=4", "without model.mc_samples"}
    assert "some configs have no key model.mc_samples" in result.markdown()


def test_baseline_is_named_by_values_alone_where_they_are_of_one_group(tmp_path):
    for name, model in (("a", {"lr": 1, "mode": None}), ("b", {"lr": 2, "mode": None}), ("c", {"lr": 1})):
        make_run(tmp_path, name, values={"c0": 0.2}, config={"model": model})
    keys = ["model.lr", "model.mode"]
    for wanted in ("model.lr=1, model.mode=null", "1, null", "1, None"):
        assert compare(tmp_path, group_by=keys, baseline=wanted).baseline == "model.lr=1, model.mode=null"
    for wanted in ("1", "1, (none)"):
        assert compare(tmp_path, group_by=keys, baseline=wanted).baseline == "model.lr=1"
    with pytest.raises(SuiteError, match="Unknown baseline '1'"):  # of a and c
        compare(tmp_path, group_by=["model.lr", "experiment"], baseline="1")


@pytest.mark.parametrize(("metrics", "order"), [(None, "bcaA"), (["hd95_mm", "dice"], "cbaA"), (["ece"], "cabA")])
def test_groups_stand_best_first_by_the_main_metric(tmp_path, metrics, order):
    """By the mean over regions of the main prediction; a group without a value stands last, equal ones by name."""
    scores = {"a": (0.5, 9.0, 0.2), "b": (0.7, 8.0, 0.2), "c": (0.6, 7.0, 0.1), "A": (math.nan, math.nan, math.nan)}
    for name, (dice, distance, ece) in scores.items():
        shift = 0.1 if name == "b" else 0
        rows = [
            row("c0", region, member, dice=sign * value, hd95_mm=distance, ece=ece)
            for member, sign in (("", 1), ("teacher", -1))
            for region, value in (("WT", dice + shift), ("TC", dice - shift))
        ]
        make_run(tmp_path, name, rows=rows)
    result = compare(tmp_path, metrics=metrics, baseline="a")
    assert "".join(g["group"] for g in result.groups) == "".join(result.folders) == order
    for sheet in result.sheets():
        assert "".join(dict.fromkeys(line[0] for line in sheet.rows)) in (order, order.replace("a", ""))
    main = (metrics or ["dice"])[0]
    assert result.cells[0]["metric"] == main
    direction = "higher" if main == "dice" else "lower"
    assert result.remarks()[0] == f"Groups stand best first, by their mean {main} over regions ({direction} is better)."
    assert compare(tmp_path / "a").remarks() == []


def test_repeated_command_counts_once_the_newest(tmp_path):
    old = make_run(tmp_path, folder="a/0123abcd/seed=0", values={"c0": 0.2}, config={"paths": "x"})
    new = make_run(tmp_path, folder="a/0123abcd/seed=0-2", values={"c0": 0.8}, config={"paths": "y"})
    for first, second in ((old, new), (new, old)):
        os.utime(first / "summary.json", (1000, 1000))
        os.utime(second / "summary.json", (2000, 2000))
        result = compare(tmp_path)
        assert only(result.cells)["mean"] == (0.8 if second == new else 0.2)
        assert result.left_out == {str(first): f"repeated by {second}, which is newer"}
    os.utime(new / "summary.json", (1000, 1000))
    os.utime(old / "summary.json", (1000, 1000))
    assert only(compare(tmp_path).cells)["mean"] == 0.8  # the same instant: the higher number


def test_same_cases_with_another_config_are_refused(tmp_path):
    one = make_run(tmp_path, folder="one/seed=0", values={"c0": 0.2, "c1": 0.3}, config={"model": {"lr": 1}})
    two = make_run(tmp_path, folder="two/seed=0", values={"c1": 0.8}, config={"model": {"lr": 2}})
    with pytest.raises(SuiteError) as error:
        compare(tmp_path)
    for part in ("c1 were tested by two runs", str(one), str(two), "differ in model.lr"):
        assert part in str(error.value)
    assert len(compare([one]).cells) == 1


def test_case_with_two_rows_is_an_error(tmp_path):
    folder = make_run(tmp_path, rows=[row("c0", dice=0.1), row("c0", dice=0.2)])
    with pytest.raises(SuiteError, match="case c0 has two rows") as error:
        compare(tmp_path)
    assert str(folder) in str(error.value)


def test_runs_are_found_by_folder_parent_and_pattern(tmp_path):
    one = make_run(tmp_path, seed=0, folder="x/one", values={"c0": 0.2})
    two = make_run(tmp_path, seed=1, folder="x/deep/er/two", values={"c0": 0.2})
    hidden = tmp_path / "x" / ".hydra"
    hidden.mkdir()
    (hidden / "config.yaml").write_text("a: 1")
    (hidden / "summary.json").write_text("{}")
    assert set(find_runs([tmp_path])) == {one, two}
    assert find_runs(one) == [one]
    assert find_runs(str(tmp_path / "x" / "o*")) == [one]
    assert len(find_runs([one, tmp_path, str(tmp_path / "**")])) == 2
    (tmp_path / "empty").mkdir()
    for place, message in [("nothing*", "no folder matches"), ("none", "no such folder"), ("empty", "no run folder here")]:
        with pytest.raises(SuiteError, match=message):
            find_runs(str(tmp_path / place))
    with pytest.raises(SuiteError, match="no run folders to compare were given"):
        find_runs([])
    (one / "summary.json").write_text("{broken")
    with pytest.raises(SuiteError, match=r"summary\.json: cannot be read"):
        compare(one)
    (two / "config.yaml").write_text("a: [1")
    with pytest.raises(SuiteError, match=r"config\.yaml: cannot be read"):
        compare(two)


@pytest.mark.parametrize(
    "text",
    [
        "# by hand\nmodel:\n  lr: 1  # rate\n\n# more\nsizes:\n- 1\n- k: 2\nnote: |\n  a: 1\n\n  b\nlong: 'one\n  two'\n",
        "---\nbase: &b {lr: 1}\nmodel: *b\n",
        "{model: {lr: 1},\nother: 2\n}\n",
        "'quoted key': 1\nmodel:\n  lr: 1\nempty:\n",
    ],
)
def test_config_by_blocks_is_the_whole_config(tmp_path, text):
    folder = make_run(tmp_path, values={"c0": 0.5})
    (folder / "config.yaml").write_text(text)
    assert read_run(folder).settings == {**yaml.safe_load(text), "experiment": "a", "seed": 0}


# --- tests against a baseline


def three_groups(root):
    generator = np.random.default_rng(3)
    values = {}
    for name, shift in (("base", 0.0), ("good", 0.1), ("same", 0.0)):
        for seed in (0, 1):
            table = {(case, region): generator.uniform(0.3, 0.6) + shift for case in CASES for region in ("WT", "TC")}
            values[name, seed] = table
            make_run(root, name, seed, rows=[row(c, r, dice=v, hd95_mm=10 * (1 - v)) for (c, r), v in table.items()])
    return values


def test_tests_average_seeds_per_case_then_pair(tmp_path):
    values = three_groups(tmp_path)
    result = compare(tmp_path, baseline="base")
    test = only(result.tests, metric="dice", group="good", region="TC")
    mean = {g: np.array([(values[g, 0][c, "TC"] + values[g, 1][c, "TC"]) / 2 for c in CASES]) for g in ("base", "good")}
    assert test["n"] == 8
    assert test["p_wilcoxon"] == pytest.approx(stats.wilcoxon(mean["good"], mean["base"]).pvalue)
    assert test["p_ttest"] == pytest.approx(stats.ttest_rel(mean["good"], mean["base"]).pvalue)
    difference = mean["good"] - mean["base"]
    assert test["mean_difference"] == pytest.approx(difference.mean())
    assert test["dz"] == pytest.approx(difference.mean() / difference.std(ddof=1))
    assert test["ci_low"] < test["mean_difference"] < test["ci_high"]
    assert (test["wins"], test["ties"], test["losses"]) == ((difference > 0).sum(), 0, (difference < 0).sum())
    distance = only(result.tests, metric="hd95_mm", group="good", region="TC")  # lower is better: the same wins
    assert distance["mean_difference"] == pytest.approx(-10 * difference.mean())
    assert (distance["wins"], distance["losses"]) == (test["wins"], test["losses"])
    family = [t for t in result.tests if t["metric"] == "dice"]
    assert len(family) == 4  # two groups, two regions
    assert [t["p_wilcoxon_holm"] for t in family] == pytest.approx(holm([t["p_wilcoxon"] for t in family]).tolist())
    assert [t["p_ttest_holm"] for t in family] == pytest.approx(holm([t["p_ttest"] for t in family]).tolist())


def test_few_pairs_show_no_p_value_and_nan_pairs_are_counted(tmp_path):
    make_run(tmp_path, "a", values=series(0.1, 0.2, 0.3, 0.4, 0.5, 0.6))
    make_run(tmp_path, "b", values=series(0.2, 0.4, 0.4, 0.4, 0.2, math.nan))
    result = compare(tmp_path, baseline="a")
    test = only(result.tests)
    assert (test["n"], test["missing"], test["note"]) == (5, 1, "n<6")
    assert (test["wins"], test["ties"], test["losses"]) == (3, 1, 1)
    assert math.isnan(test["p_wilcoxon_holm"])
    assert result.sheets()[-1].rows[0][-2:] == ["n<6", "n<6"]
    assert "n<6" in printed(result, 80)


# --- labels and files


def test_thresholds_chosen_on_test_labels_are_labeled(tmp_path):
    make_run(tmp_path, "tuned", rows=[{**row(c, dice=0.5), "oracle": True} for c in CASES])
    make_run(tmp_path, "fair", rows=[{**row(c, dice=0.4), "oracle": False} for c in CASES])
    result = compare(tmp_path, baseline="tuned")
    assert [r[0] for r in result.sheets()[0].rows] == ["tuned (test-tuned)", "fair"]
    assert only(result.cells, group="tuned")["oracle"]
    assert only(result.tests)["oracle"]
    assert {c["metric"] for c in compare(tmp_path, metrics="*").cells} == {"dice"}  # the mark is no metric


@pytest.mark.parametrize("data", [{"name": "simulated"}, {"_target_": "datamodules.Simulated"}])
def test_simulated_data_are_named_under_every_table(tmp_path, data):
    make_run(tmp_path, "a", values={"c0": 0.5}, config={"data": data})
    result = compare(tmp_path)
    assert result.markdown().count(SIMULATED) == len(result.sheets())
    assert printed(result, 120).count(SIMULATED) == len(result.sheets())
    make_run(tmp_path / "real", "b", values={"c0": 0.5})
    assert SIMULATED not in compare(tmp_path / "real").markdown()
    assert "differ in data.name" in compare(tmp_path).markdown()


def test_files_hold_what_the_comparison_holds(tmp_path):
    three_groups(tmp_path / "runs")
    result = compare(tmp_path / "runs", baseline="base", out=tmp_path / "out")
    texts = {name: (tmp_path / "out" / f"{name}.csv").read_text() for name in ("comparison", "tests")}
    read = {name: list(csv.DictReader(io.StringIO(text))) for name, text in texts.items()}
    assert len(read["comparison"]) == len(result.cells) == 12
    for records, lines in ((result.cells, read["comparison"]), (result.tests, read["tests"])):
        for record, line in zip(records, lines, strict=True):
            for name, value in record.items():
                assert line[name] == str(value) or float(line[name]) == pytest.approx(value, nan_ok=True)
    assert "wall_s" in read["comparison"][0]
    data = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert data["cells"][0]["mean"] == result.cells[0]["mean"]
    assert sorted(data["folders"]["base"]) == [str(tmp_path / "runs" / "base" / "foldNone" / f"seed={s}") for s in (0, 1)]


def test_markdown_tables_parse_back(tmp_path):
    make_run(tmp_path, "a|b", values=series(0.25, 0.75))
    make_run(tmp_path, "c", values=series(0.4, 0.5))
    result = compare(tmp_path, baseline="c")
    tables = [block.strip().split("\n") for block in result.markdown().split("\n\n") if block.startswith("|")]
    for lines, sheet in zip(tables, result.sheets(), strict=True):
        cells = [[c.strip() for c in line.strip("|").replace("\\|", "\0").split("|")] for line in lines]
        back = [[c.replace("\0", "|").replace("<br>", "\n") for c in line] for line in cells]
        assert back == [sheet.columns, ["---"] * len(sheet.columns), *sheet.rows]
    assert result.sheets()[0].rows[0] == ["a|b", "0.500\n0.500 [0.375, 0.625]"]


@pytest.mark.parametrize("width", [55, 80, 120])
def test_terminal_tables_keep_every_number_whole(tmp_path, width):
    regions = [f"region{i}" for i in range(7)]
    for name in ("a", "experiment/with/a/[long]/name/that/does/not/fit"):
        for seed in (0, 1):
            rows = [
                row(c, r, m, dice=0.1 * seed + 0.05 * i, hd95_mm=373.13) for i, c in enumerate(CASES) for r in regions for m in ("", "t")
            ]
            make_run(tmp_path, name, seed, rows=rows)
    result = compare(tmp_path, baseline="a")
    text = printed(result, width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "…" not in text
    for sheet in result.sheets():
        for line in sheet.rows:
            for cell in line[sheet.fixed :]:
                assert all(part in text for part in cell.split("\n"))
    assert all(region in text for region in regions)
    assert "[long]" in text


@pytest.fixture
def wide_runs(tmp_path):
    rows = [row(c, f"region{i}", dice=0.5) for c in CASES for i in range(12)]
    make_run(tmp_path, "an/experiment/with/a/long/name/that/a/terminal/folds", rows=rows)
    return tmp_path


def test_tables_are_whole_where_there_is_no_terminal(wide_runs, capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    run("job=compare", f"compare.runs=[{wide_runs}]", "compare.group_by=[experiment]")
    lines = capsys.readouterr().out.splitlines()
    assert sum("dice: mean ± std" in line for line in lines) == 1  # one table, not one for some of the regions each
    assert any(all(f"region{i} " in line for i in range(12)) for line in lines)
    assert any("an/experiment/with/a/long/name/that/a/terminal/folds" in line and line.count("0.500") == 12 for line in lines)


@pytest.mark.parametrize("terminal", [True, False])
def test_tables_fit_a_terminal(wide_runs, capsys, monkeypatch, terminal):
    """And the width that COLUMNS asks for, without one."""
    monkeypatch.setenv("COLUMNS", "70")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    run("job=compare", f"compare.runs=[{wide_runs}]", "compare.group_by=[experiment]")
    plain = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)  # colors of a terminal
    lines = [line for line in plain.splitlines() if line[:1] in "┏┃┡│├└"]
    assert 60 < max(map(len, lines)) <= 70


def test_reading_many_runs_imports_no_torch(tmp_path):
    for seed in range(3):
        make_run(tmp_path, seed=seed, values=series(0.1, 0.2))
    code = "import sys; from lesionbench.reports.comparison import compare; compare(sys.argv[1], out=sys.argv[2]); "
    code += "print([m for m in ('torch', 'pandas', 'monai', 'matplotlib') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path), str(tmp_path / "out")], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# --- cross-validation


def cross_validated(tmp_path):
    """Two folds of three and one case over two seeds; values in tenths."""
    for seed, shift in ((0, 0.0), (1, 0.2)):
        make_run(tmp_path, seed=seed, fold=0, values=dict(zip(CASES, [0.1 + shift, 0.3 + shift, 0.8], strict=False)))
        make_run(tmp_path, seed=seed, fold=1, values={CASES[3]: 0.6 + shift})
    return compare(tmp_path)


def test_cross_validation_by_hand(tmp_path):
    comparison = cross_validated(tmp_path)
    (cell,) = comparison.cells
    pooled = [0.1, 0.3, 0.8, 0.6, 0.3, 0.5, 0.8, 0.8]  # mean 0.525; squares about it sum to 0.515
    assert cell["mean"] == pytest.approx((1.8 / 4 + 2.4 / 4) / 2)
    assert cell["std_cases"] == pytest.approx(math.sqrt(0.515 / 7)) == pytest.approx(np.std(pooled, ddof=1))
    assert (cell["median"], cell["q25"], cell["q75"]) == pytest.approx((0.55, 0.3, 0.8))  # sorted .1 .3 .3 .5 .6 .8 .8 .8
    assert cell["n_folds"] == 2
    assert [(f["fold"], f["n_cases"]) for f in comparison.folds] == [("0", 3), ("1", 1)]
    assert [f["mean"] for f in comparison.folds] == pytest.approx([(1.2 / 3 + 1.6 / 3) / 2, (0.6 + 0.8) / 2])


def test_cross_validation_has_its_table_and_file(tmp_path):
    comparison = cross_validated(tmp_path)
    sheet = comparison.sheets()[1]
    assert "cross-validation" in sheet.title
    assert [row[1:] for row in sheet.rows] == [
        ["mean", "0.525"], ["std", "0.271"], ["median", "0.550"], ["25 %", "0.300"], ["75 %", "0.800"], ["fold 0", "0.467"], ["fold 1", "0.700"]
    ]  # fmt: skip
    files = {path.name for path in comparison.write(tmp_path / "out")}
    assert "folds.csv" in files
    assert (tmp_path / "out" / "folds.csv").read_text().splitlines()[1].startswith("a,,WT,dice,0,0.4666")


def test_without_folds_nothing_is_added(tmp_path):
    make_run(tmp_path, values=series(0.1, 0.3))
    comparison = compare(tmp_path)
    assert comparison.folds == []
    assert not any("cross-validation" in sheet.title for sheet in comparison.sheets())
    assert "folds.csv" not in {path.name for path in comparison.write(tmp_path / "out")}
