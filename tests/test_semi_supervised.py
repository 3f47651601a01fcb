"""The machinery of semi-supervised methods: what it joins, weighs, labels and saves, and what it must never see."""

import csv
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from callbacks import PseudoLabelQuality
from datamodules import Blobs, Preprocessing, Split
from lesionbench.checkpoint import initialize_from
from lesionbench.errors import SuiteError
from lesionbench.geometry import read_volume, write_volume
from lesionbench.maps import MapStore
from lesionbench.target import RegionSigmoid
from lesionbench.task import Task
from lightning_modules import CopyPaste, CrossPseudoSupervision, MeanTeacher, PseudoLabel, SemiSupervised, TemporalEnsembling
from lightning_modules.inferers import SliceWise
from lightning_modules.losses import SoftDice
from lightning_modules.ramps import Ramp
from lightning_modules.semi_supervised.base import evaluating, parted
from lightning_modules.semi_supervised.teachers import Teacher
from tests.harness import assert_same, rows, run, run_folders, weights

TASK = Task(("image",), {"background": 0, "blob": 1}, {"BLOB": ("blob",)}, unit="vox")


def net(in_channels: int = 1, out_channels: int = 2, norm: bool = False) -> nn.Module:
    layers = [nn.Conv2d(in_channels, 4, 3, padding=1), *([nn.BatchNorm2d(4)] if norm else []), nn.ReLU(), nn.Conv2d(4, out_channels, 1)]
    return nn.Sequential(*layers)


class Toy(SemiSupervised):
    """One term: the mean square of the logits of unlabeled images."""

    terms: ClassVar = {"flat": 2.0}

    def losses(self, labeled, unlabeled):
        mine, others = self.together(self.network, labeled["image"], unlabeled["image"])
        return {"supervised": self.supervised(mine, labeled), "flat": others.square().mean()}


def method(kind=Toy, **options):
    torch.manual_seed(0)
    defaults = {"network": net, "loss": SoftDice(), "inferer": SliceWise(), "optimizer": partial(torch.optim.SGD, lr=0.1)}
    return kind(TASK, **{**defaults, **options})


def timed(module, iteration: int, batches: int = 10, epochs: int = 4):
    """The method as it is in batch `iteration` of a run of `epochs` x `batches`."""
    module._trainer = SimpleNamespace(num_training_batches=batches, max_epochs=epochs, global_rank=0)
    module.iteration = iteration
    return module


def batch(count: int = 2, seed: int = 0) -> dict:
    g = torch.Generator().manual_seed(seed)
    return {"image": torch.randn(count, 1, 8, 8, generator=g), "label": torch.randint(0, 2, (count, 1, 8, 8), generator=g)}


# joint passes


def test_a_joint_pass_normalizes_over_both_batches():
    module = method(network=partial(net, norm=True)).train()
    labeled, unlabeled = batch(seed=1)["image"], batch(3, seed=2)["image"]
    mine, others = module.together(module.network, labeled, unlabeled)
    whole = module.network(torch.cat([labeled, unlabeled]))
    assert torch.allclose(torch.cat([mine, others]), whole, atol=1e-6)
    assert not torch.allclose(mine, module.network(labeled), atol=1e-3)


def test_parts_of_nested_outputs():
    output = {"logits": torch.arange(5.0)[:, None], "deep": [torch.arange(5.0)[:, None] + 10], "loss": torch.tensor(3.0)}
    first, second = parted(output, [2, 3])
    assert first["logits"].flatten().tolist() == [0, 1]
    assert second["deep"][0].flatten().tolist() == [12, 13, 14]
    assert first["loss"] == 3
    assert "loss" not in second


def test_a_pass_aside_leaves_nothing_behind():
    module = method(network=lambda **k: nn.Sequential(net(norm=True), nn.Dropout(0.5))).train()
    before, state, image = {k: v.clone() for k, v in module.state_dict().items()}, torch.get_rng_state(), batch()["image"]
    logits = module.no_grad_logits(module.network, image, "one")
    assert not logits.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(module.state_dict(), before)
    assert torch.equal(logits, module.no_grad_logits(module.network, image, "one"))
    assert not torch.equal(logits, module.no_grad_logits(module.network, image, "another"))


# terms and weights


def test_the_total_is_the_weighted_sum():
    module = timed(method(weights={"flat": 0.5}, ramp=Ramp("linear", 20)), iteration=5)
    assert module.weight("flat") == 0.5 * 5 / 20
    assert module.total({"supervised": torch.tensor(1.0), "flat": torch.tensor(8.0)}) == 1 + 8 * 0.125


def test_the_ramp_starts_with_the_end_of_the_warm_start():
    module = timed(method(warm_start=0.25, ramp=Ramp("linear", 0.5)), iteration=10)
    assert module.warm_iterations == 10  # of 40
    assert module.weight("flat") == 0
    assert timed(module, 25).weight("flat") == 2.0  # half of the 30 that remain
    assert timed(module, 20).weight("flat") == 2.0 * 10 / 15


def test_ramps_by_term():
    assert timed(method(ramp={"flat": Ramp("linear", 10)}), 5).weight("flat") == 1.0


def test_the_warm_start_sees_labeled_images_alone(monkeypatch):
    module = timed(method(warm_start=3), iteration=2)
    monkeypatch.setattr(module, "log_terms", lambda **terms: None)
    both = {"labeled": batch(seed=1), "unlabeled": {"image": batch(seed=2)["image"] * float("nan")}}
    assert module.training_step(both, 0) == module.compute_loss(both["labeled"])
    module.iteration = 3
    assert module.training_step(both, 0).isnan()


def test_a_method_that_writes_maps_warms_up_for_whole_epochs():
    assert timed(method(PseudoLabel, labels="stored", warm_start=11), 0).warm_iterations == 20
    assert timed(method(PseudoLabel, labels="online", warm_start=11), 0).warm_iterations == 11


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": {"flt": 1}}, "flt"),
        ({"ramp": {"flt": Ramp()}}, "flt"),
        ({"warm_start": -1}, "warm_start"),
        ({"relabel_every": 0}, "relabel_every"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(SuiteError, match=message):
        method(**options)


def test_a_warm_start_that_leaves_nothing_is_refused():
    for options in ({"warm_start": 40}, {"warm_start": 0.999}):
        with pytest.raises(SuiteError, match=r"takes 40 of the 40 batches .* flat would never begin"):
            timed(method(**options), 0).on_train_start()
    with pytest.raises(SuiteError, match="takes 40 of the 40"):  # 31 batches, rounded up to whole epochs
        timed(method(PseudoLabel, labels="stored", warm_start=31), 0).on_train_start()
    timed(method(warm_start=39), 0).on_train_start()
    timed(method(warm_start=100), 0, epochs=1).on_train_start()


def test_maps_that_are_lacking_are_asked_for_as_they_are_to_be_moved():
    data = SimpleNamespace(streams={"labeled": {}, "unlabeled": {}}, extra_maps={})
    for kind, options, wanted in (
        (PseudoLabel, {"labels": "stored"}, "pseudo_label: nearest"),
        (TemporalEnsembling, {}, "ensemble: linear"),
    ):
        with pytest.raises(SuiteError, match=rf"data\.extra_maps={{{wanted}}}"):
            method(kind, **options).check(data)


def test_refuses_a_network_that_is_not_there():
    data = SimpleNamespace(streams=("labeled", "unlabeled"))
    with pytest.raises(SuiteError, match="techer"):
        method(predict_with="techer").check(data)
    with pytest.raises(SuiteError, match="extra_maps"):
        method(PseudoLabel, labels="stored").check(data)


def test_a_teacher_that_a_file_does_not_hold_starts_as_its_student(tmp_path):
    source = MeanTeacher(TASK, network=net, loss=SoftDice(), inferer=SliceWise())
    torch.save({k: v for k, v in source.state_dict().items() if k.startswith("network.")}, tmp_path / "student.pt")
    module = method(MeanTeacher)
    initialize_from(module, tmp_path / "student.pt")
    assert_same(dict(module.teacher.network.named_parameters()), dict(source.network.named_parameters()))
    with torch.no_grad():
        source.teacher.network[0].bias.fill_(7)
    torch.save(source.state_dict(), tmp_path / "both.pt")
    initialize_from(module, tmp_path / "both.pt")
    assert (module.teacher.network[0].bias == 7).all()


# pseudo labels in the form of the loss


def test_hard_answers_and_maps_of_them():
    module = method()
    logits = torch.tensor([[0.0, 2.0, -1.0], [1.0, 0.0, -2.0]])[None].requires_grad_()  # (1, K=2, 3)
    hard = module.hard(logits)
    assert hard.tolist() == [[[1, 0, 0]]]
    assert not hard.requires_grad
    maps, valid = module.target.as_maps(torch.tensor([[[1, 0, -1]]]))
    assert maps.tolist() == [[[0, 1, 1], [1, 0, 0]]]
    assert valid.tolist() == [[[1, 1, 0]]]
    regions = method(target=RegionSigmoid, loss=nn.Identity())
    assert regions.hard(torch.tensor([[[0.5, -0.5]]])).tolist() == [[[1, 0]]]


class OwnLoss(nn.Module):
    """A network with a loss of its own, as one that also reconstructs the image has."""

    def __init__(self, in_channels: int = 1, out_channels: int = 2) -> None:
        super().__init__()
        self.net = net(in_channels, out_channels)

    def forward(self, image):
        return {"logits": self.net(image), "loss": 100 + 0 * image.sum()}


@pytest.mark.parametrize(("kind", "students"), [(CopyPaste, 1), (CrossPseudoSupervision, 2), (MeanTeacher, 1), (PseudoLabel, 1)])
def test_the_loss_of_the_network_itself_is_added_once_per_student(kind, students):
    module = timed(method(kind, network=OwnLoss), 0)
    labeled, unlabeled = batch(seed=1), {"image": batch(seed=2)["image"]}
    for terms in (module.losses(labeled, unlabeled), module.warm_losses(labeled)):
        values = {name: float(torch.as_tensor(term).detach()) for name, term in terms.items()}
        assert 100 * students < values.pop("supervised") < 100 * students + 10
        assert all(value < 10 for value in values.values())


def test_noise_is_keyed_and_bounded():
    module = method()
    image = torch.zeros(1, 1, 64, 64)
    noise = module.noisy(image, "a", 0.1, 0.2)
    assert noise.abs().max() == pytest.approx(0.2)
    assert noise.std() == pytest.approx(0.1, rel=0.1)
    assert torch.equal(noise, module.noisy(image, "a", 0.1, 0.2))
    assert not torch.equal(noise, module.noisy(image, "b", 0.1, 0.2))
    assert module.noisy(image, "a", 0) is image


# prediction


def test_predicts_with_whom_it_is_told():
    module = method(MeanTeacher)
    nn.init.constant_(module.teacher.network[-1].bias, 3.0)
    view = batch()["image"]
    student, teacher = (module.probabilities(n(view)) for n in (module.network, module.teacher))
    for name, expected in [(None, teacher), ("teacher", teacher), ("student", student), ("mean", student)]:
        module.predict_with = name
        assert torch.equal(module.predict_maps(view)["probabilities"], expected)
    module.predict_members = True
    assert set(module.predict_maps(view)) == {"probabilities", "teacher", "student"}


def test_evaluating_restores_every_mode():
    module = nn.Sequential(nn.Dropout(), nn.Dropout())
    module[1].eval()
    with evaluating(module):
        assert not module[0].training
    assert module.training
    assert module[0].training
    assert not module[1].training


# whole runs on tiny blobs

RUN = [
    "benchmark=blobs", "model=mean_teacher", "data.count=14", "data.split.test=2", "data.split.val=2", "data.split.labeled=3", "epochs=3", "data.samples_per_epoch=8",
    "data.batch_size=2", "model.network.features=[4,8]", "threads=1", "callbacks.calibration=null", "augmentation=flip_in_plane",
]  # fmt: skip
STORED = ["benchmark=blobs", "model=pseudo_label", *RUN[2:], "model.labels=stored", "model.warm_start=0"]


def test_the_teacher_follows_once_per_optimizer_step_and_is_saved(tmp_path):
    run(*RUN, f"data.root={tmp_path / 'data'}", f"runs={tmp_path / 'runs'}", "accumulate=2", "model.ema_warmup=false", "model.warm_start=0")
    state = weights(run_folders(tmp_path / "runs")[0])
    assert int(state["teacher.updates"]) == 6  # 12 batches, 2 to a step
    different = [not torch.equal(state[f"teacher.network.{k}"], state[f"network.{k}"]) for k in ("branches.heads.0.0.weight",)]
    assert all(different)


def test_teachers_are_in_no_optimizer():
    module = method(MeanTeacher)
    owned = {id(p) for p in module.optimizer_groups()["main"]}
    assert owned == {id(p) for p in module.network.parameters()}
    assert isinstance(module.teacher, Teacher)


def test_a_checkpoint_names_the_patients_without_a_label_too():
    """They were trained on: an ensemble must not be tested on them."""
    module, part = method(MeanTeacher), {"train": "ab", "labeled": "a", "unlabeled": "bu", "val": "v", "test": "t"}
    parts = {name: [SimpleNamespace(patient=p) for p in patients] for name, patients in part.items()}
    module._trainer = SimpleNamespace(datamodule=SimpleNamespace(parts=parts))
    checkpoint = {}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["lesionbench"]["patients"] == ["a", "b", "u", "v"]


@pytest.mark.parametrize("common", [RUN, STORED], ids=["online", "stored"])
def test_labels_of_unlabeled_cases_change_nothing(common, tmp_path):
    """Not when they are garbage on disk from the start, and not when files and cache are deleted behind the data module's back."""
    found = {}
    for name in ("true", "garbage"):
        root = tmp_path / name
        data = Blobs(root, **_blob_options())
        data.materialize()
        data.setup()
        if name == "garbage":
            for case in data.parts["unlabeled"]:
                array, affine, _ = read_volume(case.label)
                write_volume(case.label, np.roll(1 - array, 7, axis=0).astype(np.uint8), affine)
        run(*common, f"data.root={root}", f"runs={tmp_path / 'runs' / name}")
        (folder,) = run_folders(tmp_path / "runs" / name)
        found[name] = weights(folder), rows(folder), curves(folder)
    assert_same(found["true"][0], found["garbage"][0])
    assert found["true"][1:] == found["garbage"][1:]


def test_deleted_labels_are_not_missed(tmp_path, monkeypatch):
    common = [*STORED, "callbacks.checkpoint.monitor=null"]
    run(*common, f"data.root={tmp_path / 'data'}", f"runs={tmp_path / 'with'}")
    divide = Blobs.setup

    def setup(self, stage=None):
        divide(self, stage)
        for case in self.parts["unlabeled"]:
            case.label.unlink(missing_ok=True)
            (self.store.open(case).folder / "label.npy").write_bytes(b"")  # opening it would fail

    monkeypatch.setattr(Blobs, "setup", setup)
    monkeypatch.setattr("datamodules.cache.CaseCache._meta", _lenient)
    run(*common, f"data.root={tmp_path / 'data'}", f"runs={tmp_path / 'without'}", "stages=[{name: fit, run: fit}]")
    with_labels, without = (run_folders(tmp_path / name)[0] for name in ("with", "without"))
    assert_same(weights(with_labels), weights(without))


def _lenient(self, case):
    """An entry's description, whatever state its label is in."""
    import json

    return json.loads((self.folder / case.id / "meta.json").read_text())


def _blob_options() -> dict:
    return {
        "count": 14, "split": Split(test=2, val=2, labeled=3), "view": "slice", "patch": (48, 48), "check": False,
        "preprocessing": Preprocessing(crop="none", normalize="none"),
    }  # fmt: skip


def curves(folder) -> list[tuple[str, str, str]]:
    with (folder / "metrics.csv").open() as file:
        return [(r["iteration"], r["name"], r["value"]) for r in csv.DictReader(file)]


def test_whole_unlabeled_cases_and_statistics_know_no_label(tmp_path):
    """Neither the cases that pseudo labels are made for nor the intensities of labeled voxels (`normalize: ct`)."""
    statistics = []
    for name in ("true", "garbage"):
        options = {**_blob_options(), "preprocessing": Preprocessing(crop="none", normalize="ct")}
        data = Blobs(tmp_path / name, **options)
        data.prepare_data()
        data.setup()
        if name == "garbage":
            for case in data.parts["unlabeled"]:
                array, affine, _ = read_volume(case.label)
                write_volume(case.label, (1 - array).astype(np.uint8), affine)
            data = Blobs(tmp_path / name, **options)
            data.prepare_data()
            data.setup()
        statistics.append(data.statistics)
        batches = list(data.unlabeled_loader())
        assert [b["case"][0] for b in batches] == [c.id for c in data.parts["unlabeled"]]
        assert not any({"label", "native_label", "raters"} & set(b) for b in batches)
    assert statistics[0] == statistics[1]


def test_stored_labels_are_renewed_at_ends_of_epochs(tmp_path):
    run(
        *STORED,
        f"data.root={tmp_path / 'data'}",
        f"runs={tmp_path / 'runs'}",
        "epochs=6",
        "model.relabel_every=2",
        f"maps={tmp_path / 'maps'}",
    )
    (folder,) = run_folders(tmp_path / "runs")
    store = MapStore(tmp_path / "maps")
    assert store.version("pseudo_label") == 3  # after epoch 1 (the first), 2 and 4; not after the last
    used = sorted({int(i) for i, name, _ in curves(folder) if name == "train/pseudo"})
    assert used[0] > 4  # none in the first epoch


def test_the_same_cases_are_labeled_for_every_method(tmp_path):
    """What is labeled depends on the data alone: the model has no say."""
    from hydra.utils import instantiate

    from tests.harness import composed

    parts = []
    for name in ("mean_teacher", "cross_pseudo_supervision", "co_learning", "supervised"):
        data = instantiate(composed("benchmark=blobs", f"model={name}", *RUN[2:6], f"data.root={tmp_path}", "seed=3").data, _convert_="all")
        data.materialize()
        data.setup("fit")
        parts.append([c.id for c in data.parts["labeled"]])
    assert all(p == parts[0] for p in parts)
    assert len(parts[0]) == 3


def test_several_heads_a_critic_and_a_teacher_need_nothing_new(tmp_path):
    own = ["~model.weights", "+model.weights={fooling:0.1,heads:1.0}", "~model.decay", "~model.ema_warmup", "~model.noise", "trust=[tests]"]
    common = [*RUN, "model._target_=tests.toys.AdversarialHeads", "model.warm_start=0", f"data.root={tmp_path / 'data'}", *own]
    run(*common, f"runs={tmp_path / 'runs'}", "model.predict_with=teacher", "accumulate=2")
    (folder,) = run_folders(tmp_path / "runs")
    state = weights(folder)
    assert int(state["teacher.updates"]) == 6  # once for both optimizers, 12 batches, 2 to a step
    assert rows(folder)


def test_the_documented_method_works():
    page = (Path(__file__).parent.parent / "docs" / "semi_supervised.md").read_text()
    found: dict = {}
    exec(page.partition("```python\n")[2].partition("```")[0], found)
    module = method(found["HardTeacher"])
    terms = module.losses(batch(seed=1), {"image": batch(3, seed=2)["image"]})
    sum(terms.values()).backward()
    assert set(terms) == {"supervised", "pseudo"}
    assert all(p.grad is not None for p in module.network.parameters())
    assert all(p.grad is None for p in module.teacher.parameters())


# the one place that sees the labels


def test_quality_of_pseudo_labels_by_hand(tmp_path):
    case = SimpleNamespace(id="a", label="there")
    truth = np.array([1, 1, 1, 0, 0, -1], np.int8).reshape(6, 1, 1)
    said = np.array([1, 0, 1, 1, 0, 1], np.int8).reshape(6, 1, 1)
    mask = np.array([0, 1, 0, 1, 0, 1], np.uint8).reshape(6, 1, 1)
    store = MapStore(tmp_path / "maps")
    for name, array in (("pseudo_label", said), ("uncertain", mask)):
        store.write(name, "a", array)
        store.commit(name)
    data = SimpleNamespace(
        task=TASK, maps=store, parts={"unlabeled": [case]}, store=SimpleNamespace(open=lambda c: SimpleNamespace(label=lambda: truth))
    )
    trainer = SimpleNamespace(datamodule=data, global_rank=0, world_size=1, is_global_zero=True, current_epoch=4)
    callback = PseudoLabelQuality(str(tmp_path), map="pseudo_label", mask="uncertain")
    for _ in range(2):  # the second time there is nothing new
        callback.on_train_epoch_start(trainer, SimpleNamespace(iteration=40))
    with (tmp_path / "pseudo_labels.csv").open() as file:
        found = {r["where"]: r for r in csv.DictReader(file)}
    everywhere = found["all"]  # tp 2, fp 1, fn 1 of 5 known voxels
    assert [float(everywhere[k]) for k in ("voxels", "share", "error")] == [5, 1, 2 / 5]
    assert [float(everywhere[k]) for k in ("ppv", "tpr", "csi")] == [2 / 3, 2 / 3, 2 / 4]
    assert [float(found["inside"][k]) for k in ("voxels", "share", "error", "csi")] == [2, 2 / 5, 1, 0]
    assert [float(found["outside"][k]) for k in ("error", "ppv", "tpr")] == [0, 1, 1]
    assert len(found) == 3


def test_voxels_that_a_stored_label_leaves_out_are_not_judged(tmp_path):
    """-1 is no class, least of all the last one."""
    truth, said = np.array([1, 1, 0, 0, -1, 0], np.int8), np.array([1, -1, -1, 0, -1, 1], np.int8)
    callback, counts = PseudoLabelQuality(str(tmp_path), map="pseudo_label"), {}
    data = SimpleNamespace(
        task=TASK,
        parts={"unlabeled": [SimpleNamespace(id="a", label="there")]},
        store=SimpleNamespace(open=lambda c: SimpleNamespace(label=lambda: truth)),
    )
    callback._count(counts, data, "a", said, None)
    callback._write(SimpleNamespace(is_global_zero=True, current_epoch=0), SimpleNamespace(iteration=1), counts, 1)
    with (tmp_path / "pseudo_labels.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert [float(row[k]) for k in ("voxels", "share", "error", "ppv", "tpr", "csi")] == [3, 3 / 5, 1 / 3, 1 / 2, 1, 1 / 2]


def test_every_region_can_have_a_mask_of_its_own(tmp_path):
    task = Task(("t1",), {"background": 0, "a": 1, "b": 2}, {"A": ("a",), "B": ("b",)})
    truth, said = (np.array(v, np.int8).reshape(4, 1, 1) for v in ([0, 1, 2, 0], [1, 1, 2, 2]))
    masks = np.array([[1, 0, 0, 0], [0, 0, 1, 1]], bool).reshape(2, 4, 1, 1)
    callback, counts = PseudoLabelQuality(str(tmp_path), map="pseudo_label", mask="uncertain"), {}
    data = SimpleNamespace(
        task=task,
        parts={"unlabeled": [SimpleNamespace(id="a", label="there")]},
        store=SimpleNamespace(open=lambda c: SimpleNamespace(label=lambda: truth)),
    )
    callback._count(counts, data, "a", said, masks)
    assert {key: value[:4].tolist() for key, value in counts.items() if key[1] == "inside"} == {
        ("A", "inside"): [0, 1, 0, 1],
        ("B", "inside"): [1, 1, 0, 2],
    }
    assert counts["B", "outside"][:4].tolist() == [0, 0, 0, 2]


def test_quality_of_predictions_does_not_disturb_training(tmp_path):
    common = [*RUN, f"data.root={tmp_path / 'data'}"]
    run(*common, f"runs={tmp_path / 'plain'}")
    run(
        *common,
        f"runs={tmp_path / 'watched'}",
        "callbacks=[default,pseudo_label_quality]",
        "callbacks.figures=null",
        "callbacks.calibration=null",
    )
    plain, watched = (run_folders(tmp_path / name)[0] for name in ("plain", "watched"))
    assert_same(weights(plain), weights(watched))
    with (watched / "pseudo_labels.csv").open() as file:
        found = list(csv.DictReader(file))
    assert [int(r["epoch"]) for r in found] == [0, 1, 2]
    assert all(int(r["cases"]) == 7 for r in found)  # 14 less 2, 2 and 3
    shutil.rmtree(watched)
