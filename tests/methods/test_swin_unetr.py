"""Swin UNETR: how far shifted windows reach, the squared Dice, augmentation, schedule and inference of its experiments."""

import pytest
import torch
import torchio
from hydra.utils import instantiate

from benchmarks.swin_reach import SIDE, first_stage, reach
from datamodules.transforms.intensity import RandomScaleShift
from lesionbench.target import RegionSigmoid
from lesionbench.task import Task
from lightning_modules.inferers import Window
from lightning_modules.losses import RegionDice
from lightning_modules.networks import swin_unetr
from tests.harness import composed, rows, run, run_folders

TASK = Task(("t1",), {"background": 0, "ncr": 1, "ed": 2, "et": 4}, {"WT": ("ncr", "ed", "et"), "TC": ("ncr", "et"), "ET": ("et",)})


@pytest.mark.parametrize(("options", "expected"), [({}, 62_191_941), ({"feature_size": 12}, 4_079_373), ({"shift": False}, 62_191_941)])
def test_parameters(options, expected):
    with torch.device("meta"):
        assert sum(p.numel() for p in swin_unetr(4, 3, **options).parameters()) == expected


# windows


@pytest.fixture(scope="module")
def stages():
    torch.manual_seed(0)
    return {shift: first_stage(shift) for shift in (True, False)}


def test_shifted_windows_carry_information_everywhere(stages):
    seen = {shift: reach(stage) for shift, stage in stages.items()}
    assert seen[True].all()
    assert seen[False].float().mean() == 0.125
    own_window = torch.zeros(SIDE, SIDE, SIDE, dtype=torch.bool)
    own_window[:7, :7, :7] = True
    assert torch.equal(seen[False], own_window)


def test_what_was_rolled_round_is_masked(stages):
    """Of the second block alone: the corner token sees the three tokens in front of the shifted window's border, and none of the far end."""
    from monai.networks.nets.swin_unetr import compute_mask

    block = stages[True].blocks[1]
    mask = compute_mask((SIDE,) * 3, (7, 7, 7), (3, 3, 3), "cpu")
    assert set(mask.unique().tolist()) == {-100.0, 0.0}
    assert (mask[0] == 0).all()  # the first window holds neighbors only
    x = torch.randn(1, SIDE, SIDE, SIDE, 12, requires_grad=True)
    block(x, mask)[0, 0, 0, 0].square().sum().backward()
    seen = x.grad[0].abs().sum(dim=-1) > 1e-30  # exp(-100) is not quite 0
    corner = torch.zeros_like(seen)
    corner[:3, :3, :3] = True
    assert torch.equal(seen, corner)


def test_windows_lead_back_to_the_volume():
    from monai.networks.nets.swin_unetr import window_partition, window_reverse

    x = torch.arange(float(SIDE**3)).reshape(1, SIDE, SIDE, SIDE, 1)
    windows = window_partition(x, (7, 7, 7))
    assert windows.shape == (8, 343, 1)
    assert torch.equal(window_reverse(windows.reshape(-1, 7, 7, 7, 1), (7, 7, 7), (1, SIDE, SIDE, SIDE)), x)


def test_merging_takes_every_token_once(stages):
    torch.manual_seed(0)
    merging = swin_unetr(1, 1, feature_size=12).swinViT.layers1[0].downsample
    seen = []
    merging.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.arange(4.0**3 * 12).reshape(1, 4, 4, 4, 12)
    merging(x)
    assert seen[0].shape == (1, 2, 2, 2, 96)
    assert torch.equal(seen[0].flatten().sort().values, x.flatten())


def test_shift_changes_the_answer_and_no_name():
    torch.manual_seed(0)
    options = {"dimensions": 2, "feature_size": 12, "depths": (2, 2, 2, 2), "attention_window": 3}
    shifted, plain = swin_unetr(1, 1, **options), swin_unetr(1, 1, shift=False, **options)
    plain.load_state_dict(shifted.state_dict())
    image = torch.randn(1, 1, 64, 64)
    assert not torch.allclose(shifted(image), plain(image))


# training and inference


def test_squared_dice_by_hand():
    loss = RegionDice(squared=True, smooth=0)
    half = torch.zeros(1, 1, 2)
    assert loss(half, torch.tensor([[[1.0, 0.0]]])).item() == pytest.approx(1 / 3)
    sure = torch.tensor([[[60.0, -60.0]]])
    assert loss(sure, torch.tensor([[[1.0, 0.0]]])).item() == pytest.approx(0, abs=1e-6)
    both = torch.cat([half, sure], dim=1)
    assert loss(both, torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])).item() == pytest.approx(1 / 6)
    assert loss(half, torch.zeros(1, 1, 2)).item() == 1  # an empty region, as printed


def test_channels_are_scaled_and_shifted_each_in_its_own_way():
    torch.manual_seed(0)
    image = torch.randn(3, 6, 6, 6)
    subject = torchio.Subject(image=torchio.ScalarImage(tensor=image))
    changed = RandomScaleShift(per_channel=True)(subject)["image"].data
    factors = [(c.std() / o.std()).item() for c, o in zip(changed, image, strict=True)]
    assert len({round(f, 4) for f in factors}) == 3
    assert all(0.9 <= f <= 1.1 for f in factors)
    offsets = [(c - f * o).mean().item() for c, o, f in zip(changed, image, factors, strict=True)]
    assert len({round(o, 4) for o in offsets}) == 3
    assert all(abs(o) <= 0.1 for o in offsets)


def test_schedule_of_the_paper():
    scheduler = instantiate(composed("experiment=swin_unetr/brats2021").model.scheduler)
    parameter = torch.nn.Parameter(torch.zeros(1))
    schedule = scheduler(torch.optim.AdamW([parameter], lr=8e-4), 800)
    rate = [schedule.lr_lambdas[0](iteration) for iteration in range(801)]
    assert rate[0] == pytest.approx(1 / 51)
    assert rate[50] == 1
    assert rate[425] == pytest.approx(0.5)
    assert rate[800] == pytest.approx(0)


@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.7])
def test_overlapping_windows_change_nothing(overlap):
    image = torch.randn(1, 1, 20, 17, 9, generator=torch.Generator().manual_seed(0))
    out = Window((8, 8, 8), overlap, "constant")(image, lambda view: {"x": view})["x"]
    assert torch.allclose(out, image, atol=1e-6)


def test_order_of_labels():
    """Every region is one sigmoid; the innermost that reaches 1/2 inside of those around it gives the label."""
    target = RegionSigmoid(TASK)
    regions = torch.tensor([[0.9, 0.9, 0.9], [0.9, 0.9, 0.1], [0.9, 0.1, 0.1], [0.1, 0.1, 0.1]]).T[None, :, :, None, None]
    assert TASK.to_disk(target.labels(regions)[0].numpy()).flatten().tolist() == [4, 1, 2, 0]


def test_settings_of_the_paper():
    cfg = composed("experiment=swin_unetr/brats2021")
    assert (cfg.model.optimizer.lr, cfg.epochs, list(cfg.data.patch), cfg.data.batch_size * cfg.accumulate) == (8e-4, 800, [128] * 3, 8)
    assert (cfg.model.inferer.overlap, cfg.data.split.folds, cfg.data.split.val) == (0.7, 5, 0)


def test_another_method_takes_the_switch(tmp_path):
    network = [
        "~model.network",
        "+model.network={_target_:lightning_modules.networks.swin_unetr,_partial_:true,dimensions:2,feature_size:12,attention_window:3,shift:false}",
    ]
    small = [
        "patch=[64,64]",
        "patch_cap=64",
        f"data.root={tmp_path / 'blobs'}",
        f"runs={tmp_path / 'runs'}",
    ]
    run("benchmark=blobs", "model=mean_teacher", *network, "debug=tiny", "trainer=cpu", "threads=1", *small)
    (folder,) = run_folders(tmp_path / "runs")
    assert rows(folder)
