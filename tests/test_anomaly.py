"""Anomaly methods: maps by hand, invariance to the scanner, components, thresholds and their labels, and the effect of equalization."""

import csv
import json
import signal
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from lesionbench.errors import SuiteError
from lesionbench.jobs.assembled import Assembled
from lesionbench.prediction import Prediction
from lesionbench.score_counts import ScoreCounts
from lesionbench.task import Task
from lightning_modules import Autoencoder, BlurResidual, FlairThreshold
from lightning_modules.anomaly.flair_threshold import equalized, minmax
from lightning_modules.components import without_small_components
from lightning_modules.inferers import SliceWise
from lightning_modules.metrics import CaseMetrics, DatasetMetrics
from lightning_modules.networks import SpatialAutoencoder
from tests.fake_data import write_fake_brats, write_fake_folder
from tests.harness import assert_same, composed, rows, run, run_folders, run_killed, weights

TASK = Task(("t1", "flair"), {"background": 0, "lesion": 1})


def batch_of(flair, label=None):
    """An evaluation batch of one case on the network grid, with an empty T1."""
    flair = torch.as_tensor(np.asarray(flair), dtype=torch.float32)
    batch = {"image": torch.stack([torch.zeros_like(flair), flair])[None], "brain_mask": (flair != 0)[None, None], "patient": ["p"]}
    return batch if label is None else {**batch, "label": torch.as_tensor(np.asarray(label))[None, None]}


def brain(seed=0, shape=(9, 8, 7)):
    """Positive whole numbers in a box of brain, 0 around it."""
    image = np.zeros(shape, np.int64)
    image[1:-1, 1:-1, 1:-1] = np.random.default_rng(seed).integers(1, 200, [s - 2 for s in shape])
    return image


# maps


def test_equalization_by_hand():
    image = np.array([0, 1, 2, 2, 3, 3, 3, 0, 0])
    np.testing.assert_allclose(equalized(image, image > 0), [0, 1 / 6, 1 / 2, 1 / 2, 1, 1, 1, 0, 0], rtol=1e-7)
    assert (equalized(image, image > 5) == 0).all()
    np.testing.assert_allclose(minmax(image, image > 0), [0, 0, 0.5, 0.5, 1, 1, 1, 0, 0])
    assert (minmax(np.ones(3), np.ones(3, bool)) == 0).all()


def test_ranks_are_what_scikit_image_computes_for_whole_numbers_and_bins_for_others():
    from skimage.exposure import equalize_hist

    image = brain()
    mask = image > 0
    np.testing.assert_allclose(equalized(image, mask), equalize_hist(image, mask=mask) * mask, atol=1e-6)
    floats = np.where(mask, np.random.default_rng(0).random(image.shape) + 1, 0)
    np.testing.assert_allclose(equalized(floats, mask, bins=256), equalize_hist(floats, nbins=256, mask=mask) * mask, atol=1e-6)
    assert abs(equalized(floats, mask) - equalized(floats, mask, bins=256)).max() < 0.05


@pytest.mark.parametrize("change", [lambda i: 3 * i + 7, lambda i: i**2, lambda i: np.exp(i / 40.0)])
def test_any_increasing_change_of_the_scanner_leaves_the_map(change):
    image = brain()
    other = np.where(image > 0, change(image.astype(float)), 0)
    method = FlairThreshold(TASK)
    assert torch.equal(method.score_map(batch_of(image)), method.score_map(batch_of(other)))
    raw = FlairThreshold(TASK, equalize="none")
    assert not torch.equal(raw.score_map(batch_of(image)), raw.score_map(batch_of(other)))


def test_a_score_is_the_share_of_the_brain_that_is_not_brighter():
    image = np.zeros((12, 12, 12))
    image[2:10, 2:10, 2:10] = np.random.default_rng(0).random((8, 8, 8)) + 1  # all different
    scores = equalized(image, image > 0)
    for t in (0.25, 0.5, 0.75):
        assert (scores > t).sum() == (1 - t) * 512


def test_equalizations_differ_as_they_should():
    image = brain()
    maps = {
        name: FlairThreshold(TASK, equalize=name).score_map(batch_of(image)).numpy() for name in ("brain", "whole_image", "minmax", "none")
    }
    mask = image > 0
    assert all((m[~mask] == 0).all() for m in maps.values())
    share = 1 - mask.mean()  # of the background, which is not brighter than any brain voxel
    np.testing.assert_allclose(maps["whole_image"][mask], share + (1 - share) * maps["brain"][mask], rtol=1e-5)
    assert (maps["minmax"].min(), maps["minmax"].max()) == (0, 1)
    np.testing.assert_array_equal(maps["none"], image)


def test_blur_residual():
    image = brain()
    scaled = minmax(image, image > 0)
    found = BlurResidual(TASK, sigma=2.0).score_map(batch_of(image)).numpy()
    blurred = gaussian_filter(scaled, 2.0) / gaussian_filter((image > 0).astype(float), 2.0).clip(1e-6)
    np.testing.assert_allclose(found, abs(scaled - blurred) * (image > 0), atol=1e-5)
    steps = np.where(image > 0, 1.0, 0)
    steps[2, 2, 2] = 3  # one bright voxel in a flat brain: nothing else stands out, the border of the brain least of all
    found = BlurResidual(TASK, sigma=1.0).score_map(batch_of(steps)).numpy()
    assert found.argmax() == np.ravel_multi_index((2, 2, 2), steps.shape)
    assert found[-2, -2, -2] < 1e-3


# masks


def test_small_components():
    mask = np.zeros((12, 12, 12), bool)
    mask[:2, :2, :2] = True
    mask[5:8, 5:8, 5:8] = True
    found = without_small_components(mask, 20)
    assert found.sum() == 27
    assert found[6, 6, 6]
    assert without_small_components(mask, 28).sum() == 0
    assert without_small_components(mask, 0).sum() == without_small_components(mask, 8).sum() == 35
    for length, kept in ((19, 0), (20, 20)):
        chain = np.zeros((24, 24, 24), bool)
        chain[range(length), range(length), range(length)] = True  # touches by corners only
        assert without_small_components(chain, 20).sum() == kept
        assert without_small_components(chain, 20, connectivity=2).sum() == 0


def test_prediction_marks_what_is_above_the_threshold_in_large_components():
    flair = np.ones((10, 10, 10))
    flair[:2, :2, :2], flair[5:8, 5:8, 5:8] = 9, 8
    batch = batch_of(flair)
    assert FlairThreshold(TASK).predict_case(batch).labels is None
    found = FlairThreshold(TASK, threshold=0.966).predict_case(batch)  # 35 of 1000 voxels are brighter than the rest, which has 0.965
    assert found.labels.dtype == torch.int8
    assert found.labels[5:8, 5:8, 5:8].sum() == found.labels.sum() == 27
    assert FlairThreshold(TASK, threshold=0.966, min_component=8).predict_case(batch).labels.sum() == 35
    assert FlairThreshold(TASK, threshold=0.992).predict_case(batch).labels.sum() == 0  # only the 8 of the small one are above


def test_no_parameters_and_wrong_tasks():
    assert not list(FlairThreshold(TASK).parameters())
    assert not list(BlurResidual(TASK).parameters())
    two = Task(("flair",), {"background": 0, "a": 1, "b": 2}, {"A": ("a", "b"), "B": ("b",)})
    for wrong, message in [
        (lambda: FlairThreshold(TASK, channel="t2"), "channel"),
        (lambda: FlairThreshold(two), "one region"),
        (lambda: FlairThreshold(TASK, equalize="brian"), "did you mean 'brain'"),
        (lambda: FlairThreshold(TASK, slice_range=[0, 2]), "metrics.space=network"),
        (lambda: FlairThreshold(TASK, threshold="nowhere.json"), "nowhere.json"),
    ]:
        with pytest.raises(SuiteError, match=message):
            wrong()
    inner = two.narrowed(regions=["B"])
    assert FlairThreshold(inner, threshold=0.5, min_component=0).predict_case(batch_of(np.arange(8.0).reshape(2, 2, 2))).labels.max() == 1


def test_slices_outside_the_range_are_neither_marked_nor_measured():
    image = brain(shape=(6, 6, 10))
    method = FlairThreshold(TASK, threshold=0.1, min_component=0, slice_range=[3, 5], metrics=CaseMetrics(space="network"))
    batch = batch_of(image, np.ones(image.shape, np.int8))
    found = method.predict_case(batch).labels
    assert found[..., 3:5].sum() > 0
    assert found.sum() == found[..., 3:5].sum()
    truth = method.truth(batch)
    assert (truth[..., 3:5] == 1).all()
    assert (truth == 1).sum() == 6 * 6 * 2
    assert (truth == -1).sum() == 6 * 6 * 8
    np.testing.assert_array_equal(method.score_map(batch), equalized(image, image > 0))  # the histogram is that of the whole volume


# thresholds and their labels


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_fake_folder(tmp_path_factory.mktemp("folder"), 9, channels=("flair",))


SMALL = [
    "experiment=flair_threshold/folder",
    "data.check=false",
    "data.num_workers=0",
    "callbacks.figures=null",
    "writer.on_test=false",
    "threads=1",
]


def summary(path):
    return json.loads((path / "summary.json").read_text())


def test_a_threshold_from_other_cases_is_honest_and_one_from_the_test_is_labeled(folder, tmp_path, capsys):
    common = [*SMALL, f"data.root={folder}", "data.split.test=3", "data.split.val=2"]
    run(*common, f"runs={tmp_path / 'honest'}")
    assert "dice_best (test-tuned)" in capsys.readouterr().out
    run(*common, f"runs={tmp_path / 'oracle'}", "calibration.parts=[test]")
    assert "dice (test-tuned)" in capsys.readouterr().out
    (honest,), (oracle,) = (run_folders(tmp_path / name) for name in ("honest", "oracle"))
    tested = {r["patient"] for r in rows(honest)}
    chosen = [json.loads((f / "calibrate" / "threshold.json").read_text()) for f in (honest, oracle)]
    assert tested.isdisjoint(chosen[0]["patients"])
    assert len(chosen[0]["patients"]) == 6
    assert tested == set(chosen[1]["patients"])
    assert "oracle" not in rows(honest)[0]
    assert {r["oracle"] for r in rows(oracle)} == {"True"} or {r["oracle"] for r in rows(oracle)} == {"1"}
    ours, theirs = (summary(f)["dataset"][""]["lesion"] for f in (honest, oracle))
    assert "oracle" not in ours
    assert theirs["oracle"] == 1
    assert theirs["dice_best"] == ours["dice_best"]
    assert theirs["threshold_best"] == pytest.approx(chosen[1]["threshold"])
    assert summary(oracle)["test"][""]["lesion"]["dice"]["oracle"]
    assert "oracle" not in summary(oracle)["test"][""]["lesion"]["auroc"]
    assert "oracle" not in summary(honest)["test"][""]["lesion"]["dice"]
    assert summary(honest)["test"][""]["lesion"]["dice_best"]["oracle"]


def test_comparison_labels_what_was_tuned_on_the_test(folder, tmp_path, capsys):
    common = [*SMALL, f"data.root={folder}", "data.split.test=3", f"runs={tmp_path}"]
    run(*common)
    run(*common, "calibration.parts=[test]")
    run(
        "job=compare",
        f"compare.runs=[{tmp_path}]",
        "compare.group_by=[calibration.parts]",
        "compare.metrics=[dice,dice_best,auroc]",
        f"out={tmp_path / 'c'}",
    )
    text = (tmp_path / "c" / "comparison.md").read_text()
    sheets = dict(part.split("\n", 1) for part in text.split("## ")[1:])
    labels = {title.partition(":")[0]: part.count("(test-tuned)") for title, part in sheets.items()}
    assert labels["dice"] == labels["dice over all test voxels as one set"] == 1
    assert '["test"] (test-tuned)' in sheets[next(t for t in sheets if t.startswith("dice:"))]
    assert labels["dice_best"] == labels["dice_best over all test voxels as one set"] == 2
    assert labels["auroc"] == labels["auroc over all test voxels as one set"] == 0
    with (tmp_path / "c" / "dataset.csv").open(newline="") as file:
        cells = {(r["group"], r["metric"]): r for r in csv.DictReader(file)}
    (oracle,) = (f for f in run_folders(tmp_path) if "oracle" in rows(f)[0])
    assert float(cells['calibration.parts=["test"]', "dice"]["mean"]) == pytest.approx(summary(oracle)["dataset"][""]["lesion"]["dice"])
    assert cells['calibration.parts=["test"]', "dice"]["oracle"] == "True"
    assert cells['calibration.parts=["test"]', "auroc"]["oracle"] == "False"


def test_two_processes_measure_the_same_set(folder, tmp_path):
    for trainer in ("cpu", "ddp_sim"):
        run(
            *SMALL,
            f"data.root={folder}",
            "data.split.test=3",
            "calibration.parts=[test]",
            f"trainer={trainer}",
            f"runs={tmp_path / trainer}",
        )
    one, two = (run_folders(tmp_path / trainer)[0] for trainer in ("cpu", "ddp_sim"))
    assert rows(one) == rows(two)
    assert (one / "test" / "dataset.json").read_text() == (two / "test" / "dataset.json").read_text()
    assert summary(two)["dataset"][""]["lesion"]["oracle"] == 1


def test_the_search_looks_at_unfiltered_maps(folder, tmp_path):
    """Where dropping components changes which threshold is best, the unfiltered search keeps its own and the filtered one wins."""
    cfg = composed(*SMALL, f"data.root={folder}", f"run_folder={tmp_path}", "metrics.thresholds=20", "calibration.filter_in_search=true")
    made = Assembled(cfg)
    made.prepare()
    made.data.setup("test")
    from lesionbench.jobs.choose_threshold import choose_threshold
    from lightning_modules.anomaly.base import Scored

    cases = made.data.parts["train"] + made.data.parts["val"]
    scored = Scored(made, cases)
    with pytest.raises(ValueError, match="no cases"):
        Scored(made, []).counts()
    plain, threshold = scored.counts().best_dice(20)
    filtered, other = scored.best_filtered(20)
    maps = [(s, y.numpy() == 1) for s, y in scored.maps()]

    def pooled(t, keep):
        found = [(made.method.mask(s, t, filtered=keep), y) for s, y in maps]
        return 2 * sum((m & y).sum() for m, y in found) / sum(m.sum() + y.sum() for m, y in found)

    assert plain == pytest.approx(pooled(threshold, False))
    assert filtered == pytest.approx(pooled(other, True))
    assert filtered >= pooled(threshold, True)
    written = json.loads(choose_threshold(cfg, tmp_path).read_text())
    assert (written["threshold"], written["dice"]) == pytest.approx((other, filtered))
    with pytest.raises(SuiteError, match=r"metrics\.thresholds=100"):
        scored.best_filtered(None)


def test_protocol_of_the_paper_tests_every_case_in_its_slices(tmp_path):
    root = write_fake_brats(tmp_path / "data", "2020", 3)
    common = [
        "experiment=flair_threshold/brats2020",
        f"data.root={root}",
        "data.check=false",
        "data.num_workers=0",
        "callbacks.figures=null",
        "threads=1",
    ]
    run(*common, f"runs={tmp_path / 'runs'}", "data.preprocessing.spacing=[2,2,1]", "model.slice_range=[4,16]", "model.min_component=0")
    (found,) = run_folders(tmp_path / "runs")
    assert len(rows(found)) == 3
    whole = summary(found)["dataset"][""]["WT"]
    chosen = json.loads((found / "calibrate" / "threshold.json").read_text())
    assert whole["dice"] == pytest.approx(chosen["dice"]) == pytest.approx(whole["dice_best"])  # without the rule on components
    assert whole["oracle"] == 1
    with pytest.raises(SuiteError, match=r"slice_range=\[90, 95\]"):
        run(*common, f"runs={tmp_path / 'none'}", "model.slice_range=[90,95]")


def test_the_yardstick_is_this_method_at_the_best_of_100_thresholds(folder, tmp_path, capsys):
    common = [*SMALL, f"data.root={folder}", "data.split.test=3", "model.min_component=0"]
    run(*common, f"runs={tmp_path / 'a'}", "calibration.parts=[test]", "metrics.thresholds=100", "callbacks=[default,flair_baseline]")
    assert "(test-tuned)." in " ".join(capsys.readouterr().out.split())
    (found,) = run_folders(tmp_path / "a")
    written = json.loads((found / "test" / "baseline.json").read_text())
    run(*common, f"runs={tmp_path / 'b'}", "stages=[{name:test,run:test}]", f"model.threshold={written['threshold']}")
    (again,) = run_folders(tmp_path / "b")
    assert written["cases"] == pytest.approx({r["case"]: float(r["dice"]) for r in rows(again)})
    assert written["dice"] == pytest.approx(np.mean([float(r["dice"]) for r in rows(again)]))
    assert written["oracle"] is True
    assert summary(again)["dataset"][""]["lesion"]["dice"] == pytest.approx(summary(found)["dataset"][""]["lesion"]["dice_best"], abs=0.01)


def test_an_experiment_without_training_cases_cannot_train(folder, tmp_path):
    with pytest.raises(SuiteError, match=r"data.split.test=all leaves train empty"):
        run(
            "experiment=supervised/folder",
            "data.channels=[flair]",
            f"data.root={folder}",
            "data.split.test=all",
            f"runs={tmp_path}",
            "data.check=false",
        )


def test_predicting_with_a_number_as_threshold(folder, tmp_path):
    run("job=predict", *SMALL, f"input={folder / 'images'}", f"out={tmp_path}", "model.threshold=0.9")
    assert len(list((tmp_path / "predictions").glob("case_0?.nii.gz"))) == 9
    assert len(list((tmp_path / "predictions").glob("*_score.nii.gz"))) == 9


# autoencoders


def autoencoder(variational=False, **options):
    torch.manual_seed(0)
    network = partial(SpatialAutoencoder, features=[4, 8], latent=2, variational=variational)
    return Autoencoder(TASK, network=network, inferer=SliceWise(), optimizer=partial(torch.optim.Adam, lr=1e-2), **options)


def convolution(inputs, outputs, side):
    return inputs * outputs * side * side + outputs


@pytest.mark.parametrize("variational", [False, True])
def test_autoencoder_parameters_shapes_and_gradients(variational):
    method = autoencoder(variational)
    expected = convolution(1, 4, 4) + 2 * 4 + convolution(4, 8, 4) + 2 * 8 + convolution(8, 2 * (1 + variational), 1)
    expected += convolution(2, 8, 1) + convolution(8, 4, 4) + 2 * 4 + convolution(4, 4, 4) + 2 * 4 + convolution(4, 1, 3)
    assert sum(p.numel() for p in method.parameters()) == expected
    image = torch.rand(3, 2, 8, 12)
    output = method.network(image[:, 1:])
    assert output["logits"].shape == (3, 1, 8, 12)
    assert ("kl" in output) == variational
    method.training_step({"image": image}, 0).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.parameters())


def test_autoencoder_loss_by_hand_reads_one_channel_and_no_label():
    method = autoencoder(True, kl_weight=0.5).eval()
    image = torch.rand(3, 2, 8, 12)
    mean, log_variance = method.network.encoder(image[:, 1:]).chunk(2, dim=1)
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(mean, (log_variance / 2).exp()), torch.distributions.Normal(0.0, 1.0))
    error = (image[:, 1:] - method.network.decoder(mean)).abs().mean()
    loss = method.training_step({"image": image}, 0)
    assert loss.item() == pytest.approx((error + 0.5 * kl.sum() / (3 * 8 * 12)).item(), rel=1e-5)
    other = torch.cat([torch.rand(3, 1, 8, 12), image[:, 1:]], dim=1)
    assert torch.equal(loss, method.training_step({"image": other}, 0))
    plain = autoencoder().eval()
    assert plain.training_step({"image": image}, 0).item() == pytest.approx(
        (image[:, 1:] - plain.network(image[:, 1:])["logits"]).abs().mean().item()
    )


def test_latent_noise_is_keyed_and_off_in_evaluation():
    method = autoencoder(True).train()
    image = torch.rand(2, 2, 8, 8)
    first = method.training_step({"image": image}, 0)
    assert torch.equal(first, method.training_step({"image": image}, 0))
    method.iteration = 1
    assert not torch.equal(first, method.training_step({"image": image}, 0))
    method.eval()
    assert torch.equal(method.network(image[:, 1:])["logits"], method.network(image[:, 1:])["logits"])


def test_scores_of_an_autoencoder():
    method = autoencoder(threshold=0.1, min_component=0).eval()
    batch = batch_of(brain(shape=(9, 8, 5)) / 200)
    with torch.no_grad():
        found = method.predict_case(batch)
        padded = torch.nn.functional.pad(batch["image"][:, 1:], (0, 0, 0, 0, 0, 3))
        slices = [method.network(padded[..., z])["logits"][0, 0, :9] for z in range(5)]
    inside = batch["brain_mask"][0, 0]
    expected = (batch["image"][0, 1] - torch.stack(slices, dim=-1)).abs() * inside
    torch.testing.assert_close(found.scores, expected)
    assert found.table["reconstruction_error"] == pytest.approx(expected[inside].mean().item(), rel=1e-5)
    assert torch.equal(found.labels > 0, found.scores > 0.1)


def test_an_autoencoder_trains_on_lesion_free_brains_that_it_is_not_tested_on():
    cfg = composed("experiment=autoencoder/simulated")
    fit, calibrate, test = cfg.stages
    assert fit.override.data.variant == "healthy"
    assert cfg.data.variant == "tumor"
    assert "override" not in test or "data" not in test.override
    assert "data" not in calibrate.override


def test_a_killed_training_of_a_variational_autoencoder_ends_the_same(folder, tmp_path):
    common = [
        "experiment=autoencoder/simulated_variational", "data=folder", f"data.root={folder}", "task.regions=null", "epochs=2", "patch=[16,16]",
        "data.samples_per_epoch=8", "data.batch_size=2", "data.split.test=2", "data.split.val=1", "data.num_workers=0", "data.check=false",
        "model.network.features=[4,8]", "model.network.latent=2", "stages=[{name:fit,run:fit},{name:test,run:test}]", "threads=1",
        "trainer.check_val_every_n_epoch=1", "callbacks.figures=null", "writer.on_test=false", "callbacks.checkpoint.every_n_batches=1",
    ]  # fmt: skip
    run(*common, f"runs={tmp_path / 'whole'}")
    kill = ["callbacks.progress._target_=tests.toys.KillAt", "+callbacks.progress.iteration=5"]
    assert run_killed(*common, f"runs={tmp_path / 'killed'}", *kill) == -signal.SIGKILL
    run(*common, f"runs={tmp_path / 'killed'}", "resume=true")
    (whole,), (resumed,) = run_folders(tmp_path / "whole"), run_folders(tmp_path / "killed")
    assert_same(weights(whole), weights(resumed))
    assert rows(whole) == rows(resumed)
    assert "val/reconstruction_error" in (whole / "metrics.csv").read_text()


# the effect


def toy_volume(rng, shape=(24, 64, 64)):
    """Ellipsoid brain, smooth tissue, dark ventricle, six bright lesions, noise; a scanner of its own gamma and gain; whole numbers."""
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, s) for s in shape), indexing="ij"))
    radius = np.sqrt((grid**2).sum(axis=0))
    tissue = gaussian_filter(rng.normal(size=shape), 3)
    tissue = 0.45 + 0.25 * (tissue - tissue.min()) / np.ptp(tissue)
    inside = radius < 0.9
    image = np.where(np.sqrt((grid[0] / 0.3) ** 2 + (grid[1] / 0.2) ** 2 + (grid[2] / 0.15) ** 2) < 1, 0.1, tissue)
    voxels, lesion = np.argwhere(radius < 0.7), np.zeros(shape, bool)
    places = np.stack(np.meshgrid(*(np.arange(s) for s in shape), indexing="ij"))
    for center in voxels[rng.choice(len(voxels), 6, replace=False)]:
        lesion |= ((places - center[:, None, None, None]) ** 2).sum(axis=0) <= rng.uniform(1.8, 4) ** 2
    image = np.where(lesion, 0.85, image) + rng.normal(0, 0.05, shape)
    image = np.clip(image, 0.01, None) ** rng.uniform(0.7, 1.6) * rng.uniform(0.4, 2.5) * 1000
    return np.where(inside, np.maximum(np.rint(image), 1), 0).astype(np.int32), lesion & inside


MAPS = {
    "equalized": FlairThreshold,
    "minmax": partial(FlairThreshold, equalize="minmax"),
    "blurry residual": BlurResidual,
    "raw": partial(FlairThreshold, equalize="none"),
}


def toy_scores(seed, count=6):
    """Measures of four kinds of map over `count` volumes: {map: (best Dice after the rule on components, AUPRC, AUROC, brain AUROC)}."""
    rng = np.random.default_rng(seed)
    batches = [batch_of(image, lesion.astype(np.int8)) for image, lesion in (toy_volume(rng) for _ in range(count))]
    found = {}
    for name, make in MAPS.items():
        method = make(TASK)
        metric, after = DatasetMetrics(["dice_best", "auprc", "auroc", "brain_auroc"]), DatasetMetrics(["dice"])
        for batch in batches:
            metric.update(method.predict_case(batch), method.truth(batch), TASK, batch["brain_mask"][0, 0])
        whole = metric.compute()[""]["lesion"]
        method.threshold = whole["threshold_best"]
        for batch in batches:
            after.update(Prediction(labels=method.predict_case(batch).labels), method.truth(batch), TASK, tuned=True)
        found[name] = (after.compute()[""]["lesion"]["dice"], whole["auprc"], whole["auroc"], whole["brain_auroc"])
    return found


def check_effect(scores):
    """Equalized > min-max > blurry residual > raw by Dice on the mean over draws, equalized best in every draw; background helps AUROC."""
    dice = {name: [found[name][0] for found in scores] for name in MAPS}
    means = [np.mean(dice[name]) for name in ("equalized", "minmax", "blurry residual", "raw")]
    assert all(better > worse + 0.03 for better, worse in pairwise(means)), means
    assert all(best > other for name in list(MAPS)[1:] for best, other in zip(dice["equalized"], dice[name], strict=True))
    assert all(everywhere >= inside for found in scores for _, _, everywhere, inside in found.values())


def test_equalizing_beats_minmax_a_blurry_residual_and_raw_values_on_one_draw():
    check_effect([toy_scores(13)])


@pytest.mark.slow
def test_equalizing_beats_minmax_a_blurry_residual_and_raw_values():
    check_effect([toy_scores(seed) for seed in range(100, 105)])


def test_real_cases_agree_with_the_direct_computation(real_data):
    """One real case: the method's map and Dice against scikit-image and plain NumPy on the file."""
    import nibabel as nib
    from skimage.exposure import equalize_hist

    name = "Brats18_TCIA02_370_1"
    flair, seg = (np.asarray(nib.load(real_data / "brats18" / name / f"{name}_{part}.nii.gz").dataobj) for part in ("flair", "seg"))
    expected = equalize_hist(flair, mask=flair > 0) * (flair > 0)
    batch = batch_of(flair, (seg > 0).astype(np.int8))
    method = FlairThreshold(TASK, threshold=0.9, min_component=0)
    found = method.predict_case(batch)
    np.testing.assert_allclose(found.scores.numpy(), expected, atol=1e-6)
    counts = ScoreCounts.of(found.scores.numpy(), seg > 0)
    mask = expected > 0.9
    hits, marked = counts.above(np.array([0.9]))
    assert (int(hits[0]), int(marked[0])) == ((mask & (seg > 0)).sum(), mask.sum())
    assert found.labels.sum() == mask.sum()
