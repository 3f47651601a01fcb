"""HarDNet-BTS: the links and widths of its blocks, soft pooling, parameters, heads, losses, memory traffic."""

import math

import nibabel as nib
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torchio
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import DataLoader

from callbacks import CycleAverage
from datamodules.transforms.axes import RandomTransposition
from datamodules.transforms.intensity import RandomRelativeNoise
from lesionbench.errors import SuiteError
from lesionbench.resolvers import share
from lesionbench.target import ClassSoftmax, RegionSigmoid
from lesionbench.task import Task, joined
from lightning_modules.evaluation.ensemble import Member, common
from lightning_modules.inferers import Transformed, Whole
from lightning_modules.losses import DeepSupervision, RegionBCE, RegionBCEDice, RegionDice
from lightning_modules.networks import HarDNet
from lightning_modules.networks.hardnet import ConvBlock, SoftPool, harmonic_links, harmonic_width
from tests.fake_data import WRITERS
from tests.harness import composed, rows, run, run_folders, weights

SMALL = {"features": (4, 6, 8, 8, 8, 8), "growth": (2, 2, 2, 2), "layers": (4, 4, 4, 4)}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def parameters(**options):
    with torch.device("meta"):
        return sum(p.numel() for p in HarDNet(4, 3, **options).parameters())


# blocks


def test_links():
    found = {layer: harmonic_links(layer) for layer in (1, 2, 3, 4, 6, 8, 12, 16)}
    assert found == {
        1: [0], 2: [1, 0], 3: [2], 4: [3, 2, 0], 6: [5, 4], 8: [7, 6, 4, 0], 12: [11, 10, 8], 16: [15, 14, 12, 8, 0],
    }  # fmt: skip


def test_widths_and_channels_by_hand():
    assert [harmonic_width(layer, 14, 1.7) for layer in range(1, 9)] == [14, 24, 14, 40, 14, 24, 14, 68]
    block = ConvBlock(3, 64, 14, 8)
    convolutions = [layer[0] for layer in block.layers]
    assert [c.in_channels for c in convolutions] == [64, 78, 24, 102, 40, 54, 24, 142]
    assert [c.out_channels for c in convolutions] == [14, 24, 14, 40, 14, 24, 14, 68]
    assert all(c.bias is None and c.kernel_size == (3, 3, 3) for c in convolutions)


@pytest.mark.parametrize(
    ("in_channels", "growth", "layers", "last", "out"),
    [(64, 14, 8, 68, 124), (128, 16, 16, 134, 262), (256, 20, 16, 168, 328), (320, 20, 16, 168, 328)],
)
def test_answers_of_the_four_blocks(in_channels, growth, layers, last, out):
    with torch.device("meta"):
        block = ConvBlock(3, in_channels, growth, layers)
    assert block.widths[-1] == last
    assert block.out_channels == out == growth * layers // 2 + last


def test_the_answer_is_the_odd_layers_and_the_last_one():
    torch.manual_seed(0)
    block = ConvBlock(2, 3, 2, 4, activation="relu").eval()
    x, seen = torch.randn(1, 3, 5, 5), []
    for layer in block.layers:
        layer.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    out = block(x)
    assert torch.equal(out, torch.cat([seen[0][1], seen[2][1], seen[3][1]], dim=1))
    assert torch.equal(seen[3][0], torch.cat([seen[2][1], seen[1][1], x], dim=1))


def test_a_dense_block_reads_and_answers_all():
    block = ConvBlock(2, 3, 2, 3, kind="dense")
    assert block.links == [[0], [0, 1], [0, 1, 2]]
    assert block.out_channels == 6
    assert block(torch.randn(1, 3, 4, 4)).shape == (1, 6, 4, 4)


@pytest.mark.parametrize(
    ("in_channels", "growth", "layers", "dense_growth", "harmonic", "dense"),
    [(64, 14, 8, 18, 740, 1160), (128, 16, 16, 20, 2124, 4768), (256, 20, 16, 24, 3130, 7360)],
)
def test_memory_traffic_is_much_less_than_of_a_dense_block(in_channels, growth, layers, dense_growth, harmonic, dense):
    """Channels read and written by the convolutions, per voxel, at equal depth and about equal parameters (Chao et al., ICCV 2019)."""
    with torch.device("meta"):
        blocks = [ConvBlock(3, in_channels, growth, layers), ConvBlock(3, in_channels, dense_growth, layers, kind="dense")]
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)
    assert [traffic(block) for block in blocks] == [harmonic, dense]
    assert dense / harmonic > 1.5


def traffic(block):
    return sum(m.in_channels + m.out_channels for m in block.modules() if isinstance(m, nn.Conv3d))


# soft pooling


def test_soft_pooling_of_one_value_by_hand():
    window = torch.zeros(1, 1, 2, 2, 2)
    window[0, 0, 1, 0, 1] = 3.0
    assert SoftPool()(window).item() == pytest.approx(3 * math.exp(3) / (7 + math.exp(3)))
    assert SoftPool()(window).item() == pytest.approx(2.22, abs=0.01)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_soft_pooling_lies_between_mean_and_largest_and_follows_a_shift(dimensions):
    x = torch.randn(2, 3, *(6, 4, 8)[:dimensions], generator=torch.Generator().manual_seed(0))
    soft = SoftPool()(x)
    mean = (nn.functional.avg_pool2d, nn.functional.avg_pool3d)[dimensions - 2](x, 2)
    largest = (nn.functional.max_pool2d, nn.functional.max_pool3d)[dimensions - 2](x, 2)
    assert (mean <= soft + 1e-6).all()
    assert (soft <= largest + 1e-6).all()
    torch.testing.assert_close(SoftPool()(x + 5), soft + 5)
    torch.testing.assert_close(SoftPool()(torch.full_like(x, 2.5)), torch.full_like(soft, 2.5))
    weights = x.exp()
    average = (nn.functional.avg_pool2d, nn.functional.avg_pool3d)[dimensions - 2]
    torch.testing.assert_close(soft, average(weights * x, 2) / average(weights, 2))


def test_soft_pooling_does_not_overflow_in_half_precision():
    x = torch.full((1, 1, 2, 2, 2), -20.0, dtype=torch.float16)
    x[..., 0] = 20.0
    assert SoftPool()(x).item() == 20


# the network


def test_parameters():
    assert parameters(deep_supervision=False) == 23_687_963
    assert parameters() == 23_691_077
    assert 23_691_077 - 23_687_963 == 3 * (320 + 328 + 262 + 124) + 4 * 3


def test_skips_and_widths_of_the_paper_s_network():
    with torch.device("meta"):
        network = HarDNet(4, 4)
    assert [block.out_channels for block in (*network.encoder, network.bottom, *network.decoder)] == [124, 262, 328, 328, 328, 262, 124]
    assert [up[0].out_channels for up in network.up] == [324, 295, 193]
    assert (network.divisor, network.min_size) == ((16,) * 3, (32,) * 3)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_heads_are_of_full_size_and_everything_gets_a_gradient(dimensions):
    torch.manual_seed(0)
    network = HarDNet(2, 3, dimensions=dimensions, **SMALL)
    size = (32, 32, 16)[:dimensions]
    image = torch.randn(2, 2, *size)
    out = network(image)
    assert [head.shape for head in (out["logits"], *out["deep"])] == [(2, 3, *size)] * 5
    DeepSupervision(RegionDice(batch=True, squared=True, smooth=1.0), [1] * 5)(out, (torch.randn(2, 3, *size) > 0).float()).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.dim() < 2 or (parameter.grad != 0).any(), name
    for head in (network.out, *network.deep):
        assert (head.weight.grad != 0).any()
    with torch.no_grad():
        assert network.eval()(image).shape == (2, 3, *size)


def test_without_a_halving_at_the_start_all_sides_are_half_as_large():
    network = HarDNet(1, 1, dimensions=2, stem_stride=1, **SMALL)
    assert (network.divisor, network.min_size) == ((8, 8), (16, 16))
    seen = []
    network.encoder[0].register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[2:]))
    network(torch.randn(1, 1, 16, 24))
    assert seen == [(16, 24)]


def test_pooling_and_activation_are_those_asked_for():
    image = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    answers = []
    for options in ({}, {"pool": "avg"}, {"pool": "max"}, {"activation": "relu"}, {"activation": "leaky_relu"}):
        torch.manual_seed(0)
        answers.append(HarDNet(1, 1, dimensions=2, **SMALL, **options)(image)["logits"])
    assert all(not torch.allclose(a, b) for i, a in enumerate(answers) for b in answers[:i])
    mish = [m for m in HarDNet(1, 1, dimensions=2, **SMALL).modules() if isinstance(m, nn.Mish)]
    assert len(mish) == 2 + 7 * 4 + 7  # the stem, seven blocks of four layers, seven 1 x 1 convolutions


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pool": "softt"}, "network.pool.*did you mean 'soft'"),
        ({"activation": "gelu"}, "network.activation"),
        ({"block": "harmonics"}, "network.block.*did you mean 'harmonic'"),
        ({"growth": (2, 2)}, r"growth=\[2, 2\].*expected six features"),
        ({"stem_stride": 3}, "network.stem_stride=3"),
    ],
)
def test_mistakes_are_named(options, said):
    with pytest.raises(SuiteError, match=said):
        HarDNet(1, 1, **{**SMALL, **options})


# losses (Eqs. 1 to 4)


def test_losses_by_hand():
    """A = (1/2, 1/2), B = (1, 0), no smoothing."""
    logits, truth = torch.zeros(1, 1, 2, 1), torch.tensor([1.0, 0.0]).reshape(1, 1, 2, 1)
    squared = RegionDice(batch=True, squared=True, smooth=0.0)
    plain = RegionDice(batch=True, smooth=0.0)
    both = RegionBCEDice(bce_weight=0.2, dice_weight=0.8, batch=True, smooth=0.0)
    assert squared(logits, truth).item() == pytest.approx(1 / 3)
    assert plain(logits, truth).item() == pytest.approx(0.5)
    assert RegionBCE()(logits, truth).item() == pytest.approx(math.log(2))
    assert both(logits, truth).item() == pytest.approx(0.4 + 0.2 * math.log(2))


# augmentation


def subject_of(*shape):
    image = torch.arange(math.prod(shape), dtype=torch.float32).reshape(1, *shape) + 1
    return torchio.Subject(image=torchio.ScalarImage(tensor=image), label=torchio.LabelMap(tensor=image.to(torch.int16)))


def test_axes_of_equal_length_are_exchanged_with_the_label():
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        subject = RandomTransposition()(subject_of(4, 4, 4))
        original = subject_of(4, 4, 4)["image"].data
        (pair,) = [p for p in ((1, 2), (1, 3), (2, 3)) if torch.equal(subject["image"].data, original.transpose(*p))]
        assert torch.equal(subject["label"].data.float(), original.transpose(*pair))
        seen.add(pair)
    assert len(seen) == 3
    for seed in range(5):  # 144 x 144 x 128: the first two alone
        torch.manual_seed(seed)
        image = RandomTransposition()(subject_of(4, 4, 3))["image"].data
        assert torch.equal(image, subject_of(4, 4, 3)["image"].data.transpose(1, 2))
    assert torch.equal(RandomTransposition()(subject_of(2, 3, 4))["image"].data, subject_of(2, 3, 4)["image"].data)


def test_noise_is_a_share_of_the_spread_of_what_is_positive():
    torch.manual_seed(0)
    image = torch.zeros(2, 32, 32, 32)
    image[0, :16] = 3 + 2 * torch.randn(16, 32, 32).clamp(-1.4, 1.4)
    spread = image[0][image[0] > 0].std(correction=0)
    changed = RandomRelativeNoise(share=0.1, include=["image"])(torchio.Subject(image=torchio.ScalarImage(tensor=image.clone())))[
        "image"
    ].data
    assert (changed - image)[0].std() == pytest.approx(0.1 * float(spread), rel=0.05)
    assert torch.equal(changed[1], image[1])  # nothing positive, no noise


# fine-tuning


class Line(pl.LightningModule):
    """One weight that moves by -1 a batch; counts as a method does."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.iteration, self.momenta = 0, []

    @property
    def total_iterations(self):
        return self.trainer.num_training_batches * self.trainer.max_epochs

    def training_step(self, batch, batch_idx):
        self.mean += 2
        self.count += 2
        return self.weight.sum()

    def on_before_optimizer_step(self, optimizer):
        self.momenta.append(bool(optimizer.state))

    def on_train_batch_end(self, *_):
        self.iteration += 1

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0, momentum=1e-9)


def fitted(epochs, batches, cycles):
    module = Line()
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[CycleAverage(cycles)],
    )  # fmt: skip
    trainer.fit(module, DataLoader([0.0] * batches, batch_size=1))
    return module


def test_the_weights_after_every_epoch_are_averaged_buffers_too():
    """Weights -2, -4, -6, -8 after the epochs: -5; the same of a statistic; whole numbers stay so."""
    module = fitted(epochs=4, batches=2, cycles=2)
    assert module.weight.item() == pytest.approx(-5, abs=1e-6)
    assert module.mean.item() == pytest.approx(10)
    assert module.count.item() == 10


@pytest.mark.parametrize(("cycles", "fresh"), [(1, [0]), (2, [0, 4]), (4, [0, 2, 4, 6]), (5, [0, 2, 4, 5, 7])])
def test_optimizers_begin_anew_with_every_cycle(cycles, fresh):
    assert [place for place, known in enumerate(fitted(4, 2, cycles).momenta) if not known] == fresh


def test_no_cycle_is_an_error():
    with pytest.raises(SuiteError, match=r"swa\.cycles=0"):
        CycleAverage(0)


def test_cross_pseudo_supervision_of_two_of_this_network(tmp_path):
    run(
        "benchmark=blobs", "model=cross_pseudo_supervision", "model/network=hardnet", "~model.network.norm", "~model.network.upsampling", "model.network.features=[4,6,8,8,8,8]",
        "model.network.growth=[2,2,2,2]", "model.network.layers=[4,4,4,4]", "debug=tiny", "threads=1", f"data.root={tmp_path / 'data'}", f"runs={tmp_path / 'runs'}",
    )  # fmt: skip
    (folder,) = run_folders(tmp_path / "runs")
    assert any("bottom_down" in name for name in weights(folder))
    assert rows(folder)


# target, copies of a case, experiments

BRATS = Task(
    ("t1", "t1ce", "t2", "flair"),
    {"background": 0, "necrosis": 1, "edema": 2, "enhancing": 4},
    {"WT": ("necrosis", "edema", "enhancing"), "TC": ("necrosis", "enhancing"), "ET": ("enhancing",)},
)


def test_labels_are_painted_from_the_regions():
    """ET -> 4, core without it -> 1, whole tumor without core -> 2; labels come back from their own masks."""
    target = RegionSigmoid(BRATS, decoding="paint", background=True)
    label = torch.randint(0, 4, (1, 1, 6, 6, 6), generator=torch.Generator().manual_seed(0))
    masks = target.encode(label)
    assert masks.shape == (1, 4, 6, 6, 6)
    assert torch.equal(masks[:, 3], (label[:, 0] == 0).float())
    assert torch.equal(target.labels(target.decode(masks)), label[:, 0].to(torch.int8))
    single = torch.eye(3).reshape(1, 3, 3, 1, 1)  # reached alone: WT, TC, ET
    assert BRATS.to_disk(target.labels(single).numpy()).flatten().tolist() == [2, 1, 4]


def test_sixteen_different_copies_come_back_as_they_were():
    image, seen = torch.arange(2 * 5 * 4 * 3, dtype=torch.float32).reshape(1, 2, 5, 4, 3), []

    def identity(view):
        seen.append(view.clone())
        return {"image": view}

    mean = Transformed(Whole(1), "dihedral")(image, identity)["image"]
    assert torch.equal(mean, image)
    assert len({(view.shape, tuple(view.flatten().tolist())) for view in seen}) == len(seen) == 16


def test_versions_have_the_settings_of_the_paper():
    found = {}
    for version in ("brats2021", "brats2021_v2", "brats2021_v3"):
        cfg = composed(f"experiment=hardnet_bts/{version}", "data.root=data")
        loss = instantiate(cfg.model.loss)
        found[version] = (type(loss.loss).__name__, list(cfg.patch), cfg.data.batch_size, cfg.epochs, loss.weights, cfg.task.regions)
        stage = OmegaConf.to_container(cfg, resolve=True)["stages"][1]["override"]
        assert (stage["trainer"]["max_epochs"], stage["callbacks"]["swa"]["cycles"], stage["model"]["optimizer"]["lr"]) == (150, 5, 5e-5)
        assert (cfg.model.optimizer.lr, cfg.precision, cfg.test_time, cfg.model.target.background) == (1e-4, "32-true", "dihedral", True)
    one = [1.0] * 5
    assert found == {
        "brats2021": ("RegionBCEDice", [128, 128, 128], 6, 1400, one, None),
        "brats2021_v2": ("RegionDice", [144, 144, 128], 4, 1400, one, None),
        "brats2021_v3": ("RegionBCEDice", [128, 128, 128], 6, 1400, one, ["ET"]),
    }


@pytest.mark.parametrize(("whole", "part", "expected"), [(1400, 0.1071428571, 150), (12, 0.25, 3), (1, 0.1, 1)])
def test_a_share_of_the_epochs_is_a_whole_number_of_them(whole, part, expected):
    assert share(whole, part) == expected


# version 3: a network for each region, which answer as one


@pytest.fixture(scope="module")
def regions(tmp_path_factory):
    """The data and a checkpoint for each region."""
    folder = tmp_path_factory.mktemp("v3")
    root = WRITERS["brats2021"](folder / "data")
    found = {}
    for region in ("ET", "TC", "WT"):
        run(*version3(root, folder / region), f"task.regions=[{region}]", "stages=[{name: fit, run: fit}]")
        (found[region],) = (folder / region).rglob("last.ckpt")
    return root, found


def version3(root, runs):
    return [
        "experiment=hardnet_bts/brats2021_v3", "debug=tiny", "trainer=cpu", "threads=1", f"data.root={root}", f"runs={runs}", "test_time=null", "callbacks.figures=null",
        "model.network.features=[4,6,8,8,8,8]", "model.network.growth=[2,2,2,2]", "model.network.layers=[4,4,4,4]",
    ]  # fmt: skip


def probabilities(folder):
    return {
        p.name.partition("_prob_")[2].partition(".")[0]: nib.load(p).get_fdata() for p in (folder / "predictions").glob("*_prob_*.nii.gz")
    }


def test_networks_of_one_region_each_answer_as_one_model(regions, tmp_path):
    root, checkpoints = regions
    ckpt = ",".join(map(str, checkpoints.values()))
    more = [*version3(root, tmp_path), "writer.probabilities=true"]
    alone = {}
    for region, path in checkpoints.items():
        run("job=predict", f"ckpt={path}", f"out={tmp_path / region}", *more, f"task.regions=[{region}]")
        alone |= probabilities(tmp_path / region)
    run("job=predict", f"ckpt=[[{ckpt}]]", f"out={tmp_path / 'all'}", *more, "task.regions=[WT,TC,ET]")
    together = probabilities(tmp_path / "all")
    assert set(together) == {"WT", "TC", "ET"}
    for region, values in together.items():
        assert np.allclose(values, alone[region], atol=1e-6)
    (labels,) = (p for p in (tmp_path / "all" / "predictions").glob("*.nii.gz") if "_prob_" not in p.name)
    wt, tc, et = (together[r] > 0.5 for r in ("WT", "TC", "ET"))
    assert np.array_equal(nib.load(labels).get_fdata(), np.select([et, tc, wt], [4, 1, 2], 0))


def test_they_are_tested_on_all_regions_and_refused_one_by_one(regions, tmp_path):
    root, checkpoints = regions
    paths = list(map(str, checkpoints.values()))
    options = [*version3(root, tmp_path), "task.regions=[WT,TC,ET]"]
    run("job=test", f"ckpt=[[{','.join(paths)}]]", *options)
    (folder,) = run_folders(tmp_path)
    assert {row["region"] for row in rows(folder) if row["region"]} == {"WT", "TC", "ET"}
    with pytest.raises(SuiteError, match=r"(?s)3 model\(s\) of the ensemble lack a region.*ckpt=\[\[.*does not know WT, TC"):
        run("job=test", f"ckpt=[{','.join(paths)}]", *options)


def test_parts_are_decoded_as_each_of_them_is():
    """Thresholds and decoding of the parts; nothing in common where these differ, or where one is no region target."""

    def part(region, **options):
        task = BRATS.narrowed(regions=[region])
        return Member(f"{region}.ckpt", task, RegionSigmoid(task, **options), frozenset())

    parts = [part("ET", threshold=0.3, decoding="paint"), part("WT", threshold=0.4, decoding="paint"), part("TC", decoding="paint")]
    decoder = common(BRATS, parts)
    assert (decoder.decoding, decoder.thresholds) == ("paint", (0.4, 0.5, 0.3))
    assert decoder.labels(torch.tensor([0.2, 0.2, 0.35]).reshape(1, 3, 1, 1, 1)).item() == 3  # nested: background
    assert common(BRATS, [*parts, part("ET", threshold=0.6, decoding="paint")]) is None
    assert common(BRATS, [*parts, part("ET", threshold=0.3)]) is None
    softmax = Member("all.ckpt", BRATS, ClassSoftmax(BRATS), frozenset())
    assert common(BRATS, [*parts, softmax]) is None
    assert common(BRATS, [softmax, *parts]) is None


def test_a_task_is_joined_from_its_regions():
    parts = [BRATS.narrowed(regions=[region]) for region in ("ET", "WT", "TC")]
    assert joined(parts) == BRATS
    assert list(joined(parts).classes) == list(BRATS.classes)
    assert joined([BRATS.narrowed(regions=["ET"]), BRATS.narrowed(regions=["WT"])]) == BRATS.narrowed(regions=["WT", "ET"])
    other = Task(BRATS.channels, {"background": 0, "a": 1}, {"ET": ("a",)})
    with pytest.raises(SuiteError, match=r"region ET has the values \[1\] in one checkpoint, \[4\] in another"):
        joined([*parts, other])
    with pytest.raises(SuiteError, match=r"regions ET and enhancing both have the values \[4\]"):
        joined([*parts, Task(BRATS.channels, {"background": (0, 1, 2), "enhancing": 4})])
