"""Swin-Unet: a U-shaped network of shifted-window transformer blocks alone, for slices."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from lesionbench.errors import SuiteError
from lesionbench.ranges import BelowOne, Count, Dimensions
from lightning_modules.networks.contract import describe, numbered


def swin_unet(
    in_channels: int,
    out_channels: int,
    *,
    dimensions: Dimensions = 2,
    features: Count = 96,
    depths: Sequence[Count] = (2, 2, 2, 2),
    decoder_depths: Sequence[Count] = (2, 2, 2),
    heads: Sequence[Count] = (3, 6, 12, 24),
    attention_window: Count = 7,
    dropout: BelowOne = 0.0,
) -> "SwinUnet":
    """Swin-Unet (Cao et al., ECCV Workshops 2022; arXiv:2105.05537), 2D.

    Args:
        dimensions: 2; there is no other.
        features: width C after the patch embedding, doubled at each further stage.
        depths: blocks of the encoder stages, finest first; the last is the bottleneck.
        decoder_depths: blocks of the decoder stages, coarsest first.
        heads: attention heads of the stages, finest first; they divide the stage's width.
        attention_window: side of the attention windows, in tokens of 4 pixels.
        dropout: dropout rate after the embedding and in every block, in [0, 1].

    Shapes: (B, M, H, W) -> logits (B, K, H, W), any size.

    Raises:
        SuiteError: `dimensions` other than 2, lists whose lengths do not fit, heads that do not divide the width.
    """
    if dimensions != 2:
        raise SuiteError(f"network.dimensions={dimensions}: swin_unet is a 2D network; set data.view=slice and 2 here, or use swin_unetr")
    if not len(depths) == len(heads) == len(decoder_depths) + 1:
        raise SuiteError(
            f"swin_unet: depths and heads need one entry per stage, decoder_depths one fewer; "
            f"got {len(depths)}, {len(heads)} and {len(decoder_depths)} entries"
        )
    if wrong := [h for stage, h in enumerate(heads) if features * 2**stage % h]:
        raise SuiteError(f"swin_unet: {wrong[0]} heads do not divide the width of their stage (features={features}, doubled at each stage)")
    network = SwinUnet(in_channels, out_channels, features, depths, decoder_depths, heads, attention_window, dropout)
    coarsest = len(depths) - 1
    parts = {
        "encoder": ("embed", "embed_norm", *numbered("encoder", coarsest), *numbered("merges", coarsest - 1)),
        "bottleneck": (f"merges.{coarsest - 1}", f"encoder.{coarsest}", "bottleneck_norm"),
        "decoder": ("expands", "joins", "decoder", "decoder_norm", "to_pixels"),
        "heads": ("head",),
    }
    return describe(network, 2, 1, parts=parts)


class SwinUnet(nn.Module):
    """See `swin_unet`. Inside, maps are (B, H, W, C).

    Patches of 4 x 4 pixels become tokens; stages of Swin blocks are joined by patch merging on the way down and patch expanding on the way
    up, with the encoder's map of the same size concatenated and halved in width; the last expanding brings tokens back to pixels. Sides
    are padded with 0 at the far end to a multiple of the coarsest token, and the logits are cut again.
    """

    patch = 4

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        features: int,
        depths: Sequence[int],
        decoder_depths: Sequence[int],
        heads: Sequence[int],
        window: int,
        dropout: float,
    ) -> None:
        super().__init__()
        widths = [features * 2**stage for stage in range(len(depths))]

        def stage(level: int, depth: int) -> nn.Sequential:
            return nn.Sequential(*(SwinBlock(widths[level], heads[level], window, bool(i % 2), dropout) for i in range(depth)))

        self.embed = nn.Conv2d(in_channels, features, self.patch, self.patch)
        self.embed_norm, self.embed_dropout = nn.LayerNorm(features), nn.Dropout(dropout)
        self.encoder = nn.ModuleList(stage(level, depth) for level, depth in enumerate(depths))
        self.merges = nn.ModuleList(PatchMerging(w) for w in widths[:-1])
        self.bottleneck_norm = nn.LayerNorm(widths[-1])
        ups = list(enumerate(widths))[-2::-1]  # (level, width), coarsest first
        self.expands = nn.ModuleList(PatchExpanding(2 * w, w, 2) for _, w in ups)
        self.joins = nn.ModuleList(nn.Linear(2 * w, w) for _, w in ups)
        self.decoder = nn.ModuleList(stage(level, depth) for (level, _), depth in zip(ups, decoder_depths, strict=True))
        self.decoder_norm = nn.LayerNorm(features)
        self.to_pixels = PatchExpanding(features, features, self.patch)
        self.head = nn.Conv2d(features, out_channels, 1, bias=False)
        self.apply(_initialize)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Image (B, M, H, W) -> logits (B, K, H, W)."""
        height, width = image.shape[2:]
        coarsest = self.patch * 2 ** len(self.merges)
        x = self.embed(F.pad(image, (0, -width % coarsest, 0, -height % coarsest))).movedim(1, -1)
        x = self.embed_dropout(self.embed_norm(x))
        skips = []
        for stage, merge in zip(self.encoder, self.merges, strict=False):
            skips.append(stage(x))
            x = merge(skips[-1])
        x = self.bottleneck_norm(self.encoder[-1](x))
        for expand, join, stage in zip(self.expands, self.joins, self.decoder, strict=True):
            x = stage(join(torch.cat([expand(x), skips.pop()], dim=-1)))
        x = self.to_pixels(self.decoder_norm(x)).movedim(-1, 1)
        return self.head(x)[..., :height, :width]


class PatchMerging(nn.Module):
    """Four neighboring tokens to one of twice the width: (B, H, W, C) -> (B, H / 2, W / 2, 2 C)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.reduce = nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], dim=-1)
        return self.reduce(self.norm(x))


class PatchExpanding(nn.Module):
    """One token to `factor` x `factor`: (B, H, W, C) -> (B, factor H, factor W, `out_width`)."""

    def __init__(self, width: int, out_width: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.expand, self.norm = nn.Linear(width, factor**2 * out_width, bias=False), nn.LayerNorm(out_width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.expand(x).unflatten(-1, (self.factor, self.factor, -1))  # (B, H, W, factor, factor, C')
        return self.norm(x.transpose(2, 3).flatten(3, 4).flatten(1, 2))


class SwinBlock(nn.Module):
    """Attention in windows, shifted by half a window or not, and a two-layer perceptron, both residual (Liu et al., ICCV 2021, Eq. 3).

    Maps that the window does not divide are padded at the far end; no token attends to padding, nor across the seam of the shift.
    """

    def __init__(self, width: int, heads: int, window: int, shifted: bool, dropout: float) -> None:
        super().__init__()
        self.window, self.shift = window, window // 2 if shifted else 0
        self.attention_norm, self.attention = nn.LayerNorm(width), WindowAttention(width, heads, window)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.dropout(self._attend(self.attention_norm(x)))
        return x + self.mlp(self.mlp_norm(x))

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        sides = x.shape[1:3]
        padded = [s + -s % self.window for s in sides]
        shifts = [self.shift if p > self.window else 0 for p in padded]  # a single window has no neighbor to shift towards
        x = F.pad(x, (0, 0, 0, padded[1] - sides[1], 0, padded[0] - sides[0])).roll([-s for s in shifts], dims=(1, 2))
        rows, columns = (self._parts(*axis, device=x.device) for axis in zip(sides, padded, shifts, strict=True))
        parts = torch.where((rows[:, None] < 0) | (columns < 0), -1, 2 * rows[:, None] + columns)  # padding, or one of four parts
        parts = to_windows(parts[None, ..., None], self.window)[0, ..., 0]
        x = self.attention(to_windows(x, self.window), parts[:, None, :, None] == parts[:, None, None, :])
        return from_windows(x, self.window, padded).roll(shifts, dims=(1, 2))[:, : sides[0], : sides[1]]

    @staticmethod
    def _parts(side: int, padded: int, shift: int, device: torch.device) -> torch.Tensor:
        """For every row of the rolled map: 0, 1 where it came round from the other end, -1 where it is padding."""
        place = torch.arange(padded, device=device)
        return torch.where((place + shift) % padded >= side, -1, (place >= padded - shift).long())


class WindowAttention(nn.Module):
    """Self-attention among the tokens of a window, with a learned bias for each relative position (Liu et al., ICCV 2021, Eq. 4)."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.bias = nn.Parameter(nn.init.trunc_normal_(torch.empty(heads, (2 * window - 1) ** 2), std=0.02))
        place = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        offset = place[:, :, None] - place[:, None, :] + window - 1
        self.register_buffer("relative", offset[0] * (2 * window - 1) + offset[1], persistent=False)

    def forward(self, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Windows (B, N, T, C) -> the same; `seen` (N, 1, T, T) is True where a token (row) may look at another."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5)
        bias = self.bias[:, self.relative].masked_fill(~seen, -torch.inf)
        return self.out(F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype)).transpose(2, 3).flatten(3))


def to_windows(x: torch.Tensor, window: int) -> torch.Tensor:
    """(B, H, W, C) -> windows (B, N, window * window, C), row by row."""
    return x.unflatten(2, (-1, window)).unflatten(1, (-1, window)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def from_windows(x: torch.Tensor, window: int, size: Sequence[int]) -> torch.Tensor:
    """The inverse of `to_windows`: windows of a map of `size` (H, W) -> (B, H, W, C)."""
    x = x.unflatten(1, (size[0] // window, size[1] // window)).unflatten(3, (window, window))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _initialize(layer: nn.Module) -> None:
    if isinstance(layer, nn.Linear):
        nn.init.trunc_normal_(layer.weight, std=0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
