"""The multi-rater method inside the frame: killed and resumed, predicted from its checkpoint, drawn; and its effect on the ellipse toy."""

import os
import signal

import nibabel as nib
import numpy as np
import pytest
import torch

from lesionbench.errors import SuiteError
from tests.fake_data import write_fake_folder
from tests.harness import SMALL, assert_same, rows, run, run_folders, run_killed, weights

RATERS = ["model._target_=lightning_modules.MultiRater", "data.raters=3", "metrics.names=[q_dice,dice]", "~model.loss"]
SOFTMAX = ["+model.loss={_target_:tests.toys.MeanCE}", "model/target=agreement"]
REGION = ["+model.loss={_target_:lightning_modules.losses.RegionBCE}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight cases, every second with two raters instead of three, and without a consensus label."""
    root = write_fake_folder(tmp_path_factory.mktemp("raters"), 8, raters=3, shape=(14, 12, 10))
    for label in root.glob("labels/case_??.nii.gz"):
        label.unlink()
    return root


def small(root, *more: str) -> list[str]:
    """`SMALL` with the multi-rater method."""
    return [*(o for o in SMALL if not o.startswith(("~model.loss", "+model.loss", "metrics"))), f"data.root={root}", *RATERS, *more]


@pytest.mark.parametrize("target", ["random_rater", "staple"])
def test_kill_and_resume_is_bit_identical(target, folder, tmp_path):
    common = small(folder, *REGION, f"model/target={target}")
    run(*common, f"runs={tmp_path / 'whole'}")
    killed = [*common, f"runs={tmp_path / 'killed'}", "callbacks.checkpoint.every_n_batches=1"]
    assert run_killed(*killed, "callbacks.progress._target_=tests.toys.KillAt", "+callbacks.progress.iteration=6") == -signal.SIGKILL
    run(*killed, "resume=true")
    whole, resumed = run_folders(tmp_path / "whole")[0], run_folders(tmp_path / "killed")[0]
    assert_same(weights(whole), weights(resumed))
    assert rows(whole) == rows(resumed)


def test_component_rule_and_readings_travel_in_the_checkpoint(folder, tmp_path):
    run(
        *small(
            folder,
            *SOFTMAX,
            "+model.decodings=[expectation,median]",
            "model.target.keep_largest=auto",
            "metrics.names=[q_dice,q_dice_paper,dice]",
        ),
        f"runs={tmp_path}",
    )
    (found,) = run_folders(tmp_path)
    assert {row["member"] for row in rows(found)} == {"", "expectation", "median"}
    for row in rows(found):  # at the threshold 0, which the paper has too, every map is all ones
        assert float(row["q_dice_paper"]) == pytest.approx((1 + 9 * float(row["q_dice"])) / 10, abs=1e-5)
    checkpoint = found / "checkpoints" / "last.ckpt"
    pieces = torch.load(checkpoint, weights_only=True)["lesionbench"]["target"]["pieces"]
    assert set(pieces) == {1, 2, 3}
    assert min(pieces.values()) == 1
    run(
        "job=predict", f"ckpt={checkpoint}", f"input={folder / 'images'}", f"out={tmp_path / 'out'}", "trust=[tests]", "writer.probabilities=true"
    )  # fmt: skip
    share = nib.load(tmp_path / "out" / "predictions" / "case_00_prob_lesion.nii.gz").get_fdata()
    labels = nib.load(tmp_path / "out" / "predictions" / "case_00.nii.gz").get_fdata()
    assert np.allclose(3 * share, np.round(3 * share), atol=1e-5)  # arg-max: a number of raters
    assert np.array_equal(labels > 0, share > 0.5)


@pytest.mark.parametrize(
    ("more", "text"), [(["data.raters=2"], "case_0. has 3 raters, the task says 1 to 2"), (["data.raters=0"], "raters")]
)
def test_wrong_numbers_of_raters_are_refused_before_training(more, text, folder, tmp_path):
    with pytest.raises(SuiteError, match=text):
        run(*small(folder, *SOFTMAX), f"runs={tmp_path}", *more)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_cases_without_raters_are_refused_before_training(tmp_path):
    root = write_fake_folder(tmp_path / "plain", 6, shape=(14, 12, 10))
    with pytest.raises(SuiteError, match="has 0 raters"):
        run(*small(root, *SOFTMAX), f"runs={tmp_path / 'runs'}")


def test_figure_shows_bands_of_agreement(tmp_path, monkeypatch):
    from matplotlib.image import imread

    from callbacks import agreement as module

    seen = {}
    draw = module.band_figure
    monkeypatch.setattr(module, "band_figure", lambda views, raters: seen.update(views) or draw(views, raters))
    ellipses(tmp_path, "debug=tiny", "data.split.test=3", "trainer.limit_test_batches=3", "callbacks=[default,agreement]")
    (found,) = run_folders(tmp_path / "runs")
    assert list(seen) == ["best", "median", "worst"]
    scores = [v.score for v in seen.values()]
    assert scores == sorted(scores, reverse=True)
    assert {v.case: v.score for v in seen.values()}.items() <= {r["case"]: float(r["q_dice"]) for r in rows(found)}.items()
    best = seen["best"]
    levels = np.unique(np.round(5 * best.drawn, 4))
    assert set(levels) <= {0, 1, 2, 3, 4, 5}
    assert len(levels) > 3
    picture = imread(found / "figures" / "agreement.png")
    assert picture.shape[0] > picture.shape[1] > 300  # three rows of three square panels, and the legend


# effect

EFFECT = {  # frozen
    "agreement classes": [],
    "majority": ["model/target=majority", "model/loss=region_bce"],
    "STAPLE": ["model/target=staple", "model/loss=region_bce"],
}
SEEDS = (0, 1, 2, 3, 4)
AGREED = ["data.blur=[0.3,0.3]"]  # almost no disagreement
FAST = ["data.size=32", "patch=[32,32]", "data.samples_per_epoch=600", "data.count=32", "data.split.test=12"]


def ellipses(folder, *more: str) -> None:
    os.environ["LESIONBENCH_DATA"] = str(folder / "data")
    run("experiment=multi_rater/ellipses", f"runs={folder / 'runs'}", "callbacks.figures=null", "writer.on_test=false", "threads=1", *more)


def table(folder, strategies, seeds, *more: str) -> dict[str, list[float]]:
    """Strategy -> mean Q-Dice over the test images of each seed, maps read as probabilities."""
    found = {}
    for name in strategies:
        for seed in seeds:
            ellipses(folder / name / str(seed), *EFFECT[name], *more, f"seed={seed}")
            (one,) = run_folders(folder / name / str(seed) / "runs")
            found.setdefault(name, []).append(float(np.mean([float(r["q_dice"]) for r in rows(one)])))
    return found


def gap(scores: dict[str, list[float]]) -> float:
    """Mean Q-Dice of agreement classes less that of the best other strategy."""
    means = {name: float(np.mean(values)) for name, values in scores.items()}
    return means.pop("agreement classes") - max(means.values())


def test_effect_shows_in_a_short_run(tmp_path, monkeypatch):
    monkeypatch.setenv("LESIONBENCH_DATA", str(tmp_path))
    assert gap(table(tmp_path, ["agreement classes", "majority"], [100], *FAST)) > 0.01


@pytest.mark.slow
def test_agreement_classes_beat_fusing_to_one_mask(tmp_path, monkeypatch):
    monkeypatch.setenv("LESIONBENCH_DATA", str(tmp_path))
    assert gap(table(tmp_path, EFFECT, SEEDS)) >= 0.04


@pytest.mark.slow
def test_without_disagreement_all_strategies_are_alike(tmp_path, monkeypatch):
    monkeypatch.setenv("LESIONBENCH_DATA", str(tmp_path))
    means = [float(np.mean(values)) for values in table(tmp_path, EFFECT, SEEDS, *AGREED).values()]
    assert max(means) - min(means) <= 0.02
