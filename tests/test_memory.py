"""What training takes is counted before anything is allocated, and said where it is much."""

from functools import partial

import pytest
import torch
from hydra.utils import instantiate
from torch import nn

from datamodules.readers.brats_files import brats_task
from lesionbench.jobs import memory
from lightning_modules.inferers import Whole
from lightning_modules.losses import DiceCE
from lightning_modules.memory import training_memory
from lightning_modules.optimizers import Ranger
from lightning_modules.supervised.supervised import Supervised
from tests.harness import run, shared

SHAPE = (2, 4, 6, 5, 4)
VOXELS = 2 * 6 * 5 * 4


def two_convolutions(in_channels: int, out_channels: int) -> nn.Module:
    return nn.Sequential(nn.Conv3d(in_channels, 3, 3, padding=1), nn.ReLU(), nn.Conv3d(3, out_channels, 1))


def method(optimizer, **options):
    return Supervised(brats_task("2021"), network=two_convolutions, loss=DiceCE(), inferer=Whole(), optimizer=optimizer, **options)


@pytest.mark.parametrize(
    ("optimizer", "states"),
    [
        (partial(torch.optim.SGD, lr=1), 0),
        (partial(torch.optim.SGD, lr=1, momentum=0.9), 1),
        (partial(torch.optim.AdamW, lr=1), 2),
        (partial(Ranger, lr=1), 3),  # the slow weights beside the moments
    ],
)
def test_bytes_by_hand(optimizer, states):
    parameters = (4 * 3 * 27 + 3) + (3 * 4 + 4)
    found = training_memory(method(optimizer), SHAPE)
    assert found.weights == 2 * 4 * parameters
    assert found.optimizer == states * 4 * parameters
    assert found.activations == 4 * VOXELS * (4 + 3)  # the image for the first convolution, the ReLU's output for itself and the second
    assert found.total == found.weights + found.optimizer + found.activations


def test_frozen_weights_have_neither_gradient_nor_state():
    whole = method(partial(torch.optim.Adam, lr=1))
    whole.network[0].requires_grad_(False)
    found = training_memory(whole, SHAPE)
    assert found.weights == 4 * (4 * 3 * 27 + 3) + 2 * 4 * (3 * 4 + 4)
    assert found.optimizer == 2 * 4 * (3 * 4 + 4)
    assert found.activations == 4 * VOXELS * 3  # what the second convolution needs for its own gradient


def test_what_is_counted_is_what_autograd_keeps():
    """With real tensors, of a network with normalization, pooling, dropout and concatenation."""
    from lightning_modules.networks import DeepSeg

    network, kept, own = DeepSeg(4, 4, features=4, levels=2), {}, set()
    own = {p.untyped_storage().data_ptr() for p in [*network.parameters(), *network.buffers()]}

    def pack(saved):
        if saved.untyped_storage().data_ptr() not in own:
            kept[saved.untyped_storage().data_ptr()] = saved.untyped_storage()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        out = network(torch.randn(2, 4, 8, 8, 8))
    assert out.requires_grad
    real = sum(storage.nbytes() for storage in kept.values())
    whole = Supervised(
        brats_task("2021"),
        network=partial(DeepSeg, features=4, levels=2),
        loss=DiceCE(),
        inferer=Whole(),
        optimizer=partial(torch.optim.SGD, lr=1),
    )
    assert training_memory(whole, (2, 4, 8, 8, 8)).activations == pytest.approx(real, rel=0.02)


def test_a_large_network_says_what_it_takes_before_anything_is_cached(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("datamodules.base.CaseDataModule.prepare_data", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    options = ["threads=1", f"data.root={tmp_path}", f"runs={tmp_path / 'runs'}"]

    def said(*more: str) -> str:
        with pytest.raises(KeyboardInterrupt):
            run(*options, *more)
        return capsys.readouterr().out

    assert "memory" not in said()
    large = said("patch=[256,256,256]")
    assert "GiB of memory" in large
    assert "for a batch of 2 in 32 bits" in large
    assert "Less of it: patch, data.batch_size (with accumulate), model.network.features, precision=bf16-mixed" in large
    monkeypatch.setattr(memory, "_capacity", lambda device: 2**20)
    assert "cpu has 0.0 GiB, which is too little" in said()


@pytest.mark.parametrize("name", ["paired_unet", "unet_plus_plus", "swin_unetr"])
def test_no_network_keeps_more_for_a_voxel_than_is_reckoned_with(name):
    """The greediest of `benchmarks/networks.py`; what cannot be large is not counted."""
    cfg = shared(f"model/network={name}", "patch=[64,64,64]")
    more = {"channels": ["t1", "t1ce", "t2", "flair"]} if name == "paired_unet" else {}
    network = instantiate(cfg.model.network, _convert_="all")
    with torch.device("meta"):
        whole = Supervised(
            brats_task("2021"), network=partial(network, **more), loss=DiceCE(), inferer=Whole(), optimizer=partial(torch.optim.SGD, lr=1)
        )
    found = training_memory(whole, (1, 4, 64, 64, 64)).activations
    assert found is not None
    assert memory.PER_VOXEL / 8 < found / 64**3 < memory.PER_VOXEL
