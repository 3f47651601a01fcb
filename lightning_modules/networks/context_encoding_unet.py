"""A U-Net whose deepest features pass through a context encoding: residuals to learned codewords that weigh channels and tell classes."""

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lesionbench.errors import SuiteError
from lesionbench.ranges import BelowOne, Count, Dimensions, Whole
from lightning_modules.networks.contract import describe


class Codebook(nn.Module):
    """Soft assignment of features to K codewords, and what remains of the features (Zhang et al., CVPR 2018, Section 3.1).

    With the residual r_ik = x_i - d_k of a feature to a codeword and a smoothing factor s_k, the assignments are
    a_ik = exp(-s_k |r_ik|^2) / sum_j exp(-s_j |r_ij|^2), and a code is e_k = sum_i a_ik r_ik.

    Args:
        codes: K.
        channels: C of the features.

    Shapes: features (B, N, C) -> codes (B, K, C).
    """

    def __init__(self, codes: int, channels: int) -> None:
        super().__init__()
        bound = (codes * channels) ** -0.5
        self.codewords = nn.Parameter(torch.empty(codes, channels).uniform_(-bound, bound))
        self.smoothing = nn.Parameter(torch.empty(codes).uniform_(0, 1))

    def assignments(self, features: torch.Tensor) -> torch.Tensor:
        """(B, N, C) -> (B, N, K), which sum to 1 over K."""
        squares = features.square().sum(dim=-1, keepdim=True) + self.codewords.square().sum(dim=-1)
        return (-self.smoothing * (squares - 2 * features @ self.codewords.T)).softmax(dim=-1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        device = features.device.type  # on `meta`, where shapes are counted, there is nothing to switch off
        exact = torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
        with exact:  # squares of hundreds are told apart by their last digits
            features = features.float()
            assigned = self.assignments(features).transpose(1, 2)
            return assigned @ features - assigned.sum(dim=-1, keepdim=True) * self.codewords


class ContextEncoding(nn.Module):
    """Weighs channels by what the whole image holds, and tells which classes that is (Zhang et al., CVPR 2018, Section 3.1).

    Convolution of side 1, normalization and ReLU; codes, each normalized over its channels (scale and shift per code) and then by ReLU, and
    their mean e; factors sigmoid(W e + b) for the channels; logits of presence, linear in e. Codes are divided by the number of positions,
    so that they do not grow with the image.

    Args:
        channels: C.
        codes: K.
        classes: of which presence is told.
        dimensions: 2 or 3.
        residual: x + x * factors instead of x * factors, before ReLU.

    Shapes: (B, C, *spatial) -> weighed features of that shape, and logits (B, classes).
    """

    def __init__(self, channels: int, codes: int, classes: int, *, dimensions: int = 3, residual: bool = True) -> None:
        super().__init__()
        convolution, norm = ((nn.Conv2d, nn.InstanceNorm2d), (nn.Conv3d, nn.InstanceNorm3d))[dimensions - 2]
        self.features = nn.Sequential(convolution(channels, channels, 1, bias=False), norm(channels, affine=True), nn.ReLU())
        self.codebook = Codebook(codes, channels)
        self.norm = nn.InstanceNorm1d(codes, affine=True)
        self.factors = nn.Linear(channels, channels)
        self.presence = nn.Linear(channels, classes)
        self.residual = residual

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.features(x).flatten(2).transpose(1, 2)
        e = F.relu(self.norm(self.codebook(features) / features.shape[1])).mean(dim=1)
        weighed = x * self.factors(e).sigmoid().reshape(*e.shape, *[1] * (x.dim() - 2))
        return F.relu(x + weighed if self.residual else weighed), self.presence(e)


class ContextEncodingUNet(nn.Module):
    """U-Net with a context encoding at its bottom (after Rahman et al., BrainLes 2021, Section 2.2, whose layers are in a figure only).

    Blocks of two convolutions of side 3, each with instance normalization, leaky ReLU and dropout; max-pooling and transposed convolutions.

    Args:
        in_channels: image channels M.
        out_channels: logit channels K.
        dimensions: 2 or 3.
        features: width of each resolution, finest first.
        codes: number of codewords; 0 = a plain U-Net, which tells no presence.
        presence: number of classes whose presence is told; None = as for exclusive classes, one less than `out_channels`.
        residual: channels are weighed beside the features, not instead of them (see `ContextEncoding`).
        dropout: rate after every convolution of a block.

    Shapes: (B, M, *spatial) -> `logits` (B, K, *spatial) and, with codes, `presence` (B, presence), logits; sides divisible by
    2 ** (resolutions - 1).

    Raises:
        SuiteError: fewer than two resolutions, or no class whose presence could be told.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        dimensions: Dimensions = 3,
        features: Sequence[Count] = (16, 32, 64, 128, 256),
        codes: Whole = 32,
        presence: Count | None = None,
        residual: bool = True,
        dropout: BelowOne = 0.3,
    ) -> None:
        super().__init__()
        if len(features) < 2:
            raise SuiteError(f"network.features={list(features)}: two resolutions at least")
        told = out_channels - 1 if presence is None else presence
        if codes and told < 1:
            raise SuiteError(f"network.presence={presence}: of {out_channels} output no class is left but the background; give a number")
        parts = {"encoder": ("encoder",), "bottleneck": ("bottom", "context"), "decoder": ("up", "decoder"), "heads": ("out",)}
        if not codes:
            parts["bottleneck"] = ("bottom",)
        divisor = 2 ** (len(features) - 1)
        describe(self, dimensions, divisor, 2 * divisor, parts=parts)  # instance normalization needs two voxels at the bottom
        convolution, transposed, norm, pool = (
            (nn.Conv2d, nn.ConvTranspose2d, nn.InstanceNorm2d, nn.MaxPool2d),
            (nn.Conv3d, nn.ConvTranspose3d, nn.InstanceNorm3d, nn.MaxPool3d),
        )[dimensions - 2]

        def block(n_in: int, width: int) -> nn.Sequential:
            layers: list[nn.Module] = []
            for n in (n_in, width):
                layers += [
                    convolution(n, width, 3, padding=1, bias=False),
                    norm(width, affine=True),
                    nn.LeakyReLU(0.01),
                    nn.Dropout(dropout),
                ]
            return nn.Sequential(*layers)

        *finer, lowest = features
        self.pool = pool(2)
        self.encoder = nn.ModuleList(block(n_in, width) for n_in, width in zip([in_channels, *finer], finer, strict=False))
        self.bottom = block(finer[-1], lowest)
        self.context = ContextEncoding(lowest, codes, told, dimensions=dimensions, residual=residual) if codes else None
        steps = list(reversed(list(pairwise(features))))
        self.up = nn.ModuleList(transposed(below, width, 2, stride=2) for width, below in steps)
        self.decoder = nn.ModuleList(block(2 * width, width) for width, _ in steps)
        self.out = convolution(features[0], out_channels, 1)

    def forward(self, image: torch.Tensor) -> dict[str, Any]:
        skips, x, told = [], image, {}
        for level in self.encoder:
            skips.append(level(x))
            x = self.pool(skips[-1])
        x = self.bottom(x)
        if self.context is not None:
            x, told["presence"] = self.context(x)
        for up, level in zip(self.up, self.decoder, strict=True):
            x = level(torch.cat([up(x), skips.pop()], dim=1))
        return {"logits": self.out(x), **told}
