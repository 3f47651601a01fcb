"""The cascade of Luu and Pavlovskiy: its network, loss and table, what is frozen, what a checkpoint carries, maps of training cases, kills."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from torch import nn

from benchmarks.cascade_effect import TASK as TOY
from benchmarks.cascade_effect import a_round, curves, probabilities, train, volumes
from datamodules import Preprocessing, Simulated, Split
from datamodules.overview import cut_off
from lesionbench.checkpoint import initialize_from, load_method, read_checkpoint
from lesionbench.errors import SuiteError
from lesionbench.maps import MapStore
from lesionbench.target import RegionSigmoid
from lesionbench.task import Task
from lightning_modules import CascadedUNet3D
from lightning_modules.cascade import drawn, said
from lightning_modules.inferers import Whole
from lightning_modules.losses import RegionDice
from lightning_modules.networks import RReLUUNet
from tests.fake_data import write_fake_brats
from tests.harness import assert_same, composed, rows, run, run_folders, weights

TASK = Task(
    ("t1", "t1ce", "t2", "flair"),
    {"background": 0, "ncr": 1, "ed": 2, "et": (4, 3)},
    {"WT": ("ncr", "ed", "et"), "TC": ("ncr", "et"), "ET": ("et",)},
)
TINY = [
    "experiment=cascaded_3d_unet/brats2021", "trainer=cpu", "epochs=2", "patch=[16,16,16]", "model.network.features=[8,8]", "model.optimizer.lr=1e-2", "data.samples_per_epoch=2",
    "data.num_workers=0", "data.check=false", "data.split={test:1,val:1}", "callbacks.figures=null", "callbacks.calibration=null", "metrics.names=[dice]", "threads=1",
    "trainer.log_every_n_steps=1",
]  # fmt: skip
ROUNDS = {"wt": (4, "WT"), "tc": (5, "TC"), "": (6, "ET")}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_fake_brats(tmp_path_factory.mktemp("brats"), "2021", count=5, shape=(20, 18, 17))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    """The folder of a run through all stages."""
    runs = tmp_path_factory.mktemp("runs")
    run(*TINY, f"data.root={data}", f"runs={runs}")
    return run_folders(runs)[0]


def artefact(folder: Path, stage: str) -> str:
    return json.loads((folder / "stages" / f"{stage}.json").read_text())["artefact"]


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def rounds(**options) -> CascadedUNet3D:
    network = partial(RReLUUNet, features=(8, 8))
    return CascadedUNet3D(TASK, **{"network": network, "loss": RegionDice(), "inferer": Whole(2), "target": RegionSigmoid, **options})


# the network, the loss and the table of the paper


def test_parameters_of_the_three_rounds():
    with torch.device("meta"):
        assert [parameters(RReLUUNet(4 + n, 1)) for n in range(3)] == [5_888_273, 5_888_705, 5_889_137]
        wide = [parameters(RReLUUNet(4 + n, 1, features=(32, 64, 128, 256, 512))) for n in range(3)]
    assert wide == [23_540_769, 23_541_633, 23_542_497]
    assert {m.num_groups for m in RReLUUNet(4, 1, features=(16, 32)).modules() if isinstance(m, nn.GroupNorm)} == {8}


def test_the_network_by_other_means():
    """The same logits from torch's own functions: convolution, normalization, activation, twice; pooling; interpolation before the skip."""
    torch.manual_seed(0)
    network, image = RReLUUNet(2, 1, features=(8, 16, 32)).eval(), torch.randn(1, 2, 8, 8, 12)

    def pair(layers: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
        for convolution, norm in ((layers[0], layers[1]), (layers[3], layers[4])):
            x = F.conv3d(x, convolution.weight, convolution.bias, padding=1)
            x = F.leaky_relu(F.group_norm(x, 8 if len(norm.weight) > 8 else 4, norm.weight, norm.bias), 11 / 48)
        return x

    with torch.no_grad():
        fine = pair(network.encoder[0], image)
        half = pair(network.encoder[1], F.max_pool3d(fine, 2))
        up = F.interpolate(pair(network.bottom, F.max_pool3d(half, 2)), scale_factor=2, mode="trilinear", align_corners=False)
        up = F.interpolate(pair(network.decoder[0], torch.cat([up, half], 1)), scale_factor=2, mode="trilinear", align_corners=False)
        x = pair(network.decoder[1], torch.cat([up, fine], 1))
        expected = F.conv3d(x, network.out.weight, network.out.bias)
        torch.testing.assert_close(network(image), expected)


def test_the_slope_is_drawn_in_training_and_the_mean_afterwards():
    torch.manual_seed(0)
    network, image = RReLUUNet(2, 1, features=(8, 16)), torch.randn(1, 2, 8, 8, 8)
    assert not torch.equal(network(image), network(image))
    mean = RReLUUNet(2, 1, features=(8, 16), activation="leaky_relu")
    for module in mean.modules():
        if isinstance(module, nn.LeakyReLU):
            module.negative_slope = (1 / 8 + 1 / 3) / 2
    mean.load_state_dict(network.state_dict())
    torch.testing.assert_close(network.eval()(image), mean(image))
    assert pytest.approx(0.22917, abs=1e-5) == (1 / 8 + 1 / 3) / 2


@pytest.mark.parametrize("activation", ["rrelu", "leaky_relu", "relu"])
@pytest.mark.parametrize(("dimensions", "size"), [(3, (16, 8, 24)), (2, (16, 40))])
def test_shapes_and_gradients(activation, dimensions, size):
    network = RReLUUNet(3, 2, dimensions=dimensions, features=(8, 16, 24), activation=activation)
    logits = network(torch.randn(2, 3, *size))
    assert logits.shape == (2, 2, *size)
    (logits * torch.randn_like(logits)).sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad != 0).any(), name


def test_dice_loss_with_squares_by_hand():
    p, g = torch.tensor([0.9, 0.8, 0.3, 0.1]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    shape = (1, 1, 4, 1, 1)
    loss = {squared: RegionDice(squared=squared, smooth=1e-6) for squared in (True, False)}
    assert loss[True](p.logit().reshape(shape), g.reshape(shape)).item() == pytest.approx(0.0423, abs=5e-5)
    assert loss[False](p.logit().reshape(shape), g.reshape(shape)).item() == pytest.approx(0.1707, abs=5e-5)
    sure = (2 * g - 1).mul(100).reshape(shape)
    assert loss[True](sure, g.reshape(shape)).item() == pytest.approx(0, abs=1e-6)
    assert loss[True](torch.full(shape, -100.0), torch.zeros(shape)).item() == pytest.approx(0, abs=1e-6)


def test_the_table_of_the_paper_for_all_eight():
    masks = torch.tensor(list(product((0.0, 1.0), repeat=3))).T.reshape(3, 8, 1, 1)  # 000, 001, 010, 011, 100, 101, 110, 111
    labels = RegionSigmoid(TASK, decoding="supported").labels(masks[None])[0].flatten()
    assert TASK.to_disk(labels.numpy()).tolist() == [0, 0, 1, 4, 2, 4, 1, 4]
    cfg = composed("experiment=cascaded_3d_unet/brats2021", "run_folder=x")
    assert instantiate(cfg.model.target)(TASK).decoding == "supported"


def test_the_preset_of_the_paper():
    cfg = composed("experiment=cascaded_3d_unet/brats2021", "run_folder=x")
    assert (cfg.epochs, cfg.data.batch_size, list(cfg.patch), list(cfg.model.network.features)) == (
        50,
        1,
        [160] * 3,
        [16, 32, 64, 128, 256],
    )
    optimizer = instantiate(cfg.model.optimizer)([nn.Parameter(torch.zeros(1))])
    schedule = instantiate(cfg.model.scheduler)(optimizer, total_iterations=1)
    rates = []
    for value in (0.5, 0.5, 0.4, 0.5, 0.5):  # better once, then not for three validations
        schedule.step(value)
        rates.append(optimizer.param_groups[0]["lr"])
    assert (type(optimizer), rates) == (torch.optim.Adam, pytest.approx([1e-4, 1e-4, 1e-4, 1e-6, 1e-6]))
    assert (list(cfg.augmentation), list(cfg.data.preprocessing.crop_size)) == (["_target_"], [160, 160, None])  # a chain of nothing
    assert [stage.get("map") or stage.name for stage in cfg.stages] == ["wt", "wt", "tc", "tc", "fit", "test"]


# what is cut off


@pytest.mark.parametrize("reaches_out", [False, True])
def test_the_middle_comes_back_whole_and_what_lies_outside_is_counted(reaches_out, tmp_path, capsys):
    root = write_fake_brats(tmp_path / "data", "2021", count=4, shape=(24, 24, 15))
    path = min(root.rglob("*seg.nii.gz"))
    image = nib.load(path)
    label = np.zeros(image.shape, np.int16)
    label[6:18, 5:17, :] = 2  # the middle 16 x 16 begins at 4
    if reaches_out:
        label[2:6, 10, 3] = 4
    for other in root.rglob("*seg.nii.gz"):
        nib.save(nib.Nifti1Image(0 * label, image.affine), other)
    nib.save(nib.Nifti1Image(label, image.affine), path)
    settings = [
        "data.split={test:1,val:1}",
        "data.preprocessing.crop=center",
        "data.preprocessing.crop_size=[16,16,null]",
        "data.num_workers=0",
        "data.check=false",
        "data.limit_cases=3",
    ]
    cfg = composed("data=brats2021", *settings, f"data.root={root}", "run_folder=x")
    module = instantiate(cfg.data, _convert_="all")
    module.prepare_data()
    case = next(c for c in module.cases() if c.label == path)
    cached = module.store.open(case)
    back = cached.geometry.to_native(torch.from_numpy(np.array(cached.label()))[None], discrete=True)[0].numpy()
    lost = module.task.from_disk(label) != back
    assert lost.sum() == (2 if reaches_out else 0)
    assert cut_off(module).get(case.id, 0) == lost.sum()
    run("job=prepare", "data=brats2021", *settings, f"data.root={root}")
    assert (f"crop=center leaves out 2 labeled voxel(s) of 1 case(s), most of {case.id} (2)" in capsys.readouterr().out) == reaches_out


# frozen forerunners


def test_every_round_has_its_channels_and_its_region(trained):
    for stage, (channels, region) in ROUNDS.items():
        method, own = load_method(trained / stage / "checkpoints" / "last.ckpt")
        assert method.network.encoder[0][0].in_channels == channels
        assert (drawn(method), method.network.out.out_channels) == ([region], 1)
        assert (own["model"]["monitor"], list(method.forerunners)) == (f"val/dice_{region}", ["wt", "tc"][: channels - 4])


def test_forerunners_stay_bit_identical_through_training(trained):
    last = weights(trained)
    for name in ("wt", "tc"):
        before = read_checkpoint(artefact(trained, name))["state_dict"]
        after = {k.removeprefix(f"forerunners.{name}."): v for k, v in last.items() if k.startswith(f"forerunners.{name}.")}
        assert_same(before, after)
    start = read_checkpoint(trained / "checkpoints" / "last.ckpt")
    trained_names = len([k for k in start["state_dict"] if k.startswith("network.")])
    assert len(start["optimizer_states"][0]["state"]) == trained_names


def behind(trained: Path, region: str = "TC", **options) -> CascadedUNet3D:
    return rounds(region=region, forerunners={"wt": artefact(trained, "wt")}, **options)


def test_a_step_reaches_the_new_network_and_its_fifth_channel_and_nothing_before(trained):
    torch.manual_seed(0)
    method = behind(trained).train()
    frozen = {k: v.clone() for k, v in method.forerunners.state_dict().items()}
    label = torch.randint(0, 4, (1, 1, 8, 8, 8))
    batch = {"image": torch.randn(1, 4, 8, 8, 8), "label": label, "wt": (label > 0).half()}
    optimizer = torch.optim.Adam([p for p in method.parameters() if p.requires_grad], lr=0.1)
    method.compute_loss(batch).backward()
    assert (method.network.encoder[0][0].weight.grad[:, 4] != 0).all()
    assert all(p.grad is not None and (p.grad != 0).any() for p in method.network.parameters())
    optimizer.step()
    assert all(p.grad is None and not p.requires_grad for p in method.forerunners.parameters())
    assert_same(frozen, method.forerunners.state_dict())
    assert {id(p) for group in method.optimizer_groups().values() for p in group} == {id(p) for p in method.network.parameters()}


def test_the_loss_is_that_of_the_region_of_the_round(trained):
    method = behind(trained)
    label = torch.tensor([0, 1, 2, 3]).reshape(1, 1, 4, 1, 1)
    assert method.training_target({"label": label}).flatten().tolist() == [0, 1, 0, 1]  # necrosis and enhancing tumor
    assert rounds(region="WT").training_target({"label": label}).flatten().tolist() == [0, 1, 1, 1]
    assert rounds().training_target({"label": label}).shape[1] == 3


def test_forerunners_rest_in_training_mode_so_that_nothing_is_drawn_or_recorded(trained):
    method = behind(trained)
    wt = method.forerunners["wt"]
    wt.network.encoder[0][1] = nn.BatchNorm3d(8)
    method.train()
    before = {k: v.clone() for k, v in wt.state_dict().items()}
    batch = {"image": torch.randn(1, 4, 8, 8, 8), "case": ["a"]}
    first = method.ask(batch)["wt"]
    assert torch.equal(first, method.ask(batch)["wt"])
    assert_same(before, wt.state_dict())
    assert method.network.training
    assert not any(m.training for m in method.forerunners.modules())


def test_masks_or_probabilities_are_shown(trained):
    maps = {"wt": torch.tensor([0.2, 0.5, 0.51, 1.0]).reshape(1, 1, 4, 1, 1)}
    image = torch.randn(1, 4, 4, 1, 1)
    assert behind(trained).shown(image, maps)[0, 4].flatten().tolist() == [0, 0, 1, 1]
    assert torch.equal(behind(trained, given="probability").shown(image, maps), torch.cat([image, maps["wt"]], dim=1))
    with pytest.raises(SuiteError, match="there is no map wt for a training case"):
        behind(trained).shown(image, {})


def test_regions_of_earlier_rounds_come_from_them_and_unknown_ones_are_empty(trained):
    method = behind(trained).eval()
    batch = {"image": torch.randn(1, 4, 8, 8, 8), "case": ["a"]}
    with torch.no_grad():
        answer = method.predict_case(batch)
        wt = method.ask(batch)["wt"]
        alone = method.network(method.shown(batch["image"], {"wt": wt})).sigmoid()
    assert torch.equal(answer.regions[0], wt[0, 0])
    torch.testing.assert_close(answer.regions[1], alone[0, 0])
    assert (answer.regions[2] == 0).all()
    stored = method.predict_case({**batch, "wt": torch.ones(1, 1, 8, 8, 8)})  # a map in the store is no answer of a tested case
    assert torch.equal(stored.regions, answer.regions)
    assert not torch.equal(method.answer({**batch, "wt": torch.ones(1, 1, 8, 8, 8)}).regions, answer.regions)


def test_a_forerunner_of_forerunners_is_asked_once(trained):
    method = load_method(artefact(trained, "fit"))[0]
    assert method.forerunners["tc"].forerunners["wt"] is method.forerunners["wt"]
    asked = []
    method.forerunners["wt"].network.register_forward_hook(lambda *_: asked.append(1))
    method.predict_case({"image": torch.randn(1, 4, 16, 16, 16), "case": ["a"]})
    assert asked == [1]


# one file


def test_one_moved_checkpoint_predicts_with_nothing_else_there(trained, data, tmp_path):
    moved = tmp_path / "alone.ckpt"
    shutil.copy(artefact(trained, "fit"), moved)
    case = rows(trained)[0]["case"]
    hidden = trained.rename(trained.with_name("hidden"))
    try:
        run(
            "job=predict",
            f"ckpt={moved}",
            "data=brats2021",
            f"data.root={data}",
            "data.check=false",
            f"out={tmp_path / 'out'}",
            "threads=1",
        )
    finally:
        hidden.rename(trained)
    name = f"{case}.nii.gz"
    (ours,) = (nib.load(p).get_fdata() for p in (tmp_path / "out").rglob(name))
    (theirs,) = (nib.load(p).get_fdata() for p in (trained / "predictions").rglob(name))
    assert np.array_equal(ours, theirs)
    assert str(trained) not in json.dumps(read_checkpoint(moved)["lesionbench"]["model"])


def test_a_checkpoint_carries_the_patients_of_its_forerunners(trained):
    wt, fit = (read_checkpoint(artefact(trained, name))["lesionbench"] for name in ("wt", "fit"))
    assert wt["patients"] == fit["patients"] == fit["model"]["forerunners"]["wt"]["patients"]
    assert len(fit["patients"]) == 4
    checkpoint = {}
    behind(trained).on_save_checkpoint(checkpoint)  # of a method without data of its own
    assert checkpoint["lesionbench"]["patients"] == wt["patients"]


def test_what_a_checkpoint_carries_is_refused_like_the_rest_of_it(trained, tmp_path):
    changed = torch.load(artefact(trained, "fit"), weights_only=True)
    changed["lesionbench"]["model"]["forerunners"]["tc"]["method"]["forerunners"]["wt"]["method"]["network"] = {"_target_": "os.getcwd"}
    torch.save(changed, tmp_path / "changed.ckpt")
    with pytest.raises(SuiteError, match=r"changed\.ckpt: would build 'os\.getcwd'"):
        load_method(tmp_path / "changed.ckpt")


# maps of training cases


def test_stored_maps_are_what_the_forerunner_says_and_no_test_case_has_one(trained, data):
    store, test = MapStore(trained / "maps"), rows(trained)[0]["case"]
    cfg = composed(*TINY, f"data.root={data}", "run_folder=x")
    module = instantiate(cfg.data, _convert_="all")
    module.prepare_data()
    module.setup("fit")
    method = load_method(artefact(trained, "tc"))[0]
    for batch in module.case_loader(module.parts["train"] + module.parts["val"]):
        expected = said(method, batch)[0].numpy()
        found = store.read("tc", batch["case"][0])
        assert (found.dtype, found.shape) == (np.float16, expected.shape)
        assert np.array_equal(found, expected)
    assert not store.has("tc", test)


def stage(trained: Path, data: Path, runs: Path, *more: str) -> Path:
    """The map store of a run that has nothing but the stage that writes the maps of the first round."""
    stages = f"stages=[{{name:x,run:maps,map:wt,checkpoint:'{artefact(trained, 'wt')}'}}]"
    run(*TINY, f"data.root={data}", f"runs={runs}", stages, *more)
    return run_folders(runs)[0] / "maps"


def test_forerunners_are_asked_with_the_precision_of_the_trainer(trained, data, tmp_path):
    store, exact = MapStore(stage(trained, data, tmp_path, "trainer.precision=bf16-mixed")), MapStore(trained / "maps")
    module = instantiate(composed(*TINY, f"data.root={data}", "run_folder=x").data, _convert_="all")
    module.prepare_data()
    module.setup("fit")
    method = load_method(artefact(trained, "wt"))[0]
    (batch,) = module.case_loader(module.parts["train"][:1])
    with torch.autocast("cpu", torch.bfloat16):
        expected = said(method, batch)[0].numpy()
    found = store.read("wt", batch["case"][0])
    assert np.array_equal(found, expected)
    assert not np.array_equal(found, exact.read("wt", batch["case"][0]))


def test_maps_tell_how_far_they_are_without_a_terminal(trained, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lesionbench.progress.PATIENCE", 0.0)
    stage(trained, data, tmp_path)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("maps")]
    assert [line.partition("  ETA")[0] for line in lines[:-1]] == [f"maps  wt  {n} of 4 cases ({25 * n} %)" for n in range(1, 5)]
    assert lines[-1].startswith("maps  wt  4 cases  ")


def test_a_full_disk_leaves_no_half_of_a_map_and_resuming_writes_the_rest(trained, data, tmp_path, monkeypatch):
    real, calls = np.save, []

    def filling(file, array, *options, **more):
        calls.append(1)
        if len(calls) == 3:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file, array, *options, **more)

    with monkeypatch.context() as patch:
        patch.setattr("lesionbench.maps.np.save", filling)
        with pytest.raises(SuiteError, match=r"no space left for .*\.npy.*resume=true goes on"):
            stage(trained, data, tmp_path)
    (folder,) = run_folders(tmp_path)
    assert not MapStore(folder / "maps").state_dict()
    assert not list(folder.rglob(".writing-*"))
    assert len(list(folder.rglob("*.npy"))) == 2
    found, whole = MapStore(stage(trained, data, tmp_path, "resume=true")), MapStore(trained / "maps")
    for path in sorted((trained / "maps" / "wt").glob("v*/*.npy")):
        assert np.array_equal(found.read("wt", path.stem), whole.read("wt", path.stem))


def test_out_of_fold_every_case_is_answered_by_who_has_not_seen_it(tmp_path):
    options = [
        "data.preprocessing.normalize=dataset",  # every network by the statistics of the cases that it was trained on
        "data.count=8",
        "data.spacing=8",
        "data.split={test:1,val:1}",
        "epochs=1",
        "data.samples_per_epoch=2",
        "patch=[8,8,8]",
        "model.network.features=[8,8]",
    ]
    run("experiment=cascaded_3d_unet/simulated_out_of_fold", *options, f"data.root={tmp_path / 'data'}", f"runs={tmp_path / 'runs'}")
    (folder,) = run_folders(tmp_path / "runs")
    store = MapStore(folder / "maps")
    module = Simulated(
        tmp_path / "data",
        count=8,
        spacing=8.0,
        split=Split(test=1, val=1),
        preprocessing=Preprocessing(normalize="dataset"),
        extra_maps={"wt": "nearest"},
    )
    module.maps = store
    module.prepare_data()
    module.setup("fit")
    used = []
    for region in ("wt", "tc"):
        loaded = {name: load_method(artefact(folder, name)) for name in (region, f"{region}_0", f"{region}_1")}
        assert len({json.dumps(own["statistics"]) for _, own in loaded.values()}) == 3
        for case in module.parts["train"] + module.parts["val"]:
            unseen = [name for name, (_, own) in loaded.items() if case.patient not in own["patients"]] or [region]
            (name,) = unseen
            used.append(name)
            (batch,) = module.case_loader([case], loaded[name][1]["statistics"])
            assert np.array_equal(store.read(region, batch["case"][0]), said(loaded[name][0], batch)[0].numpy()), (case, name)
    assert {name: used.count(name) for name in used} == {"wt_0": 3, "wt_1": 3, "wt": 1, "tc_0": 3, "tc_1": 3, "tc": 1}


# kills


def _dies(owner: type, name: str, at: int, overrides: list[str]) -> None:
    real, calls = getattr(owner, name), []

    def counted(*arguments, **options):
        result = real(*arguments, **options)
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, counted)
    run(*overrides)


def _batch_end() -> tuple[type, str]:
    return CascadedUNet3D, "on_train_batch_end"


KILLS: dict[str, tuple[Callable[[], tuple[type, str]], int]] = {
    "round 1": (_batch_end, 3),
    "its maps": (lambda: (MapStore, "write"), 2),
    "its maps, swapped": (lambda: (MapStore, "commit"), 1),
    "round 2": (_batch_end, 6),
    "the maps of round 2": (lambda: (MapStore, "write"), 6),
    "round 3": (_batch_end, 11),
    "the test": (lambda: (CascadedUNet3D, "test_step"), 1),
}


@pytest.mark.parametrize(
    "where", [name if name in ("its maps", "round 2") else pytest.param(name, marks=pytest.mark.slow) for name in KILLS]
)
def test_killed_in_any_stage_and_resumed_it_ends_bit_identical(where, trained, data, tmp_path):
    killed = [*TINY, f"data.root={data}", f"runs={tmp_path}", "callbacks.checkpoint.every_n_batches=1"]
    place, at = KILLS[where]
    process = multiprocessing.get_context("fork").Process(target=_dies, args=(*place(), at, killed))
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL
    run(*killed, "resume=true")
    (resumed,) = run_folders(tmp_path)
    assert_same(weights(trained), weights(resumed))
    assert rows(trained) == rows(resumed)
    first, second = MapStore(trained / "maps"), MapStore(resumed / "maps")
    for name in ("wt", "tc"):
        for path in sorted((trained / "maps" / name).glob("v*/*.npy")):
            assert np.array_equal(first.read(name, path.stem), second.read(name, path.stem))


# the effect


def test_the_toy_hides_the_core_among_balls_and_a_given_tumor_tells_them_apart():
    data = volumes(6, torch.Generator().manual_seed(0))
    bright, label = data["image"][:, 1:2] > 1.5, data["label"]
    core = (label == 1) | (label == 3)
    assert (bright & (label == 0)).sum() > core.sum() / 2  # as bright outside
    torch.manual_seed(0)
    given = {"wt": {"method": partial(CascadedUNet3D, network=partial(RReLUUNet, features=(8, 16, 32)), loss=RegionDice(), inferer=Whole(4), target=RegionSigmoid, region="WT"), "task": TOY.to_dict(), "patients": []}}  # fmt: skip
    method = a_round("TC", given)
    data["wt"] = (label > 0).float()
    train(method, data, 12, torch.Generator().manual_seed(0), torch.optim.Adam(method.network.parameters(), lr=1e-2))
    with_tumor, without = (probabilities(method, {**data, "wt": share * data["wt"]}) for share in (1, 0))
    assert not torch.equal(with_tumor, without)


@pytest.mark.slow
def test_the_core_is_found_earlier_on_the_mean_of_three_seeds():
    found = [row for seed in range(3) for row in curves(seed)]
    for steps in (25, 50, 100):
        plain, cascade = (np.mean([r["dice"] for r in found if (r["arm"], r["steps"]) == (arm, steps)]) for arm in ("plain", "cascade"))
        assert cascade > plain, steps


# mistakes


def test_what_cannot_be_is_named(trained, data, tmp_path):
    wt, tc = artefact(trained, "wt"), artefact(trained, "tc")
    with pytest.raises(SuiteError, match=r"region \(model\.region\) 'TX'"):
        rounds(region="TX")
    with pytest.raises(SuiteError, match=r"'image' names no map"):
        rounds(forerunners={"image": wt})
    with pytest.raises(SuiteError, match=r"nowhere\.ckpt: no such checkpoint"):
        rounds(forerunners={"wt": "nowhere.ckpt"})
    changed = torch.load(wt, weights_only=True)
    changed["state_dict"]["network.out.bias"] += 1
    torch.save(changed, tmp_path / "changed.ckpt")
    with pytest.raises(SuiteError, match=r"forerunners\.tc was trained behind another wt than model\.forerunners\.wt"):
        rounds(region="ET", forerunners={"wt": str(tmp_path / "changed.ckpt"), "tc": tc})
    assert rounds(forerunners={"wt": tc}).forerunners["wt"].forerunners["wt"].region == "WT"  # the same name within is another network
    other = Task(("t1", "flair"), TASK.classes, TASK.regions)
    with pytest.raises(SuiteError, match=r"forerunners\.wt needs the channel\(s\) t1ce, t2"):
        CascadedUNet3D(other, network=RReLUUNet, loss=RegionDice(), inferer=Whole(), target=RegionSigmoid, forerunners={"wt": wt})
    swapped = Task(TASK.channels, {"background": 0, "ncr": 1, "et": (2, 3), "ed": 4}, {"WT": ("ncr", "et")})
    with pytest.raises(SuiteError, match=r"forerunners\.wt: its region WT holds the values \[1, 2, 3, 4\], not \[1, 2, 3\]"):
        CascadedUNet3D(swapped, network=RReLUUNet, loss=RegionDice(), inferer=Whole(), target=RegionSigmoid, forerunners={"wt": wt})
    common = [*TINY, f"data.root={data}", f"runs={tmp_path}"]
    with pytest.raises(SuiteError, match=r"set data\.extra_maps=\{wt: nearest\}"):
        run(*common, f"model.forerunners={{wt:'{wt}'}}", "stages=[{name:fit,run:fit}]")
    with pytest.raises(SuiteError, match=r"trained with another preprocessing .*margin: 0 -> 1"):
        run(*common, f"model.forerunners={{wt:'{wt}'}}", "data.preprocessing.margin=1", "stages=[{name:fit,run:fit}]")
    with pytest.raises(SuiteError, match=r"stages\.x: a stage that writes maps needs map"):
        run(*common, "stages=[{name:x,run:maps,checkpoint:y}]")
    with pytest.raises(SuiteError, match=r"stages\.x\.folds: a stage that writes maps has"):
        run(*common, "stages=[{name:x,run:maps,map:wt,checkpoint:y,folds:2}]")
    with pytest.raises(SuiteError, match=r"out_of_fold: all of these checkpoints were trained or selected on 3 of the training patients"):
        run(*common, f"stages=[{{name:x,run:maps,map:wt,checkpoint:'{wt}',out_of_fold:['{wt}']}}]")
    with pytest.raises(SuiteError, match=r"draws \['TC'\], .* draws \['WT'\]"):
        run(*common, f"stages=[{{name:x,run:maps,map:wt,checkpoint:'{wt}',out_of_fold:['{tc}']}}]")
    with pytest.raises(
        SuiteError, match=r"(?s)its weights do not fit.*\nckpt=.*, as a list of one, tests the model that the checkpoint describes"
    ):
        run(*common, "job=test", f"ckpt={artefact(trained, 'fit')}")


def test_a_round_begins_with_the_weights_of_another(trained, data, tmp_path):
    """What its network has in common with that of the first round; forerunners stay."""
    run(
        *TINY, f"data.root={data}", f"runs={tmp_path}", f"model.forerunners={{wt:'{artefact(trained, 'wt')}'}}", f"maps={trained / 'maps'}", "data.extra_maps={wt:nearest}",
        f"init_from={artefact(trained, 'wt')}", "init_prefix={network:network}", "stages=[{name:fit,run:fit}]",
    )  # fmt: skip
    (folder,) = run_folders(tmp_path)
    own = read_checkpoint(artefact(trained, "wt"))["state_dict"]
    assert_same(own, {k.removeprefix("forerunners.wt."): v for k, v in weights(folder).items() if k.startswith("forerunners.wt.")})


def test_init_from_leaves_forerunners_as_they_are(trained, tmp_path):
    changed = torch.load(artefact(trained, "tc"), weights_only=True)
    changed["state_dict"] = {name: value + 1 for name, value in changed["state_dict"].items()}
    torch.save(changed, tmp_path / "changed.ckpt")
    method = behind(trained)
    before = {k: v.clone() for k, v in method.forerunners.state_dict().items()}
    report = initialize_from(method, tmp_path / "changed.ckpt")
    assert "stays as it is: forerunners.*" in report
    assert_same(before, method.forerunners.state_dict())
    own = {k.removeprefix("network."): v for k, v in changed["state_dict"].items() if k.startswith("network.")}
    assert_same(own, method.network.state_dict())


def test_a_forerunner_has_the_state_that_its_own_checkpoint_gave_it(trained):
    """Beside the weights: what `on_load_checkpoint` restores."""
    iterations = {name: read_checkpoint(artefact(trained, name))["lesionbench"]["iteration"] for name in ("wt", "tc")}
    method = load_method(artefact(trained, "fit"))[0]
    assert {name: method.forerunners[name].iteration for name in iterations} == iterations
    assert iterations["wt"] > 0


def test_a_forerunner_far_behind_is_not_told_what_another_of_its_name_says(trained, tmp_path):
    changed = torch.load(artefact(trained, "wt"), weights_only=True)
    changed["state_dict"]["network.out.bias"] += 10
    torch.save(changed, tmp_path / "changed.ckpt")
    options = {"network": partial(RReLUUNet, features=(8, 8)), "loss": RegionDice(), "inferer": Whole(2), "target": RegionSigmoid}
    torch.manual_seed(0)
    far = {
        "method": partial(CascadedUNet3D, **options, forerunners={"tc": artefact(trained, "tc")}),
        "task": TASK.to_dict(),
        "patients": [],
    }
    method = rounds(region="ET", forerunners={"wt": str(tmp_path / "changed.ckpt"), "far": far}).eval()
    batch = {"image": torch.randn(1, 4, 8, 8, 8), "case": ["a"]}
    asked = []
    method.forerunners["far"].forerunners["tc"].network.register_forward_hook(lambda _, inputs, output: asked.append(inputs[0]))
    told = method.ask(batch)
    assert (told["wt"] > 0.5).all()
    said(method.forerunners["far"], batch)
    assert torch.equal(*asked)
