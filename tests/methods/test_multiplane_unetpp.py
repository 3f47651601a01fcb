"""Xception and UNet++ by their numbers, the boundary loss on masks drawn by hand, its rising share, slices of three planes and their vote."""

import csv
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lesionbench.errors import SuiteError
from lesionbench.target import RegionSigmoid
from lesionbench.task import Task
from lesionbench.views import from_slices, to_slices
from lightning_modules import MultiplaneUNetPP
from lightning_modules.distances import DistanceMaps, signed_distance
from lightning_modules.inferers import SliceWise
from lightning_modules.losses import RegionDice, SoftDice, boundary_loss
from lightning_modules.networks import XceptionUNetPlusPlus
from lightning_modules.networks.xception_unet_plus_plus import Node
from lightning_modules.raters.fusion import LabelVote
from tests.harness import run, run_folders

TASK = Task(("a", "b"), {"background": 0, "ncr": 1, "ed": 2, "et": 4}, {"WT": ("ncr", "ed", "et"), "TC": ("ncr", "et"), "ET": ("et",)})
NARROW = {"widths": [8, 8, 8, 8, 16, 16, 16, 16], "decoder": [8] * 5, "middle": 1}


# network


def test_parameters_and_widths_are_those_of_xception_and_its_decoder():
    with torch.device("meta"):
        network = XceptionUNetPlusPlus(4, 4)
        features = network.encoder(torch.randn(1, 4, 256, 256))
    assert sum(p.numel() for p in network.parameters()) == 34_007_628
    assert sum(p.numel() for p in network.encoder.parameters()) == 20_806_952 + 288  # without its head; a fourth channel
    assert [(f.shape[1], 256 // f.shape[2]) for f in features] == [(64, 2), (128, 4), (256, 8), (728, 16), (2048, 32)]
    nodes = {name: [m.out_channels for m in node.modules() if isinstance(m, torch.nn.Conv2d)] for name, node in network.nodes.items()}
    assert nodes == {
        "3_1": [256, 256], "2_1": [256, 256], "2_2": [128, 128], "1_1": [128, 128], "1_2": [128, 128], "1_3": [64, 64],
        "0_1": [64, 64], "0_2": [64, 64], "0_3": [64, 64], "0_4": [32, 32],
    }  # fmt: skip


def test_a_node_repeats_what_is_below_and_joins_it_first():
    node = Node(1, 1, 4)
    node.body = torch.nn.Identity()
    below, same = torch.arange(4.0).reshape(1, 1, 2, 2), torch.randn(1, 1, 4, 4)
    assert torch.equal(node(below, [same]), torch.cat([below.repeat_interleave(2, 2).repeat_interleave(2, 3), same], dim=1))


def test_every_weight_is_trained_and_slices_keep_their_size():
    torch.manual_seed(0)
    network = XceptionUNetPlusPlus(2, 3, **NARROW)
    logits = network(torch.randn(2, 2, 64, 96))
    assert logits.shape == (2, 3, 64, 96)
    (logits * torch.randn_like(logits)).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters() if p.dim() > 1)
    resized = XceptionUNetPlusPlus(2, 3, **NARROW, size=[64, 64])
    assert resized(torch.randn(2, 2, 50, 37)).shape == (2, 3, 50, 37)
    assert (network.divisor, resized.divisor) == ((32, 32), (1, 1))
    with pytest.raises(SuiteError, match="divisible by 32"):
        XceptionUNetPlusPlus(2, 3, size=[60, 64])
    with pytest.raises(SuiteError, match="8 widths"):
        XceptionUNetPlusPlus(2, 3, widths=[8, 8])


# slices


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slices_put_together_are_the_volume(axis):
    volume = torch.randint(0, 4, (1, 1, 5, 6, 7))
    assert torch.equal(from_slices(to_slices(volume, axis), axis, 1), volume)
    found = SliceWise(divisor=32, batch=2)(volume.float(), lambda view: {"same": view}, axis)["same"]
    assert torch.equal(found, volume.float())


def test_a_large_block_survives_being_resized_and_back():
    label = torch.zeros(240, 155)
    label[60:180, 40:110] = 1
    there = torch.nn.functional.interpolate(label[None, None], (256, 256), mode="bilinear")
    back = torch.nn.functional.interpolate(there, (240, 155), mode="bilinear")[0, 0]
    assert torch.equal(back > 0.5, label > 0.5)


# losses


def square(shift=0):
    mask = np.zeros((9, 9), bool)
    mask[2 + shift : 7 + shift, 2:7] = True
    return mask


def cost(prediction):
    phi = torch.from_numpy(signed_distance(square(), (1.0, 1.0)))
    return boundary_loss(torch.from_numpy(prediction).float()[None, None], phi[None, None], torch.ones(1, 1, 9, 9)).item()


def test_boundary_loss_on_masks_by_hand():
    corner, edge = square(), square()
    corner[0, 0] = edge[1, 4] = True
    assert cost(square()) == pytest.approx(-0.12346, abs=1e-5)
    assert cost(corner) == pytest.approx(-0.08854, abs=1e-5)
    assert cost(square(1)) == pytest.approx(-0.06173, abs=1e-5)
    assert cost(square()) < cost(edge) < cost(corner)  # further away costs more
    assert cost(square()) == min(cost(square(shift)) for shift in (-2, -1, 0, 1, 2))


def test_boundary_loss_is_linear_and_leaves_ignored_voxels_out():
    phi = torch.from_numpy(signed_distance(square(), (1.0, 1.0)))[None, None]
    p = torch.rand(1, 1, 9, 9, requires_grad=True)
    boundary_loss(p, phi, torch.ones(1, 1, 9, 9)).backward()
    assert torch.equal(p.grad, phi / 81)
    valid = torch.zeros(1, 1, 9, 9)
    valid[..., :3] = 1
    torch.testing.assert_close(boundary_loss(p, phi, valid), (p * phi)[..., :3].mean())


def method(**options):
    model = MultiplaneUNetPP(TASK, network=lambda in_channels, out_channels: XceptionUNetPlusPlus(in_channels, out_channels, **NARROW), loss=SoftDice(True, True), inferer=SliceWise(), **options)  # fmt: skip
    model._trainer = SimpleNamespace(num_training_batches=7)
    model.logged = {}
    model.log_terms = lambda **terms: model.logged.update(terms)
    return model


def batch():
    torch.manual_seed(0)
    label = torch.zeros(2, 1, 64, 64, dtype=torch.int8)
    label[:, :, 20:40, 20:44], label[:, :, 25:35, 25:35] = 2, 4 - 1
    phi = np.stack([[signed_distance((case[0] == c).numpy(), (1.0, 1.0)) for c in (1, 2, 3)] for case in label])
    return {"image": torch.randn(2, 2, 64, 64), "label": label, "distance": torch.from_numpy(phi).half(), "case": ["x", "y"]}


def test_the_share_of_the_boundary_loss_rises_by_epoch_and_stays_at_a_half():
    model, shares = method(), []
    for epoch in range(60):
        for inside in (0, 6):
            model.iteration = epoch * 7 + inside
            shares.append(model.share())
    assert shares[0] == shares[1] == 0.01
    assert shares[2] == 0.02
    assert shares[2 * 49] == pytest.approx(0.5)
    assert shares[2 * 48] == pytest.approx(0.49)
    assert shares[-1] == 0.5
    assert method(alpha_max=0).share() == 0
    assert method(alpha=0.2, alpha_step=0).share() == 0.2


def test_the_loss_is_dice_and_boundary_by_their_shares():
    model, data = method(alpha=0.3), batch()
    loss = model.training_step(data, 0)
    terms = model.logged
    torch.testing.assert_close(loss, 0.7 * terms["dice"] + 0.3 * terms["boundary"])
    torch.manual_seed(0)
    p = model(data["image"]).softmax(1)[:, 1:]
    torch.testing.assert_close(terms["boundary"], (p * data["distance"].float()).mean(), atol=1e-4, rtol=1e-4)
    loss.backward()
    assert all(p.grad is not None for p in model.network.parameters())
    with pytest.raises(SuiteError, match=r"has 3 channel|needs 3"):
        model.training_step({**data, "distance": data["distance"][:, :2]}, 0)
    with pytest.raises(SuiteError, match="softmax"):
        MultiplaneUNetPP(TASK, network=lambda in_channels, out_channels: XceptionUNetPlusPlus(in_channels, out_channels, **NARROW), loss=RegionDice(), inferer=SliceWise(), target=RegionSigmoid)  # fmt: skip


def test_ignored_pixels_change_nothing():
    model, data = method(alpha=0.3), batch()
    data["label"][:, :, :16] = -1
    found = []
    for distance in (0.0, 100.0):
        data["distance"][:, :, :16] = distance
        model.training_step(data, 0)
        found.append(model.logged["boundary"].item())
    assert found[0] == found[1]


def test_an_absent_class_has_no_boundary():
    label = np.zeros((6, 6, 3), np.int8)
    label[1:4, 1:4, 1] = 2
    maps = DistanceMaps(of="classes", signed=True, in_plane=True, unit="vox")(label, TASK, (1.0, 1.0, 1.0))
    assert maps.shape[0] == 3
    assert not maps[0].any()
    assert not maps[1][..., [0, 2]].any()
    assert maps[1][0, 0, 1] == pytest.approx(2**0.5, abs=1e-3)


# vote


def voted(*said, tie="mean", probabilities=None, weights=None):
    """Labels of one voxel, as class indices; each member is sure of its label unless probabilities of (ncr, ed, et) are given."""
    fusion = LabelVote(TASK, tie)
    for place, label in enumerate(said):
        p = [float(label == c) for c in (1, 2, 3)] if probabilities is None else probabilities[place]
        regions = torch.tensor([sum(p), p[0] + p[2], p[2]]).view(3, 1, 1, 1)
        fusion.add(regions, torch.full((1, 1, 1), label, dtype=torch.int8), 1.0 if weights is None else weights[place])
    return int(RegionSigmoid(TASK).labels(fusion.result().regions[None])[0])


def test_the_vote_by_hand():
    assert voted(1, 1, 2) == 1
    assert voted(0, 2, 2) == 2
    assert voted(3, 0, 0) == 0
    assert [voted(c, c, c) for c in range(4)] == [0, 1, 2, 3]
    different = [[0.5, 0.2, 0.1], [0.1, 0.4, 0.3], [0.1, 0.3, 0.6]]  # means: background .13, ncr .23, ed .30, et .33
    assert voted(1, 2, 3, probabilities=different) == 3
    assert voted(1, 2, 3, tie="first") == 1
    assert voted(1, 2, 3, tie="background") == 0
    assert voted(2, 3, weights=[1.0, 2.0], tie="background") == 3
    assert voted(2, 3, tie="background") == 0
    assert voted(2, 3, 2, 3, tie="first") == 2
    assert voted(0, 1, 2, probabilities=[[0.0, 0.0, 0.0], [0.4, 0.0, 0.0], [0.0, 0.4, 0.0]]) == 0
    with pytest.raises(SuiteError, match="tie"):
        LabelVote(TASK, "last")


def test_three_identical_maps_vote_for_themselves_and_where_planes_differ_it_shows():
    labels = torch.randint(0, 4, (4, 5, 6))
    fusion = LabelVote(TASK)
    for _ in range(3):
        fusion.add(TASK.region_masks(labels).float(), labels)
    found = fusion.result()
    assert torch.equal(RegionSigmoid(TASK).labels(found.regions[None])[0].long(), labels)
    assert found.disagreement.max() < 1e-3


def test_a_collapsed_plane_is_outvoted_and_two_are_not():
    truth = torch.zeros(8, 8, 8, dtype=torch.long)
    truth[2:6, 2:6, 2:6] = 2
    everything = torch.full_like(truth, 1)  # as a network whose one class has swallowed the background
    for planes, survives in (([truth, truth, everything], True), ([truth, everything, everything], False)):
        fusion = LabelVote(TASK)
        for labels in planes:
            fusion.add(TASK.region_masks(labels).float(), labels)
        assert torch.equal(RegionSigmoid(TASK).labels(fusion.result().regions[None])[0].long(), truth) == survives


def test_all_stages_run_and_every_plane_has_its_axis(tmp_path):
    options = (
        "experiment=multiplane_unetpp/simulated", f"data.root={tmp_path / 'data'}", "data.spacing=6.0", "data.count=5", f"runs={tmp_path / 'runs'}", "epochs=1", "trainer.check_val_every_n_epoch=1",
        "model.network.widths=[8,8,8,8,16,16,16,16]", "model.network.decoder=[8,8,8,8,8]", "model.network.middle=1", "data.samples_per_epoch=4", "data.batch_size=2",
        "data.split.test=1", "data.split.val=1",
    )  # fmt: skip
    run(*options)
    (folder,) = run_folders(tmp_path / "runs")
    with (folder / "test" / "cases.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["member"] for row in rows} == {"", "m1", "m2", "m3"}
    axes = {}
    for stage in ("", "coronal", "sagittal"):
        found = torch.load(folder / stage / "checkpoints" / "last.ckpt", weights_only=True)["lesionbench"]
        axes[stage] = found["task"]["slice_axis"]
    assert axes == {"": 2, "coronal": 1, "sagittal": 0}
    planes = ",".join(str(folder / stage / "checkpoints" / "last.ckpt") for stage in axes)
    out = tmp_path / "masks"
    run("job=predict", *options, f"ckpt=[{planes}]", "ensemble.fusion=label_vote", f"out={out}")
    assert len(list((out / "predictions").glob("*.nii.gz"))) == 5
