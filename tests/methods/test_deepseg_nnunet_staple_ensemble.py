"""DeepSeg and nnU-Net fused by STAPLE: the network, the presets of the four configurations, and what the fusion must keep."""

import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from torch import nn

from datamodules.readers.brats_files import brats_task
from lesionbench.errors import SuiteError
from lightning_modules.networks import DeepSeg
from lightning_modules.raters.fusion import Staple
from tests.harness import composed, rows, run, run_folders, shared

EXPERIMENT = "experiment=deepseg_nnunet_staple_ensemble"


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


# the network


@pytest.mark.parametrize(
    ("features", "classes", "regions"), [(32, 22_583_908, 22_583_875), (16, 5_649_204, 5_649_187), (8, 1_413_916, 1_413_907)]
)
def test_parameters(features, classes, regions):
    with torch.device("meta"):
        assert parameters(DeepSeg(4, 4, features=features)) == classes
        assert parameters(DeepSeg(4, 3, features=features)) == regions


def test_levels_halve_and_double_and_the_logits_have_the_size_of_the_input():
    with torch.device("meta"):
        network, seen = DeepSeg(4, 3), {}
        for name in ("encoder.0", "encoder.1", "encoder.2", "encoder.3", "bottom", "up.0", "decoder.0", "decoder.3"):
            network.get_submodule(name).register_forward_hook(lambda _, args, out, name=name: seen.update({name: tuple(out.shape[1:3])}))
        assert network(torch.zeros(1, 4, 192, 224, 160)).shape == (1, 3, 192, 224, 160)
    widths = {"encoder.0": (32, 192), "encoder.1": (64, 96), "encoder.2": (128, 48), "encoder.3": (256, 24), "bottom": (512, 12)}
    assert seen == widths | {"up.0": (256, 24), "decoder.0": (256, 24), "decoder.3": (32, 192)}
    kinds = [type(layer).__name__ for layer in network.encoder[0]]
    assert kinds == ["Conv3d", "BatchNorm3d", "ReLU"] * 2
    assert network.divisor == (16, 16, 16)


@pytest.mark.parametrize(("dimensions", "size"), [(2, (16, 24)), (3, (16, 24, 8))])
def test_gradients_reach_everything(dimensions, size):
    network = DeepSeg(2, 3, dimensions=dimensions, features=4, levels=3)
    out = network(torch.randn(2, 2, *size))
    assert out.shape == (2, 3, *size)
    (out * torch.randn_like(out)).sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.dim() < 2 or (parameter.grad != 0).any(), name


def test_batch_mates_matter_in_training_only_and_dropout_acts_at_the_bottom_only():
    torch.manual_seed(0)
    network = DeepSeg(2, 3, features=4, levels=3)
    first, others = torch.randn(1, 2, 8, 8, 8), 3 * torch.randn(2, 2, 8, 8, 8) + 1
    with torch.no_grad():
        for _ in range(3):
            network(torch.cat([first, others]))  # running statistics that are not those of `first`
        network.eval()
        torch.testing.assert_close(network(torch.cat([first, others]))[:1], network(first), atol=1e-6, rtol=1e-4)
        network.train()
        (dropout,) = (m for m in network.modules() if isinstance(m, nn.Dropout))
        assert dropout.p == 0.5
        assert network.bottom[-1] is dropout
        x = network.bottom[0](torch.randn(4, 8, 4, 4, 4))
        assert 0.3 < (network.bottom[1](x)[x != 0] == 0).float().mean() < 0.7
        dropout.p = 0.0
        alone, together = network(first), network(torch.cat([first, others]))[:1]
    assert (alone - together).abs().max() > 0.05


def test_a_single_level_is_refused():
    with pytest.raises(SuiteError, match=r"network\.levels=1: expected 2 or more"):
        DeepSeg(4, 3, levels=1)


# the losses


@pytest.mark.parametrize("experiment", ["brats2021", "brats2021_baseline", "brats2021_nnunet"])
def test_the_loss_is_one_minus_dice_so_that_the_right_answer_has_none(experiment):
    """Eq. 1 is printed as Dice + cross-entropy, which would be 1 for a perfect prediction."""
    cfg = shared(f"{EXPERIMENT}/{experiment}")
    loss, task = instantiate(cfg.model.loss), brats_task("2021")
    target = instantiate(cfg.model.target)(task)
    torch.manual_seed(0)
    label = torch.randint(0, 4, (2, 1, 4, 4, 4))
    truth, _ = target.as_maps(target.encode(label))
    values = [float(loss((truth.float() * 2 - 1) * size, target.encode(label))) for size in (0, 0.5, 1, 2, 40)]
    assert values == sorted(values, reverse=True)
    assert values[0] > 1
    assert values[-1] < 1e-3


def test_batch_dice_of_nnunet_weighs_voxels_and_not_samples():
    loss = instantiate(shared(f"{EXPERIMENT}/brats2021_nnunet").model.loss)
    target = torch.zeros(2, 3, 4, 4, 4)
    target[0, :, :3], target[1, :, 0, 0, 0] = 1, 1  # a large and a small lesion; the small one is missed
    probability = torch.where(target > 0, 0.9, 0.1)
    probability[1] = 0.1
    logits = torch.logit(probability)
    inner, sums = 0.9 * 48 * 2, 48 + 1 + 0.9 * 48 + 0.1 * 16 + 0.1 * 64
    batch = 1 - (inner + 0.1 * 2) / sums
    apart = 1 - ((0.9 * 48 * 2) / (48 + 0.9 * 48 + 0.1 * 16) + (0.1 * 2) / (1 + 0.1 * 64)) / 2
    bce = F.binary_cross_entropy(probability, target)
    assert float(loss(logits, target)) == pytest.approx(float(bce) + batch, rel=1e-4)
    assert abs(batch - apart) > 0.2


# the recipes


def test_presets_of_the_paper(tmp_path):
    """Section 3: what all share, and what the four configurations of Table 1 differ in."""
    names = {"A": "brats2021_baseline", "B": "brats2021", "nnU-Net": "brats2021_nnunet"}
    found = {name: composed(f"{EXPERIMENT}/{file}", f"run_folder={tmp_path}") for name, file in names.items()}
    for name, cfg in found.items():
        optimizer = instantiate(cfg.model.optimizer)([nn.Parameter(torch.zeros(1))])
        assert (type(optimizer), optimizer.defaults["lr"], optimizer.defaults["eps"]) == (torch.optim.Adam, 1e-4, 1e-7), name
        assert (cfg.epochs, cfg.data.split.folds) == (1000, 5), name
        assert (cfg.data.preprocessing.crop, list(cfg.data.preprocessing.crop_size)) == ("center", [192, 224, 160]), name
        assert cfg.data.preprocessing.normalize == "zscore", name
    assert {name: (list(cfg.patch), cfg.data.batch_size) for name, cfg in found.items()} == {
        "A": ([192, 224, 160], 2), "B": ([128] * 3, 5), "nnU-Net": ([128] * 3, 5),
    }  # fmt: skip
    assert {name: cfg.model.target._target_.rsplit(".", 1)[1] for name, cfg in found.items()} == {
        "A": "ClassSoftmax", "B": "RegionSigmoid", "nnU-Net": "RegionSigmoid",
    }  # fmt: skip
    rules = {name: (cfg.postprocessing.min_volume, cfg.postprocessing.min_component) for name, cfg in found.items()}
    assert rules == {"A": (None, None), "B": ({"ET": 200}, None), "nnU-Net": ({"ET": 200}, None)}
    assert (found["nnU-Net"].model.network.norm, found["nnU-Net"].model.loss.batch) == ("batch", True)
    assert found["A"].data.augmentation is None or instantiate(found["A"].data.augmentation) is None
    assert instantiate(found["B"].data.augmentation).placement.degrees == 30
    brightness = {
        augmentation: instantiate(
            shared(f"{EXPERIMENT}/brats2021_nnunet", f"augmentation={augmentation}").data.augmentation.additive_brightness
        )
        for augmentation in ("nnunet_da3", "nnunet_da4")
    }
    assert [b.p_channel for b in brightness.values()] == [1.0, 0.5]


def test_fewer_than_200_voxels_of_enhancing_tumor_become_necrosis():
    task, rules = brats_task("2021"), instantiate(shared(f"{EXPERIMENT}/brats2021").postprocessing)
    names = list(task.class_names)
    for count, left in [(199, 0), (200, 200)]:
        labels = torch.zeros(10, 10, 10, dtype=torch.int8)
        labels.view(-1)[:count] = names.index("et")
        labels.view(-1)[500:600] = names.index("ed")
        ruled = rules.labels(labels, task)
        assert int((ruled == names.index("et")).sum()) == left
        assert int((ruled == names.index("ncr")).sum()) == count - left
        assert int((ruled == names.index("ed")).sum()) == 100


@pytest.mark.parametrize("seed", range(5))
def test_regions_fused_one_by_one_are_nested(seed):
    torch.manual_seed(seed)
    task, fusion = brats_task("2021"), Staple(brats_task("2021"))
    for _ in range(3):
        regions = torch.rand(3, 6, 6, 6)  # not nested at all
        fusion.add(regions, torch.randint(0, 4, (6, 6, 6), dtype=torch.int8), 1.0, "m")
    whole, core, enhancing = fusion.result().regions
    assert list(task.region_names) == ["WT", "TC", "ET"]
    assert (whole >= core).all()
    assert (core >= enhancing).all()
    assert enhancing.min() >= 0
    assert whole.max() <= 1


def test_the_small_experiment_trains_and_three_configurations_are_fused(tmp_path):
    small = ["debug=tiny", "threads=1", "model.network.features=4", f"data.root={tmp_path / 'data'}"]
    for seed in (0, 1):
        run(f"{EXPERIMENT}/simulated", *small, f"seed={seed}", f"runs={tmp_path / 'runs'}")
    first, second = (folder / "checkpoints" / "last.ckpt" for folder in run_folders(tmp_path / "runs"))
    run(
        f"{EXPERIMENT}/simulated", "job=test", *small, f"ckpt=[[{first},{second}],{first.parent / 'best.ckpt'}]", "ensemble.fusion=staple",
        "ensemble.members=true", f"runs={tmp_path / 'fused'}",
    )  # fmt: skip
    (folder,) = run_folders(tmp_path / "fused")
    assert {row["member"] for row in rows(folder)} == {"", "m1", "m2"}


def test_it_is_the_network_of_another_method(tmp_path):
    network = [
        "model/network=deepseg",
        "model.network.features=4",
        "model.network.levels=3",
        "~model.network.norm",
        "~model.network.upsampling",
    ]
    run("benchmark=blobs", "model=mean_teacher", *network, "debug=tiny", "threads=1", f"runs={tmp_path}", f"data.root={tmp_path / 'data'}")
    (folder,) = run_folders(tmp_path)
    assert rows(folder)
