"""Fits an encoder of voxel vectors without Lightning: the fit that the search repeats for every quantile."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from lesionbench.errors import SuiteError, unknown
from lesionbench.keyed import numpy_generator, torch_seeded
from lightning_modules.networks.voxel_autoencoders import ENCODERS, UPDATES, turns, voxel_encoder


@dataclass(frozen=True)
class EncoderSettings:
    """What the encoder is and how it is fitted (kind, hidden, latent_dim, update: see `networks.voxel_autoencoders`).

    The paper states neither learning rate, batch size nor epochs.

    Raises:
        SuiteError: an unknown kind or update, a number below its least.
    """

    kind: str = "fae"
    hidden: int = 10
    latent_dim: int | None = None
    update: str = "alternate_batch"
    epochs: int = 10
    batch_size: int = 1024
    lr: float = 3e-3

    def __post_init__(self) -> None:
        for name, known in (("kind", ENCODERS), ("update", UPDATES)):
            if getattr(self, name) not in known:
                raise unknown(f"habitats.encoder.{name}", getattr(self, name), known)
        if self.epochs < 0 or self.batch_size < 1 or self.hidden < 1 or self.lr <= 0:
            raise SuiteError(
                f"habitats.encoder: epochs={self.epochs} must not be negative, batch_size={self.batch_size}, hidden={self.hidden} and "
                f"lr={self.lr} be positive"
            )


def build_encoder(settings: EncoderSettings, modalities: int, *seed: object) -> nn.Module:
    """The network with its initial weights, which belong to `seed`."""
    with torch_seeded("encoder", *seed):
        return voxel_encoder(settings.kind, modalities, settings.hidden, settings.latent_dim)


def fit_encoder(voxels: np.ndarray, settings: EncoderSettings, *seed: object, start: Mapping[str, torch.Tensor] | None = None) -> nn.Module:
    """Trains an encoder on scaled voxels (N, M) and returns it, frozen.

    Args:
        start: weights to start from instead of the initial ones that belong to `seed`.
    """
    network = build_encoder(settings, voxels.shape[1], *seed)
    if start is not None:
        network.load_state_dict(start)
    data = torch.from_numpy(np.ascontiguousarray(voxels, dtype=np.float32))
    names = {name for epoch in range(settings.epochs) for name in turns(network, settings.update, epoch)}
    optimizers = {name: torch.optim.Adam(network.trained_by(name), lr=settings.lr) for name in sorted(names)}
    for epoch in range(settings.epochs if optimizers else 0):
        order = torch.from_numpy(numpy_generator("batches", *seed, epoch).permutation(len(data)))
        for batch in order.split(settings.batch_size):
            for name in turns(network, settings.update, epoch):
                loss = network.loss(name, data[batch])
                wanted = network.trained_by(name)
                for parameter, gradient in zip(wanted, torch.autograd.grad(loss, wanted), strict=True):
                    parameter.grad = gradient
                optimizers[name].step()
    return network.requires_grad_(False).eval()


def encode(network: Any, voxels: np.ndarray, chunk: int = 1 << 18) -> np.ndarray:
    """Latent features (N, L) of scaled voxels (N, M), so many at a time."""
    with torch.no_grad():
        parts = [network.encode(torch.from_numpy(voxels[i : i + chunk])).numpy() for i in range(0, len(voxels), chunk)]
    return np.concatenate(parts)
