"""MONAI's SegResNet, without and with its variational branch."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.nets import (
    SegResNet,
    SegResNetVAE,
)

from lesionbench.errors import SuiteError
from lesionbench.ranges import BelowOne, Count, Dimensions, NotNegative
from lightning_modules.networks.contract import describe, numbered, per_axis


def segresnet(
    in_channels: int,
    out_channels: int,
    *,
    dimensions: Dimensions = 3,
    features: Count = 32,
    blocks_down: Sequence[Count] = (1, 2, 2, 4),
    blocks_up: Sequence[Count] = (1, 1, 1),
    dropout: BelowOne = 0.2,
) -> SegResNet:
    """Asymmetric residual encoder-decoder of the BraTS 2018 winner, without its auto-encoder (Myronenko, BrainLes 2018); group norm.

    Args:
        features: width of the finest level, doubled at each further one; a multiple of 8 (the number of groups).
        blocks_down, blocks_up: residual blocks per encoder level, and per decoder level (one level fewer).
        dropout: channel dropout rate after the first convolution, in [0, 1].

    Shapes: (B, M, *spatial) -> logits (B, K, *spatial), sides divisible by 2 ** (levels - 1).
    """
    network = SegResNet(
        dimensions,
        features,
        in_channels,
        out_channels,
        dropout_prob=dropout,
        blocks_down=tuple(blocks_down),
        blocks_up=tuple(blocks_up),
    )
    return describe(network, dimensions, per_axis(2 ** (len(blocks_down) - 1), dimensions), parts=_parts(len(blocks_down)))


def _parts(levels: int) -> dict[str, tuple[str, ...]]:
    return {
        "encoder": ("convInit", *numbered("down_layers", levels - 1)),
        "bottleneck": (f"down_layers.{levels - 1}",),
        "decoder": ("up_layers", "up_samples"),
        "heads": ("conv_final",),
    }


class WeightedSegResNetVAE(SegResNetVAE):
    """SegResNetVAE that returns `{"logits", "loss", "reconstruction", "kl"}` in training mode and logits otherwise.

    `reconstruction` is the mean squared error of the reconstructed input, `kl` the mean of mu^2 + s^2 - log s^2 - 1 over the latent
    variables, `loss` is vae_weight * (reconstruction + kl / 2).
    """

    vae_weight: float

    def __init__(self, *arguments: Any, own_decoder: bool = False, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.own_decoder = own_decoder
        if own_decoder:
            self.vae_layers, self.vae_samples = self._make_up_layers()

    def forward(self, x: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        if self.training and tuple(x.shape[2:]) != tuple(self.input_image_size):
            raise SuiteError(
                f"segresnet_vae: trained on patches of {list(x.shape[2:])}, but network.image_size={list(self.input_image_size)}; "
                "its auto-encoder has a fixed size, set both to the same"
            )
        encoded, down = self.encode(x)
        logits = self.decode(encoded, down[::-1])
        if not self.training:
            return logits
        reconstruction, kl = self._reconstruct(x, encoded)
        return {"logits": logits, "loss": self.vae_weight * (0.5 * kl + reconstruction), "reconstruction": reconstruction, "kl": kl}

    def _reconstruct(self, image: torch.Tensor, encoded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        flat = self.vae_down(encoded).view(-1, self.vae_fc1.in_features)
        mean = self.vae_fc1(flat)
        noise = torch.randn_like(mean)
        sigma = F.softplus(self.vae_fc2(flat))
        kl = torch.mean(mean**2 + sigma**2 - torch.log(1e-8 + sigma**2) - 1)
        x = self.act_mod(self.vae_fc3(mean + sigma * noise))
        x = self.vae_fc_up_sample(x.view([-1, self.smallest_filters, *self.fc_insize]))
        samples, layers = (self.vae_samples, self.vae_layers) if self.own_decoder else (self.up_samples, self.up_layers)
        for sample, layer in zip(samples, layers, strict=True):
            x = layer(sample(x))
        return F.mse_loss(image, self.vae_conv_final(x)), kl


def segresnet_vae(
    in_channels: int,
    out_channels: int,
    *,
    image_size: Count | Sequence[Count],
    dimensions: Dimensions = 3,
    features: Count = 32,
    blocks_down: Sequence[Count] = (1, 2, 2, 4),
    blocks_up: Sequence[Count] = (1, 1, 1),
    dropout: BelowOne = 0.2,
    vae_weight: NotNegative = 0.1,
    own_decoder: bool = False,
) -> WeightedSegResNetVAE:
    """SegResNet with a variational auto-encoder branch as regularizer (Myronenko, BrainLes 2018, Eq. 1-3).

    In training mode it returns `{"logits", "loss", "reconstruction", "kl"}` (see `WeightedSegResNetVAE`); in evaluation logits, and the
    branch is not computed. Unlike in the paper, the branch shares the blocks of the segmentation decoder (without its skips), unless told
    otherwise.

    Args:
        image_size: size of the training patches, divisible by 2 ** levels. Evaluation takes any size that fits `divisor`.
        features, blocks_down, blocks_up, dropout: as `segresnet`.
        vae_weight: weight of the branch's loss (0.1 in the paper).
        own_decoder: the branch has a decoder of its own, as in the paper.

    Raises:
        SuiteError: an `image_size` that is not divisible, or (in training) an input of another size.
    """
    size = per_axis(image_size, dimensions)
    half = 2 ** (len(blocks_down) - 1)
    if any(s % (2 * half) for s in size):
        raise SuiteError(f"segresnet_vae: network.image_size={list(size)} must be divisible by {2 * half}")
    network = WeightedSegResNetVAE(
        size,
        vae_estimate_std=True,  # else MONAI leaves a layer without gradient, and has no KL term
        spatial_dims=dimensions,
        init_filters=features,
        in_channels=in_channels,
        out_channels=out_channels,
        dropout_prob=dropout,
        blocks_down=tuple(blocks_down),
        blocks_up=tuple(blocks_up),
        own_decoder=own_decoder,
    )
    network.vae_weight = vae_weight
    vae = tuple(name for name, _ in network.named_children() if name.startswith("vae_"))
    return describe(network, dimensions, half, parts={**_parts(len(blocks_down)), "vae": vae})
