"""U-Nets that take groups of modalities through branches of their own (Wang et al., "Modality-pairing learning for brain tumor segmentation",
BrainLes 2020)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lesionbench.errors import SuiteError, unknown
from lesionbench.ranges import Count, Dimensions
from lightning_modules.networks.contract import describe, numbered, per_axis

FUSIONS = ("paired", "late", "early")
GRANULARITIES = ("block", "conv")
NORM_ORDERS = ("conv_norm_act", "norm_act_conv")
NORMS: dict[str, Callable[[int, int], nn.Module]] = {  # (dimensions, channels) -> layer
    "instance": lambda d, c: (nn.InstanceNorm2d, nn.InstanceNorm3d)[d - 2](c, affine=True),
    "batch": lambda d, c: (nn.BatchNorm2d, nn.BatchNorm3d)[d - 2](c),
    "group": lambda d, c: nn.GroupNorm(8, c),
}
PAIRS = (("flair", "t2"), ("t1ce", "t1"))  # for edema, and for core and rim


class PairedUNet(nn.Module):
    """Heads of equal shape, one for each group of modalities, that read each other's features and share their heads.

    On every level below the first, the first convolution of an encoder block takes the features of all branches, its own first (Eq. 2);
    a decoder block takes its own upsampled features and the skips of all branches, its own first (Eq. 3). The decoders' features are not
    exchanged; heads (1x1x1 convolutions) take the features of all branches. A block is two units of convolution, normalization and leaky
    ReLU; a stride of 2 on the first halves the resolution, a transposed convolution doubles it.

    Args:
        in_channels, out_channels: M and K.
        channels: names of the M channels, in the order of the image.
        pairs: names of the modalities of each branch, any number of lists. Every channel is in one of them at least. Names that are not
            among `channels` are left out, and so is a branch that has none left: a task narrowed to some modalities keeps its grouping.
        widths: features of each level, finest first. The paper does not give them; the default is nnU-Net's plan for patches of 128^3.
        image_size: size of the training patches; levels that would have fewer than two voxels on an axis are left out. None = all levels.
        fusion: `paired`; `late`, branches that meet in the heads only; `early`, one branch for all modalities, an ordinary U-Net.
        cross: what a branch reads of the others, with `paired`: `encoder` and `skips` (true or false), and `granularity`, `block` (first
            convolution of an encoder block) or `conv` (each convolution but the very first).
        dimensions: 2 or 3.
        norm: `instance`, `batch` or `group` (8 groups).
        norm_order: `conv_norm_act` or, as Eq. 1 is printed, `norm_act_conv`; there the convolution that sees the image is alone.
        deep_supervision: heads on all decoder levels but the finest (`logits`) and the two coarsest, the bottleneck being one.

    Shapes: (B, M, *spatial) -> logits (B, K, *spatial); in training mode a dict of `logits`, `features` (one (B, widths[0], *spatial) per
    branch: the last before the head) and, with deep supervision, `deep` (logits at 1/2, 1/4 ... of the resolution). Sides are divisible
    by 2 ** (levels - 1).

    Raises:
        SuiteError: an unknown option, fewer than two levels, widths that do not fit the norm, or a channel without a branch.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        channels: Sequence[str],
        pairs: Sequence[Sequence[str]] = PAIRS,
        widths: Sequence[Count] = (32, 64, 128, 256, 320, 320),
        image_size: Count | Sequence[Count] | None = None,
        fusion: str = "paired",
        cross: Mapping[str, Any] | None = None,
        dimensions: Dimensions = 3,
        norm: str = "instance",
        norm_order: str = "conv_norm_act",
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        sides = per_axis(2, dimensions) if image_size is None else per_axis(image_size, dimensions)
        widths = [width for level, width in enumerate(widths) if image_size is None or min(sides) >> level >= 2]
        cross = {"encoder": True, "skips": True, "granularity": "block", **(cross or {})}
        for name, value, known in [
            ("fusion", fusion, FUSIONS),
            ("norm", norm, NORMS),
            ("norm_order", norm_order, NORM_ORDERS),
            ("cross.granularity", cross["granularity"], GRANULARITIES),
            *(("cross", name, ("encoder", "skips", "granularity")) for name in cross),
        ]:
            if value not in known:
                raise unknown(f"network.{name}", value, known)
        if len(widths) < 2:
            raise SuiteError(
                f"network.widths={widths}: a U-Net has two levels or more, each of two voxels or more (image_size={image_size})"
            )
        if norm == "group" and any(width % 8 for width in widths):
            raise SuiteError(f"network.widths={list(widths)}: norm=group has 8 groups and needs multiples of 8")
        if len(channels) != in_channels:
            raise SuiteError(f"network.channels={list(channels)} are {len(channels)} names for {in_channels} channels")
        grouped = [list(channels)] if fusion == "early" else grouping(channels, pairs)
        self.groups = [[list(channels).index(c) for c in group] for group in grouped]
        branches = len(self.groups)
        readers = {name: branches if fusion == "paired" and cross[name] else 1 for name in ("encoder", "skips")}
        dense = readers["encoder"] if cross["granularity"] == "conv" else 1
        self.crossed = {name: count > 1 for name, count in readers.items()}

        def unit(inputs: int, outputs: int, stride: int = 1, first: bool = False) -> nn.Sequential:
            convolution = (nn.Conv2d, nn.Conv3d)[dimensions - 2](inputs, outputs, 3, stride, padding=1)
            if norm_order == "conv_norm_act":
                return nn.Sequential(convolution, NORMS[norm](dimensions, outputs), nn.LeakyReLU(0.01, inplace=True))
            before = [] if first else [NORMS[norm](dimensions, inputs), nn.LeakyReLU(0.01, inplace=True)]
            return nn.Sequential(*before, convolution)

        def head(level: int) -> nn.Module:
            return (nn.Conv2d, nn.Conv3d)[dimensions - 2](branches * widths[level], out_channels, 1)

        def up(level: int) -> nn.Module:
            return (nn.ConvTranspose2d, nn.ConvTranspose3d)[dimensions - 2](widths[level + 1], widths[level], 2, 2, bias=False)

        levels = range(len(widths))
        self.encoders = nn.ModuleList()  # [branch][level][0 or 1]
        self.ups, self.decoders = nn.ModuleList(), nn.ModuleList()  # [branch][level], finest first
        for group in self.groups:
            firsts = [
                unit(len(group), widths[0], first=True),
                *(unit(readers["encoder"] * widths[i - 1], widths[i], 2) for i in levels[1:]),
            ]
            seconds = [unit(dense * width, width) for width in widths]
            self.encoders.append(nn.ModuleList(nn.ModuleList(block) for block in zip(firsts, seconds, strict=True)))
            self.ups.append(nn.ModuleList(up(i) for i in levels[:-1]))
            self.decoders.append(
                nn.ModuleList(
                    nn.Sequential(unit((1 + readers["skips"]) * widths[i], widths[i]), unit(widths[i], widths[i])) for i in levels[:-1]
                )
            )
        self.dense = dense > 1
        self.head = head(0)
        self.deep_heads = nn.ModuleList(head(i) for i in (levels[1:-2] if deep_supervision else ()))
        divisor = per_axis(2 ** (len(widths) - 1), dimensions)
        coarsest = len(widths) - 1
        parts = {
            "encoder": [path for branch in range(branches) for path in numbered(f"encoders.{branch}", coarsest)],
            "bottleneck": [f"encoders.{branch}.{coarsest}" for branch in range(branches)],
            "decoder": ["ups", "decoders"],
            "heads": ["head", "deep_heads"],
        }
        describe(self, dimensions, divisor, [d * (1 if norm == "group" else 2) for d in divisor], parts=parts)

    def forward(self, image: torch.Tensor) -> torch.Tensor | dict[str, Any]:
        skips = self._encode([image[:, group] for group in self.groups])
        decoded = self._decode(skips)
        logits = self.head(torch.cat(decoded[0], dim=1))
        if not self.training:
            return logits
        output = {"logits": logits, "features": decoded[0]}
        if self.deep_heads:
            output["deep"] = [head(torch.cat(decoded[i], dim=1)) for i, head in enumerate(self.deep_heads, start=1)]
        return output

    def _encode(self, features: list[torch.Tensor]) -> list[list[torch.Tensor]]:
        """[level][branch], finest first."""
        skips = []
        for level in range(len(self.encoders[0])):
            for conv in (0, 1):
                shared = (self.dense if conv else self.crossed["encoder"]) and (level or conv)
                seen = _crossed(features) if shared else features
                features = [encoder[level][conv](x) for encoder, x in zip(self.encoders, seen, strict=True)]
            skips.append(features)
        return skips

    def _decode(self, skips: list[list[torch.Tensor]]) -> list[list[torch.Tensor]]:
        """[level][branch], finest first, the bottleneck last."""
        decoded = [skips[-1]]
        for level in reversed(range(len(skips) - 1)):
            offered = _crossed(skips[level]) if self.crossed["skips"] else skips[level]
            grown = [ups[level](x) for ups, x in zip(self.ups, decoded[0], strict=True)]
            seen = [torch.cat(pair, dim=1) for pair in zip(grown, offered, strict=True)]
            decoded.insert(0, [decoder[level](x) for decoder, x in zip(self.decoders, seen, strict=True)])
        return decoded


def grouping(channels: Sequence[str], pairs: Sequence[Sequence[str]]) -> list[list[str]]:
    """The channels of each branch: `pairs` without names that are not among `channels`, and without branches that then are empty.

    Raises:
        SuiteError: a channel that is in no branch.
    """
    for channel in channels:
        if not any(channel in group for group in pairs):
            raise SuiteError(f"network.pairs={[list(g) for g in pairs]} has no branch for channel {channel}; add it to one of the lists")
    groups = [[c for c in group if c in channels] for group in pairs]
    return [group for group in groups if group]


def _crossed(features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """For each branch the features of all, its own first."""
    return [torch.cat([own, *(x for j, x in enumerate(features) if j != i)], dim=1) for i, own in enumerate(features)]
