"""Convolutional autoencoders with a spatial bottleneck, plain and variational."""

from collections.abc import Sequence
from itertools import pairwise
from math import gcd

import torch
from torch import nn

from lesionbench.ranges import Count, Dimensions
from lightning_modules.networks.contract import describe


class SpatialAutoencoder(nn.Module):
    """Strided convolutions to a small grid of latent vectors and back, without skip connections; fully convolutional.

    The spatial autoencoder and VAE of Baur et al., "Autoencoders for unsupervised anomaly segmentation in brain MR images: A comparative
    study", Medical Image Analysis 69, 2021, small. Input (B, C, *spatial); returns `logits` (the reconstruction, same shape) and, if
    `variational`, `kl` (B,): the Kullback-Leibler divergence to N(0, 1), summed over the latent grid (Kingma and Welling, ICLR 2014).

    Args:
        in_channels, out_channels: of the image and the reconstruction.
        dimensions: 2 or 3.
        features: channels of the levels; each level halves the sides.
        latent: channels of the bottleneck.
        variational: draw the latent vectors in training, use their mean in evaluation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        dimensions: Dimensions = 2,
        features: Sequence[Count] = (16, 32, 64, 64),
        latent: Count = 16,
        variational: bool = False,
    ) -> None:
        super().__init__()
        down, up = (nn.Conv2d, nn.ConvTranspose2d) if dimensions == 2 else (nn.Conv3d, nn.ConvTranspose3d)
        widths = [in_channels, *features]
        encoder, decoder = [], [down(latent, features[-1], 1), nn.LeakyReLU(0.1)]
        for before, after in pairwise(widths):
            encoder += [down(before, after, 4, stride=2, padding=1), nn.GroupNorm(gcd(8, after), after), nn.LeakyReLU(0.1)]
        outwards = [*reversed(features), features[0]]
        for before, after in pairwise(outwards):
            decoder += [up(before, after, 4, stride=2, padding=1), nn.GroupNorm(gcd(8, after), after), nn.LeakyReLU(0.1)]
        self.encoder = nn.Sequential(*encoder, down(features[-1], latent * (1 + variational), 1))
        self.decoder = nn.Sequential(*decoder, down(features[0], out_channels, 3, padding=1))
        self.variational = variational
        describe(self, dimensions, divisor=2 ** len(features), parts={"encoder": ("encoder",), "decoder": ("decoder",)})

    def forward(self, image: torch.Tensor, generator: torch.Generator | None = None) -> dict[str, torch.Tensor]:
        """`generator` draws the latent vectors in training."""
        if not self.variational:
            return {"logits": self.decoder(self.encoder(image))}
        mean, log_variance = self.encoder(image).chunk(2, dim=1)
        drawn = mean
        if self.training:
            noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
            drawn = mean + noise * (0.5 * log_variance).exp()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(dim=1)
        return {"logits": self.decoder(drawn), "kl": kl}
