"""U-Net with context encoding: its codes, what they weigh and tell, the loss of presence, and what passes with dropout and flips say."""

import copy
import math
from functools import partial

import pytest
import torch
import torchio
from torch import nn

from benchmarks.context_encoding_effects import SHARES, measured
from datamodules.transforms.intensity import RandomUniformNoise
from lesionbench.errors import SuiteError
from lesionbench.target import RegionSigmoid
from lesionbench.task import Task
from lightning_modules import UNetContextEncoding
from lightning_modules.inferers import Whole, Window
from lightning_modules.losses import RegionDice, SoftDice
from lightning_modules.networks import ContextEncodingUNet
from lightning_modules.networks.context_encoding_unet import Codebook, ContextEncoding
from lightning_modules.schedules import warmup_poly
from lightning_modules.supervised.unet_context_encoding_uncertainty import presence_loss, present
from lightning_modules.uncertainty import RunningMoments, mc_dropout
from tests.harness import composed, rows, run, run_folders

TASK = Task(
    ("a", "b"), {"background": 0, "core": 1, "edema": 2, "rim": 4}, {"WT": ("core", "edema", "rim"), "TC": ("core", "rim"), "ET": ("rim",)}
)
tiny = partial(ContextEncodingUNet, features=(4, 8), codes=3, dropout=0.3)


def method(network=tiny, task=TASK, **options):
    torch.manual_seed(0)
    return UNetContextEncoding(task, **{"network": network, "loss": SoftDice(), "inferer": Whole(), **options})


def batch(size=8):
    label = torch.zeros(2, 1, size, size, size, dtype=torch.long)
    label[0, 0, :3], label[0, 0, 3:5], label[1, 0, :2] = 1, 2, 3
    return {"image": torch.randn(2, 2, size, size, size), "label": label}


def gradients(module, loss):
    module.zero_grad()
    loss.backward()
    return {name: p.grad is not None and bool(p.grad.any()) for name, p in module.named_parameters()}


# the encoding


def by_hand():
    codebook = Codebook(2, 2)
    codebook.codewords.data = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    codebook.smoothing.data.fill_(1)
    return codebook, torch.tensor([[[0.0, 0.0], [1.0, 0.0]]])


def test_assignments_and_codes_by_hand():
    codebook, features = by_hand()
    near = 1 / (1 + math.exp(-1))  # 0.7311
    torch.testing.assert_close(codebook.assignments(features), torch.tensor([[[near, 1 - near], [1 - near, near]]]))
    torch.testing.assert_close(codebook(features), torch.tensor([[[1 - near, 0.0], [near - 1, 0.0]]]))
    codebook.smoothing.data = torch.tensor([1.0, 3.0])  # each codeword has its own: at (1, 0) exp(-1) and 1, at (0, 0) 1 and exp(-3)
    far = [1 / (1 + math.exp(-3)), 1 / (1 + math.exp(1))]
    torch.testing.assert_close(codebook.assignments(features)[0, :, 0], torch.tensor(far))


def test_codes_do_not_know_places_and_assignments_sum_to_one():
    torch.manual_seed(0)
    codebook, features = Codebook(4, 3), torch.randn(2, 10, 3)
    torch.testing.assert_close(codebook(features[:, torch.randperm(10)]), codebook(features))
    torch.testing.assert_close(codebook.assignments(features).sum(dim=-1), torch.ones(2, 10))
    codebook.smoothing.data.zero_()
    torch.testing.assert_close(codebook.assignments(features), torch.full((2, 10, 4), 0.25))


def test_codes_are_those_of_residuals_also_in_half_precision():
    torch.manual_seed(0)
    codebook, features = Codebook(4, 64), 3 * torch.randn(1, 50, 64)
    residuals = features[:, :, None] - codebook.codewords
    assigned = (-codebook.smoothing * residuals.square().sum(dim=-1)).softmax(dim=-1)
    expected = (assigned[..., None] * residuals).sum(dim=1)
    torch.testing.assert_close(codebook(features), expected, rtol=1e-3, atol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(codebook(features), expected, rtol=1e-3, atol=1e-3)


def test_channels_are_weighed_beside_or_instead_of_the_features():
    torch.manual_seed(0)
    context, x = ContextEncoding(4, 3, 2), torch.randn(2, 4, 3, 3, 3)
    nn.init.zeros_(context.factors.weight)
    context.factors.bias.data = torch.tensor([-100.0, 0.0, 0.0, 100.0])  # factors 0, 1/2, 1/2, 1
    weights = torch.tensor([0, 0.5, 0.5, 1]).reshape(1, 4, 1, 1, 1)
    torch.testing.assert_close(context(x)[0], (x * (1 + weights)).relu())
    context.residual = False
    torch.testing.assert_close(context(x)[0], (x * weights).relu())


def test_context_of_a_repeated_image_is_that_of_the_image():
    """Codes are divided by the number of positions: an image of twice the size with the same content is told the same."""
    torch.manual_seed(0)
    context, x = ContextEncoding(4, 3, 2), torch.randn(1, 4, 3, 3, 3)
    context.norm = nn.Identity()  # which would hide all but the last digits of a difference in size
    torch.testing.assert_close(context(x.repeat(1, 1, 2, 2, 2))[1], context(x)[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(context(x.flip(2))[1], context(x)[1], rtol=1e-4, atol=1e-4)


# the network


def parameters(network):
    return sum(p.numel() for p in network.parameters())


def test_parameters():
    with torch.device("meta"):
        small, large = ContextEncodingUNet(4, 3, presence=3), ContextEncodingUNet(4, 3, presence=3, features=(32, 64, 128, 256, 320))
        assert (parameters(small), parameters(large)) == (5_788_614, 16_763_814)
        assert parameters(ContextEncodingUNet(4, 4)) == 5_788_614 + 16 + 1  # one output more, of 16 channels
        encoding = 256 * 256 + 2 * 256 + 32 * 256 + 32 + 2 * 32 + 256 * 256 + 256 + 3 * 256 + 3
        assert parameters(small) - parameters(ContextEncodingUNet(4, 3, codes=0)) == encoding == parameters(small.context)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_shapes_and_smallest_size(dimensions):
    network = ContextEncodingUNet(2, 4, dimensions=dimensions, features=(4, 4, 8), codes=3)
    assert (network.divisor, network.min_size) == ((4,) * dimensions, (8,) * dimensions)
    said = network(torch.randn(2, 2, *[8, 12, 8][:dimensions]))
    assert said["logits"].shape == (2, 4, *[8, 12, 8][:dimensions])
    assert said["presence"].shape == (2, 3)
    assert "presence" not in ContextEncodingUNet(2, 4, dimensions=dimensions, features=(4, 8), codes=0)(
        torch.randn(1, 2, *[8] * dimensions)
    )


def test_dropout_follows_every_convolution_of_a_block():
    network = ContextEncodingUNet(1, 2, features=(4, 4, 8), dropout=0.25)
    blocks = [*network.encoder, network.bottom, *network.decoder]
    assert [[type(layer) for layer in block] for block in blocks] == [[nn.Conv3d, nn.InstanceNorm3d, nn.LeakyReLU, nn.Dropout] * 2] * 5
    assert {m.p for m in network.modules() if isinstance(m, nn.Dropout)} == {0.25}


def test_what_the_network_refuses():
    with pytest.raises(SuiteError, match="two resolutions"):
        ContextEncodingUNet(1, 2, features=(4,))
    with pytest.raises(SuiteError, match=r"network.presence=None"):
        ContextEncodingUNet(1, 1)


# presence


def test_presence_of_samples():
    label = batch()["label"]
    assert present(label, 3).tolist() == [[True, True, False], [False, False, True]]


def test_loss_of_presence():
    label = batch()["label"]
    assert presence_loss(torch.zeros(2, 3), label).item() == pytest.approx(math.log(2))
    logits = torch.tensor([[1.0, -1.0, 2.0], [0.0, 0.0, 0.0]])
    first = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(1)) + math.log(1 + math.exp(2))) / 3
    assert presence_loss(logits, label).item() == pytest.approx((first + math.log(2)) / 2)
    label[1] = -1  # nothing is known of it
    assert presence_loss(logits, label).item() == pytest.approx(first)
    assert presence_loss(logits, torch.full_like(label, -1)).item() == 0


def test_presence_teaches_encoder_and_codes_but_not_the_decoder():
    model = method()
    reached = gradients(model.network, presence_loss(model.network(batch()["image"])["presence"], batch()["label"]))
    outside = ("up.", "decoder.", "out.", "context.factors")
    assert all(reached[name] for name in reached if not name.startswith(outside))
    assert not any(reached[name] for name in reached if name.startswith(outside))
    assert reached["context.codebook.smoothing"]


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_loss_of_a_step(weight, monkeypatch):
    model, data = method(presence_weight=weight), batch()
    model.network.eval()  # no dropout
    told = {}
    monkeypatch.setattr(model, "log_terms", lambda **terms: told.update(terms))
    loss = model.training_step(data, 0)
    output = model.network(data["image"])
    segmentation, presence = SoftDice()(output["logits"], data["label"]), presence_loss(output["presence"], data["label"])
    torch.testing.assert_close(loss, segmentation + weight * presence)
    assert ("presence" in told) == bool(weight)
    reached = gradients(model.network, loss)
    assert reached["context.presence.weight"] == bool(weight)
    assert reached["out.weight"]


@torch.no_grad()
def test_head_and_task_must_agree():
    with pytest.raises(SuiteError, match=r"tells the presence of 2 classes, the task has 3 \(core, edema, rim\)"):
        method(partial(tiny, presence=2))
    with pytest.raises(SuiteError, match="presence of 0 classes"):
        method(partial(tiny, codes=0))
    assert method(partial(tiny, codes=0), presence_weight=0).predict_case(case()).table == {}
    assert method(partial(tiny, presence=2), presence_weight=0).predict_case(case()).table == {}
    regions = method(partial(tiny, presence=3), target=RegionSigmoid, loss=RegionDice())
    assert regions.network.out.out_channels == 3


def case(size=8):
    return {"image": torch.randn(1, 2, size, size, size, generator=torch.Generator().manual_seed(1))}


@torch.no_grad()
def test_table_of_a_prediction():
    model = method().eval()
    said = model.predict_case(case())
    told = model.network(case()["image"])["presence"].sigmoid()[0].tolist()
    assert said.table == pytest.approx({"presence_core": told[0], "presence_edema": told[1], "presence_rim": told[2]})
    assert said.regions.shape == (3, 8, 8, 8)


@torch.no_grad()
def test_of_several_windows_the_largest_presence_counts():
    model = method(inferer=Window((8, 8, 8), overlap=0.0, blending="constant")).eval()
    image = case(16)["image"]
    corners = [slice(0, 8), slice(8, 16)]
    windows = [image[:, :, x, y, z] for x in corners for y in corners for z in corners]
    largest = torch.cat([model.network(w)["presence"].sigmoid() for w in windows]).amax(dim=0).tolist()
    assert list(model.predict_case({"image": image}).table.values()) == pytest.approx(largest, abs=1e-5)


def test_presence_is_judged_where_there_is_a_truth():
    model = method()
    row = {"member": "", "region": "", "presence_core": 0.9, "presence_edema": 0.6, "presence_rim": 0.2}
    judged = model._judged(row, [True, False, False])
    assert judged == {"present_core": 1, "present_edema": 0, "present_rim": 0, "presence_accuracy": pytest.approx(2 / 3)}


def blobs(seed, count=32):
    """Images (count, 2, 16, 16) of noise with a bright square, and in every second one a square that is bright in the second channel alone."""
    generator = torch.Generator().manual_seed(seed)
    image, label = 0.3 * torch.randn(count, 2, 16, 16, generator=generator), torch.zeros(count, 1, 16, 16, dtype=torch.long)
    for n, (x, y) in enumerate(torch.randint(0, 5, (count, 2), generator=generator).tolist()):
        image[n, 0, x : x + 6, y : y + 6] += 2
        label[n, 0, x : x + 6, y : y + 6] = 1
        if n % 2:
            image[n, 1, x + 7 : x + 10, y + 7 : y + 10] += 2
            label[n, 0, x + 7 : x + 10, y + 7 : y + 10] = 2
    return {"image": image, "label": label}


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_the_head_learns_what_an_image_holds(weight):
    task = Task(("a", "b"), {"background": 0, "square": 1, "spot": 2})
    model = method(partial(tiny, dimensions=2, features=(8, 16), dropout=0.0), task, presence_weight=weight, inferer=Whole())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(60):
        optimizer.zero_grad()
        model.training_step(blobs(step), 0).backward()
        optimizer.step()
    with torch.no_grad():
        new = blobs(1000)
        told = model.eval().network(new["image"])["presence"][:, 1]
    right = ((told > 0) == present(new["label"], 2)[:, 1]).float().mean().item()
    assert right > 0.9 if weight else right < 0.75


# passes


def test_only_dropout_draws():
    model, x = method().eval(), case()["image"]
    before = copy.deepcopy(model.state_dict())
    with mc_dropout(model), torch.no_grad():
        assert {type(m) for m in model.modules() if m.training and not list(m.children())} == {nn.Dropout}
        torch.manual_seed(0)
        answers = [model.predict_maps(x)["probabilities"] for _ in range(3)]
        torch.manual_seed(1)
        other = model.predict_maps(x)["probabilities"]
    assert not torch.equal(answers[0], answers[1])
    assert not torch.equal(answers[0], other)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    sure = method(partial(tiny, dropout=0.0)).eval()
    with mc_dropout(sure), torch.no_grad():
        assert torch.equal(sure.predict_maps(x)["probabilities"], sure.predict_maps(x)["probabilities"])


def test_entropies_of_three_passes_by_hand():
    moments, passes = RunningMoments(mutual_information=True), [torch.tensor([p, 1 - p]).reshape(1, 2, 1) for p in (0.9, 0.5, 0.1)]
    for p in passes:
        moments.update(p)
    found = [float(m) for m in (moments.entropy, moments.expected_entropy, moments.mutual_information)]
    assert found == pytest.approx([0.6931, 0.4478, 0.2454], abs=1e-4)
    torch.testing.assert_close(moments.mean, torch.stack(passes).mean(dim=0))
    agreed = RunningMoments(mutual_information=True)
    for _ in range(3):
        agreed.update(passes[0])
    assert float(agreed.mutual_information) == pytest.approx(0, abs=1e-6)


# noise and schedule of the training


def test_uniform_noise():
    torch.manual_seed(0)
    image = torchio.Subject(image=torchio.ScalarImage(tensor=torch.ones(2, 20, 20, 20)))
    noise = RandomUniformNoise(amplitude=0.3)(image)["image"].data - 1
    assert noise.abs().max() <= 0.3
    assert noise.mean().abs() < 0.01
    assert noise.std().item() == pytest.approx(0.3 / 3**0.5, rel=0.02)  # that of a uniform draw
    assert not torch.equal(noise[0], noise[1])


def test_schedule_of_the_paper():
    cfg = composed("experiment=unet_context_encoding_uncertainty/brats2021")
    assert (cfg.epochs, cfg.model.scheduler.warmup_epochs, cfg.asked.passes) == (300, 0, 100)
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=1e-4)
    schedule = warmup_poly(optimizer, 600, epochs=300, warmup_epochs=0, power=0.9)
    rates = [1e-4 * schedule.lr_lambdas[0](i) for i in (0, 1, 300, 301)]
    assert rates == pytest.approx([1e-4, 1e-4, 5.359e-5, 5.359e-5], rel=1e-4)  # of an epoch, half of them done at 150


# all of it


@pytest.mark.slow
def test_presence_and_errors_are_found_on_the_toy(tmp_path):
    """About a minute on a core; three seeds of it are in docs/results/unet_context_encoding_uncertainty_toy.csv."""
    run("experiment=unet_context_encoding_uncertainty/toy", "callbacks=[default,risk_coverage]", "trainer=cpu", "threads=1", "seed=3", f"runs={tmp_path}",
        f"data.root={tmp_path / 'data'}", "callbacks.figures=null")  # fmt: skip
    (folder,) = run_folders(tmp_path)
    found = measured(folder)
    assert found["presence_auroc"] > 0.9
    assert found["auroc_entropy"] > 0.8
    wrong = [found[f"wrong_{share:g}"] for share in SHARES]
    assert wrong == sorted(wrong, reverse=True)
    assert wrong[-1] < wrong[0] / 2


def test_trained_and_asked(tmp_path):
    run("experiment=unet_context_encoding_uncertainty/simulated", "debug=tiny", "trainer=cpu", "threads=1", f"runs={tmp_path}", f"data.root={tmp_path / 'data'}",
        "model.network.features=[4,8]", "asked.passes=2", "callbacks.figures=null")  # fmt: skip
    (folder,) = run_folders(tmp_path)
    found = rows(folder)
    assert {row["member"] for row in found} == {"", "plain"}
    (main, *_) = [row for row in found if row["member"] == "" and row["region"] == "WT"]
    assert 0 <= float(main["qu_brats_entropy"]) <= 1
    (table,) = [row for row in found if row["region"] == ""]
    assert table["member"] == "plain"
    right = [(float(table[f"presence_{name}"]) > 0.5) == bool(float(table[f"present_{name}"])) for name in ("ncr", "ed", "et")]
    assert float(table["presence_accuracy"]) == pytest.approx(sum(right) / 3, abs=1e-3)
