"""SPiN: a 2.5D U-Net guided by a subpixel embedding (Wong et al., "Small Lesion Segmentation in Brain MRIs with Subpixel Embedding",
BrainLes 2021).

A strided encoder loses lesions of a few pixels. A light branch that never goes below the resolution of the input embeds it at twice that
resolution; the decoder sees the embedding at 2x and 1x as skip connections, predicts on the 2x grid, and a few convolutions learn how to
weigh the four subpixels of every pixel. Details that the paper leaves open (widths, stem, slope) are those of the authors' settings that
give the counts of the paper for the embedding, 16 K, and for the downsampler, 11 K; in all they are 5.17 M, where the paper says about 5.3 M.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from lesionbench.errors import SuiteError, unknown
from lesionbench.ranges import Count
from lightning_modules.networks.contract import describe

GUIDANCE = ("learned", "bilinear_input", "nearest_input", "extra_resblocks", "none")
DOWNSAMPLERS = ("learned", "bilinear", "none")
EMBEDDINGS = ("release", "paper")
LD_INPUTS = ("latent", "latent_and_logits")
COMBINATIONS = ("logits", "probs")
LATENTS = ("merged", "concatenated")
SLOPE = 0.1


class ConvNormAct(nn.Sequential):
    """Convolution without bias (padding kernel // 2), batch normalization, LeakyReLU(0.1): (B, i, H, W) -> (B, o, ~H / stride, ~W / stride)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.LeakyReLU(SLOPE),
        )


class ResBlock(nn.Module):
    """Two `ConvNormAct` of kernel 3, the shortcut added, LeakyReLU; the shortcut is a bare 1x1 convolution where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.convs = nn.Sequential(ConvNormAct(in_channels, out_channels, 3, stride), ConvNormAct(out_channels, out_channels))
        same = in_channels == out_channels and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
        self.activation = nn.LeakyReLU(SLOPE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.convs(x) + self.shortcut(x))


class Encoder(nn.Module):
    """ResNet-18 layout: (B, i, H, W) -> features at 1/2, 1/4, 1/8 ..., one per width; sides are rounded up.

    Args:
        widths: channels of the 7x7 stem (1/2), then of every stage of two residual blocks.
        extra_blocks: residual blocks added behind the stem (the ablation that only adds parameters).
    """

    def __init__(self, in_channels: int, widths: Sequence[int], extra_blocks: int = 0) -> None:
        super().__init__()
        extra = [ResBlock(widths[0], widths[0]) for _ in range(extra_blocks)]
        self.stem = nn.Sequential(ConvNormAct(in_channels, widths[0], 7, 2), *extra)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        strides = [1] + [2] * (len(widths) - 2)
        self.stages = nn.ModuleList(
            nn.Sequential(ResBlock(i, o, s), ResBlock(o, o)) for i, o, s in zip(widths[:-1], widths[1:], strides, strict=True)
        )

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        features = [self.stem(x)]
        x = self.pool(features[0])
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


class SubpixelEmbedding(nn.Module):
    """The input at twice its resolution, channels rearranged to space: (B, i, H, W) -> (B, o, 2H, 2W); no stride, no pooling.

    Args:
        width: channels of the feature extraction.
        out_channels: channels of the embedding.
        form: `release` (16 016 parameters at the defaults, the paper's 16 K) or `paper` (two residual blocks, as Section 3 words it; 8.4 K).
    """

    def __init__(self, in_channels: int, width: int = 16, out_channels: int = 8, form: str = "release") -> None:
        super().__init__()
        if form == "release":
            self.first: nn.Module = ConvNormAct(in_channels, width, 5)
            self.features = nn.Sequential(ResBlock(width, width), ResBlock(width, width), ConvNormAct(width, width))
            self.to_space = nn.Sequential(ConvNormAct(width, 4 * width, 1), nn.PixelShuffle(2))
            self.last: nn.Module = nn.Conv2d(width, out_channels, 3, padding=1, bias=False)
        else:
            self.first = nn.Identity()
            self.features = nn.Sequential(ResBlock(in_channels, width), ResBlock(width, width))
            self.to_space = nn.PixelShuffle(2)
            self.last = nn.Sequential(
                nn.Conv2d(width // 4, out_channels, 1, bias=False), nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
            )
        self.form = form

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.first(x)
        features = self.features(first)
        return self.last(self.to_space(features + first if self.form == "release" else features))


class SubpixelGuidance(nn.Module):
    """Skip connections {resolution: (B, width, ...)} at 2x and, from the same embedding rearranged to channels, at 1x."""

    def __init__(self, embedding: nn.Module, channels: int, width: int, resolutions: Sequence[int]) -> None:
        super().__init__()
        self.embedding, self.resolutions = embedding, tuple(resolutions)
        self.skips = nn.ModuleDict({str(r): ConvNormAct(channels * (4 if r == 1 else 1), width) for r in resolutions})

    def forward(self, slices: torch.Tensor) -> dict[int, torch.Tensor]:
        embedded = self.embedding(slices)
        return {r: self.skips[str(r)](F.pixel_unshuffle(embedded, 2) if r == 1 else embedded) for r in self.resolutions}


class InterpolatedGuidance(nn.Module):
    """What the learned guidance is compared with: the input resized to 2x, one convolution, as the 2x skip connection."""

    resolutions = (2,)

    def __init__(self, in_channels: int, width: int, mode: str) -> None:
        super().__init__()
        self.resize = nn.Upsample(scale_factor=2, mode=mode)
        self.conv = ConvNormAct(in_channels, width)

    def forward(self, slices: torch.Tensor) -> dict[int, torch.Tensor]:
        return {2: self.conv(self.resize(slices))}


class DecoderBlock(nn.Module):
    """Nearest-neighbor resize to `size`, convolution, skip connection, convolution (unless `merged` is false)."""

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int, merged: bool = True) -> None:
        super().__init__()
        self.up = ConvNormAct(in_channels, out_channels)
        self.merge = ConvNormAct(out_channels + skip_channels, out_channels) if merged else nn.Identity()

    def forward(self, x: torch.Tensor, skip: torch.Tensor | None, size: Sequence[int]) -> torch.Tensor:
        x = self.up(F.interpolate(x, size=tuple(size), mode="nearest"))
        return self.merge(x if skip is None else torch.cat([x, skip], dim=1))


class LearnedDownsampler(nn.Module):
    """Softmax weights of the four subpixels of every pixel (Wong et al., Section 3.1).

    Args:
        latent_channels: channels of the decoder's last features (2H x 2W).
        logit_channels: subpixel logit channels K that the weights also see, 0 for none.
        width: channels of the two hidden convolutions.

    Shapes: latent (B, C, 2H, 2W), logits (B, K, 2H, 2W) -> weights (B, 4, H, W), in the order of `pixel_unshuffle`, summing to 1.
    """

    def __init__(self, latent_channels: int, logit_channels: int = 0, width: int = 16) -> None:
        super().__init__()
        self.sees_logits = logit_channels > 0
        self.layers = nn.Sequential(
            nn.Conv2d(4 * (latent_channels + logit_channels), width, 3, padding=1, bias=False),
            nn.LeakyReLU(SLOPE),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.LeakyReLU(SLOPE),
            nn.Conv2d(width, 4, 1, bias=False),
        )

    def forward(self, latent: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        seen = torch.cat([latent, logits], dim=1) if self.sees_logits else latent
        return self.layers(F.pixel_unshuffle(seen, 2)).softmax(dim=1)


class SubpixelNet(nn.Module):
    """The SPiN network.

    Args:
        in_channels: image channels M.
        out_channels: logit channels K.
        slab: slices per sample k, odd; the answer is for the middle one.
        widths: encoder channels at 1/2, 1/4 ... (see `Encoder`).
        decoder_widths: channels of the decoder from the deepest level up to 2x; one more than `widths`.
        embedding_width, guidance_width, downsampler_width: channels of the embedding's features, of the embedding and its skip
            connections, and of the downsampler's hidden layers.
        spg: subpixel guidance: `learned`; or in its place the input resized to 2x (`bilinear_input`, `nearest_input`; 2x skip only),
            two residual blocks more in the encoder (`extra_resblocks`), or `none` (Table 4).
        guidance_resolutions: where `learned` guidance enters the decoder: 1, 2 or both.
        embedding: form of the embedding, see `SubpixelEmbedding`.
        downsampler: `learned`; `bilinear` (the mean of the four subpixels); `none` = logits stay on the 2x grid.
        latent: g(x), which head and downsampler see: `merged` (of the last decoder width, after one more convolution), or `concatenated`, the last
            decoder features beside the 2x skip connection, whose 16 + 8 channels are those that the paper counts.
        ld_input: what the learned downsampler sees: `latent`, or `latent_and_logits` as the paper words it.
        combine: weighted mean of `logits`, or of `probs` (sigmoids; the answer is their logit again).

    Shapes: image (B, M, H, W, k), any sides -> logits (B, K, H, W); with `downsampler=none` (B, K, 2H, 2W). In training the deepest
    level needs more than one pixel: a side of more than 2 ** len(widths).

    Raises:
        SuiteError: an unknown choice, widths that do not fit, an even slab, or an input with another number of slices.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        slab: Count = 5,
        widths: Sequence[Count] = (32, 64, 128, 196, 196),
        decoder_widths: Sequence[Count] = (196, 128, 64, 32, 16, 16),
        embedding_width: Count = 16,
        guidance_width: Count = 8,
        downsampler_width: Count = 16,
        spg: str = "learned",
        guidance_resolutions: Sequence[Count] = (1, 2),
        embedding: str = "release",
        downsampler: str = "learned",
        ld_input: str = "latent",
        combine: str = "logits",
        latent: str = "merged",
    ) -> None:
        super().__init__()
        for name, value, known in [
            ("spg", spg, GUIDANCE),
            ("embedding", embedding, EMBEDDINGS),
            ("downsampler", downsampler, DOWNSAMPLERS),
            ("ld_input", ld_input, LD_INPUTS),
            ("combine", combine, COMBINATIONS),
            ("latent", latent, LATENTS),
        ]:
            if value not in known:
                raise unknown(f"network.{name}", value, known)
        if slab < 1 or slab % 2 == 0:
            raise SuiteError(f"network.slab={slab}: a slab needs a middle slice, use an odd number")
        if len(widths) < 2 or len(decoder_widths) != len(widths) + 1:
            raise SuiteError(f"network.decoder_widths: one number more than network.widths {list(widths)}; got {list(decoder_widths)}")
        if not guidance_resolutions or not set(guidance_resolutions) <= {1, 2}:
            raise SuiteError(f"network.guidance_resolutions: 1, 2 or both; got {list(guidance_resolutions)}")
        channels = in_channels * slab
        self.combine = combine
        self.encoder = Encoder(channels, widths, extra_blocks=2 if spg == "extra_resblocks" else 0)
        self.guidance: nn.Module | None = None
        if spg == "learned":
            embedded = SubpixelEmbedding(channels, embedding_width, guidance_width, embedding)
            self.guidance = SubpixelGuidance(embedded, guidance_width, guidance_width, guidance_resolutions)
        elif spg in ("bilinear_input", "nearest_input"):
            self.guidance = InterpolatedGuidance(channels, guidance_width, spg.removesuffix("_input"))
        guided = [guidance_width if self.guidance is not None and r in self.guidance.resolutions else 0 for r in (1, 2)]
        self.decoder = nn.ModuleList(
            DecoderBlock(i, skip, o, merged=latent == "merged" or number < len(widths))
            for number, (i, skip, o) in enumerate(
                zip([widths[-1], *decoder_widths[:-1]], [*widths[-2::-1], *guided], decoder_widths, strict=True)
            )
        )
        last = decoder_widths[-1] + (guided[-1] if latent == "concatenated" else 0)
        self.head = nn.Conv2d(last, out_channels, 3, padding=1, bias=False)
        self.downsampler: nn.Module | None = None
        if downsampler == "learned":
            seen = out_channels if ld_input == "latent_and_logits" else 0
            self.downsampler = LearnedDownsampler(last, seen, downsampler_width)
        self.keeps_subpixels = downsampler == "none"
        parts = {"encoder": ["encoder"], "decoder": ["decoder"], "heads": ["head"]}
        parts |= {name: [name] for name in ("guidance", "downsampler") if getattr(self, name) is not None}
        describe(self, 2, 1, 2 ** len(widths) + 1, slab=slab, parts=parts)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        if image.dim() != 5 or image.shape[-1] != self.slab:
            raise SuiteError(f"SubpixelNet takes (B, M, H, W, {self.slab}), got {tuple(image.shape)}: set the data view to this slab")
        slices = image.permute(0, 1, 4, 2, 3).flatten(1, 2)
        latent = self.latent(slices)
        logits = self.head(latent)
        if self.keeps_subpixels:
            return logits
        if self.downsampler is None:
            weights = logits.new_full((len(logits), 4, *slices.shape[2:]), 0.25)
        else:
            weights = self.downsampler(latent, logits)
        return combined(logits, weights, self.combine)

    def latent(self, slices: torch.Tensor) -> torch.Tensor:
        """Decoder features (B, C, 2H, 2W) of slices (B, M * k, H, W)."""
        height, width = slices.shape[2:]
        *skips, x = self.encoder(slices)
        guidance = self.guidance(slices) if self.guidance is not None else {}
        levels = [(skip, skip.shape[2:]) for skip in reversed(skips)]
        levels += [(guidance.get(1), (height, width)), (guidance.get(2), (2 * height, 2 * width))]
        for block, (skip, size) in zip(self.decoder, levels, strict=True):
            x = block(x, skip, size)
        return x


def combined(logits: torch.Tensor, weights: torch.Tensor, what: str = "logits") -> torch.Tensor:
    """Weighted mean over the four subpixels: logits (B, K, 2H, 2W), weights (B, 4, H, W) that sum to 1 -> logits (B, K, H, W).

    Args:
        what: `logits`, or `probs` for the mean of the sigmoids, given as a logit (probabilities are kept 1e-6 away from 0 and 1).
    """
    values = logits if what == "logits" else logits.float().sigmoid()
    mean = (weights[:, None] * F.pixel_unshuffle(values, 2).unflatten(1, (-1, 4))).sum(dim=2)
    return mean if what == "logits" else mean.logit(eps=1e-6)
