"""TransBTS: a 3D convolutional encoder and decoder with a transformer over the coarsest map."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from lesionbench.errors import SuiteError
from lesionbench.ranges import BelowOne, Count, Dimensions
from lightning_modules.networks.contract import describe, per_axis

DIVISOR = 8  # three halvings
GROUPS = 8


def transbts(
    in_channels: int,
    out_channels: int,
    *,
    image_size: Count | Sequence[Count],
    dimensions: Dimensions = 3,
    features: Count = 16,
    hidden_size: Count = 512,
    mlp_size: Count = 4096,
    layers: Count = 4,
    heads: Count = 8,
    dropout: BelowOne = 0.1,
) -> "TransBTS":
    """TransBTS (Wang et al., MICCAI 2021), 3D; group normalization.

    Args:
        image_size: input size that the learned position embedding is made for; for another size it is interpolated.
        dimensions: 3; there is no other.
        features: width of the finest level, doubled at each of three further ones; a multiple of 8 (the number of groups).
        hidden_size, mlp_size, layers, heads: width of the transformer, of its feed-forward layers, its layers and attention heads.
        dropout: dropout rate in the transformer, in [0, 1].

    Shapes: (B, M, X, Y, Z) -> logits (B, K, X, Y, Z), any size.

    Raises:
        SuiteError: `dimensions` other than 3, `features` that groups or a `hidden_size` that heads do not divide.
    """
    if dimensions != 3:
        raise SuiteError(f"network.dimensions={dimensions}: transbts is a 3D network; for slices use swin_unet")
    if features % GROUPS or hidden_size % heads:
        raise SuiteError(f"transbts: features={features} must be divisible by {GROUPS}, hidden_size={hidden_size} by heads={heads}")
    size = per_axis(image_size, dimensions)
    parts = {
        "encoder": ("stem", "encoder", "downs"),
        "bottleneck": ("to_tokens", "position", "transformer", "from_tokens"),
        "decoder": ("ups", "decoder"),
        "heads": ("head",),
    }
    network = TransBTS(in_channels, out_channels, size, features, hidden_size, mlp_size, layers, heads, dropout)
    return describe(network, 3, 1, parts=parts)


class TransBTS(nn.Module):
    """See `transbts`.

    Strided convolutions bring the image to an eighth of its size; every voxel of that map is a token. After the transformer the map is
    decoded with skip connections. Sides are padded with 0 at the far end to a multiple of 8, and the logits are cut again.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: Sequence[int],
        features: int,
        hidden_size: int,
        mlp_size: int,
        layers: int,
        heads: int,
        dropout: float,
    ) -> None:
        super().__init__()
        widths = [features * 2**level for level in range(4)]
        coarsest = widths[-1]
        self.stem = _conv(in_channels, features)
        self.encoder = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(w) for _ in range(n))) for w, n in zip(widths, (1, 2, 2, 4), strict=True)
        )
        self.downs = nn.ModuleList(_conv(w, 2 * w, stride=2) for w in widths[:-1])
        self.to_tokens = nn.Sequential(nn.GroupNorm(GROUPS, coarsest), nn.ReLU(), _conv(coarsest, hidden_size))
        self.position = nn.Parameter(torch.zeros(1, hidden_size, *(-(-s // DIVISOR) for s in size)))
        self.position_dropout = nn.Dropout(dropout)
        self.transformer = nn.Sequential(
            *(TransformerLayer(hidden_size, mlp_size, heads, dropout) for _ in range(layers)), nn.LayerNorm(hidden_size)
        )
        self.from_tokens = nn.Sequential(
            *(_conv(hidden_size, coarsest), nn.GroupNorm(GROUPS, coarsest), nn.ReLU()),
            *(_conv(coarsest, coarsest), nn.GroupNorm(GROUPS, coarsest), nn.ReLU()),
            ResidualBlock(coarsest),
        )
        self.ups = nn.ModuleList(Up(2 * w, w) for w in widths[-2::-1])
        self.decoder = nn.ModuleList(ResidualBlock(w) for w in widths[-2::-1])
        self.head = nn.Conv3d(features, out_channels, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Image (B, M, X, Y, Z) -> logits (B, K, X, Y, Z)."""
        sides = image.shape[2:]
        x = self.stem(F.pad(image, [margin for s in reversed(sides) for margin in (0, -s % DIVISOR)]))
        skips = []
        for block, down in zip(self.encoder, self.downs, strict=False):
            skips.append(block(x))
            x = down(skips[-1])
        x = self.from_tokens(self._transformed(self.to_tokens(self.encoder[-1](x))))
        for up, block in zip(self.ups, self.decoder, strict=True):
            x = block(up(x, skips.pop()))
        return self.head(x)[(..., *(slice(0, s) for s in sides))]

    def _transformed(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C, x, y, z) -> the same, every voxel having seen every other."""
        grid, position = x.shape[2:], self.position
        if position.shape[2:] != grid:
            position = F.interpolate(position, grid, mode="trilinear", align_corners=False)
        tokens = self.position_dropout((x + position).flatten(2).transpose(1, 2))
        return self.transformer(tokens).transpose(1, 2).unflatten(2, grid)


class ResidualBlock(nn.Module):
    """Two convolutions, each after normalization and ReLU, added to the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers = [layer for _ in range(2) for layer in (nn.GroupNorm(GROUPS, width), nn.ReLU(), _conv(width, width))]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x)


class Up(nn.Module):
    """Halves the width, doubles the size by a transposed convolution, and joins the encoder's map of that size."""

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__()
        self.narrow = nn.Conv3d(in_width, out_width, 1)
        self.enlarge = nn.ConvTranspose3d(out_width, out_width, 2, 2)
        self.join = nn.Conv3d(2 * out_width, out_width, 1)

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        return self.join(torch.cat([skip, self.enlarge(self.narrow(x))], dim=1))


class TransformerLayer(nn.Module):
    """Self-attention and a two-layer perceptron over tokens (B, N, C), each after layer normalization and residual."""

    def __init__(self, width: int, mlp_size: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, mlp_size), nn.GELU(), nn.Dropout(dropout), nn.Linear(mlp_size, width), nn.Dropout(dropout)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.dropout(self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))
        return x + self.mlp(self.mlp_norm(x))


def _conv(in_width: int, out_width: int, stride: int = 1) -> nn.Conv3d:
    return nn.Conv3d(in_width, out_width, 3, stride, padding=1)
