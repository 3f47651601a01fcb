"""Auto-encoders of voxel vectors (N, M): the feature-enhanced auto-encoder and what it is compared with (Li et al., BrainLes 2021, Fig. 1B).

All are fully connected with tanh on every layer, output included, so inputs have to lie in [-1, 1]. A network says what it is trained
on: `turns` are the names of its losses in the order in which they take turns, `loss(name, x)` computes one, `trained_by(name)` lists the
parameters that it may change.
"""

import math
from itertools import combinations

import torch
from torch import nn

from lesionbench.errors import SuiteError, unknown


class PairLinear(nn.Module):
    """W linear layers side by side: (N, W, in) -> (N, W, out), initialized like `nn.Linear`."""

    def __init__(self, pairs: int, in_features: int, out_features: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(in_features)
        self.weight = nn.Parameter(torch.empty(pairs, in_features, out_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(pairs, out_features).uniform_(-bound, bound))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.baddbmm(self.bias[:, None], x.transpose(0, 1), self.weight).transpose(0, 1)


def _tanh_layers(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*(m for layer in layers for m in (layer, nn.Tanh())))


class Raw(nn.Module):
    """No auto-encoder: the latent features are the scaled modalities. Nothing to train."""

    turns: tuple[str, ...] = ()

    def __init__(self, modalities: int) -> None:
        super().__init__()
        self.latent_dim = modalities

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Voxels (N, M) -> the same."""
        return x


class AutoEncoder(nn.Module):
    """The standard auto-encoder, M - hidden - latent - hidden - M.

    Args:
        modalities: M.
        hidden: nodes of the hidden layers.
        latent_dim: size of the latent space; None = M.
    """

    turns = ("global",)

    def __init__(self, modalities: int, hidden: int = 10, latent_dim: int | None = None) -> None:
        super().__init__()
        self.latent_dim = modalities if latent_dim is None else latent_dim
        self.encoder = _tanh_layers(nn.Linear(modalities, hidden), nn.Linear(hidden, self.latent_dim))
        self.decoder = _tanh_layers(nn.Linear(self.latent_dim, hidden), nn.Linear(hidden, modalities))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Voxels (N, M) -> latent features (N, latent) in (-1, 1)."""
        return self.encoder(x)

    def loss(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Mean squared error of the reconstruction."""
        return nn.functional.mse_loss(self.decoder(self.encode(x)), x)

    def trained_by(self, name: str) -> list[nn.Parameter]:
        """Everything."""
        return list(self.parameters())


class EnsembleAutoEncoder(nn.Module):
    """One auto-encoder for each of the W = M (M - 1) / 2 pairs of modalities, joined in a bottleneck (the FAE without dual decoder).

    Pair encoders 2 - hidden - 1 give e (N, W); z = tanh(A e + a) are the latent features; d = tanh(B z + b) (N, W) feeds the pair
    decoders 1 - hidden - 2. One loss: the mean squared error over all pairs.
    """

    turns: tuple[str, ...] = ("pair",)

    def __init__(self, modalities: int, hidden: int = 10, latent_dim: int | None = None) -> None:
        super().__init__()
        if modalities < 2:
            raise SuiteError(f"pairs of modalities need two modalities or more, got {modalities} (task.channels)")
        self.latent_dim = modalities if latent_dim is None else latent_dim
        self.register_buffer("pairs", torch.tensor(list(combinations(range(modalities), 2))), persistent=False)
        count = len(self.pairs)
        self.pair_encoders = _tanh_layers(PairLinear(count, 2, hidden), PairLinear(count, hidden, 1))
        self.bottleneck = _tanh_layers(nn.Linear(count, self.latent_dim))
        self.mirror = _tanh_layers(nn.Linear(self.latent_dim, count))
        self.pair_decoders = _tanh_layers(PairLinear(count, 1, hidden), PairLinear(count, hidden, 2))

    def pair_features(self, x: torch.Tensor) -> torch.Tensor:
        """Voxels (N, M) -> e (N, W); e_w depends on the two modalities of pair w alone."""
        return self.pair_encoders(x[:, self.pairs])[..., 0]

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Voxels (N, M) -> latent features (N, latent) in (-1, 1)."""
        return self.bottleneck(self.pair_features(x))

    def loss(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """The pair loss 1/W sum_w MSE(D_w(d_w), x_Gw)."""
        decoded = self.pair_decoders(self.mirror(self.encode(x))[..., None])
        return nn.functional.mse_loss(decoded, x[:, self.pairs])

    def trained_by(self, name: str) -> list[nn.Parameter]:
        """The parameters that the loss `name` changes."""
        return [p for part in (self.pair_encoders, self.bottleneck, self.mirror, self.pair_decoders) for p in part.parameters()]


class FeatureEnhancedAutoEncoder(EnsembleAutoEncoder):
    """The FAE: pair encoders and decoders with a dual decoder W - hidden - M, which reconstructs all modalities from d.

    The losses take turns: `pair` changes everything but the dual decoder, `global` everything but the pair decoders.
    """

    turns = ("pair", "global")

    def __init__(self, modalities: int, hidden: int = 10, latent_dim: int | None = None) -> None:
        super().__init__(modalities, hidden, latent_dim)
        self.dual_decoder = _tanh_layers(nn.Linear(len(self.pairs), hidden), nn.Linear(hidden, modalities))

    def loss(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """`pair`: see above; `global`: MSE(D_s(d), x); `joint`: their sum."""
        if name == "pair":
            return super().loss(name, x)
        whole = nn.functional.mse_loss(self.dual_decoder(self.mirror(self.encode(x))), x)
        return whole if name == "global" else whole + super().loss("pair", x)

    def trained_by(self, name: str) -> list[nn.Parameter]:
        if name == "joint":
            return list(self.parameters())
        left_out = {id(p) for p in (self.dual_decoder if name == "pair" else self.pair_decoders).parameters()}
        return [p for p in self.parameters() if id(p) not in left_out]


ENCODERS = {"none": Raw, "ae": AutoEncoder, "ensemble": EnsembleAutoEncoder, "fae": FeatureEnhancedAutoEncoder}
UPDATES = ("alternate_batch", "alternate_epoch", "joint")


def voxel_encoder(kind: str, modalities: int, hidden: int = 10, latent_dim: int | None = None) -> nn.Module:
    """The encoder of that name: `none` (raw modalities), `ae`, `ensemble`, `fae`.

    Raises:
        SuiteError: an unknown name, pairs of fewer than two modalities, a latent space for `none`.
    """
    if kind not in ENCODERS:
        raise unknown("encoder (habitats.encoder.kind)", kind, ENCODERS)
    if kind != "none":
        return ENCODERS[kind](modalities, hidden, latent_dim)
    if latent_dim not in (None, modalities):
        raise SuiteError(f"latent_dim={latent_dim}: encoder=none clusters the {modalities} modalities themselves; leave it null")
    return Raw(modalities)


def turns(network: nn.Module, update: str, epoch: int) -> tuple[str, ...]:
    """The losses that take their turn on every batch of this epoch.

    `alternate_batch`: each loss in turn on every batch; `alternate_epoch`: one loss per epoch; `joint`: the sum of both.

    Raises:
        SuiteError: an unknown update.
    """
    if update not in UPDATES:
        raise unknown("update (habitats.encoder.update)", update, UPDATES)
    if len(network.turns) < 2 or update == "alternate_batch":
        return network.turns
    return ("joint",) if update == "joint" else (network.turns[epoch % len(network.turns)],)
