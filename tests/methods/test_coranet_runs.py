"""CoraNet through run.py: its clock, what it stores, killed in self-training and resumed, the rows of its tables, its callback, its effect."""

import csv
import shutil
import signal
import statistics

import nibabel as nib
import numpy as np
import pytest
import torch

from callbacks.uncertain_region import boundary_distances
from lesionbench.maps import MapStore
from lesionbench.reports.report import curve
from tests.harness import assert_same, rows, run, run_folders, run_killed, weights

# 3 batches an epoch, 2 epochs on labels alone, 3 of self-training
TINY = [
    "experiment=coranet/blobs", "epochs=5", "data.count=10", "data.split.test=2", "data.split.val=1", "data.split.labeled=2", "data.samples_per_epoch=6", "data.batch_size=2",
    "model.network.features=[4,6]", "model.warm_start=5", "model.optimizer.lr=0.01", "metrics.names=[dice]", "threads=1", "callbacks.uncertain_region.keep=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def lines(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """An undisturbed run."""
    runs = tmp_path_factory.mktemp("whole")
    run(*TINY, f"data.root={data}", f"runs={runs}")
    return run_folders(runs)[0]


def test_all_unlabeled_cases_are_labeled_after_the_warm_start_and_every_so_often(whole, data, tmp_path):
    assert [(int(r["epoch"]), int(r["iteration"]), int(r["version"]), int(r["cases"])) for r in lines(whole / "uncertain_region.csv")] == [
        (2, 6, 1, 5),
        (3, 9, 2, 5),
        (4, 12, 3, 5),
    ]
    run(*TINY, f"data.root={data}", f"runs={tmp_path}", "model.relabel_every=2", "epochs=6")
    seen = [(int(r["epoch"]), int(r["version"])) for r in lines(run_folders(tmp_path)[0] / "uncertain_region.csv")]
    assert seen == [(2, 1), (4, 2)]  # after 0 and 2 epochs of self-training; after the last there is nobody to learn from it


def test_terms_begin_after_the_warm_start(whole):
    for name in ("certain", "uncertain"):
        assert all(iteration > 6 for iteration, _ in curve(whole, f"train/{name}"))


def test_stored_maps_are_whole_cases(whole):
    store = MapStore(whole / "maps")
    cases = [path.stem for path in (whole / "maps" / "uncertain" / "v0003").glob("*.npy")]
    assert len(cases) == 5
    for case in cases:
        label, uncertain = store.read("pseudo_label", case), store.read("uncertain", case)
        assert label.shape == uncertain.shape == (1, 48, 48, 1)
        assert (label.dtype, uncertain.dtype) == (np.int8, np.bool_)
        assert set(np.unique(label)) <= {0, 1}


@pytest.mark.parametrize("update", ["joint", "alternating"])
def test_killed_in_the_middle_of_self_training_it_ends_the_same(update, data, tmp_path, whole):
    common = [*TINY, f"data.root={data}", f"model.update={update}"]
    if update != "joint":
        run(*common, f"runs={tmp_path / 'whole'}")
        (whole,) = run_folders(tmp_path / "whole")
    killed = [*common, f"runs={tmp_path / 'killed'}", "callbacks.checkpoint.every_n_batches=2"]
    assert run_killed(*killed, "callbacks.progress._target_=tests.toys.KillAt", "+callbacks.progress.iteration=11") == -signal.SIGKILL
    torch.rand(3)
    run(*killed, "resume=true")
    (resumed,) = run_folders(tmp_path / "killed")
    assert_same(weights(whole), weights(resumed))
    assert rows(whole) == rows(resumed)
    assert lines(whole / "pseudo_labels.csv") == lines(resumed / "pseudo_labels.csv")


def test_labels_of_unlabeled_cases_change_nothing(data, tmp_path, whole):
    """Wrong ones make the same network, to the last bit. (Without any file the cases could not be divided the same way.)"""
    (folder,) = (p for p in data.iterdir() if p.is_dir() and (p / "labels").is_dir() and len(list((p / "labels").iterdir())) == 10)
    copy = tmp_path / "data" / folder.name
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(".cache"))
    unlabeled = {path.stem for path in (whole / "maps" / "uncertain" / "v0003").glob("*.npy")}
    for case in unlabeled:
        path = copy / "labels" / f"{case}.nii.gz"
        nib.save(nib.Nifti1Image(np.ones((48, 48, 1), dtype=np.uint8), np.eye(4)), path)
    run(*TINY, f"data.root={tmp_path / 'data'}", f"runs={tmp_path / 'runs'}")
    assert_same(weights(whole), weights(run_folders(tmp_path / "runs")[0]))


def test_alternating_updates_take_a_step_for_each_term(data, tmp_path):
    run(*TINY, f"data.root={data}", f"runs={tmp_path}", "model=coranet_paper", "model.warm_start=6")
    (folder,) = run_folders(tmp_path)
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["lesionbench"]["iteration"] == 15
    assert checkpoint["global_step"] == 6 + 3 * 9
    state = checkpoint["optimizer_states"][0]["state"]
    steps = {int(s["step"]) for s in state.values()}
    assert steps == {33, 15}  # trunk and main head in every step, the two other heads in those on labels


@pytest.mark.parametrize(
    "more",
    [
        ["sweep=coranet_table4", "row=seg"],
        ["sweep=coranet_table4", "row=mt_mask"],
        ["sweep=coranet_table6", "row=mc_dropout", "model.mask.passes=2"],
        ["sweep=coranet_table6", "row=tta", "model.mask.passes=2"],
        ["sweep=coranet_table6", "row=aleatoric", "model.mask.samples=2"],
        ["sweep=coranet_table8", "model.mask.alpha=1"],
        ["sweep=coranet_toy", "row=full_supervision"],
        [
            "model.certain_heads=all",
            "model.uncertain_heads=all",
            "model.pseudo_weights=swapped",
            "model.norm=mask",
            "model.noise=0.1",
            "model.reset_teacher=false",
        ],
    ],
    ids=["seg", "mt_mask", "mc_dropout", "tta", "aleatoric", "alpha_1", "bound", "code"],
)
def test_rows_of_the_tables_run(more, data, tmp_path):
    mask = [o.replace("model.mask.", f"rows.{more[1][4:]}.mask.") for o in more] if more[0] == "sweep=coranet_table6" else more
    run(*TINY, f"data.root={data}", f"runs={tmp_path}", *mask, "epochs=3", "model.warm_start=3")
    (folder,) = run_folders(tmp_path)
    assert rows(folder)
    trained = {name for name in ("certain", "uncertain") if curve(folder, f"train/{name}")}
    expected = {"row=seg": set(), "row=mt_mask": {"uncertain"}, "row=full_supervision": set()}
    assert trained == expected.get(more[1], {"certain", "uncertain"})
    if not trained:
        assert not (folder / "uncertain_region.csv").exists()  # nobody asks for pseudo labels, so none are made


# the callback


def test_distances_to_the_boundary_by_hand():
    label = np.zeros((9, 1, 1), dtype=np.int8)
    label[3:6] = 1  # boundary voxels 3 and 5
    mask = np.zeros_like(label, dtype=bool)
    mask[[0, 4, 5, 8]] = True
    distances, count = boundary_distances(label, mask)
    assert distances.tolist() == [3, 1, 0, 3]
    assert count == 4
    empty, count = boundary_distances(np.zeros_like(label), mask)
    assert len(empty) == 0
    assert count == 4


def test_the_callback_tells_what_is_stored(whole):
    last = lines(whole / "uncertain_region.csv")[-1]
    store = MapStore(whole / "maps")
    cases = sorted(path.stem for path in (whole / "maps" / "uncertain" / "v0003").glob("*.npy"))
    masks = [store.read("uncertain", case)[0] for case in cases]
    assert float(last["share"]) == pytest.approx(np.mean(masks))
    found = np.concatenate([boundary_distances(store.read("pseudo_label", c)[0], m)[0] for c, m in zip(cases, masks, strict=True)])
    assert float(last["distance"] or -1) == (pytest.approx(np.median(found)) if len(found) else -1)
    kept = np.load(whole / "uncertain_region.npz")
    assert len(kept.files) == 2 * 3
    name = next(n for n in kept.files if n.startswith("uncertain_v0003"))
    assert np.array_equal(kept[name].astype(bool), store.read("uncertain", name.partition("0003_")[2])[0])


# the effect on the toy


def effect(data, runs, *more, seeds, conditions):
    """Condition -> mean test Dice over seeds, and for the last seed's full model the quality of the stored labels."""
    dice, quality = {}, {}
    for name in conditions:
        for seed in seeds:
            run(
                "experiment=coranet/blobs",
                "sweep=coranet_toy",
                f"row={name}",
                f"seed={seed}",
                f"data.root={data}",
                f"runs={runs / name}",
                "threads=1",
                *more,
            )
        folders = run_folders(runs / name)
        dice[name] = statistics.mean(r["dice"] for f in folders for r in ({"dice": float(x["dice"])} for x in rows(f) if x["member"] == ""))
        quality[name] = [lines(f / "pseudo_labels.csv") for f in folders if (f / "pseudo_labels.csv").exists()]
    return dice, quality


def errors(quality):
    """Error rate inside and outside the uncertain region of the last labeling."""
    last = max(int(line["version"]) for line in quality)
    found = {line["where"]: float(line["error"]) for line in quality if int(line["version"]) == last and line["error"]}
    return found["inside"], found["outside"]


def test_errors_gather_in_the_uncertain_region(data, tmp_path):
    """The fast twin: one short training, the first labeling."""
    short = ["epochs=7", "model.warm_start=90", "data.count=26", "data.split.test=4", "data.split.val=2", "model.optimizer.lr=3e-3"]
    _, quality = effect(data, tmp_path, *short, seeds=[100], conditions=["all"])
    inside, outside = errors(quality["all"][0])
    assert inside > 0.25
    assert inside > 5 * outside


@pytest.mark.slow
def test_effect_on_the_toy(data, tmp_path):
    """What shows on the toy (docs/methods/coranet.md), ten minutes: CoraNet is above labels alone and above self-training on all pixels.

    That the teacher adds to self-training on certain pixels does not show, and is not asserted.
    """
    dice, quality = effect(data, tmp_path, seeds=[0, 1, 2, 3], conditions=["supervised", "st", "all"])
    assert dice["all"] > dice["supervised"] + 0.005
    assert dice["all"] > dice["st"] + 0.005
    for found in quality["all"]:
        inside, outside = errors(found)
        assert inside > 10 * outside


@pytest.mark.slow
def test_self_training_wants_a_mask(data, tmp_path):
    """On certain pixels it is above L_crm alone and above self-training on all pixels; five minutes."""
    dice, _ = effect(data, tmp_path, seeds=[1, 2], conditions=["seg", "st", "st_mask"])
    assert dice["st_mask"] > dice["seg"] + 0.005
    assert dice["st_mask"] > dice["st"] + 0.005
