"""Counts per score: measures by hand and as scikit-learn has them, whatever the range, the order and the division of the scores."""

import math

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from lesionbench.errors import SuiteError
from lesionbench.prediction import Prediction
from lesionbench.score_counts import ScoreCounts, dice
from lesionbench.task import Task
from lightning_modules.metrics import CaseMetrics, DatasetMetrics

TASK = Task(("flair",), {"background": 0, "lesion": 1})
ALL = ["dice_best", "auprc", "ap", "auroc", "brain_auroc"]


def counts(scores, labels, dtype=np.float32):
    return ScoreCounts.of(np.array(scores, dtype), np.array(labels, bool))


def draws(name, size=120_000, seed=0):
    """Scores and labels (4 % positives) that overlap."""
    rng = np.random.default_rng(seed)
    positive = rng.random(size) < 0.04
    noise = {
        "bounded": lambda: np.clip(rng.beta(2, 5, size) + 0.3 * positive, 0, 1),
        "equalized": lambda: (rng.permutation(size) + 1.0) / size * (1 - 0.3 * rng.random(size) * ~positive),
        "cauchy": lambda: rng.standard_cauchy(size) + 2 * positive,
        "lognormal": lambda: np.exp(4 * rng.normal(size=size) + 3 * positive),
        "negative": lambda: -np.exp(3 * rng.normal(size=size) - 2 * positive),
        "few values": lambda: rng.integers(0, 7, size) + 2.0 * positive,
        "large offset": lambda: 1000 + rng.random(size) + 0.4 * positive,
        "mostly background": lambda: rng.random(size) * (rng.random(size) < 0.2) + positive * rng.random(size),
    }[name]()
    return noise.astype(np.float32), positive


DISTRIBUTIONS = ["bounded", "equalized", "cauchy", "lognormal", "negative", "few values", "large offset", "mostly background"]


def test_measures_by_hand():
    found = counts([0.25, 0.5, 0.75, 1], [0, 1, 0, 1])
    assert found.auroc() == 0.75
    assert found.average_precision() == pytest.approx(5 / 6)
    assert found.auprc() == pytest.approx(0.5 * (1 + 1) / 2 + 0.5 * (1 / 2 + 2 / 3) / 2)  # 0.7917
    assert found.best_dice() == (0.8, pytest.approx(0.5))  # three marked, both found
    assert found.best_dice()[1] < 0.5  # so that `score > threshold` marks the 0.5
    # thresholds 0.25, 0.5, 0.75, 1 mark 3, 2, 1 and 0 voxels
    assert found.best_dice(4) == (0.8, 0.25)
    assert [a.tolist() for a in found.above(np.array([-1, 0.3, 0.5, 2]))] == [[2, 2, 1, 0], [4, 3, 2, 0]]


def test_limiting_cases():
    perfect = counts([1, 2, 3, 4], [0, 0, 1, 1])
    assert (perfect.auroc(), perfect.auprc(), perfect.average_precision(), perfect.best_dice()[0]) == (1, 1, 1, 1)
    constant = counts([1, 1, 1, 1], [0, 1, 0, 1])
    assert (constant.auroc(), constant.average_precision(), constant.best_dice()[0]) == (0.5, 0.5, pytest.approx(2 / 3))
    nothing = counts([1, 2], [0, 0])
    assert all(math.isnan(x) for x in (nothing.auroc(), nothing.auprc(), nothing.average_precision()))
    assert nothing.best_dice() == (1, 2)  # an empty mask is right
    assert math.isnan(counts([1, 2], [1, 1]).auroc())
    assert counts([1, 2], [1, 1]).auprc() == 1
    assert all(math.isnan(x) for x in counts([], []).best_dice())
    assert counts([0, 1, 2, 3, 4], [0, 1, 0, 0, 1]).best_dice(5) == (pytest.approx(2 / 3), 0)  # thresholds 0 and 3 are equally good


def test_dice_of_counts():
    assert dice(np.array([0, 1, 0]), np.array([0, 2, 3]), 2).tolist() == [0, 0.5, 0]
    assert float(dice(np.array(0), np.array(0), 0)) == 1


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("bins", [2**17, 2**13])
def test_streaming_equals_scikit_learn(name, bins):
    from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_auc_score

    scores, positive = draws(name)
    metric = DatasetMetrics(ALL, thresholds=100, max_bins=bins)
    for s, y in zip(np.array_split(scores, 5), np.array_split(positive, 5), strict=True):
        label = torch.from_numpy(y.astype(np.int8))
        metric.update(Prediction(scores=torch.from_numpy(s)), label, TASK, brain=torch.ones_like(label, dtype=torch.bool))
    found = metric.compute()[""]["lesion"]
    precision, recall, _ = precision_recall_curve(positive, scores)
    tried = np.linspace(scores.min(), scores.max(), 100)
    best = max(2 * (positive & (scores > t)).sum() / (positive.sum() + (scores > t).sum()) for t in tried)
    exact = {"auprc": auc(recall, precision), "ap": average_precision_score(positive, scores), "auroc": roc_auc_score(positive, scores)}
    assert {k: found[k] for k in exact} == pytest.approx(exact, abs=1e-3)
    assert found["brain_auroc"] == found["auroc"]
    assert found["dice_best"] == pytest.approx(best, abs=1e-3)
    assert counts(scores, positive).limited(bins).best_dice()[0] == pytest.approx(counts(scores, positive).best_dice()[0], abs=1e-3)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_counts_do_not_depend_on_order_or_division_and_are_bounded(name):
    scores, positive = draws(name, 30_000)
    whole = counts(scores, positive).limited(500)
    order = np.random.default_rng(1).permutation(scores.size)
    parts = [counts(scores[i], positive[i]).limited(500) for i in np.array_split(order, [10, 11, 9000, 29_000])]
    added = parts[0]
    for part in parts[1:]:
        added = (part + added).limited(500)
        assert added.values.size <= 500
    assert added.bits == whole.bits
    for name in ("values", "positives", "negatives"):
        np.testing.assert_array_equal(getattr(added, name), getattr(whole, name))
    assert whole.positives.sum() + whole.negatives.sum() == scores.size
    assert (np.diff(whole.values) > 0).all()


def test_extreme_scores_are_counted_and_nan_is_refused():
    scores = np.array([-np.inf, -1, -1e-40, -0.0, 0.0, 1e-40, 1, np.inf], np.float32)
    found = counts(scores, scores > 0).limited(4)
    assert found.auroc() >= 0.8
    assert found.values[0] == -np.inf
    assert (found.positives.sum(), found.negatives.sum()) == (3, 5)
    assert counts([0.0, -0.0, 1], [1, 0, 0]).limited(2).values.tolist() == [0, 1]
    with pytest.raises(ValueError, match="NaN"):
        counts([0, np.nan], [0, 1]).limited(4)
    with pytest.raises(SuiteError, match=r"NaN.*lesion"):
        DatasetMetrics().update(Prediction(scores=torch.tensor([0, np.nan])), torch.tensor([0, 1]), TASK)


def test_memory_is_bounded_whatever_the_number_of_cases():
    metric = DatasetMetrics(ALL, max_bins=1000)
    for seed in range(30):
        scores, positive = draws("cauchy", 5000, seed)
        label = torch.from_numpy(positive.astype(np.int8))
        metric.update(Prediction(scores=torch.from_numpy(scores)), label, TASK, brain=label >= 0)
        stored = [c for store in (metric.everywhere, metric.brain) for c in store.values()]
        assert all(c.values.size <= 1000 for c in stored)
    assert sum(int((c.positives + c.negatives).sum()) for c in stored) == 2 * 30 * 5000


def cases():
    """Five cases of different prevalence; one holds ignored voxels, one has a second member."""
    rng = np.random.default_rng(3)
    for number in range(5):
        label = torch.from_numpy((rng.random((6, 5, 4)) < 0.1 * (number + 1)).astype(np.int8))
        scores = torch.from_numpy(rng.normal(size=label.shape).astype(np.float32)) + label
        if number == 2:
            label[0] = -1
        members = {"other": Prediction(scores=-scores)} if number == 4 else {}
        yield Prediction(scores=scores, labels=(scores > 0.5).to(torch.int8), members=members), label, scores > -1


def test_data_set_wise_is_the_measure_of_all_voxels_as_one_set():
    metric = DatasetMetrics([*ALL, "dice"])
    for prediction, label, brain in cases():
        metric.update(prediction, label, TASK, brain)
    found = metric.compute()
    kept = [(p.scores[y >= 0], p.labels[y >= 0] > 0, y[y >= 0] > 0, b[y >= 0]) for p, y, b in cases()]
    scores, marked, true, brain = (torch.cat(part).numpy() for part in zip(*kept, strict=True))
    assert found[""]["lesion"]["auroc"] == pytest.approx(counts(scores, true).auroc())
    assert found[""]["lesion"]["brain_auroc"] == pytest.approx(counts(scores[brain], true[brain]).auroc())
    assert found[""]["lesion"]["dice"] == pytest.approx(2 * (marked & true).sum() / (marked.sum() + true.sum()))
    assert found["other"]["lesion"].keys() == {"dice_best", "threshold_best", "auprc", "ap", "auroc", "brain_auroc"}
    assert "oracle" not in found[""]["lesion"]
    metric.reset()
    assert metric.compute() == {}


def test_one_case_that_the_threshold_was_chosen_on_marks_the_set():
    metric = DatasetMetrics(["dice", "auroc"])
    for number, (prediction, label, _) in enumerate(cases()):
        metric.update(prediction, label, TASK, tuned=number == 1)
    assert metric.compute()[""]["lesion"]["oracle"] == 1


def on_rank(rank, file, out):
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=3)
    metric = DatasetMetrics([*ALL, "dice"], max_bins=64)
    for number, (prediction, label, brain) in enumerate(cases()):
        if number % 2 == rank:  # the third rank sees none
            metric.update(prediction, label, TASK, brain, tuned=number == 1)
    torch.save(metric.compute(), f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_ranks_agree_with_one_process(tmp_path):
    mp.start_processes(on_rank, (str(tmp_path / "store"), str(tmp_path)), nprocs=3, start_method="fork")
    metric = DatasetMetrics([*ALL, "dice"], max_bins=64)
    for number, (prediction, label, brain) in enumerate(cases()):
        metric.update(prediction, label, TASK, brain, tuned=number == 1)
    whole = metric.compute()
    assert set(whole) == {"", "other"}
    assert all(torch.load(tmp_path / f"{rank}.pt") == whole for rank in range(3))


def test_unknown_metric_and_another_grid():
    with pytest.raises(SuiteError, match="data-set-wise metric"):
        DatasetMetrics(["auc"])
    with pytest.raises(SuiteError, match="one grid"):
        DatasetMetrics().update(Prediction(scores=torch.zeros(2, 2)), torch.zeros(3, 2), TASK)


def test_case_metrics_of_scores():
    scores, truth = torch.tensor([[[0.0, 0.25, 0.5, 0.75, 1]]]), torch.tensor([[[0, 0, 1, 0, 1]]])
    metrics = CaseMetrics(ALL)
    (row,) = metrics(Prediction(scores=scores), truth, TASK, (1, 1, 1), brain=scores > 0)
    expected = {"dice_best": 0.8, "auprc": 0.7917, "ap": 5 / 6, "auroc": 5 / 6, "brain_auroc": 0.75}
    assert {k: row[k] for k in expected} == pytest.approx(expected, abs=1e-4)
    (row,) = metrics(Prediction(scores=scores), truth, TASK, (1, 1, 1))
    assert "brain_auroc" not in row
