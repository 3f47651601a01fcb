"""A U-Net whose features are parted among the four modalities: pairs of them weigh each other, and a transformer joins all.

Hierarchical and global modality interaction for brain tumor segmentation, BrainLes 2021, doi:10.1007/978-3-031-08999-2_38.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from lesionbench.errors import SuiteError, unknown
from lesionbench.ranges import BelowOne, Count, Dimensions, Whole
from lightning_modules.networks.contract import describe, per_axis
from lightning_modules.networks.conv_transformer import TransformerLayer
from lightning_modules.networks.conv_unit import convolution, unit

MODALITIES = 4  # T1, T1c, T2, FLAIR, in this order
INTERACTIONS = ("hierarchical", "raw", "none")
SCOPES = ("all", "modality", "position", "none")
NORMS = ("instance", "batch")
LEAKY = partial(nn.LeakyReLU, 0.01, inplace=True)


class CoAttention(nn.Module):
    """Features of one modality, weighed by those of another, by channel and by voxel (SCCA, Eqs. 1 to 3).

    Args:
        channels: of either modality, an even number; half of them lie between the two layers that weigh channels.
        dimensions: 2 or 3.

    Shapes: two maps (B, channels, *spatial) -> (B, channels, *spatial).
    """

    def __init__(self, channels: int, dimensions: int = 3) -> None:
        super().__init__()
        self.by_channel = nn.Sequential(nn.Linear(channels, channels // 2), nn.ReLU(inplace=True), nn.Linear(channels // 2, channels))
        self.by_voxel = convolution(dimensions)(channels, 1, 1)
        self.out = convolution(dimensions)(channels, channels, 3, padding=1)

    def forward(self, enhanced: torch.Tensor, partner: torch.Tensor) -> torch.Tensor:
        channels = self.by_channel(partner.flatten(2).mean(dim=2)).sigmoid()
        channels = channels.reshape(*channels.shape, *[1] * (partner.ndim - 2))
        return F.relu(self.out(channels * enhanced + self.by_voxel(partner).sigmoid() * enhanced))


class HierarchicalInteraction(nn.Module):
    """Four modalities, each weighed by the one that complements it (HMI, Section 2.2, Fig. 2).

    T1 and T2 weigh each other as they are; the enhanced T2 weighs FLAIR, and the enhanced T1 weighs T1c.

    Args:
        channels: C of the map, a multiple of 8; a quarter of them is of each modality, in the order T1, T1c, T2, FLAIR.
        dimensions: 2 or 3.
        raw: FLAIR and T1c are weighed by T2 and T1 as they are.

    Shapes: (B, C, *spatial) -> (B, C, *spatial).
    """

    def __init__(self, channels: int, dimensions: int = 3, raw: bool = False) -> None:
        super().__init__()
        self.t1, self.t1c, self.t2, self.flair = (CoAttention(channels // MODALITIES, dimensions) for _ in range(MODALITIES))
        self.raw = raw

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        t1, t1c, t2, flair = x.chunk(MODALITIES, dim=1)
        new_t1, new_t2 = self.t1(t1, t2), self.t2(t2, t1)
        new_flair = self.flair(flair, t2 if self.raw else new_t2)
        new_t1c = self.t1c(t1c, t1 if self.raw else new_t1)
        return torch.cat([new_t1, new_t1c, new_t2, new_flair], dim=1)


class GlobalInteraction(nn.Module):
    """A transformer whose tokens are the voxels of every modality (GMI, Section 2.3, Eqs. 4 and 5).

    Args:
        channels: C of the map, a multiple of 4; a token has a quarter of them.
        grid: size of the map that the learned position embedding, one for each modality, is made for; interpolated for others.
        layers, heads, mlp_size: of the transformer; heads divide the width of a token.
        dropout: in its layers, in [0, 1].
        scope: what a token attends to, see `ModalityInteractionUNet`.

    Shapes: (B, C, *spatial) -> (B, C, *spatial).
    """

    def __init__(
        self,
        channels: int,
        grid: Sequence[int],
        *,
        layers: int = 6,
        heads: int = 8,
        mlp_size: int = 320,
        dropout: float = 0.1,
        scope: str = "all",
    ) -> None:
        super().__init__()
        width = channels // MODALITIES
        self.project = nn.Linear(width, width)
        self.position = nn.Parameter(nn.init.trunc_normal_(torch.empty(MODALITIES, width, *grid), std=0.02))
        self.layers = nn.Sequential(*(TransformerLayer(width, mlp_size, heads, dropout) for _ in range(layers)))
        self.scope = scope

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        grid, position = x.shape[2:], self.position
        if position.shape[2:] != grid:
            position = F.interpolate(position, grid, mode=("bilinear", "trilinear")[len(grid) - 2], align_corners=False)
        tokens = x.unflatten(1, (MODALITIES, -1)).flatten(3).transpose(2, 3)  # (B, 4, N, C / 4)
        tokens = self.project(tokens) + position.flatten(2).transpose(1, 2)
        if self.scope == "position":
            tokens = self.layers(tokens.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), -1)).transpose(1, 2)
        elif self.scope == "modality":
            tokens = self.layers(tokens.flatten(0, 1)).unflatten(0, (-1, MODALITIES))
        else:
            tokens = self.layers(tokens.flatten(1, 2)).unflatten(1, (MODALITIES, -1))
        return tokens.transpose(2, 3).flatten(1, 2).unflatten(2, grid)


class ModalityInteractionUNet(nn.Module):
    """U-Net with interaction between modalities, by pairs at every level and of all at the lowest (Fig. 1).

    An encoder block is twice convolution of side 3, normalization and leaky ReLU; the first has stride 2 but at full resolution. Skip
    connections carry its features after `HierarchicalInteraction`, and the lowest ones go on through `GlobalInteraction`. A decoder block
    doubles the size by a transposed convolution, joins the skip connection and the global features, brought to its width by a
    convolution of side 1 and to its size by interpolation, and convolves once. Sides are padded with 0 at the far end to a multiple of
    2 ** (levels - 1), and the logits are cut again.

    Args:
        in_channels, out_channels: M and K.
        image_size: input size that the position embedding is made for; for another size it is interpolated.
        dimensions: 2 or 3.
        features: widths of the levels, finest first, multiples of 8.
        interaction: what a modality is weighed by at every level: `hierarchical`; `raw`, its partner as it is (see
            `HierarchicalInteraction`); `none`, nothing.
        scope: what a token of the lowest level attends to: `all` tokens; those of its own `modality`; those of the four modalities at its
            own `position`, as many parameters without a look around; `none`, no transformer and no global features in the decoder.
        encoder_groups: 4 keeps the modalities apart in the encoder's convolutions, for images of four channels in the order T1, T1c, T2,
            FLAIR; with 1 they mix, and the quarters of the features are modalities by name.
        layers, heads, mlp_size, dropout: of the transformer.
        norm: `instance` or `batch`.

    Shapes: (B, M, *spatial) -> logits (B, K, *spatial), any size above 2 ** (levels - 1).

    Raises:
        SuiteError: an unknown interaction, scope or norm; fewer than two features, or such that are no multiples of 8; heads that do not
            divide a quarter of the last one; groups other than 1 and 4, or 4 without four channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        image_size: Count | Sequence[Count],
        dimensions: Dimensions = 3,
        features: Sequence[Count] = (32, 64, 128, 256, 320),
        interaction: str = "hierarchical",
        scope: str = "all",
        encoder_groups: Count = 1,
        layers: Whole = 6,
        heads: Count = 8,
        mlp_size: Count = 320,
        dropout: BelowOne = 0.1,
        norm: str = "instance",
    ) -> None:
        super().__init__()
        for name, value, known in (("interaction", interaction, INTERACTIONS), ("scope", scope, SCOPES), ("norm", norm, NORMS)):
            if value not in known:
                raise unknown(f"network.{name}", value, known)
        if len(features) < 2 or any(width % 8 for width in features):
            raise SuiteError(f"network.features={list(features)}: expected two or more multiples of 8")
        if features[-1] // MODALITIES % heads:
            raise SuiteError(
                f"network.heads={heads} does not divide {features[-1] // MODALITIES}, a quarter of the last of network.features"
            )
        if encoder_groups not in (1, MODALITIES) or (encoder_groups == MODALITIES and in_channels != MODALITIES):
            raise SuiteError(f"network.encoder_groups={encoder_groups}: expected 1, or 4 with four channels; there are {in_channels}")
        self.divisor_inside = 2 ** (len(features) - 1)
        grid = [-(-side // self.divisor_inside) for side in per_axis(image_size, dimensions)]
        parts = {
            "encoder": ("encoder", "interactions"),
            "bottleneck": ("transformer",),
            "decoder": ("ups", "reduce", "decoder"),
            "heads": ("out",),
        }
        if scope == "none":
            parts |= {"bottleneck": (), "decoder": ("ups", "decoder")}
        describe(self, dimensions, 1, self.divisor_inside + 1, parts=parts)  # normalization needs two voxels at the bottom

        def conv(n_in: int, n_out: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
            return unit(dimensions, n_in, n_out, norm=norm, stride=stride, groups=groups, activation=LEAKY)

        def interacting(width: int) -> nn.Module:
            return nn.Identity() if interaction == "none" else HierarchicalInteraction(width, dimensions, raw=interaction == "raw")

        before = [in_channels, *features[:-1]]
        *finer, coarsest = features
        self.encoder = nn.ModuleList(
            nn.Sequential(conv(n_in, n_out, 2 if level else 1, encoder_groups), conv(n_out, n_out, groups=encoder_groups))
            for level, (n_in, n_out) in enumerate(zip(before, features, strict=True))
        )
        self.interactions = nn.ModuleList(interacting(width) for width in features)
        self.transformer = None
        if scope != "none":
            self.transformer = GlobalInteraction(
                coarsest, grid, layers=layers, heads=heads, mlp_size=mlp_size, dropout=dropout, scope=scope
            )
        transposed = (nn.ConvTranspose2d, nn.ConvTranspose3d)[dimensions - 2]
        ups = list(zip([*finer[1:], coarsest], finer, strict=True))[::-1]  # (width below, width), coarsest first
        self.ups = nn.ModuleList(transposed(below, width, 3, stride=2, padding=1, output_padding=1) for below, width in ups)
        sources = 2 if self.transformer is None else 3
        self.decoder = nn.ModuleList(conv(sources * width, width) for _, width in ups)
        self.reduce = (
            nn.ModuleList() if self.transformer is None else nn.ModuleList(convolution(dimensions)(coarsest, w, 1) for _, w in ups)
        )
        self.out = convolution(dimensions)(features[0], out_channels, 1)
        self._mode = ("bilinear", "trilinear")[dimensions - 2]

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        sides = image.shape[2:]
        x = F.pad(image, [margin for side in reversed(sides) for margin in (0, -side % self.divisor_inside)])
        skips = []
        for block, interaction in zip(self.encoder, self.interactions, strict=True):
            x = block(x)
            skips.append(interaction(x))
        x = skips.pop()
        joined = None if self.transformer is None else self.transformer(x)
        x = x if joined is None else joined
        for level, (up, block) in enumerate(zip(self.ups, self.decoder, strict=True)):
            parts = [up(x), skips.pop()]
            if joined is not None:
                parts.append(F.interpolate(self.reduce[level](joined), parts[1].shape[2:], mode=self._mode, align_corners=False))
            x = block(torch.cat(parts, dim=1))
        return self.out(x)[(..., *(slice(0, side) for side in sides))]
