"""Thresholds of probability and suppressed regions, chosen on held-out cases; the rules that apply them."""

import json

import numpy as np
import pytest
import torch

from datamodules.readers.brats_files import brats_task
from lesionbench.errors import SuiteError
from lesionbench.prediction import Prediction
from lesionbench.target import RegionSigmoid
from lightning_modules.evaluation.probability_tuning import Levels, Scorer, _median, _search, counted
from lightning_modules.evaluation.suppression_tuning import Suppression, gone, learned
from lightning_modules.evaluation.tuning import HeldOut
from lightning_modules.metrics.overlap import overlap_metrics
from lightning_modules.postprocessing import PostProcessing

BRATS = brats_task("2020")
NCR, ED, ET = 1, 2, 3


def biased(seed, shift=1.0, shape=(10, 10, 10)):
    """Nested balls, and probabilities of their regions that are off: the logits of enhancing tumor are shifted up, those of the core down."""
    draw = torch.Generator().manual_seed(seed)
    axes = torch.meshgrid(*(torch.arange(s) - (s - 1) / 2 for s in shape), indexing="ij")
    distance = sum(a**2 for a in axes).sqrt() + 0.2 * torch.randn(shape, generator=draw)
    labels = torch.zeros(shape, dtype=torch.int8)
    for value, radius in ((ED, 4.5), (NCR, 3.2), (ET, 2.2)):
        labels[distance < radius] = value
    logits = torch.stack([2 * (radius - distance) for radius in (4.5, 3.2, 2.2)])
    logits += 0.5 * torch.randn(logits.shape, generator=draw) + shift * torch.tensor([0.0, -1.0, 1.5]).reshape(3, 1, 1, 1)
    return logits.sigmoid(), labels


def dice(labels, truth):
    masks = zip(BRATS.region_masks(labels).numpy(), BRATS.region_masks(truth).numpy(), strict=True)
    return np.mean([overlap_metrics(a, b)["dice"] for a, b in masks])


@pytest.mark.parametrize("decoding", ["nested", "paint", "supported"])
def test_the_table_of_counts_gives_the_dice_of_the_volumes(decoding):
    cases = [biased(seed) for seed in (0, 1)]
    score = Scorer([counted("r", f"p{n}", BRATS, *case) for n, case in enumerate(cases)], decoding, "regions")
    for thresholds in ({"WT": 500, "TC": 500, "ET": 500}, {"WT": 400, "TC": 250, "ET": 800}, {"WT": 900, "TC": 20, "ET": 300}):
        rules = RegionSigmoid(BRATS, {name: step / 1000 for name, step in thresholds.items()}, decoding)
        expected = [dice(rules.labels(p[None])[0], truth) for p, truth in cases]
        assert score(thresholds).tolist() == pytest.approx(expected, abs=1e-12)


def test_dice_of_classes_and_ignored_voxels():
    regions = torch.tensor([[0.9, 0.9, 0.9, 0.1], [0.9, 0.9, 0.1, 0.1], [0.9, 0.1, 0.1, 0.1]]).reshape(3, 4, 1, 1)
    truth = torch.tensor([ET, ED, ED, -1], dtype=torch.int8).reshape(4, 1, 1)
    half = dict.fromkeys(BRATS.regions, 500)
    of = {s: Scorer([counted("r", "p", BRATS, regions, truth)], "nested", s)(half) for s in ("regions", "classes")}
    assert of["regions"].tolist() == pytest.approx([(1 + 2 / 3 + 1) / 3])  # WT 3 of 3; TC 2 said, 1 real; ET
    assert of["classes"].tolist() == pytest.approx([(0 + 2 / 3 + 1) / 3])  # necrosis 1 said, none real; edema 1 said, 2 real


def test_tuned_thresholds_beat_one_half_on_other_cases():
    tuning = [counted("r", f"p{n}", BRATS, *biased(n)) for n in range(3)]
    found = _search(Scorer(tuning, "nested", "regions"), 60, seed=0)
    assert found == _search(Scorer(tuning, "nested", "regions"), 60, seed=0)
    assert found["ET"] > 600
    assert found["TC"] < 400
    fresh = Scorer([counted("r", f"p{n}", BRATS, *biased(n)) for n in range(10, 14)], "nested", "regions")
    assert (fresh(found) - fresh(dict.fromkeys(BRATS.regions, 500))).min() > 0.02


def test_the_median_of_runs():
    folds = [{"ET": 400, "WT": 10}, {"ET": 700, "WT": 20}, {"ET": 500, "WT": 990}]
    assert _median(folds) == {"ET": 500, "WT": 20}
    assert _median(folds[:2]) == {"ET": 400, "WT": 10}


def test_what_is_chosen_is_what_postprocessing_applies(tmp_path):
    found = Levels({"WT": 0.5, "TC": 0.3, "ET": 0.8}, "paint", "regions", {"r0": {}}, 0.5, 0.6, 0.55, ["p1"], ["r0"])
    rules = PostProcessing(thresholds=found.write(tmp_path / "levels.json"))
    regions, labels = biased(3)
    said = rules(Prediction(regions, labels, members={"masks": Prediction(labels=labels)}), BRATS)
    assert torch.equal(said.labels, RegionSigmoid(BRATS, found.probability, "paint").labels(regions[None])[0])
    assert torch.equal(said.members["masks"].labels, labels)  # without probabilities there is nothing to be made anew
    assert rules.chosen_on == {"p1"}
    assert "0.5000 -> 0.6000" in found.report()
    assert "0.5500" in found.report()


# suppression


def held(name, et, ncr, present, run="r0"):
    score = (0.8, 0.0) if present else (0.0, 1.0)
    return HeldOut(run, name, name, et, *score, classes={"ncr": ncr, "ed": 100, "et": et}, present=present)


FALSE = [held(f"f{n}", 50 + n, 20000 + n, False) for n in range(5)]
TRUE = [held(f"t{n}", 60 + n, 300 + n, True) for n in range(5)] + [held(f"l{n}", 4000 + n, 21000 + n, True) for n in range(5)]
RULE = [{"et": [None, 129.5], "ncr": [16954, None]}]


@pytest.mark.parametrize(("et", "ncr", "goes"), [(129, 16955, True), (130, 16955, False), (129, 16954, False), (130, 16954, False)])
def test_the_printed_rule_at_its_bounds(et, ncr, goes):
    labels = torch.full((40, 40, 20), ED, dtype=torch.int8)
    labels.view(-1)[:ncr], labels.view(-1)[ncr : ncr + et] = NCR, ET
    after = PostProcessing(suppress={"ET": RULE}).labels(labels, BRATS)
    assert ((after == ET).sum() == 0) == goes
    assert (after[labels == ET] == (NCR if goes else ET)).all()
    assert torch.equal(after[labels != ET], labels[labels != ET])


def test_a_suppressed_region_is_decoded_anew_without_it():
    regions = torch.tensor([[0.9, 0.9, 0.9], [0.9, 0.1, 0.9], [0.9, 0.9, 0.1]]).reshape(3, 3, 1, 1)
    rules = PostProcessing(probability={"ET": 0.5}, decoding="paint", suppress={"ET": [{"et": [None, 10]}]})
    labels = RegionSigmoid(BRATS, decoding="paint").labels(regions[None])[0]
    assert labels.flatten().tolist() == [ET, ET, NCR]
    assert rules.labels(labels, BRATS, regions).flatten().tolist() == [NCR, ED, NCR]  # the second was outside of the core


def test_a_tree_finds_the_cases_that_were_planted():
    boxes = learned([*FALSE, *TRUE])
    assert [c.case for c in (*FALSE, *TRUE) if gone(c, boxes)] == [c.case for c in FALSE]
    unseen = [held("a", 55, 20500, False), held("b", 62, 310, True), held("c", 5000, 20500, True)]
    assert [gone(c, boxes) for c in unseen] == [True, False, False]
    assert learned(TRUE) == learned(FALSE) == []  # nothing to tell apart
    assert not gone(held("none", 0, 20000, False), boxes)


def test_a_learned_rule_is_written_and_applied(tmp_path):
    found = Suppression("ET", "dice", {"ET": RULE}, 0.5, 0.7, None, 5, 0, ["p1"], ["r0"])
    levels = Levels({"ET": 0.4}, "nested", "regions", {}, 0.5, 0.6, None, ["p2"], ["r0"])
    files = [levels.write(tmp_path / "a.json"), found.write(tmp_path / "b.json")]
    rules = PostProcessing(thresholds=files)
    assert rules.rules["suppress"] == {"ET": RULE}
    assert rules.rules["probability"] == {"ET": 0.4}
    assert rules.chosen_on == {"p1", "p2"}
    assert "et <= 129.5 and ncr > 16954" in found.report()
    assert json.loads(files[1].read_text())["region"] == "ET"


# the other rules


def test_opening_and_closing_by_hand():
    labels = torch.zeros(9, 9, 9, dtype=torch.int8)
    labels[2:7, 2:7, 2:7] = ED
    labels[4, 4, 4] = 0  # a hole
    labels[4, 4, 7:9] = ED  # a thread to the border
    closed = PostProcessing(closing={"WT": 1}).labels(labels, BRATS)
    assert closed[4, 4, 4] == ED
    assert (closed[labels == ED] == ED).all()  # nothing is lost, at the border neither
    whole = labels.clone()
    whole[4, 4, 4] = ED
    opened = PostProcessing(opening={"WT": 1}).labels(whole, BRATS)
    assert opened[4, 4, 7:].tolist() == [ED, 0]  # of the thread stays what a cross in the body covers
    assert opened[2, 2, 4] == 0  # an edge of a cube, which no cross in it covers
    core = whole.clone()
    core[4, 4, 4] = NCR
    assert torch.equal(PostProcessing(opening={"TC": 1}).labels(core, BRATS), whole)  # a lone voxel of the core becomes edema


def test_only_the_largest_component_stays():
    labels = torch.zeros(8, 8, 8, dtype=torch.int8)
    labels[:3, :3, :3], labels[5:7, 5:7, 5:7], labels[1, 1, 1] = ED, ED, ET
    labels[6, 6, 6] = ET
    after = PostProcessing(keep_largest=["WT"]).labels(labels, BRATS)
    assert not after[5:].any()
    assert torch.equal(after[:5], labels[:5])


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"decoding": "painted"}, "did you mean 'paint'"),
        ({"probability": {"ET": 2}}, "threshold=2 "),
        ({"probability": {"XX": 0.5}}, "'XX'"),
        ({"keep_largest": ["XX"]}, "'XX'"),
        ({"opening": {"WT": -1}}, "opening.WT=-1"),
        ({"suppress": {"ET": [{"edema": [None, 3]}]}}, "class.*'edema'"),
        ({"suppress": {"ET": [{"ed": 3}]}}, "suppress.ET"),
    ],
)
def test_rules_that_make_no_sense(rules, message):
    with pytest.raises(SuiteError, match=message):
        PostProcessing(**rules).check(BRATS)
