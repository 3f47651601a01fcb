"""SPiN: the network by its parameter counts, shapes and limiting cases; gradients; sampling, schedule and gate of its training."""

import signal
from functools import partial

import pytest
import torch
from torch.nn.functional import avg_pool2d, binary_cross_entropy_with_logits, interpolate, pixel_shuffle, pixel_unshuffle

from datamodules import Folder, Split
from datamodules.transforms.augmentation import Gate
from lesionbench.errors import SuiteError
from lesionbench.target import RegionSigmoid
from lesionbench.task import Task
from lightning_modules import SPiN
from lightning_modules.inferers import SlabWise
from lightning_modules.losses import RegionBCE, RegionDice
from lightning_modules.networks import SubpixelNet
from lightning_modules.networks.subpixel import LearnedDownsampler, SubpixelEmbedding, SubpixelGuidance, combined
from lightning_modules.schedules import steps
from tests.fake_data import write_fake_folder
from tests.harness import assert_same, rows, run, run_folders, run_killed, weights

SMALL = {"widths": [8, 16, 24, 32, 32], "decoder_widths": [32, 24, 16, 8, 8, 8], "embedding_width": 8}
TASK = Task(("t1",), {"background": 0, "lesion": 1})


def count(module) -> int:
    return sum(p.numel() for p in module.parameters())


def net(seed=0, **options):
    torch.manual_seed(seed)
    return SubpixelNet(1, 1, **{**SMALL, **options}).eval()


def method(**options):
    return SPiN(
        TASK, network=partial(SubpixelNet, **{**SMALL, **options}), loss=RegionBCE(1.5), target=RegionSigmoid, inferer=SlabWise(k=5)
    )


# parameters


def test_parameter_counts_of_the_paper():
    with torch.device("meta"):
        full = SubpixelNet(1, 1)
        assert count(full) == 5_165_984
        assert count(full.guidance.embedding) == 16_016  # "16K"
        assert count(full.downsampler) == 11_584  # "11K"
        assert count(full.guidance) == 16_016 + 2_912
        assert count(SubpixelNet(1, 1, spg="none", downsampler="bilinear")) == 5_133_168
        assert count(SubpixelEmbedding(5, form="paper")) == 8_448
        assert count(LearnedDownsampler(16, 1)) == 11_584 + 4 * 16 * 9
        assert count(LearnedDownsampler(24, 1)) == 16_768  # the text's 25 channels
        text = SubpixelNet(1, 1, latent="concatenated", ld_input="latent_and_logits", embedding="paper")
        assert text.head.in_channels == 24  # g(x)
        assert text.downsampler.layers[0].in_channels == 4 * 25
        assert count(text.downsampler) == 16_768
        assert SubpixelNet(1, 1, latent="concatenated", spg="none").head.in_channels == 16
        assert count(SubpixelNet(1, 1, spg="extra_resblocks", downsampler="learned")) > count(SubpixelNet(1, 1))


@pytest.mark.parametrize(
    ("spg", "downsampler", "expected"),
    [("none", "bilinear", 161_664), ("none", "learned", 168_640), ("learned", "bilinear", 170_600), ("learned", "learned", 177_576)],
)
def test_parameter_counts_of_the_small_variants(spg, downsampler, expected):
    assert count(net(spg=spg, downsampler=downsampler)) == expected


# shapes


def test_full_size_shapes():
    with torch.no_grad():
        full = SubpixelNet(1, 1).eval()
        image = torch.randn(2, 1, 197, 233, 5)
        slices = image.permute(0, 1, 4, 2, 3).flatten(1, 2)
        assert full(image).shape == (2, 1, 197, 233)
        assert full.head(full.latent(slices)).shape == (2, 1, 394, 466)
        assert [f.shape[2:] for f in full.encoder(slices)] == [(99, 117), (50, 59), (25, 30), (13, 15), (7, 8)]


@pytest.mark.parametrize("spg", ["learned", "bilinear_input", "nearest_input", "extra_resblocks", "none"])
@pytest.mark.parametrize("downsampler", ["learned", "bilinear", "none"])
def test_every_variant_at_odd_sizes(spg, downsampler):
    scale = 2 if downsampler == "none" else 1
    with torch.no_grad():
        assert net(spg=spg, downsampler=downsampler)(torch.randn(1, 1, 37, 41, 5)).shape == (1, 1, 37 * scale, 41 * scale)


def test_more_channels_classes_and_other_slabs():
    network = SubpixelNet(
        2,
        3,
        slab=3,
        guidance_resolutions=[2],
        ld_input="latent_and_logits",
        embedding="paper",
        combine="probs",
        latent="concatenated",
        **SMALL,
    )
    assert network(torch.randn(2, 2, 40, 36, 3)).shape == (2, 3, 40, 36)
    assert set(network.guidance.skips) == {"2"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spg": "lerned"}, "spg"),
        ({"downsampler": "max"}, "downsampler"),
        ({"latent": "concat"}, "latent"),
        ({"slab": 4}, "odd"),
        ({"decoder_widths": [8, 8]}, "one number more"),
        ({"guidance_resolutions": [4]}, "guidance_resolutions"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(SuiteError, match=message):
        SubpixelNet(1, 1, **{**SMALL, **options})


def test_another_slab_than_the_networks_is_refused():
    with pytest.raises(SuiteError, match="data view"):
        net()(torch.zeros(1, 1, 40, 40, 3))


# the learned downsampler


def test_downsampling_is_a_convex_combination():
    torch.manual_seed(0)
    logits, latent = torch.randn(2, 3, 10, 14), torch.randn(2, 8, 10, 14)
    weights = LearnedDownsampler(8)(latent, logits)
    assert torch.allclose(weights.sum(dim=1), torch.ones(2, 5, 7), atol=1e-6)
    result = combined(logits, weights)
    four = pixel_unshuffle(logits, 2).unflatten(1, (3, 4))
    assert ((result <= four.amax(2) + 1e-6) & (result >= four.amin(2) - 1e-6)).all()
    by_hand = sum(weights[:, k] * logits[:, :, k // 2 :: 2, k % 2 :: 2].transpose(0, 1) for k in range(4)).transpose(0, 1)
    assert torch.allclose(result, by_hand, atol=1e-6)


def test_constant_logits_stay_whatever_the_weights():
    weights = LearnedDownsampler(4)(torch.randn(1, 4, 6, 6), torch.zeros(1, 1, 6, 6))
    for what in ("logits", "probs"):
        assert torch.allclose(combined(torch.full((1, 1, 6, 6), 1.7), weights, what), torch.tensor(1.7), atol=1e-5)


def test_downsampler_that_knows_nothing_is_average_pooling():
    learned, bilinear = net(), net(downsampler="bilinear")
    torch.nn.init.zeros_(learned.downsampler.layers[-1].weight)
    bilinear.load_state_dict(learned.state_dict(), strict=False)
    image = torch.randn(1, 1, 34, 38, 5)
    with torch.no_grad():
        subpixels = learned.head(learned.latent(image.permute(0, 1, 4, 2, 3).flatten(1, 2)))
        assert torch.allclose(learned(image), avg_pool2d(subpixels, 2), atol=1e-6)
        assert torch.allclose(bilinear(image), interpolate(subpixels, scale_factor=0.5, mode="bilinear"), atol=1e-6)


def test_mean_of_probabilities():
    logits = torch.tensor([[[[2.0, -1.0], [0.5, 0.0]]]])
    weights = torch.tensor([0.4, 0.3, 0.2, 0.1]).reshape(1, 4, 1, 1)
    expected = (weights.flatten() * logits.flatten().sigmoid()).sum()
    assert combined(logits, weights, "probs").sigmoid().item() == pytest.approx(expected.item())
    assert combined(logits, weights).item() == pytest.approx(0.4 * 2 - 0.3 + 0.1)


def test_space_to_depth_and_back_is_exact():
    t = torch.randn(2, 8, 5, 7)
    assert torch.equal(pixel_unshuffle(pixel_shuffle(t, 2), 2), t)


# guidance


def test_embedding_is_local():
    """One input pixel reaches 8 input pixels: 2 (5x5) + 4 (two residual blocks) + 1 (3x3) + at most 1 (3x3 on the 2x grid)."""
    torch.manual_seed(0)
    embedding = SubpixelEmbedding(5, 8).eval()
    image = torch.randn(1, 5, 41, 41)
    changed = image.clone()
    changed[0, 2, 20, 20] += 5
    with torch.no_grad():
        moved = (embedding(changed) - embedding(image)).abs().amax(dim=(0, 1))
    reached = avg_pool2d(moved[None], 2)[0] > 0
    rows, columns = reached.nonzero().unbind(1)
    assert int(rows.min()) == 20 - 8
    assert int(rows.max()) == 20 + 8
    assert int(columns.min()) == 20 - 8
    assert int(columns.max()) == 20 + 8


def test_embedding_adds_its_features_to_those_of_the_first_convolution():
    torch.manual_seed(0)
    embedding = SubpixelEmbedding(5, 8).eval()
    for parameter in embedding.features[-1][1].parameters():  # the last normalization gives nothing
        torch.nn.init.zeros_(parameter)
    image = torch.randn(1, 5, 9, 7)
    assert torch.equal(embedding(image), embedding.last(embedding.to_space(embedding.first(image))))
    assert embedding(image).std() > 1e-3


def test_guidance_at_1x_tells_the_subpixels_of_a_pixel_apart():
    torch.manual_seed(0)
    guidance = SubpixelGuidance(torch.nn.Identity(), channels=2, width=3, resolutions=(1, 2)).eval()
    embedded = torch.randn(1, 2, 8, 6)
    swapped = embedded.unflatten(3, (3, 2)).flip(4).flatten(3)  # columns within a pixel; its mean stays
    (one, other) = (guidance(e) for e in (embedded, swapped))
    assert (one[1].shape, one[2].shape) == ((1, 3, 4, 3), (1, 3, 8, 6))
    assert (one[1] - other[1]).abs().min() > 1e-6


def test_downsampler_sees_logits_only_where_it_should():
    torch.manual_seed(0)
    latent, logits = torch.randn(1, 8, 6, 6), torch.randn(1, 1, 6, 6)
    for seen in (0, 1):
        downsampler = LearnedDownsampler(8, seen)
        assert torch.equal(downsampler(latent, logits), downsampler(latent, -logits)) == (not seen)
    assert [net(ld_input=i).downsampler.sees_logits for i in ("latent", "latent_and_logits")] == [False, True]


def test_gradients_reach_guidance_and_downsampler():
    model = method()
    batch = {"image": torch.randn(2, 1, 40, 40, 5), "label": (torch.rand(2, 1, 40, 40) < 0.1).char()}
    model.compute_loss(batch).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.network.guidance.embedding.first.parameters())
    assert model.network.downsampler.layers[0].weight.grad.abs().sum() > 0
    assert all(p.grad is not None for p in model.parameters())
    bare = method(spg="none", downsampler="bilinear").network
    assert bare.guidance is None
    assert bare.downsampler is None


def test_every_slice_of_the_slab_counts():
    image = torch.randn(1, 1, 36, 36, 5, requires_grad=True)
    net()(image).sum().backward()
    assert (image.grad.abs().sum(dim=(0, 1, 2, 3)) > 0).all()


# the method


def test_loss_by_hand():
    model = method().eval()
    batch = {"image": torch.randn(1, 1, 40, 36, 5), "label": (torch.rand(1, 1, 40, 36) < 0.2).char()}
    logits, y = model(batch["image"]), batch["label"].float()
    expected = -(1.5 * y * logits.sigmoid().log() + (1 - y) * (1 - logits.sigmoid()).log()).mean()
    assert model.compute_loss(batch).item() == pytest.approx(expected.item(), rel=1e-4)


def test_ablation_loss_is_the_pooled_soft_dice_with_smoothing_one():
    logits, y = torch.randn(2, 1, 6, 6), (torch.rand(2, 1, 6, 6) < 0.3).float()
    p = logits.sigmoid()
    assert RegionDice(batch=True, smooth=1)(logits, y).item() == pytest.approx(
        1 - ((2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)).item()
    )


def test_weighted_cross_entropy_is_torchs():
    logits, y = torch.randn(2, 1, 5, 5), (torch.rand(2, 1, 5, 5) < 0.5).float()
    expected = binary_cross_entropy_with_logits(logits, y, pos_weight=torch.tensor(1.5))
    assert RegionBCE(positive_weight=1.5)(logits, y).item() == pytest.approx(expected.item())


def test_without_downsampler_training_is_on_the_fine_grid_and_prediction_on_the_image_grid():
    model = method(downsampler="none").eval()
    image, label = torch.randn(1, 1, 40, 36, 5), torch.zeros(1, 1, 40, 36, dtype=torch.int8)
    label[..., 10:13, 20:22] = 1
    fine = label.float().repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    expected = RegionBCE(1.5)(model(image), fine)
    assert model.compute_loss({"image": image, "label": label}).item() == pytest.approx(expected.item())
    with torch.no_grad():
        maps = model.predict_maps(image)["probabilities"]
        assert torch.allclose(maps, avg_pool2d(model(image).sigmoid(), 2))
        assert model.predict_case({"image": torch.randn(1, 1, 40, 36, 3)}).labels.shape == (40, 36, 3)


# what its training adds to the suite


def test_learning_rate_in_steps():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    schedule = steps(optimizer, 16, [[0.25, 1 / 3], [0.875, 1 / 6]])
    rates = []
    for _ in range(16):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([3e-4] * 4 + [1e-4] * 10 + [5e-5] * 2)


def test_gate_opens_less_often_late_in_training():
    calls = []
    gate = Gate(lambda subject: calls.append(subject["epoch"]) or subject, before=1.0, after=0.5, epoch=3)
    torch.manual_seed(0)
    for epoch in range(6):
        for _ in range(100):
            gate({"epoch": epoch})
    assert [calls.count(e) for e in range(3)] == [100] * 3
    assert all(30 < calls.count(e) < 70 for e in range(3, 6))
    assert Gate(None)({"epoch": 0}) == {"epoch": 0}


def test_kill_and_resume_is_bit_identical(tmp_path):
    common = [
        "experiment=spin/simulated_stroke", f"data.root={tmp_path / 'data'}", "data.spacing=6", "data.count=4", "data.split.test=1", "data.split.val=1",
        "patch=[36,36]", "data.batch_size=2", "data.samples_per_epoch=4", "epochs=2", "augmentation=slices_gated", "augmentation.epoch=1",
        "model.network.widths=[4,4,4,4,4]", "model.network.decoder_widths=[4,4,4,4,4,4]", "trainer.check_val_every_n_epoch=1", "threads=1",
    ]  # fmt: skip
    run(*common, f"runs={tmp_path / 'whole'}")
    killed = [*common, f"runs={tmp_path / 'killed'}", "callbacks.checkpoint.every_n_batches=1"]
    assert run_killed(*killed, "callbacks.progress._target_=tests.toys.KillAt", "+callbacks.progress.iteration=3") == -signal.SIGKILL
    run(*killed, "resume=true")
    (whole,), (resumed,) = run_folders(tmp_path / "whole"), run_folders(tmp_path / "killed")
    assert_same(weights(whole), weights(resumed))
    assert rows(whole) == rows(resumed)


def test_augmentation_is_told_the_epoch(tmp_path):
    seen = []
    root = write_fake_folder(tmp_path, 4, channels=["t1"])
    gate = Gate(lambda subject: seen.append(subject["epoch"]) or subject, before=1, after=0, epoch=2)
    data = Folder(root, channels=["t1"], patch=(8, 8, 8), split=Split(test=1, val=1), augmentation=gate, check=False)
    data.prepare_data()
    data.setup("fit")
    samples = data.train_dataloader().dataset
    for epoch in range(4):
        samples[(epoch, 0)]
    assert seen == [0, 1]
