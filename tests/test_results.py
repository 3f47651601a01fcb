"""Result rows: statistics by hand, round trips, atomic writes."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from lesionbench.errors import SuiteError
from lesionbench.results import read_rows, summarize, write_json, write_rows


def row(case, value, member="", region="WT", **more):
    return {"case": case, "patient": case, "site": "", "member": member, "region": region, "dice": value, **more}


def test_summary_by_hand():
    rows = [row("a", 0.2), row("b", 0.4), row("c", 0.9), row("d", 0.5), row("e", math.nan), row("f", None)]
    found = summarize(rows)[""]["WT"]["dice"]
    assert found["mean"] == pytest.approx(0.5)
    assert found["std"] == pytest.approx(math.sqrt((0.09 + 0.01 + 0.16 + 0) / 3))
    assert [found[k] for k in ("q25", "median", "q75")] == pytest.approx([0.35, 0.45, 0.6])
    assert (found["n"], found["missing"]) == (4, 2)
    assert 0.2 <= found["ci_low"] < 0.5 < found["ci_high"] <= 0.9


def test_summary_keeps_members_regions_and_metrics_apart():
    rows = [row("a", 0.2), row("a", 0.6, member="teacher"), row("a", 0.8, region="ET", hd95_mm=3.0), row("b", 0.4)]
    rows.append({"case": "a", "member": "", "region": "", "risk": True, "note": "text"})
    found = summarize(rows, bootstrap=10)
    means = {(m, r, k): s["mean"] for m, regions in found.items() for r, metrics in regions.items() for k, s in metrics.items()}
    assert means == pytest.approx(
        {
            **{("", "WT", "dice"): 0.3, ("", "ET", "dice"): 0.8, ("", "ET", "hd95_mm"): 3.0, ("", "", "risk"): 1.0},
            **{("teacher", "WT", "dice"): 0.6},
        }
    )


def test_summary_of_one_case_and_of_none():
    one = summarize([row("a", 0.25)])[""]["WT"]["dice"]
    numbers = dict.fromkeys(["mean", "median", "q25", "q75", "ci_low", "ci_high"], 0.25)
    assert one == {**numbers, "std": None, "n": 1, "missing": 0}
    none = summarize([row("a", math.nan)])[""]["WT"]["dice"]
    assert none == {**dict.fromkeys([*numbers, "std"]), "n": 0, "missing": 1}
    assert summarize([]) == {}


def test_bootstrap_interval_is_that_of_the_mean_and_keyed_by_the_seed():
    rng = np.random.default_rng(0)
    rows = [row(str(i), float(v)) for i, v in enumerate(rng.normal(0.7, 0.1, 100))]
    found = summarize(rows, bootstrap=4000)[""]["WT"]["dice"]
    half = 1.96 * found["std"] / math.sqrt(100)
    assert found["ci_low"] == pytest.approx(found["mean"] - half, abs=0.15 * half)
    assert found["ci_high"] == pytest.approx(found["mean"] + half, abs=0.15 * half)
    assert summarize(rows[::-1], bootstrap=4000)[""]["WT"]["dice"] == found
    other = summarize(rows, bootstrap=4000, seed=1)[""]["WT"]["dice"]
    assert other["mean"] == found["mean"]
    assert other["ci_low"] != found["ci_low"]


def test_rows_round_trip_at_full_precision(tmp_path):
    rows = [
        row("007", 1 / 3, hd95_mm=373.1286640735263, n=12),
        {"case": "1e5", "patient": 'p,"q"', "site": "x\ny", "member": "a/b", "region": "", "risk": np.float32(0.1), "nan": math.nan},
        {"case": "c", "patient": "c", "site": "", "member": "", "region": "ET", "dice": 5e-324, "flag": np.bool_(True), "stage": "1_0"},
    ]
    path = write_rows(tmp_path / "test" / "cases.csv", rows)
    header = path.read_text().splitlines()[0]
    assert header == "case,patient,site,member,region,dice,hd95_mm,n,risk,nan,flag,stage"
    first, second, third = read_rows(path)
    assert first == rows[0]
    assert isinstance(first["n"], int)
    assert math.isnan(second.pop("nan"))
    assert second == {**{k: v for k, v in rows[1].items() if k != "nan"}, "risk": float(np.float32(0.1))}
    assert third == rows[2] | {"flag": 1}
    write_rows(tmp_path / "again.csv", read_rows(path))
    assert (tmp_path / "again.csv").read_bytes() == path.read_bytes()


def test_rows_without_all_keys_and_no_rows(tmp_path):
    write_rows(tmp_path / "rows.csv", [{"region": "WT", "dice": None, "case": "a"}])
    assert read_rows(tmp_path / "rows.csv") == [{"case": "a", "patient": "", "site": "", "member": "", "region": "WT"}]
    write_rows(tmp_path / "none.csv", [])
    assert read_rows(tmp_path / "none.csv") == []


def test_reading_what_is_not_there_or_no_table(tmp_path):
    with pytest.raises(SuiteError, match=r"gone\.csv: no such file"):
        read_rows(tmp_path / "gone.csv")
    (tmp_path / "other.csv").write_text("iteration,value\n1,2\n")
    with pytest.raises(SuiteError, match=r"other\.csv: .*lacks the column\(s\) case, patient"):
        read_rows(tmp_path / "other.csv")


def test_json_is_valid_and_atomic(tmp_path):
    data = {"a": math.nan, "b": [np.float64(0.5), np.int64(3), math.inf], "c": {"d": (None, True, "x")}, 1: np.float32("nan")}
    path = write_json(tmp_path / "deep" / "summary.json", data)
    assert json.loads(path.read_text()) == {"a": None, "b": [0.5, 3, None], "c": {"d": [None, True, "x"]}, "1": None}
    with pytest.raises(TypeError):
        write_json(path, {"bad": object()})
    with pytest.raises((TypeError, ValueError)):
        write_rows(path, [row("a", object())])
    assert json.loads(path.read_text())["b"][0] == 0.5
    assert [p.name for p in path.parent.iterdir()] == ["summary.json"]


def test_reading_rows_brings_neither_torch_nor_pandas():
    code = "import sys, lesionbench.results; print({'torch', 'pandas'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"
