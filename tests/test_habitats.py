"""The habitat estimators against hand-computed values: filter, scaling, clusters, stability, texture, risk groups, survival, search."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lesionbench.errors import SuiteError
from lightning_modules.habitats import EvaluationLog, HabitatModel, HabitatObjective, HabitatSettings, Search, Theta, Tumor, run_search
from lightning_modules.habitats.bayesopt import Surrogate, expected_improvement
from lightning_modules.habitats.clustering import HabitatClustering
from lightning_modules.habitats.encoder import EncoderSettings
from lightning_modules.habitats.outliers import OutlierFilter
from lightning_modules.habitats.pipeline import label_map, sample_voxels, survival_of
from lightning_modules.habitats.risk_groups import RiskGroups, two_medoids
from lightning_modules.habitats.scaling import Scaling
from lightning_modules.habitats.stability import disagreement, stability_losses
from lightning_modules.habitats.survival import Survival, excess_deaths, log_rank, significance_loss, significant_habitats, survival_time
from lightning_modules.habitats.texture import FEATURES, cooccurrence, directions, run_lengths, texture_features

QUICK = HabitatSettings(encoder=EncoderSettings(epochs=2, batch_size=128), repeats=3)


def patients(count=12, voxels=120, seed=0):
    """Three blobs in three modalities; survival falls with the share of the third."""
    rng = np.random.default_rng(seed)
    centers = np.array([[0, 0, 0], [4, 0, 2], [0, 4, 4]], float)
    positions = np.stack(np.unravel_index(np.arange(voxels), (6, 5, voxels // 30)), axis=1)
    tumors = []
    for n in range(count):
        share = rng.dirichlet([3, 3, 3])
        region = np.sort(rng.choice(3, voxels, p=share))
        values = (centers[region] + rng.normal(0, 0.3, (voxels, 3))).astype(np.float32)
        tumors.append(Tumor(f"p{n:02d}", values, positions, float(rng.exponential(600) * math.exp(-4 * share[2]) + 1), n % 4 > 0))
    return tumors


# filter and scaling


def test_filter_cuts_above_the_quantile_of_any_modality():
    voxels = np.stack([np.arange(101.0), np.arange(101.0)[::-1]], axis=1)
    outliers = OutlierFilter(0.9).fit(voxels)
    assert outliers.high.tolist() == [90, 90]
    assert outliers.keep(voxels).sum() == 81  # 0..90 of each; the last ten of either go
    assert outliers.clip(np.array([[200.0, -50.0]])).tolist() == [[90, -50]]
    assert OutlierFilter(1.0).fit(voxels).keep(voxels).all()
    both = OutlierFilter(0.9, "two_sided").fit(voxels)
    assert both.low == pytest.approx([5, 5])
    assert both.high == pytest.approx([95, 95])
    with pytest.raises(SuiteError, match="two_sided"):
        OutlierFilter(0.9, "both")
    with pytest.raises(SuiteError, match=r"1\.5"):
        OutlierFilter(1.5)


def test_scaling_by_hand_and_a_constant_modality_is_named():
    voxels = np.array([[0.0, 1], [2, 3], [10, 5]])
    assert Scaling("minmax").fit(voxels).transform(voxels).tolist() == pytest.approx(np.array([[-1, -1], [-0.6, 0], [1, 1]]), abs=1e-6)
    z = Scaling("zscore").fit(voxels).transform(voxels)
    assert z.mean(axis=0) == pytest.approx([0, 0], abs=1e-6)
    assert z.std(axis=0) == pytest.approx([1, 1], abs=1e-6)
    assert Scaling("robust").fit(voxels).transform(voxels)[1].tolist() == [0, 0]
    voxels[:, 1] = 7
    with pytest.raises(SuiteError, match=r"modality flair.*no spread.*7 to 7"):
        Scaling("minmax", ("t1", "flair")).fit(voxels)


# clustering and stability


def test_labels_do_not_matter_for_the_disagreement():
    a = np.array([0, 0, 1, 1])
    assert disagreement(a, np.array([1, 1, 0, 0]), 2) == 0
    assert disagreement(a, np.array([0, 1, 0, 1]), 2) == 0.5
    rng = np.random.default_rng(0)
    labels = rng.integers(5, size=500)
    assert disagreement(labels, rng.permutation(5)[labels], 5) == 0
    wrong = labels.copy()
    wrong[:50] = (wrong[:50] + 1) % 5
    assert disagreement(labels, rng.permutation(5)[wrong], 5) == pytest.approx(0.1)


def test_blobs_are_stable_and_one_gaussian_is_not():
    rng = np.random.default_rng(0)
    patient = np.repeat(np.arange(20), 60)
    blobs = rng.normal(size=(1200, 3)) * 0.1 + np.eye(3)[rng.integers(3, size=1200)] * 5
    assert stability_losses(blobs, patient, 3, seed=(4,)).mean() < 0.01
    gaussian = stability_losses(rng.normal(size=(1200, 3)), patient, 6, seed=(0,))
    assert gaussian.mean() > 0.2
    assert gaussian.shape == (10,)


def test_stability_divides_patients_not_voxels(monkeypatch):
    seen = []
    fit = HabitatClustering.fit
    monkeypatch.setattr(HabitatClustering, "fit", lambda self, z: (seen.append(set(z[:, 0].astype(int))), fit(self, z))[1])
    patient = np.repeat(np.arange(10), 30)
    latent = np.stack([patient, np.random.default_rng(0).normal(size=300)], axis=1).astype(np.float32)
    stability_losses(latent, patient, 2, repeats=5, share=0.7, seed=(1,))
    for first, second in zip(seen[::2], seen[1::2], strict=True):
        assert first.isdisjoint(second)
        assert len(first) == 7
        assert first | second == set(range(10))
    assert len({tuple(sorted(s)) for s in seen[::2]}) > 1
    with pytest.raises(SuiteError, match="two patients"):
        stability_losses(latent, np.zeros(300, int), 2)


def test_stability_compares_labels_of_the_validation_side(monkeypatch):
    """Eq. 1: C and C' both label Omega_val. Here patients 0 to 6 have voxels that every clustering divides alike, and the share of differing
    labels is counted by hand on the voxels that were asked for."""
    fitted, asked = [], []
    fit, predict = HabitatClustering.fit, HabitatClustering.predict
    monkeypatch.setattr(HabitatClustering, "fit", lambda self, z: (fitted.append(z), fit(self, z))[1])
    monkeypatch.setattr(HabitatClustering, "predict", lambda self, z: asked.append((z, predict(self, z))) or asked[-1][1])
    patient = np.repeat(np.arange(10), 30)
    latent = np.random.default_rng(0).normal(size=(300, 2))
    losses = stability_losses(latent, patient, 4, repeats=3, share=0.7, seed=(1,))
    for repeat in range(3):
        (_, validation), pair = fitted[2 * repeat : 2 * repeat + 2], asked[2 * repeat : 2 * repeat + 2]
        assert len(validation) == 90  # three patients
        assert all(np.array_equal(seen, validation) for seen, _ in pair)
        first, second = (labels for _, labels in pair)
        best = min((np.array(names)[first] != second).mean() for names in itertools.permutations(range(4)))
        assert losses[repeat] == pytest.approx(best)
    assert losses.min() > 0


def test_82_patients_are_divided_into_57_and_25(monkeypatch):
    sizes = []
    fit = HabitatClustering.fit
    monkeypatch.setattr(HabitatClustering, "fit", lambda self, z: (sizes.append(len(z)), fit(self, z))[1])
    stability_losses(np.random.default_rng(0).normal(size=(82, 2)), np.arange(82), 3, repeats=2)
    assert sizes == [57, 25] * 2


@pytest.mark.parametrize("clusters", [2, 3, 5])
def test_the_stability_loss_ends_at_one_less_the_share_of_a_cluster(clusters):
    """Labels that have nothing to do with each other; nothing is stretched to 1."""
    first, second = np.divmod(np.arange(clusters**2), clusters)
    assert disagreement(first, second, clusters) == pytest.approx(1 - 1 / clusters)


# texture


def test_row_of_three_by_hand():
    f = texture_features(np.array([[1, 1, 2]]))
    assert {k: f[k] for k in ("lre", "sre", "non_uniformity", "run_variance", "run_entropy")} == pytest.approx(
        {"lre": 2.5, "sre": 0.625, "non_uniformity": 0.5, "run_variance": 0.25, "run_entropy": 1}
    )
    # pairs (1,1), (1,2) symmetric: p = [[2, 1], [1, 0]] / 4
    assert f["joint_energy"] == pytest.approx(6 / 16)
    hx, hxy = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)), 1.5
    assert f["imc1"] == pytest.approx((hxy - 2 * hx) / hx)
    assert f["rmi"] == pytest.approx((hx - (hxy - hx)) / hx)
    assert f["entropy"] == pytest.approx(-(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3)))
    assert tuple(f) == FEATURES


def test_constant_maps():
    for shape in ((6,), (4, 5), (3, 4, 5)):
        f = texture_features(np.ones(shape, int))
        assert f["entropy"] == pytest.approx(0, abs=1e-12)
        assert f["joint_energy"] == pytest.approx(1)
        assert (f["imc1"], f["rmi"]) == (0, 0)
    assert texture_features(np.ones(6, int))["run_entropy"] == pytest.approx(0, abs=1e-12)  # one run
    single = texture_features(np.array([[[0, 3]]]))
    assert (single["lre"], single["sre"], single["joint_energy"]) == (1, 1, 1)
    with pytest.raises(ValueError, match="without labels"):
        texture_features(np.zeros((3, 3), int))


@pytest.mark.parametrize("shape", [(9, 11), (7, 8, 6)])
def test_names_of_labels_do_not_matter(shape):
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 5, size=shape)
    before = texture_features(labels, 4)
    for _ in range(5):
        renamed = np.concatenate([[0], 1 + rng.permutation(4)])[labels]
        assert texture_features(renamed, 4) == pytest.approx(before)


def test_cooccurrence_equals_skimage_without_background():
    from skimage.feature import graycomatrix

    labels = np.random.default_rng(1).integers(0, 6, size=(31, 17)).astype(np.uint8)
    angles = {(0, 1): 0, (1, 1): np.pi / 4, (1, 0): np.pi / 2, (1, -1): 3 * np.pi / 4}
    steps = directions(labels.shape)
    assert set(steps) == set(angles)
    theirs = graycomatrix(labels, [1], [angles[s] for s in steps], levels=6, symmetric=True)[1:, 1:, 0]
    assert np.array_equal(cooccurrence(labels, 5, steps), theirs.transpose(2, 0, 1))
    volume = cooccurrence(labels[:, None], 5, [(a, 0, b) for a, b in steps])  # the same through the layout for volumes
    assert np.array_equal(volume, theirs.transpose(2, 0, 1))


def test_cooccurrence_of_a_volume_by_walking():
    labels = np.random.default_rng(4).integers(0, 4, size=(5, 3, 6))
    for counts, step in zip(cooccurrence(labels, 3, directions(labels.shape)), directions(labels.shape), strict=True):
        expected = np.zeros((3, 3), int)
        for here in np.argwhere(labels):
            there = here + step
            if (there >= 0).all() and (there < labels.shape).all() and labels[tuple(there)]:
                expected[labels[tuple(here)] - 1, labels[tuple(there)] - 1] += 1
        assert np.array_equal(counts, expected + expected.T), step


def brute_runs(labels, step):
    """Runs by walking along every line."""
    counts = {}
    for start in np.argwhere(labels):
        value, before = labels[tuple(start)], start - step
        inside = (before >= 0).all() and (before < labels.shape).all()
        if inside and labels[tuple(before)] == value:
            continue
        length, here = 0, start.copy()
        while (here >= 0).all() and (here < labels.shape).all() and labels[tuple(here)] == value:
            length, here = length + 1, here + step
        counts[value, length] = counts.get((value, length), 0) + 1
    return counts


@pytest.mark.parametrize("shape", [(6, 7), (5, 4, 6)])
def test_runs_equal_a_walk_along_every_line(shape):
    labels = np.random.default_rng(2).integers(0, 3, size=shape)
    steps = directions(shape)
    assert len(steps) == (4 if len(shape) == 2 else 13)
    found = run_lengths(labels, 2, steps)
    for runs, step in zip(found, steps, strict=True):
        counted = {(i + 1, j + 1): n for (i, j), n in np.ndenumerate(runs) if n}
        assert counted == brute_runs(labels, np.array(step))
        assert (runs * np.arange(1, runs.shape[1] + 1)).sum() == (labels > 0).sum()


def pyradiomics(labels, levels, step):
    """The features of one direction, written down from the definitions of the PyRadiomics documentation."""
    eps, p = np.spacing(1), np.zeros((levels, levels))
    for here in np.argwhere(labels):
        there = here + step
        if (there >= 0).all() and (there < labels.shape).all() and labels[tuple(there)]:
            i, j = labels[tuple(here)] - 1, labels[tuple(there)] - 1
            p[i, j] += 1
            p[j, i] += 1
    p /= p.sum()
    px = p.sum(axis=1)
    hx = -sum(v * np.log2(v + eps) for v in px)
    hxy = -sum(v * np.log2(v + eps) for v in p.ravel())
    hxy1 = -sum(p[i, j] * np.log2(px[i] * px[j] + eps) for i in range(levels) for j in range(levels))
    runs = brute_runs(labels, step)
    total = sum(runs.values())
    mean = sum(n / total * j for (_, j), n in runs.items())
    return {
        "JointEnergy": (p**2).sum(),
        "Imc1": (hxy - hxy1) / hx,
        "LongRunEmphasis": sum(n * j**2 for (_, j), n in runs.items()) / total,
        "ShortRunEmphasis": sum(n / j**2 for (_, j), n in runs.items()) / total,
        "GrayLevelNonUniformityNormalized": sum(sum(n for (i, _), n in runs.items() if i == g) ** 2 for g in range(1, levels + 1))
        / total**2,
        "RunVariance": sum(n / total * (j - mean) ** 2 for (_, j), n in runs.items()),
        "RunEntropy": -sum(n / total * np.log2(n / total + eps) for n in runs.values()),
    }


def test_features_are_the_published_definitions_averaged_over_directions():
    labels = np.random.default_rng(5).integers(0, 4, size=(5, 6, 4))
    each = [pyradiomics(labels, 3, np.array(step)) for step in directions(labels.shape)]
    mean = {name: np.mean([e[name] for e in each]) for name in each[0]}
    ours = texture_features(labels, 3)
    names = ("joint_energy", "imc1", "lre", "sre", "non_uniformity", "run_variance", "run_entropy")
    assert [ours[n] for n in names] == pytest.approx(list(mean.values()))


def test_texture_within_slices_does_not_look_across_them():
    rng = np.random.default_rng(0)
    labels = rng.integers(1, 4, size=(6, 5, 4))
    within = texture_features(labels, 3, plane=2)
    assert within == pytest.approx(texture_features(labels[:, :, [2, 0, 3, 1]], 3, plane=2))
    assert within != pytest.approx(texture_features(labels, 3))
    flat = labels[:, :, :1]
    assert texture_features(flat, 3, plane=2) == pytest.approx(texture_features(flat[..., 0], 3))


# risk groups and survival


def test_two_medoids_are_the_best_pair():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(15, 4))
    distance = np.linalg.norm(points[:, None] - points[None], axis=2)
    costs = {(i, j): np.minimum(distance[i], distance[j]).sum() for i in range(15) for j in range(i + 1, 15)}
    assert two_medoids(points) == min(costs, key=costs.get)
    with pytest.raises(SuiteError, match="two training patients"):
        two_medoids(points[:1])


def test_high_risk_is_the_group_with_more_deaths_than_expected():
    features = np.array([[0.0, 1], [0.1, 1], [0.2, 1], [9.0, 1], [9.1, 1], [9.2, 1]])
    survival = Survival(np.array([10.0, 11, 12, 100, 110, 120]), np.ones(6, bool))
    groups = RiskGroups().fit(features)
    groups.orient(excess_deaths(survival, groups.predict(features).astype(bool)))
    assert groups.predict(features).tolist() == [1, 1, 1, 0, 0, 0]
    assert groups.predict(np.array([[-5.0, 99]])).tolist() == [1]  # a feature without spread counts for nothing


def test_log_rank_by_hand_and_where_it_says_nothing():
    days, died = np.array([1.0, 2, 3, 4, 5, 6]), np.ones(6, bool)
    high = np.array([True, True, True, False, False, False])
    survival = Survival(days, died)
    expected = 3 / 6 + 2 / 5 + 1 / 4
    assert excess_deaths(survival, high) == pytest.approx((expected - 3, 3 - expected))
    variance = (3 * 3) / 36 + (2 * 3) / 25 + (1 * 3) / 16
    from scipy.stats import chi2

    assert log_rank(survival, high) == pytest.approx(chi2.sf((3 - expected) ** 2 / variance, 1))
    assert log_rank(survival, np.array([True, True, False, False, False, False])) == 1
    assert log_rank(Survival(days, np.zeros(6, bool)), high) == 1
    unknown = Survival(np.append(days, np.nan), np.append(died, False))
    assert log_rank(unknown, np.append(high, False)) == log_rank(survival, high)


def test_unusable_survival_is_refused():
    with pytest.raises(SuiteError, match=r"none of the 3.*habitats\.alpha=1"):
        Survival(np.full(3, np.nan), np.zeros(3, bool)).require_events()
    with pytest.raises(SuiteError, match=r"all 2 training patients.*censored"):
        Survival(np.array([5.0, 7, np.nan]), np.zeros(3, bool)).require_events()
    with pytest.raises(SuiteError, match="-3"):
        Survival(np.array([5.0, -3]), np.ones(2, bool)).require_events()


def test_significance_loss_falls_with_p_and_tau_changes_no_minimum():
    p = np.array([1.0, 0.5, 0.05, 0.01, 1e-3, 1e-4])
    for scale in ("unit", "raw"):
        losses = [significance_loss(v, scale) for v in p]
        assert all(a > b for a, b in itertools.pairwise(losses))
        assert math.isfinite(significance_loss(0.0, scale))
        for tau in (1e-3, 0.5):
            moved = [significance_loss(v, scale, tau=tau) for v in p]
            assert np.ptp(np.subtract(moved, losses)) == pytest.approx(0, abs=1e-12)
    assert [significance_loss(v) for v in (1.0, 1e-2, 1e-4, 0.0)] == pytest.approx([1, 0.5, 0, 0])
    assert significance_loss(0.01, "raw", tau=0.05) == pytest.approx(math.log(0.2))
    assert significance_loss(0.01, "as_printed") == -significance_loss(0.01, "raw")
    with pytest.raises(SuiteError, match="unit"):
        significance_loss(0.1, "units")


def test_survival_is_read_from_attributes():
    assert survival_time("a", {"survival": 361.0, "event": 0}, "survival", "event") == (361, False)
    assert survival_time("a", {"days": "12", "dead": "1"}, "days", "dead") == (12, True)
    for attributes in ({}, {"survival": 5}, {"event": 1}):  # one without the other is no survival time, and no censored one either
        days, died = survival_time("a", attributes, "survival", "event")
        assert np.isnan(days)
        assert not died
    for days, event in ((5, 2), (5, "alive"), (5, 0.5), (0, 1), (-5, 1), ("long", 1), (float("inf"), 0)):
        with pytest.raises(SuiteError, match=r"case a: .*0 \(censored\) or 1 \(died\)"):
            survival_time("a", {"survival": days, "event": event}, "survival", "event")


def test_significant_habitats_are_those_that_separate_survival():
    rng = np.random.default_rng(0)
    fractions = rng.random((40, 5))
    survival = Survival(1000 * np.exp(-3 * fractions[:, 3]) + rng.random(40), np.ones(40, bool))
    assert 3 in significant_habitats(fractions, survival)


# search


@pytest.mark.parametrize(("mean", "variance", "value"), [(0.0, 1.0, 0.39894228), (-2.0, 1e-12, 2.0), (2.0, 1e-12, 0.0)])
def test_expected_improvement(mean, variance, value):
    from botorch.utils.testing import MockModel, MockPosterior

    at = torch.tensor([[[1.0]]], dtype=torch.float64)
    model = MockModel(MockPosterior(mean=mean * at, variance=variance * at))
    assert expected_improvement(model, 0.0)(torch.zeros(1, 1, 2, dtype=torch.float64)).exp().item() == pytest.approx(value, abs=1e-5)


def test_search_proposes_whole_clusters_and_nothing_twice():
    search, log = Search(initial=4, iterations=2, quantile=(0.9, 1.0), step=0.05), EvaluationLog()
    run_search(search, lambda t: {"loss": 1.0}, log)  # a flat loss: the surrogate has nothing to prefer
    assert len(log.rows) == 8
    assert len(set(log.thetas)) == 8
    assert all(isinstance(t.clusters, int) and 3 <= t.clusters <= 7 and 0.9 <= t.quantile <= 1 for t in log.thetas)
    everything = Search(strategy="random", initial=50, quantile=(0.9, 1.0), step=0.05)
    assert everything.budget == 15
    run_search(everything, lambda t: {"loss": 1.0}, log := EvaluationLog())
    assert len(set(log.thetas)) == 15
    with pytest.raises(SuiteError, match="all 15"):
        everything.propose(log.thetas, log.losses)


def test_grid_is_spread_over_both_parameters():
    search = Search(strategy="grid")
    run_search(search, lambda t: {"loss": t.quantile}, log := EvaluationLog())
    assert len(log.rows) == 30
    assert {t.clusters for t in log.thetas} == {3, 4, 5, 6, 7}
    assert {t.quantile for t in log.thetas} == {0.5, 0.6, 0.7, 0.8, 0.9, 1.0}


def test_rounds_take_the_improvement_then_the_posterior_minimum():
    from scipy.stats import norm

    search = Search(initial=6, quantile=(0, 1))
    done = [Theta(q, k) for k in (3, 7) for q in (0.1, 0.5, 0.9)]
    losses = [(t.quantile - 0.7) ** 2 + (t.clusters - 5) ** 2 / 4 for t in done]
    settings = search.settings()
    free = settings[[Theta(float(q), int(k)) not in done for q, k in settings]]
    mean, std = Surrogate(search, done, losses).predict(free)
    assert (std > 0).all()
    below = (min(losses) - mean) / std
    improvement = std * (below * norm.cdf(below) + norm.pdf(below))  # eq. 4
    highest, lowest = (Theta(float(row[0]), int(row[1])) for row in (free[improvement.argmax()], free[mean.argmin()]))
    assert highest != lowest
    assert search.propose(done, losses) == highest
    assert Search(initial=5, quantile=(0, 1)).propose(done, losses) == lowest  # one evaluation further in its round


def test_search_stops_when_nothing_improves():
    log = EvaluationLog()
    run_search(Search(initial=3, iterations=10, patience=1, quantile=(0.9, 1.0)), lambda t: {"loss": 0.5}, log)
    assert len(log.rows) == 5


def test_search_goes_on_from_its_log_as_if_nothing_had_happened(tmp_path):
    search = Search(initial=3, iterations=1)

    def loss(theta):
        return {"loss": (theta.quantile - 0.7) ** 2 + (theta.clusters - 5) ** 2 / 4 + 1 / 3, "extra": float("nan")}

    whole = EvaluationLog(tmp_path / "whole.csv")
    run_search(search, loss, whole, seed=1)
    for done in (2, 4):
        log = EvaluationLog(tmp_path / f"{done}.csv")
        calls = []

        def dying(theta, calls=calls, done=done):
            if len(calls) == done:
                raise KeyboardInterrupt
            calls.append(theta)
            return loss(theta)

        with pytest.raises(KeyboardInterrupt):
            run_search(search, dying, log, seed=1)
        seen = []
        run_search(search, loss, EvaluationLog(log.path), seed=1, watch=lambda n, row, seen=seen: seen.append(n))
        assert log.path.read_text() == whole.path.read_text()
        assert seen == list(range(1, 6))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"strategy": "bayes"}, "bo"),
        ({"proposals": ["ucb"]}, "ei"),
        ({"quantile": (0.9, 0.5)}, "quantile"),
        ({"initial": 1}, "initial=1"),
        ({"iterations": -1}, "iterations=-1"),
        ({"patience": 0}, "patience=0"),
        ({"limit": 0}, "limit=0"),
    ],
)
def test_bad_searches_are_named(options, named):
    with pytest.raises(SuiteError, match=named):
        Search(**options)


# the whole pipeline


def test_pipeline_finds_planted_habitats_and_nothing_is_refitted_by_prediction():
    tumors = patients()
    objective = HabitatObjective(tumors, QUICK)
    row = objective(Theta(1.0, 3))
    assert row["stability_loss"] < 0.05
    assert row["loss"] == pytest.approx(0.5 * row["stability_loss"] + 0.5 * row["significance_loss"])
    assert row["kept"] == 1
    model, training = objective.fit(Theta(1.0, 3))
    for tumor, fitted in zip(tumors, training, strict=True):
        assert [len(set(fitted.labels[tumor.values[:, 0] > 2])), set(fitted.labels)] == [1, {1, 2, 3}]
        again = model.predict(tumor.values, tumor.positions)
        assert (again.features, again.high_risk) == (fitted.features, fitted.high_risk)
        assert np.array_equal(again.labels, fitted.labels)
    before = {k: v.clone() for k, v in model.state()["arrays"].items()}
    other = patients(3, seed=5)[0]
    found = model.predict(other.values * 3, other.positions)
    copy = HabitatModel.from_state(torch_round_trip(model.state()))
    assert all(torch.equal(model.state()["arrays"][k], v) for k, v in before.items())
    assert copy.predict(other.values * 3, other.positions).features == found.features
    means = [np.concatenate([t.values[p.labels == k, 0] for t, p in zip(tumors, training, strict=True)]).mean() for k in (1, 2, 3)]
    assert means == sorted(means)  # numbered by the first modality


def torch_round_trip(state):
    """Through a file that is read as plain data."""
    import io

    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_encoders_are_fitted_once_per_quantile_and_kept_on_disk(tmp_path, monkeypatch):
    from lightning_modules.habitats import pipeline

    calls, fit = [], pipeline.fit_encoder
    monkeypatch.setattr(pipeline, "fit_encoder", lambda *a, **k: (calls.append(1), fit(*a, **k))[1])
    one = HabitatObjective(patients(), QUICK, folder=tmp_path)
    rows = [one(Theta(q, k)) for q, k in ((0.9, 3), (0.9, 4), (1.0, 3))]
    assert len(calls) == 2
    again = HabitatObjective(patients(), QUICK, folder=tmp_path)
    for theta, row in zip(((0.9, 3), (0.9, 4), (1.0, 3)), rows, strict=True):
        same = again(Theta(*theta))
        assert {k: v for k, v in same.items() if k[:2] != "s_"} == {k: v for k, v in row.items() if k[:2] != "s_"}
    assert len(calls) == 2


def test_a_quantile_that_leaves_too_little_is_unstable_and_insignificant():
    objective = HabitatObjective(patients(), QUICK)
    row = objective(Theta(0.0, 3))
    assert (row["stability_loss"], row["p_train"], row["loss"]) == (1, 1, 1)
    with pytest.raises(SuiteError, match="min_kept"):
        objective.fit(Theta(0.0, 3))


def test_patients_without_survival_count_for_everything_but_the_test():
    tumors = patients()
    without = [Tumor(t.case, t.values, t.positions) if n < 3 else t for n, t in enumerate(tumors)]
    full, partial = (HabitatObjective(t, QUICK)(Theta(1.0, 3)) for t in (tumors, without))
    assert full["stability_loss"] == partial["stability_loss"]
    nothing = [Tumor(t.case, t.values, t.positions) for t in tumors]
    with pytest.raises(SuiteError, match="survival time"):
        HabitatObjective(nothing, QUICK)
    stable = HabitatSettings(**{**vars(QUICK), "alpha": 1.0})
    assert HabitatObjective(nothing, stable)(Theta(1.0, 3))["p_train"] == 1


def test_sessions_of_a_patient_stay_together():
    tumors = [Tumor(f"s{n}", t.values, t.positions, t.days, t.died, patient=f"p{n // 2}") for n, t in enumerate(patients(6))]
    values, patient = sample_voxels(tumors, 50, 0)
    assert values.shape == (300, 3)
    assert np.bincount(patient).tolist() == [100, 100, 100]


def test_label_map_puts_labels_at_their_places():
    positions = np.array([[5, 7, 2], [6, 7, 2], [6, 9, 3]])
    box = label_map(np.array([1, 2, 3], np.int8), positions)
    assert box.shape == (2, 3, 2)
    assert (box[0, 0, 0], box[1, 0, 0], box[1, 2, 1], (box > 0).sum()) == (1, 2, 3, 3)


@pytest.mark.parametrize(
    ("make", "options", "named"),
    [
        (HabitatSettings, {"alpha": 2}, "alpha=2"), (HabitatSettings, {"texture": "4d"}, "habitats.texture"), (HabitatSettings, {"scaling": "log"}, "minmax"),
        (HabitatSettings, {"filter_mode": "lower"}, "two_sided"), (HabitatSettings, {"significance": "units"}, "unit"), (HabitatSettings, {"share": 1.0}, "share=1"),
        (HabitatSettings, {"repeats": 0}, "repeats=0"), (HabitatSettings, {"voxels_per_patient": 0}, "voxels_per_patient=0"), (HabitatSettings, {"tau": 0}, "tau=0"),
        (HabitatSettings, {"p_floor": 0}, "p_floor=0"), (HabitatSettings, {"min_kept": 1.5}, "min_kept=1.5"), (EncoderSettings, {"kind": "vae"}, "ensemble"),
        (EncoderSettings, {"update": "both"}, "joint"), (EncoderSettings, {"batch_size": 0}, "batch_size=0"),
    ],
)  # fmt: skip
def test_bad_settings_are_named(make, options, named):
    with pytest.raises(SuiteError, match=named):
        make(**options)


def test_training_groups_are_those_of_prediction_whichever_group_lives_longer():
    for turned in (False, True):  # one of them turns the groups round
        tumors = [replace(t, days=1e5 / t.days if turned else t.days) for t in patients()]
        model, training = HabitatObjective(tumors, QUICK).fit(Theta(1.0, 3))
        high = np.array([p.high_risk for p in training])
        assert [model.predict(t.values, t.positions).high_risk for t in tumors] == high.tolist()
        assert excess_deaths(survival_of(tumors), high)[1] > 0


def test_texture_settings_reach_the_features():
    labels, positions = np.array([1, 2, 1, 1, 2, 2, 2, 1], np.int8), np.argwhere(np.ones((2, 2, 2)))
    for texture, axis in (("3d", 2), ("2d", 2), ("2d", 0)):
        model = HabitatModel(Theta(1.0, 2), replace(QUICK, texture=texture, slice_axis=axis), None)
        expected = texture_features(labels.reshape(2, 2, 2), 2, axis if texture == "2d" else None)
        assert {n: v for n, v in model.describe(labels, positions).items() if n in FEATURES} == expected
    within = [texture_features(labels.reshape(2, 2, 2), 2, plane)["rmi"] for plane in (None, 2, 0)]
    assert len(set(within)) == 3


def test_loss_settings_reach_the_loss():
    tumors = patients()
    options = {"significance": "raw", "tau": 0.2, "p_floor": 0.999, "alpha": 0.25}
    row = HabitatObjective(tumors, replace(QUICK, **options))(Theta(1.0, 3))
    assert row["significance_loss"] == pytest.approx(math.log(max(row["p_train"], 0.999) / 0.2))
    assert row["loss"] == pytest.approx(0.25 * row["stability_loss"] + 0.75 * row["significance_loss"])
    objective = HabitatObjective(tumors, replace(QUICK, share=0.4, repeats=2))
    found = objective.stability(objective.sample, objective.patient, 6)
    assert found.tolist() == stability_losses(objective.sample, objective.patient, 6, repeats=2, share=0.4, seed=("stability", 0)).tolist()
    assert found.tolist() != stability_losses(objective.sample, objective.patient, 6, repeats=2, seed=("stability", 0)).tolist()


def test_outliers_have_the_habitat_of_their_cut_off():
    """Maps have no holes: a voxel beyond a cut-off is clipped to it before it is scaled and encoded."""
    tumors = patients()
    model, _ = HabitatObjective(tumors, QUICK).fit(Theta(0.9, 3))
    assert np.isfinite(model.encoder.outliers.high).all()
    values = np.concatenate([t.values for t in tumors])
    beyond = model.encoder.outliers.high + np.float32([[0, 0, 0], [50, 0, 0], [0, 1e3, 0], [1e6, 1e6, 1e6]])
    latent = model.encoder.transform(beyond)
    assert np.array_equal(latent, np.repeat(latent[:1], 4, axis=0))
    assert set(model.label(np.concatenate([values, beyond]))) == {1, 2, 3}


def test_example_of_the_page():
    page = (Path(__file__).parent.parent / "docs" / "methods" / "fae.md").read_text()
    names = {}
    exec(page.partition("```python\n")[2].partition("```")[0], names)
    assert names["found"].labels.shape == (120,)
    assert len(names["training"]) == 12


# leaks: what belongs to held-out patients reaches nothing that is fitted (see also tests/methods/test_fae_stages.py)


def test_estimators_never_see_held_out_patients():
    tumors = patients(16)
    objective = HabitatObjective(tumors[:12], QUICK)
    row, (model, _) = objective(Theta(0.9, 4)), objective.fit(Theta(0.9, 4))
    for held_out in tumors[12:]:
        held_out.values[...] *= -7
        model.predict(held_out.values, held_out.positions)
    again = HabitatObjective(tumors[:12], QUICK)
    assert {k: v for k, v in again(Theta(0.9, 4)).items() if k[:2] != "s_"} == {k: v for k, v in row.items() if k[:2] != "s_"}
    fitted = again.fit(Theta(0.9, 4))[0].state()["arrays"]
    assert all(torch.equal(v, model.state()["arrays"][k]) for k, v in fitted.items())
