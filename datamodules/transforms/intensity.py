"""Intensity transforms that TorchIO lacks, as TorchIO transforms; randomness comes from torch's global generator.

Most `ChannelTransform`s are those of nnU-Net's default training (Isensee et al., Nature Methods 2021, Supplementary Note 4; version 2): they draw
per channel and work on the tensor in place.
"""

from collections.abc import Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torchio import Subject
from torchio.transforms.augmentation import RandomTransform
from torchio.transforms.intensity_transform import IntensityTransform

from lesionbench.errors import SuiteError
from lesionbench.ranges import ASCENDING, NotNegative, Positive, PositiveShare, Real, Share


class ChannelTransform(RandomTransform, IntensityTransform):
    """Base: calls `change` with single channels (x, y, z) of every intensity image, and keeps what it returns.

    Args:
        p: probability that the transform is applied at all.
        p_channel: probability of each channel, once it is.
    """

    def __init__(self, p: Share = 1, p_channel: Share = 1, **options) -> None:
        super().__init__(p=p, **options)
        self.p_channel = p_channel

    def apply_transform(self, subject: Subject) -> Subject:
        for image in self.get_images(subject):
            for channel in image.data:
                if torch.rand(1).item() < self.p_channel:
                    channel.copy_(self.change(channel))
        return subject

    def change(self, channel: torch.Tensor) -> torch.Tensor:
        raise TypeError(f"{type(self).__name__} must define change()")


class RandomChannelBlur(ChannelTransform):
    """Gaussian blur whose standard deviation, in voxels, is drawn per channel and axis from `std`; axes of length one stay."""

    def __init__(self, std: Annotated[Sequence[NotNegative], ASCENDING] = (0.5, 1.0), **options) -> None:
        super().__init__(**options)
        self.std = tuple(std)

    def change(self, channel: torch.Tensor) -> torch.Tensor:
        sigmas = [self.sample_uniform(*self.std) if n > 1 else 0 for n in channel.shape]
        return torch.from_numpy(gaussian_filter(channel.numpy(), sigmas, truncate=6))


class RandomBrightness(ChannelTransform):
    """Multiplies a channel by a factor from `factors`: below or above 1 with equal probability."""

    def __init__(self, factors: Annotated[Sequence[NotNegative], ASCENDING] = (0.75, 1.25), **options) -> None:
        super().__init__(**options)
        self.factors = tuple(factors)

    def change(self, channel: torch.Tensor) -> torch.Tensor:
        return channel.mul_(_around_one(*self.factors))


class RandomAdditiveBrightness(ChannelTransform):
    """Adds a normal number of mean 0 and standard deviation `std`, in units of the normalized image, to a channel."""

    def __init__(self, std: NotNegative = 0.2, **options) -> None:
        super().__init__(**options)
        self.std = std

    def change(self, channel: torch.Tensor) -> torch.Tensor:
        return channel.add_(self.std * torch.randn(1).item())


class RandomContrast(ChannelTransform):
    """Stretches a channel about its mean by a factor from `factors`, clipped to the range it had."""

    def __init__(self, factors: Annotated[Sequence[NotNegative], ASCENDING] = (0.75, 1.25), **options) -> None:
        super().__init__(**options)
        self.factors = tuple(factors)

    def change(self, channel: torch.Tensor) -> torch.Tensor:
        low, high = torch.aminmax(channel)
        mean = channel.mean()
        return channel.sub_(mean).mul_(_around_one(*self.factors)).add_(mean).clamp_(low, high)


class RandomLowResolution(ChannelTransform):
    """Sampled down by nearest neighbors to a share from `zoom` of each side, then up again linearly; axes of length one stay."""

    def __init__(self, zoom: Annotated[Sequence[PositiveShare], ASCENDING] = (0.5, 1.0), **options) -> None:
        super().__init__(**options)
        self.zoom = tuple(zoom)

    def change(self, channel: torch.Tensor) -> torch.Tensor:
        zoom = self.sample_uniform(*self.zoom)
        small = F.interpolate(channel[None, None], [max(1, round(n * zoom)) for n in channel.shape], mode="nearest-exact")
        return F.interpolate(small, channel.shape, mode="trilinear")[0, 0]


class RandomPower(ChannelTransform):
    """Gamma correction of a channel mapped to [0, 1], with its mean and standard deviation put back afterwards.

    Args:
        gamma: range of the exponent, below or above 1 with equal probability.
        invert: work on the negative image.
    """

    def __init__(self, gamma: Annotated[Sequence[Positive], ASCENDING] = (0.7, 1.5), invert: bool = False, **options) -> None:
        super().__init__(**options)
        self.gamma, self.invert = tuple(gamma), invert

    def change(self, channel: torch.Tensor) -> torch.Tensor:
        if self.invert:
            channel.neg_()
        mean, std = _moments(channel)
        low, high = torch.aminmax(channel)
        extent = (high - low).clamp_min(1e-7)
        channel.sub_(low).div_(extent).pow_(_around_one(*self.gamma))
        new_mean, new_std = _moments(channel)
        factor = std / new_std.clamp_min(1e-7)
        channel.mul_(factor).add_(mean - new_mean * factor)
        return channel.neg_() if self.invert else channel


class RandomRelativeNoise(ChannelTransform):
    """Adds Gaussian noise to a channel whose standard deviation is `share` of that of the channel's values above 0."""

    def __init__(self, share: Share = 0.1, **options) -> None:
        super().__init__(**options)
        self.share = share

    def change(self, channel: torch.Tensor) -> torch.Tensor:
        positive = channel[channel > 0]
        spread = positive.std(correction=0) if len(positive) else 0.0
        return channel.add_(torch.randn_like(channel) * (self.share * spread))


class RandomUniformNoise(ChannelTransform):
    """Adds noise to a channel that is uniform between -`amplitude` and `amplitude`, in units of the normalized image."""

    def __init__(self, amplitude: NotNegative = 0.1, **options) -> None:
        super().__init__(**options)
        self.amplitude = amplitude

    def change(self, channel: torch.Tensor) -> torch.Tensor:
        return channel.add_(self.amplitude * (2 * torch.rand_like(channel) - 1))


class RandomDroppedChannel(RandomTransform, IntensityTransform):
    """Sets one channel, each as likely, to 0.

    Args:
        p: probability that it is applied.
    """

    def apply_transform(self, subject: Subject) -> Subject:
        for image in self.get_images(subject):
            image.data[torch.randint(len(image.data), ())] = 0
        return subject


class RandomScaleShift(RandomTransform, IntensityTransform):
    """Multiplies all channels by one factor and adds one number, as MONAI's RandScaleIntensity and RandShiftIntensity in turn.

    Args:
        scale: the factor is uniform in [1 - scale, 1 + scale].
        shift: the number is uniform in [-shift, shift], in units of the normalized image.
        per_channel: each channel has its own factor and number.

    Raises:
        SuiteError: a negative scale or shift.
    """

    def __init__(self, scale: NotNegative = 0.1, shift: NotNegative = 0.1, per_channel: bool = False, **options: Any) -> None:
        if scale < 0 or shift < 0:
            raise SuiteError(f"augmentation: scale={scale} and shift={shift} must not be negative")
        super().__init__(**options)
        self.scale, self.shift, self.per_channel = scale, shift, per_channel

    def apply_transform(self, subject: Subject) -> Subject:
        images = self.get_images(subject)
        shape = (len(images[0].data), 1, 1, 1) if self.per_channel else (1,)
        factor, offset = 1 + self.scale * (2 * torch.rand(shape) - 1), self.shift * (2 * torch.rand(shape) - 1)
        for image in images:
            image.set_data(image.data * factor + offset)
        return subject


class RandomNormalIntensity(RandomTransform, IntensityTransform):
    """Gain and shift of each channel, and noise on each voxel, all from normal distributions (Fonov et al., BrainLes 2021, Section 2.3).

    Args:
        gain, shift, noise: standard deviations, the last two in units of the normalized image. The mean gain is 1.
        signal: share of the samples whose noise is signal-dependent instead: at a voxel x, standard deviation noise * sqrt(x - min x).
        p: probability that it is applied.
    """

    def __init__(
        self, gain: NotNegative = 0.1, shift: NotNegative = 0.1, noise: NotNegative = 0.1, signal: Share = 0.0, **options: Any
    ) -> None:
        super().__init__(**options)
        self.gain, self.shift, self.noise, self.signal = gain, shift, noise, signal

    def apply_transform(self, subject: Subject) -> Subject:
        for image in self.get_images(subject):
            data = image.data.float()
            each = (len(data), 1, 1, 1)
            data = data * (1 + self.gain * torch.randn(each)) + self.shift * torch.randn(each)
            poisson = torch.rand(1).item() < self.signal
            spread = (data - data.amin(dim=(1, 2, 3), keepdim=True)).sqrt() if poisson else 1.0
            image.set_data(data + self.noise * spread * torch.randn_like(data))
        return subject


class RandomChannelNoise(RandomTransform, IntensityTransform):
    """Replaces one channel, drawn anew, by Gaussian noise of mean 0 and standard deviation 1 (Akbar et al., BrainLes 2021, Section 2.5).

    Args:
        p: probability that it is applied.
    """

    def apply_transform(self, subject: Subject) -> Subject:
        for image in self.get_images(subject):
            image.data[int(torch.randint(len(image.data), ()))].normal_()
        return subject


class MaskBackground(IntensityTransform):
    """Sets the image outside the map `mask` of the same sample to `value`; None = the background, as before the intensities were changed."""

    def __init__(self, mask: str = "brain_mask", value: Real | None = None, **options) -> None:
        super().__init__(**options)
        self.mask, self.value = mask, value
        self.args_names = ["mask", "value"]

    def apply_transform(self, subject: Subject) -> Subject:
        outside = subject[self.mask].data[0] == 0
        for image in self.get_images(subject):
            image.set_data(filled(image.data, outside, background(subject, len(image.data)) if self.value is None else self.value))
        return subject


def background(subject: Subject, channels: int) -> torch.Tensor:
    """What lies beyond the border of the case that a sample was cut from, in network units (M,); 0 where the sample does not say."""
    return subject.get("outside", torch.zeros(channels))


def filled(image: torch.Tensor, where: torch.Tensor, values: torch.Tensor | float) -> torch.Tensor:
    """(M, x, y, z) with `values`, one or one per channel, where the mask (x, y, z) says so."""
    return torch.where(where, torch.as_tensor(values, dtype=image.dtype).reshape(-1, 1, 1, 1), image)


def _around_one(low: float, high: float) -> float:
    """Uniform below 1 or above 1, each with probability 0.5; uniform in the range where it lies on one side."""
    below = (torch.rand(1).item() < 0.5 and low < 1) or high <= 1
    low, high = (low, min(1.0, high)) if below else (max(low, 1.0), high)
    return low + (high - low) * torch.rand(1).item()


def _moments(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation in two passes over memory that are faster than `torch.std_mean`."""
    flat = values.flatten()
    mean = flat.mean()
    variance = torch.dot(flat, flat) / flat.numel() - mean.square()
    return mean, variance.clamp_min(0).sqrt()
