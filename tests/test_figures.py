import re
from dataclasses import replace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from matplotlib.image import imread
from torch.utils.data import DataLoader

from callbacks import OverlayFigures, montage
from callbacks.figures import case_slices, not_drawn, selected
from callbacks.overlays import PALETTE, case_figure, masks_of, score_figure, slices
from lesionbench.errors import SuiteError
from lesionbench.geometry import Geometry
from lesionbench.prediction import CaseResult, Prediction
from lesionbench.task import Task

TASK = Task(("t1", "flair"), {"background": 0, "ncr": 1, "ed": 2, "et": 4}, {"WT": ("ncr", "ed", "et"), "TC": ("ncr", "et"), "ET": ("et",)})
SHAPE, SPACING = (24, 28, 12), (2.0, 2.0, 5.0)


def ellipsoid(center, radii):
    grid = np.meshgrid(*[np.arange(n) for n in SHAPE], indexing="ij")
    return sum(((g - c) / r) ** 2 for g, c, r in zip(grid, center, radii, strict=True)) < 1


def blob(shift=0):
    """A brain with a nested lesion on the patient's right (large x), in front (large y) and above the middle (large z)."""
    brain = ellipsoid((12, 14, 6), (10, 12, 5.5))
    label = np.zeros(SHAPE, np.int8)
    for value, radius in ((2, 5), (3, 3), (1, 1.5)):
        label[ellipsoid((15 + shift, 18, 7), (radius, radius, radius / 2))] = value
    image = np.stack([brain, brain + label]).astype(np.float32)
    return image, label


def case(name="a", native=True, truth=True, shift=1, dice=(0.9, 0.8, 0.7), **prediction):
    """On disk the axes run left, posterior, superior: flipped in two of three."""
    image, label = blob()
    _, drawn = blob(shift)
    geometry = Geometry.of(np.diag([-2.0, -2, 5, 1]), SHAPE)
    turn = (lambda a: np.ascontiguousarray(a[::-1, ::-1])) if native else (lambda a: a)
    rows = [
        {"case": name, "member": m, "region": r, "dice": d, "hd95_mm": 3.0}
        for m in ("", "ema")
        for r, d in zip(TASK.regions, dice, strict=True)
    ]
    what = {"labels": torch.from_numpy(turn(drawn)), **prediction}
    known = torch.from_numpy(turn(label)) if truth else None
    return CaseResult(name, "p", "s", Prediction(**what), known, torch.from_numpy(image), geometry, rows if truth else [], native)


# which slices, and how they lie


def test_slices_cut_the_lesion_where_it_is_largest_and_lie_radiologically():
    image, label = blob()
    axial, coronal, sagittal = slices(image, masks_of(label, TASK), None, {}, SPACING)
    assert [(v.name, v.index) for v in (axial, coronal, sagittal)] == [("axial", 7), ("coronal", 18), ("sagittal", 15)]

    def center(mask):
        row, column = np.argwhere(mask).mean(axis=0) / (np.array(mask.shape) - 1)
        return row, column

    row, column = center(axial.truth[0])
    assert row < 0.45  # in front: towards the top
    assert column < 0.45  # the patient's right: on the left
    row, column = center(coronal.truth[0])
    assert row < 0.45  # above: towards the top
    assert column < 0.45
    row, column = center(sagittal.truth[0])
    assert row < 0.45
    assert column < 0.45  # in front: on the left


def test_slices_are_cropped_to_the_brain_and_keep_its_proportions():
    image, label = blob()
    brain = np.argwhere(image[0])
    extent = brain.max(axis=0) - brain.min(axis=0) + 1
    axial, coronal, sagittal = slices(image, masks_of(label, TASK), None, {}, SPACING)
    assert axial.image.shape == (2, extent[1], extent[0])
    assert axial.size == (extent[0] * 2, extent[1] * 2)
    assert coronal.size == (extent[0] * 2, extent[2] * 5)
    assert sagittal.size == (extent[1] * 2, extent[2] * 5)


def test_slices_without_any_lesion_or_any_image():
    image, label = blob()
    assert [v.index for v in slices(image, masks_of(label * 0, TASK), None, {}, SPACING)] == [6, 14, 12]
    assert slices(image * 0, None, None, {}, SPACING)[0].image.shape == (2, 28, 24)


@pytest.mark.parametrize("native", [True, False])
def test_native_and_network_grids_give_the_same_picture(native):
    entropy = torch.from_numpy(np.ascontiguousarray((blob()[1] == 3)[::-1, ::-1] if native else blob()[1] == 3)).float()
    views = case_slices(case(native=native, uncertainty={"entropy": entropy}), TASK, ["flair"])
    image, label = blob()
    expected = slices(image[1:], masks_of(label, TASK), masks_of(blob(1)[1], TASK), {"entropy": (label == 3).astype(float)}, SPACING)
    for view, other in zip(views, expected, strict=True):
        assert view.size == other.size
        np.testing.assert_array_equal(view.image, other.image)
        np.testing.assert_array_equal(view.truth, other.truth)
        np.testing.assert_array_equal(view.prediction, other.prediction)
        np.testing.assert_array_equal(view.maps["entropy"], other.maps["entropy"])


def test_probabilities_stand_in_for_labels():
    regions = torch.from_numpy(masks_of(blob()[1], TASK)).float() * 0.6
    view = case_slices(case(native=False, labels=None, regions=regions), TASK, ["t1"])[0]
    np.testing.assert_array_equal(view.prediction, view.truth)


# the figure of a case


def titles(figure):
    return [ax.get_title() for ax in figure.axes if ax.get_title()]


def test_columns_follow_what_there_is():
    def columns(**options):
        views = case_slices(case(**options), TASK, ["t1", "flair"])
        return titles(case_figure("a", "", views, ["t1", "flair"], TASK.region_names, True))

    score = torch.rand(SHAPE)
    assert columns() == ["t1", "flair", "truth", "prediction", "error"]
    assert columns(uncertainty={"entropy": score}) == ["t1", "flair", "truth", "prediction", "error", "entropy"]
    branch = {"s": Prediction(uncertainty={"entropy": score})}
    assert columns(truth=False, uncertainty={"entropy": score}, members=branch) == ["t1", "flair", "prediction", "entropy", "s entropy"]
    assert columns(truth=False) == ["t1", "flair", "prediction"]
    assert columns(truth=False, labels=None, scores=score) == ["t1", "flair", "score"]


def test_panels_are_not_stretched():
    views = case_slices(case(), TASK, ["flair"])
    figure = case_figure("a", "", views, ["flair"], TASK.region_names, True)
    width, height = figure.get_size_inches()
    panels = figure.axes[:12]
    scales = set()
    for place, ax in enumerate(panels):
        box, size = ax.get_position(), views[place // 4].size
        scales |= {round(box.width * width / size[0], 6), round(box.height * height / size[1], 6)}
    assert len(scales) == 1  # inches per millimeter, both ways, in every view


@pytest.mark.parametrize("size", [(240, 240, 155), (180, 60, 320), (40, 40, 400), (400, 40, 40), (200, 300, 10), (100, 100, 100)])
@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize("known", ["nothing", "prediction", "score", "both"])
def test_no_figure_is_taller_than_wide_and_no_panel_leaves_it(size, channels, known):
    """`size`: millimeters to the right, front and top, of few voxels each."""
    image = np.ones((channels, 4, 5, 6), np.float32)
    masks = np.ones((1, 4, 5, 6), bool)
    truth, prediction = (masks if known == "both" else None), (masks if known in ("prediction", "both") else None)
    views = slices(
        image, truth, prediction, {"score": image[0]} if known == "score" else {}, [s / n for s, n in zip(size, (4, 5, 6), strict=True)]
    )
    figure = case_figure("a", "", views, [f"c{i}" for i in range(channels)], ["WT"], True)
    width, height = figure.get_size_inches()
    assert height <= width + 1e-9
    boxes = [ax.get_position() for ax in figure.axes]
    assert all(b.x0 > 0 and b.y0 > 0 and b.x1 < 1 and b.y1 < 1 for b in boxes)
    assert max(b.width * width for b in boxes) <= 2.3 + 1e-9
    for one in range(len(boxes)):
        for other in boxes[:one]:
            assert boxes[one].x0 >= other.x1 or boxes[one].x1 <= other.x0 or boxes[one].y0 >= other.y1 or boxes[one].y1 <= other.y0


def test_a_region_that_is_not_in_the_picture_says_why():
    """WT is in both, TC only in the truth, ET in neither."""
    _, label = blob()
    label[label == 3] = 1
    drawn = np.where(label == 2, label, 0)
    result = replace(case(native=False), truth=torch.from_numpy(label), prediction=Prediction(labels=torch.from_numpy(drawn)))
    views = case_slices(result, TASK, ["flair"])
    assert not_drawn(result, TASK, views) == {"WT": "", "TC": " (not predicted)", "ET": " (in neither)"}
    swapped = replace(result, truth=result.prediction.labels, prediction=Prediction(labels=result.truth))
    assert not_drawn(swapped, TASK, views)["TC"] == " (not in the truth)"
    shares = torch.stack([torch.from_numpy(m).float() for m in masks_of(label, TASK)])
    assert not_drawn(replace(result, prediction=Prediction(regions=shares)), TASK, views)["TC"] == ""
    for view in views:
        view.truth[1:], view.prediction[1:] = False, False
    assert not_drawn(replace(result, prediction=Prediction(regions=shares)), TASK, views)["TC"] == " (elsewhere)"
    assert not_drawn(replace(result, truth=None), TASK, views) == {}


def test_error_panel_shows_missed_and_extra_voxels():
    view = case_slices(case(shift=2), TASK, ["flair"])[0]
    figure = case_figure("a", "", [view], ["flair"], TASK.region_names, True)
    ax = next(ax for ax in figure.axes if ax.get_title() == "error")
    missed, extra = (np.asarray(i.get_array())[..., 3] > 0 for i in ax.images[1:])
    np.testing.assert_array_equal(missed, (view.truth & ~view.prediction).any(0))
    np.testing.assert_array_equal(extra, (view.prediction & ~view.truth).any(0))
    assert missed.any()
    assert extra.any()


def test_directions_are_marked_only_where_they_are_known():
    views = case_slices(case(), TASK, ["flair"])
    for known, expected in ((True, ["R", "L", "R", "L", "A", "P"]), (False, [])):
        figure = case_figure("a", "", views, ["flair"], TASK.region_names, known)
        assert [t.get_text() for ax in figure.axes for t in ax.texts] == expected


def test_colors_differ():
    assert len(set(PALETTE)) == len(PALETTE) >= 6


def test_one_voxel_thick_data_can_be_drawn():
    image, label = blob()
    views = slices(image[:, :, :, 7:8], masks_of(label[:, :, 7:8], TASK), None, {}, SPACING)
    case_figure("a", "", views, TASK.channels, TASK.region_names, True).canvas.draw()


# which cases


def test_best_median_worst_by_mean_dice():
    rows = [
        {"case": c, "dice": d}
        for c, ds in {"a": (0.2, 0.4), "b": (0.9, 0.9), "c": (0.5, float("nan")), "d": (0.1, 0.1)}.items()
        for d in ds
    ]
    assert selected(rows, list("abcd")) == {"best": "b", "median": "c", "worst": "d"}
    assert selected(rows[:2], list("a")) == {"best": "a"}
    assert selected(rows[:4], list("ab")) == {"best": "b", "worst": "a"}
    assert selected([], list("dcba")) == {"case_1": "a", "case_2": "b", "case_3": "c"}


# the callback


class Method(pl.LightningModule):
    def __init__(self, results):
        super().__init__()
        self.task, self.results, self.iteration = TASK, results, 5

    def test_step(self, batch, batch_idx):
        own = self.results[batch_idx * self.trainer.world_size + self.global_rank :]
        return own[0] if own else None

    def test_dataloader(self):
        return DataLoader(range(-(-len(self.results) // self.trainer.world_size)))


class Images(pl.loggers.logger.DummyLogger):
    def __init__(self):
        super().__init__()
        self.got = {}

    def log_image(self, key, images):
        self.got[key] = images


def run_test(tmp_path, results, logger=False, **options):
    trainer = pl.Trainer(
        accelerator="cpu", logger=logger, enable_progress_bar=False, callbacks=[OverlayFigures(str(tmp_path), **options)],
        enable_checkpointing=False, devices=1,
    )  # fmt: skip
    trainer.test(Method(results), verbose=False)


def shown(tmp_path):
    return sorted(p.name for p in (tmp_path / "figures").iterdir())


def test_figures_of_a_test_reach_the_disk_and_the_loggers(tmp_path):
    results = [case(n, dice=(d, d, d)) for n, d in zip("abcde", (0.5, 0.1, 0.9, 0.6, 0.2), strict=True)]
    logger, board = Images(), pl.loggers.TensorBoardLogger(tmp_path, name="", version="")
    run_test(tmp_path, [*results, None], logger=[logger, board])
    assert shown(tmp_path) == ["best.png", "median.png", "summary.png", "worst.png"]
    picture = imread(tmp_path / "figures/best.png")
    assert picture.shape[0] > 300
    assert picture[..., :3].std() > 0.1
    assert set(logger.got) == {f"figures/{n}" for n in ("best", "median", "worst", "summary")}
    events = next(tmp_path.glob("events*")).read_bytes()
    assert set(re.findall(rb"figures/(\w+)", events)) == {b"best", b"median", b"worst", b"summary"}


def test_without_truth_the_first_cases_are_drawn(tmp_path):
    run_test(tmp_path, [case(n, truth=False) for n in "dabc"])
    assert shown(tmp_path) == ["case_1.png", "case_2.png", "case_3.png"]


def test_unknown_channel(tmp_path):
    with pytest.raises(SuiteError, match="did you mean 'flair'"):
        run_test(tmp_path, [case()], channels=["flare"])


def test_two_processes_draw_what_one_draws(tmp_path):
    results = [case(n, shift=s, dice=(d, d, d)) for n, d, s in zip("abc", (0.5, 0.1, 0.9), (1, 2, 0), strict=True)]
    run_test(tmp_path / "one", results)
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp_fork", logger=False, enable_progress_bar=False, enable_checkpointing=False,
        use_distributed_sampler=False, callbacks=[OverlayFigures(str(tmp_path / "two"))],
    )  # fmt: skip
    trainer.test(Method(results), verbose=False)
    assert shown(tmp_path / "one") == shown(tmp_path / "two") == ["best.png", "median.png", "summary.png", "worst.png"]
    for name in ("best", "median", "worst", "summary"):
        np.testing.assert_array_equal(imread(tmp_path / f"one/figures/{name}.png"), imread(tmp_path / f"two/figures/{name}.png"))


def test_score_figure_shows_every_case():
    rows = [
        {"case": c, "region": r, "dice": d, "hd95_vox": 4.0} for c, d in (("a", 0.3), ("b", 0.9), ("c", float("nan"))) for r in TASK.regions
    ]
    figure = score_figure(rows, TASK.region_names)
    dice, distance = figure.axes
    assert (dice.get_title(), distance.get_title()) == ("Dice", "HD95 (voxels)")
    assert sorted(dice.collections[0].get_offsets()[:, 1]) == [0.3, 0.9]
    assert len(distance.collections[0].get_offsets()) == 3


def test_montage(tmp_path):
    image, label = blob()
    few = Task(("t1",), TASK.classes)
    cases = [("a", torch.from_numpy(image), label, TASK, SPACING), ("b", image[:1], None, few, SPACING)]
    path = montage(cases, tmp_path / "new/m.png")
    assert imread(path).shape[1] >= 2 * 2.3 * 100
    tall = montage([("a", torch.from_numpy(image), label, TASK, (1.0, 9.0, 1.0))], tmp_path / "tall.png")
    assert imread(tall).shape[0] <= (2.3 + 1.5) * 110  # 9 x 28 high, 24 wide
