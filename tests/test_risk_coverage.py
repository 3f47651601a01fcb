"""Errors that are left when uncertain voxels are left out: curves by hand, over cases and ranks, and in a report."""

import csv
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import uncertainty_table
from callbacks import RiskCoverage
from callbacks.risk_coverage import LEFT_OUT, uncertainty_maps
from lesionbench.prediction import CaseResult, Prediction
from lesionbench.reports.html_report import _risk_coverage, _risk_curves
from lesionbench.results import write_rows
from lesionbench.score_counts import ScoreCounts


def test_risk_by_hand():
    counts = ScoreCounts.of(np.array([0.1, 0.2, 0.2, 0.9]), np.array([False, True, False, True]))
    # the surest voxel alone is right; of the two that tie as much of the wrong as of the right one is kept
    assert counts.risk(np.array([0.25, 0.5, 0.75, 1.0])) == pytest.approx([0, 0.5 / 2, 1 / 3, 2 / 4])
    assert math.isnan(ScoreCounts.of(np.zeros(0), np.zeros(0, bool)).risk(np.array([1.0]))[0])


def test_risk_falls_where_errors_are_uncertain_and_stays_where_they_are_not():
    generator = np.random.default_rng(0)
    doubt = generator.random(50_000)
    coverage = np.linspace(0.1, 1, 10)
    finds = ScoreCounts.of(doubt, generator.random(doubt.size) < doubt / 2).risk(coverage)
    assert (np.diff(finds) > 0).all()
    assert finds == pytest.approx(coverage / 4, abs=0.01)
    blind = ScoreCounts.of(doubt, generator.random(doubt.size) < 0.25).risk(coverage)
    assert blind == pytest.approx(np.full(10, 0.25), abs=0.02)


def result(case, labels, truth, uncertainty, **more):
    maps = {name: torch.tensor([[values]]) for name, values in uncertainty.items()}
    prediction = Prediction(labels=torch.tensor([[labels]]), uncertainty=maps, **more)
    return CaseResult(case, case, "", prediction, torch.tensor([[truth]]), None, None, native=False)


def written(folder):
    with (folder / "test" / "risk_coverage.csv").open() as file:
        return list(csv.DictReader(file))


def test_cases_and_ranks_are_one_set(tmp_path):
    callback, trainer = RiskCoverage(str(tmp_path)), SimpleNamespace(is_global_zero=True)
    callback.on_test_epoch_start(trainer, None)
    first = result("a", [0, 1, 1, 0], [0, 1, 0, -1], {"doubt": [0.1, 0.2, 0.8, 9.0]})
    second = result("b", [0, 1], [0, 0], {"doubt": [0.3, 0.4]}, members={"plain": Prediction(labels=torch.tensor([[[0, 0]]]))})
    callback.on_test_batch_end(trainer, None, first, None, 0)
    other, callback.collected = callback.collected, {}
    callback.on_test_batch_end(trainer, None, second, None, 1)
    callback.write([other, callback.collected], None)
    rows = written(tmp_path)
    assert {(row["member"], row["map"]) for row in rows} == {("", "doubt")}  # a member without maps has no curve
    # five voxels count, two of them are wrong: 0.8 and 0.4, the most uncertain
    at = {float(row["left_out"]): (float(row["risk"]), float(row["best"])) for row in rows}
    assert at[0] == pytest.approx((0.4, 0.4))
    assert at[0.5] == (0, 0)
    assert [float(row["left_out"]) for row in rows] == pytest.approx(LEFT_OUT, rel=1e-3)
    near = min(at, key=lambda share: abs(share - 0.1))
    assert at[near] == pytest.approx(((2 - 5 * near) / (5 - 5 * near),) * 2, abs=1e-3)
    assert (tmp_path / "figures" / "risk_coverage.png").stat().st_size > 1000


def test_region_entropy_is_a_map_of_every_prediction_with_probabilities():
    regions = torch.tensor([0.5, 1 + 1e-6, 0.0]).reshape(1, 1, 1, 3)
    maps = uncertainty_maps(Prediction(regions=torch.cat([regions, regions * 0]), uncertainty={"critic": regions[0]}))
    assert list(maps) == ["critic", "region_entropy"]
    assert maps["region_entropy"].flatten().tolist() == pytest.approx([math.log(2) / 2, 0, 0])
    assert uncertainty_maps(Prediction()) == {}


def test_nothing_is_written_without_truth_or_maps(tmp_path):
    callback, trainer = RiskCoverage(str(tmp_path)), SimpleNamespace(is_global_zero=True)
    callback.on_test_epoch_start(trainer, None)
    callback.on_test_batch_end(trainer, None, result("a", [0, 1], [0, 0], {}), None, 0)
    callback.on_test_epoch_end(trainer, None)
    assert list(tmp_path.iterdir()) == []


def test_curves_in_a_report(tmp_path):
    assert _risk_curves(tmp_path / "test" / "risk_coverage.csv") == {}
    callback = RiskCoverage(str(tmp_path))
    callback.collected = {}
    callback.add(result("a", [0, 1, 1], [0, 1, 0], {"doubt": [0.1, 0.2, 0.8]}), None, None)
    callback.write([callback.collected], None)
    curves = _risk_curves(tmp_path / "test" / "risk_coverage.csv")
    assert curves["doubt"].shape == (3, len(LEFT_OUT) - 1)  # none left out has no place on a logarithmic axis
    page = _risk_coverage(SimpleNamespace(folders={"one": [tmp_path], "none": [tmp_path / "absent"]}))
    assert "<svg" in page
    assert ">one<" in page
    assert ">none<" not in page
    assert "callbacks=[default,risk_coverage]" in _risk_coverage(SimpleNamespace(folders={"none": [tmp_path / "absent"]}))


def test_table_and_figure_of_several_methods(tmp_path):
    for seed, score in ((0, 0.6), (1, 0.8)):
        folder = tmp_path / "reciprocal" / "x" / f"seed={seed}"
        callback = RiskCoverage(str(folder))
        callback.collected = {}
        callback.add(
            result("a", [0, 1, 1], [0, 1, 0], {"critic": [0.1, 0.2, 0.8]}, regions=torch.tensor([0.1, 0.9, 0.6]).reshape(1, 1, 1, 3)),
            None,
            None,
        )
        callback.write([callback.collected], None)
        scores = {f"{name}_critic": score for name in ("auroc", "qu_brats", "qu_dice", "qu_ftp", "qu_ftn")}
        rows = [{"case": case, "member": "", "region": "WT", "dice": score, "ece": 0.1, "brier": math.nan, **scores} for case in "ab"]
        write_rows(folder / "test" / "cases.csv", [*rows, {"case": "a", "member": "", "region": "", "presence_et": 0.3}])
    (row,) = uncertainty_table.table(tmp_path)
    assert (row["method"], row["map"], row["runs"], row["brier"]) == ("reciprocal", "critic", 2, "")
    assert (row["auroc"], row["auroc_std"], row["dice"]) == ("0.7000", "0.1414", "0.7000")
    uncertainty_table.draw(tmp_path, tmp_path / "risk.png")
    assert (tmp_path / "risk.png").stat().st_size > 1000
    assert [len(uncertainty_table.folders(tmp_path, "reciprocal", seed)) for seed in (None, 0, 2)] == [2, 1, 0]
