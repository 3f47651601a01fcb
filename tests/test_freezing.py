"""Parts of networks that are frozen: what they are, that nothing of them moves, and what is refused."""

from functools import partial

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from lesionbench.errors import SuiteError
from lesionbench.jobs.run_folder import config_hash
from lesionbench.task import Task
from lightning_modules import CoLearning, MeanTeacher, Supervised, networks
from lightning_modules.freezing import freeze, frozen_paths
from lightning_modules.inferers import SliceWise
from lightning_modules.losses import SoftDice
from lightning_modules.networks.contract import parts_of
from lightning_modules.supervised.umm import Branches
from tests.fake_data import write_fake_folder
from tests.harness import SMALL, assert_same, composed, run, run_folders, run_killed, weights
from tests.test_networks import TINY, tiny

TASK = Task(("image",), {"background": 0, "blob": 1}, {"BLOB": ("blob",)}, unit="vox")
COMMON = {"encoder", "bottleneck", "decoder", "heads"}


def flat(**options):
    """A small 2D network with batch normalization and dropout."""
    return partial(networks.MultiHeadUNet, features=(4, 6, 8), dropout=0.5, **options)


def branches() -> Branches:
    slab = partial(networks.SlabChannels, network=flat(), slab=3)
    return Branches(2, 3, factories={"s": flat(), "p": slab}, axis=2, seed=0)


def every_network() -> dict:
    """Name -> a call that makes the network."""
    made = {f"{name}-{d}d": partial(tiny, name, d) for name in TINY for d in (2, 3)}
    made |= {
        "dynunet-own-deep": partial(tiny, "dynunet", own_decoders=True),
        "unet-plain": partial(tiny, "unet", residual_units=0),
        "unet_plus_plus-one-head": partial(tiny, "unet_plus_plus", deep_supervision=False),
        "resnet": partial(networks.MultiHeadResNet, 2, 3, width=4, head_width=4, heads=2),
        "swin_unet": partial(networks.swin_unet, 2, 3, features=12, heads=(1, 1, 2, 2)),
        "transbts": partial(networks.transbts, 2, 3, image_size=16, features=8, hidden_size=16, mlp_size=16, layers=1, heads=2),
        "pack": partial(networks.PackUNet, 2, 3, features=(4, 4, 8, 8)),
        "pack_attention": partial(networks.pack_attention_unet, 2, 3, channels=(4, 6, 8)),
        "slab": partial(networks.SlabChannels, 2, 3, network=flat(), slab=3),
        "noisy": partial(networks.NoisyInput, 2, 3, network=flat(), sigma=0.1),
        "subpixel": partial(networks.SubpixelNet, 2, 3, widths=(4, 4), decoder_widths=(4, 4, 4)),
        "subpixel-plain": partial(networks.SubpixelNet, 2, 3, widths=(4, 4), decoder_widths=(4, 4, 4), spg="none", downsampler="bilinear"),
        "autoencoder": partial(networks.SpatialAutoencoder, 1, 1, variational=True),
        "branches": branches,
    }
    for fusion in ("paired", "early"):
        made[f"paired-{fusion}"] = partial(
            networks.PairedUNet,
            2,
            3,
            channels=("t1", "flair"),
            pairs=(("flair",), ("t1",)),
            widths=(4, 4, 4, 8),
            fusion=fusion,
            deep_supervision=True,
        )
    return made


EVERY = every_network()


@pytest.mark.parametrize("name", EVERY)
def test_every_parameter_is_in_one_part(name):
    network = EVERY[name]()
    parts = dict(parts_of(network))
    if name == "branches":
        assert {"s", "p"} < set(parts)
        del parts["s"], parts["p"]  # each of them is a branch as a whole
    expected = {"autoencoder": {"encoder", "decoder"}}.get(name, COMMON)
    assert expected <= set(parts) | ({"bottleneck"} if "unetr" in name or "subpixel" in name else set())
    found = {
        part: {n for n, _ in network.named_parameters() if any(n == p or n.startswith(f"{p}.") for p in paths)}
        for part, paths in parts.items()
    }
    names = [n for own in found.values() for n in own]
    assert all(found.values()), {part: paths for part, paths in parts.items() if not found[part]}
    assert sorted(names) == sorted(n for n, _ in network.named_parameters())
    for part in parts:
        frozen_paths(network, [part])
        freeze({"it": EVERY[name]()}, [part])  # each path is there


def test_the_encoder_does_not_see_what_the_decoder_makes():
    """Of every network with an encoder: its output does not depend on decoder and heads, whatever they are called inside."""
    for name in ("unet-2d", "attention_unet-2d", "unet_plus_plus-2d", "dynunet-2d", "vnet-2d"):
        network = EVERY[name]().eval()
        order = []
        for part, paths in parts_of(network).items():
            for path in paths:
                module = network.get_submodule(path)
                for called in module if isinstance(module, nn.ModuleList) else [module]:
                    called.register_forward_hook(lambda *_, part=part, order=order: order.append(part))
        with torch.no_grad():
            network(torch.randn(1, 2, *(64,) * 2))
        first_up = min(order.index(part) for part in ("decoder", "heads") if part in order)
        if name != "unet_plus_plus-2d":  # its dense paths grow while the encoder goes down
            assert "encoder" not in order[first_up:], name
        assert order.index("bottleneck") >= order.index("encoder"), name


def test_a_network_of_ones_own_has_its_children_for_parts():
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1))
    assert parts_of(network) == {"0": ("0",), "2": ("2",)}
    freeze({"it": network}, ["0"])
    assert [p.requires_grad for p in network.parameters()] == [False, False, True, True]


def test_refuses_unknown_parts_and_nothing_left():
    network = flat()(1, 2)
    with pytest.raises(SuiteError, match=r"(?s)encodr.*encoder.*bottleneck.*decoder.*heads"):
        freeze({"it": network}, ["encodr"])
    with pytest.raises(SuiteError, match="leaves nothing to train of student1"):
        freeze({"student1": network}, ["encoder", "bottleneck", "decoder", "heads"])
    with pytest.raises(SuiteError, match="trains no network"):
        freeze({}, ["encoder"])


def made(kind=Supervised, **options):
    torch.manual_seed(0)
    defaults = {
        "network": flat(),
        "loss": SoftDice(),
        "inferer": SliceWise(),
        "optimizer": partial(torch.optim.AdamW, lr=0.1, weight_decay=0.1),
    }
    return kind(TASK, **{**defaults, **options})


@pytest.mark.parametrize(("kind", "count"), [(Supervised, 1), (MeanTeacher, 1), (CoLearning, 2)])
def test_frozen_parts_of_every_student_get_no_gradient_and_keep_their_statistics(kind, count):
    method = made(kind, freeze=["encoder"])
    method.setup("fit")
    method.eval()
    method.train()
    students = list(method.trained_networks().values())
    assert len(students) == count
    owned = {id(p) for group in method.configure_optimizers() for g in group.param_groups for p in g["params"]}
    for network in students:
        inside = {n for n, _ in network.named_parameters() if n.startswith(("encoder.0", "encoder.1"))}
        assert {n for n, p in network.named_parameters() if not p.requires_grad} == inside
        assert {n for n, p in network.named_parameters() if id(p) not in owned} == inside
        before = {n: b.clone() for n, b in network.named_buffers()}
        network(torch.randn(2, 1, 16, 16)).square().sum().backward()
        assert {n for n, p in network.named_parameters() if p.grad is None} == inside
        moved = {n for n, b in network.named_buffers() if not torch.equal(b, before[n])}
        assert moved
        assert not [n for n in moved if n.startswith(("encoder.0", "encoder.1"))]
    for module in method.children():
        if hasattr(module, "network") and module is not method.network:  # a teacher
            assert not any(m.training for m in module.network.encoder[0].modules())
            assert module.network.encoder[2].training


def test_test_and_prediction_do_not_care():
    method = made(freeze=["encoder"])
    method.setup("test")
    assert all(p.requires_grad for p in method.parameters())


FROZEN = [
    *(option for option in SMALL if "patch=" not in option and "model.network" not in option), "patch=[32,32,32]", "model/network=basic_unet",
    "model.network.features=[2,2,2,4,4,2]", "data.samples_per_epoch=4", "model.freeze=[encoder,bottleneck]",
]  # fmt: skip


def test_a_run_moves_only_what_is_not_frozen_and_resumes_bit_exactly(tmp_path):
    small = [*FROZEN, f"data.root={write_fake_folder(tmp_path / 'data', 8, shape=(20, 18, 16))}"]
    run(*small, f"runs={tmp_path / 'whole'}")
    killed = [*small, f"runs={tmp_path / 'killed'}", "callbacks.checkpoint.every_n_batches=1"]
    assert run_killed(*killed, "callbacks.progress._target_=tests.toys.KillAt", "+callbacks.progress.iteration=3") != 0
    run(*killed, "resume=true")
    whole, resumed = (weights(run_folders(tmp_path / name)[0]) for name in ("whole", "killed"))
    assert_same(whole, resumed)
    run(*small, f"runs={tmp_path / 'first'}", "epochs=1")
    first = weights(run_folders(tmp_path / "first")[0])
    same = {name.split(".")[1] for name in whole if torch.equal(whole[name], first[name])}
    assert {"conv_0", "down_1", "down_2", "down_3", "down_4"} <= same
    assert not same & {"upcat_1", "final_conv"}


def test_without_frozen_parts_the_hash_is_that_of_earlier_runs():
    plain = composed("benchmark=simulated")
    OmegaConf.set_struct(plain, False)
    before = config_hash(plain)
    del plain.model["freeze"], plain["init_prefix"]
    assert config_hash(plain) == before
    assert config_hash(composed("benchmark=simulated", "model.freeze=[encoder]")) != before
