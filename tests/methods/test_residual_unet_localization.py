"""The residual U-Net with localization: its blocks and losses, crops and how they come back, several networks that give one answer."""

import json
import shutil
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from torch import nn

from lesionbench.checkpoint import load_method, read_checkpoint
from lesionbench.errors import SuiteError
from lesionbench.target import RegionSigmoid
from lesionbench.task import Task
from lightning_modules import LocalizedUNet
from lightning_modules.inferers import Whole
from lightning_modules.localization import box_around, center_of, pasted
from lightning_modules.losses import RegionBCEDice
from lightning_modules.networks import ResidualUNet
from lightning_modules.networks.residual_unet import PreNormBlock
from lightning_modules.postprocessing import PostProcessing
from lightning_modules.raters.fusion import FUSIONS
from tests.fake_data import write_fake_brats
from tests.harness import assert_same, composed, rows, run, run_folders, weights

TASK = Task(
    ("t1", "t1ce", "t2", "flair"),
    {"background": 0, "ncr": 1, "ed": 2, "et": (4, 3)},
    {"WT": ("ncr", "ed", "et"), "TC": ("ncr", "et"), "ET": ("et",)},
)
TINY = [
    "experiment=residual_unet_localization/brats2021", "trainer=cpu", "epochs=1", "patch=[8,8,8]", "finds.patch=[16,16,16]", "finds.widths=[4,8]", "model.network.features=[8,16]",
    "data.samples_per_epoch=2", "data.batch_size=1", "data.num_workers=0", "data.check=false", "data.split={folds:null,test:1,val:1}", "callbacks.figures=null",
    "callbacks.calibration=null", "metrics.names=[dice]", "threads=1",
]  # fmt: skip


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_fake_brats(tmp_path_factory.mktemp("brats"), "2021", count=5, shape=(20, 18, 17))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    run(*TINY, f"data.root={data}", f"runs={runs}")
    return run_folders(runs)[0]


def artefact(folder: Path, stage: str) -> str:
    return json.loads((folder / "stages" / f"{stage}.json").read_text())["artefact"]


# network and losses


def test_parameters_of_both_stages():
    with torch.device("meta"):
        assert parameters(ResidualUNet(4, 1, features=(24, 48, 96, 192))) == 5_262_489
        assert parameters(ResidualUNet(4, 1)) == 37_395_849


@pytest.mark.parametrize("norm", ["group", "instance", "batch", "none"])
@pytest.mark.parametrize(("dimensions", "size"), [(3, (16, 24, 16)), (2, (16, 24))])
def test_the_answer_has_the_size_of_the_image_and_gradients_reach_everything(norm, dimensions, size):
    network = ResidualUNet(4, 1, dimensions=dimensions, features=(4, 8, 16, 32), norm=norm)
    logits = network(torch.randn(2, 4, *size))
    assert logits.shape == (2, 1, *size)
    (logits * torch.randn_like(logits)).sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_the_network_by_other_means():
    """The same logits from torch's own functions."""
    torch.manual_seed(0)
    network, image = ResidualUNet(4, 1, features=(4, 8, 16)).eval(), torch.randn(1, 4, 8, 8, 12)

    def normalized(layers: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
        norm, convolution = layers[0], layers[1]
        x = F.group_norm(x, 8 if len(norm.weight) >= 8 else 1, norm.weight, norm.bias)
        return F.conv3d(x, convolution.weight, padding=1)

    def block(parts: PreNormBlock, x: torch.Tensor) -> torch.Tensor:
        r = normalized(parts.first, x).relu()
        return (normalized(parts.third, normalized(parts.second, r).relu()) + r).relu()

    def raised(up: nn.ConvTranspose3d, x: torch.Tensor) -> torch.Tensor:
        return F.conv_transpose3d(x, up.weight, up.bias, stride=2, padding=1, output_padding=1)

    with torch.no_grad():
        fine = block(network.encoder[0], image)
        half = block(network.encoder[1], F.max_pool3d(fine, 2))
        x = raised(network.up[0], block(network.bottom, F.max_pool3d(half, 2)))
        x = raised(network.up[1], block(network.decoder[0], torch.cat([x, half], 1)))
        x = block(network.decoder[1], torch.cat([x, fine], 1))
        torch.testing.assert_close(network(image), F.conv3d(x, network.out.weight, network.out.bias))


def test_a_block_whose_third_convolution_is_zero_gives_what_the_first_gave():
    block, x = PreNormBlock(4, 8), torch.randn(2, 4, 5, 6, 7)
    nn.init.zeros_(block.third[1].weight)
    r = block.first(x)
    assert (r >= 0).all()
    assert torch.equal(block(x), r)
    plain = PreNormBlock(4, 8, residual=False)
    nn.init.zeros_(plain.third[1].weight)
    assert (plain(x) == 0).all()
    assert [m.num_groups for m in block.modules() if isinstance(m, nn.GroupNorm)] == [1, 8, 8]  # of 4, 8 and 8 channels


def test_loss_of_two_voxels_by_hand():
    logits = torch.tensor([0.8, 0.4]).logit().reshape(1, 1, 2, 1, 1)
    target = torch.tensor([1.0, 0.0]).reshape(1, 1, 2, 1, 1)
    bce = -(np.log(0.8) + np.log(0.6)) / 2
    dice = 2 * 0.8 / (1.2 + 1)
    assert RegionBCEDice(smooth=0.0)(logits, target).item() == pytest.approx(bce + 1 - dice, rel=1e-5)


def test_the_preset_of_the_paper():
    cfg = composed("experiment=residual_unet_localization/brats2021", "run_folder=x")
    assert (cfg.epochs, cfg.data.batch_size, list(cfg.patch), list(cfg.finds.patch)) == (50, 4, [128] * 3, [192, 192, 160])
    assert list(cfg.model.network.features) == [64, 128, 256, 512]
    assert list(cfg.data.preprocessing.crop_size) == [192, 192, None]
    overrides = {stage.name: stage.override.model for stage in cfg.stages}
    assert overrides["tc"].optimizer.lr == 3e-5
    assert (overrides["fit"].optimizer.lr, overrides["fit"].loss._target_) == (3e-3, "lightning_modules.losses.RegionBCE")
    assert (cfg.model.optimizer.lr, cfg.model.loss._target_, cfg.data.sampling.name) == (
        1e-4,
        "lightning_modules.losses.RegionBCEDice",
        "lesion_center",
    )
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, rates = instantiate(cfg.model.scheduler)(optimizer, total_iterations=1), []
    for _ in range(9):  # best, three worse, two that do not count, three worse
        schedule.step(0.5)
        rates.append(round(optimizer.param_groups[0]["lr"], 3))
    assert rates == [1, 1, 1, 0.4, 0.4, 0.4, 0.4, 0.4, 0.16]


# crops


def test_the_center_is_that_of_the_largest_component():
    mask = torch.zeros(20, 18, 16, dtype=torch.bool)
    assert center_of(mask) is None
    mask[2, 3, 4] = True  # a speck
    mask[8:13, 5:12, 6:9] = True
    mask[8, 5, 9:15] = True  # a thin tail moves the box further than the centroid
    assert center_of(mask) == (10, 8, 10)
    assert center_of(mask, "centroid") == (10, 8, 7)


@pytest.mark.parametrize("center", [(10, 9, 8), (0, 0, 0), (19, 17, 15), (0, 17, 8)])
def test_a_crop_comes_back_at_its_place_also_at_borders(center):
    shape, size = (20, 18, 16), (8, 6, 4)
    volume = torch.arange(20 * 18 * 16.0).reshape(1, 1, *shape) + 1  # every voxel has a value of its own
    box = box_around(center, size, shape)
    part = volume[(..., *box)]
    assert part.shape[2:] == size
    assert all(s.start <= c < s.stop for s, c in zip(box, center, strict=True))
    back = pasted(part, box, shape)
    inside = torch.zeros(shape, dtype=torch.bool)
    inside[box] = True
    assert torch.equal(back[0, 0][inside], volume[0, 0][inside])
    assert (back[0, 0][~inside] == 0).all()
    whole = box_around(center, (40, 6, 18), shape)  # an axis shorter than the crop is kept
    assert (whole[0], whole[2]) == (slice(0, 20), slice(0, 16))


def localized(trained: Path, **options) -> LocalizedUNet:
    network = partial(ResidualUNet, features=(8, 16))
    given = {"forerunners": {"where": artefact(trained, "where")}, "region": "TC", "crop": (8, 8, 8)}
    return LocalizedUNet(TASK, network=network, loss=RegionBCEDice(), inferer=Whole(2), target=RegionSigmoid, **{**given, **options}).eval()


def test_the_network_sees_the_crop_around_what_was_found_and_nothing_is_said_outside(trained):
    method, seen = localized(trained), []
    method.network.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
    image, mask = torch.randn(1, 4, 20, 18, 16), torch.zeros(1, 1, 20, 18, 16)
    mask[..., 15:19, 2:5, 8:10] = 1
    answer = method.answer({"image": image, "where": mask, "case": ["a"]})
    box = (slice(12, 20), slice(0, 8), slice(5, 13))  # around (17, 4, 9), moved inside along the first two axes
    assert torch.equal(seen[0], image[(..., *box)])
    core = answer.regions[1]
    assert (core[box] > 0).all()
    core[box] = 0
    assert (core == 0).all()
    assert torch.equal(answer.regions[0], mask[0, 0])


def test_what_is_found_is_more_likely_than_not_and_has_the_center_that_is_asked_for(trained):
    image, maps = torch.randn(1, 4, 20, 18, 16), torch.full((1, 1, 20, 18, 16), 0.4)
    maps[..., 4:7, 9, 8], maps[..., 6, 9, 8:14] = (
        0.6,
        0.6,
    )  # an angle of 8 voxels: its box is centered on (5, 9, 11), its voxels on (6, 9, 10)
    boxes = {}
    for center in ("box", "centroid"):
        answer = localized(trained, center=center).answer({"image": image, "where": maps, "case": ["a"]})
        found = answer.regions[1].nonzero()
        boxes[center] = (found.min(dim=0).values.tolist(), found.max(dim=0).values.tolist())
    assert boxes == {"box": ([1, 5, 7], [8, 12, 14]), "centroid": ([2, 5, 6], [9, 12, 13])}


def test_where_nothing_is_found_the_crop_is_in_the_middle_of_the_brain(trained):
    method = localized(trained)
    brain = torch.zeros(1, 1, 20, 18, 16, dtype=torch.bool)
    brain[..., 10:20, 0:8, 4:12] = True
    assert method.box(torch.zeros(20, 18, 16), brain) == (slice(11, 19), slice(0, 8), slice(4, 12))
    assert method.box(torch.zeros(20, 18, 16), None) == (slice(6, 14), slice(5, 13), slice(4, 12))


def test_the_oracle_centers_every_network_on_the_truth_and_its_rows_say_so(trained):
    method = localized(trained, oracle_center=True)
    label = torch.zeros(1, 1, 20, 18, 16, dtype=torch.long)
    label[..., 4:6, 9, 9] = 2
    batch = {"image": torch.randn(1, 4, 20, 18, 16), "case": ["a"], "label": label}
    said = method.predict_case(batch)
    oracle = said.members["oracle_center"].regions[1]
    assert {tuple(v) for v in oracle.nonzero().tolist()} <= {
        tuple(v) for v in torch.cartesian_prod(torch.arange(1, 9), torch.arange(5, 13), torch.arange(5, 13)).tolist()
    }
    assert oracle.max() > 0
    assert not method.predict_case({k: v for k, v in batch.items() if k != "label"}).members
    found = rows(trained)
    assert {row["member"] for row in found} == {"", "oracle_center"}
    assert all((row["oracle"] == "1") == (row["member"] == "oracle_center") for row in found)


def test_the_oracle_knows_the_truth_of_a_region_that_the_task_does_not_have_or_says_that_it_cannot(trained):
    alone = Task(TASK.channels, TASK.classes, {"ET": ("et",)})  # no region WT, but labels tell
    network = partial(ResidualUNet, features=(8, 16))
    options = {"network": network, "loss": RegionBCEDice(), "inferer": Whole(2), "target": RegionSigmoid, "oracle_center": True}
    given = {**options, "forerunners": {"where": artefact(trained, "where")}, "region": "ET", "crop": (8, 8, 8)}
    label = torch.zeros(1, 1, 20, 18, 16, dtype=torch.long)
    label[..., 4:6, 9, 9] = 2
    label[..., 0, 0, 0] = -1
    batch = {"image": torch.randn(1, 4, 20, 18, 16), "case": ["a"], "label": label}
    oracle = LocalizedUNet(alone, **given).eval().predict_case(batch).members["oracle_center"].regions[0]
    assert (oracle[1:9, 5:13, 5:13] > 0).all()
    with pytest.raises(SuiteError, match=r"labels of the classes background, et do not say where WT is; keep WT in task\.regions"):
        LocalizedUNet(TASK.narrowed(regions=["ET"]), **given)


# several networks, one answer


def test_all_regions_come_from_their_networks_and_one_file_has_them_all(trained, data, tmp_path):
    method, _ = load_method(artefact(trained, "fit"))
    assert list(method.forerunners) == ["where", "wt", "tc"]
    assert all(method.forerunners[name].forerunners["where"] is method.forerunners["where"] for name in ("wt", "tc"))
    batch = {"image": torch.randn(1, 4, 20, 18, 16), "case": ["a"]}
    whole = method.predict_case(batch).regions
    for place, name in enumerate(("wt", "tc")):
        alone = load_method(artefact(trained, name))[0].predict_case(batch).regions[place]
        torch.testing.assert_close(whole[place], alone, atol=1e-3, rtol=0)  # half precision
    for name in ("where", "wt", "tc"):
        before = read_checkpoint(artefact(trained, name))["state_dict"]
        prefix = f"forerunners.{name}."
        assert_same(before, {k.removeprefix(prefix): v for k, v in weights(trained).items() if k.startswith(prefix)})
    moved, case = tmp_path / "alone.ckpt", rows(trained)[0]["case"]
    shutil.copy(artefact(trained, "fit"), moved)
    hidden = trained.rename(trained.with_name("hidden"))
    try:
        run(
            "job=predict",
            f"ckpt={moved}",
            "data=brats2021",
            f"data.root={data}",
            "data.check=false",
            "data.num_workers=0",
            f"out={tmp_path / 'out'}",
            "threads=1",
        )
    finally:
        hidden.rename(trained)
    assert nib.load(next((tmp_path / "out").rglob(f"{case}.nii.gz"))).shape == (20, 18, 17)


def test_means_and_votes_of_five_folds_by_hand():
    said = [0.9, 0.45, 0.45, 0.45, 0.45]
    task = Task(("t1",), {"background": 0, "tumor": 1}, {"WT": ("tumor",)})
    found = {}
    for name in ("mean", "vote"):
        fusion = FUSIONS[name](task)
        for number, p in enumerate(said):
            regions = torch.full((1, 1, 1, 1), p)
            fusion.add(regions, (regions[0] > 0.5).to(torch.int8), 1.0, f"m{number}")
        regions = fusion.result().regions
        found[name] = (float(regions), int(RegionSigmoid(task).labels(regions[None])))
    assert found["mean"] == (pytest.approx(0.54), 1)
    assert found["vote"] == (pytest.approx(0.2), 0)


@pytest.mark.parametrize(("voxels", "left"), [(3, 0), (4, 4), (5, 5)])
def test_fewer_voxels_of_enhancing_tumor_than_asked_are_none(voxels, left):
    labels = torch.zeros(6, 6, 6, dtype=torch.int8)
    labels[0:3, 0:3, 0:3] = 2
    labels[4, 0:2, 0:2] = 1
    labels[3, 0, :voxels] = 3
    after = PostProcessing(min_volume={"ET": 4}).labels(labels, TASK)
    assert int((after == 3).sum()) == left
    assert torch.equal(after == 2, labels == 2)
    assert torch.equal((after == 1) | (after == 3), (labels == 1) | (labels == 3))  # what is no enhancing tumor is still core


# mistakes


def test_what_cannot_be_is_named(trained, data, tmp_path):
    with pytest.raises(SuiteError, match=r"without model\.forerunners nothing is cropped"):
        localized(trained, forerunners=None, oracle_center=True)
    with pytest.raises(SuiteError, match=r"model\.crop=\[8, 8\]: voxels along each of three axes"):
        localized(trained, crop=(8, 8))
    with pytest.raises(SuiteError, match="12 channels do not divide into 8 groups"):
        ResidualUNet(4, 1, features=(12, 24))
    with pytest.raises(SuiteError, match=r"model\.center=middle.*box or centroid"):
        run(*TINY, "model.center=middle")
    with pytest.raises(SuiteError, match=r"objective\.name=val/dice_XX: no value of a validation"):
        run(*TINY, f"data.root={data}", f"runs={tmp_path}", "objective.name=val/dice_XX")
