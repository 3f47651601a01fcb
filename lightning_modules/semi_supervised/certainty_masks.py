"""Where labels given to an unlabeled image cannot be trusted: disagreement of heads trained under different costs, and its rivals.

A mask says how many heads it needs beside the main one, how they learn (`head_loss`), which maps of a view are to be averaged over
windows (`maps`; `probabilities` is the main head's probabilities) and what is uncertain, given them (`uncertain`).
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import nn

from lesionbench.errors import SuiteError
from lesionbench.ranges import ASCENDING, AtLeastOne, Count, NotNegative, Positive, PositiveShare, Share
from lightning_modules.losses.cost_sensitive import cost_cross_entropy
from lightning_modules.losses.cross_entropy import voxel_binary_cross_entropy, voxel_cross_entropy, weighted_mean
from lightning_modules.networks.multi_head import every_head
from lightning_modules.uncertainty import mc_dropout


def decided(maps: torch.Tensor, kind: str) -> torch.Tensor:
    """Probabilities (B, K, *spatial) -> hard decisions: class indices (B, 1, *spatial), or of each region (B, K, *spatial)."""
    return maps.argmax(dim=1, keepdim=True) if kind == "softmax" else (maps > 0.5).long()


def confidence(maps: torch.Tensor, kind: str) -> torch.Tensor:
    """Probability of what is decided: (B, 1, *spatial) of classes, (B, K, *spatial) of regions."""
    return maps.amax(dim=1, keepdim=True) if kind == "softmax" else torch.maximum(maps, 1 - maps)


class ConservativeRadical:
    """Uncertain where a conservative and a radical head decide differently: M_uc = Y_rad XOR Y_con (Shi et al., IEEE TMI 2022, Eqs. 1-6).

    To the conservative head a false positive costs `alpha` times a false negative, to the radical one the reverse. The decisions compare
    the posterior with alpha / (1 + alpha) and 1 / (1 + alpha). For several classes under a softmax, background is weighed against all
    others, and what differs is the arg-max.

    Args:
        alpha: at least 1. With 1 the heads differ in nothing but their initial weights.

    Raises:
        SuiteError: an alpha below 1.
    """

    heads = ("conservative", "radical")

    def __init__(self, alpha: AtLeastOne = 5.0) -> None:
        if alpha < 1:
            raise SuiteError(f"model.mask.alpha={alpha}: the cost must be at least 1")
        self.alpha = float(alpha)

    def costs(self, swapped: bool = False) -> list[tuple[float, float]]:
        """Weights (background, foreground) of each head."""
        costs = [(self.alpha, 1.0), (1.0, self.alpha)]
        return costs[::-1] if swapped else costs

    def head_loss(self, method: Any, output: Mapping[str, Any], target: torch.Tensor) -> torch.Tensor:
        """L_con + L_rad on labels."""
        how = {"kind": method.target.kind, "by_weight": method.cost_norm == "weights"}
        return sum(cost_cross_entropy(z, target, *cost, **how) for z, cost in zip(output["heads"], self.costs(), strict=True))

    def maps(self, method: Any, view: torch.Tensor) -> dict[str, torch.Tensor]:
        with every_head(method.network):
            output = method.network(view)
        heads = dict(zip(self.heads, output["heads"], strict=True))
        return {name: method.target.activate(z) for name, z in {"probabilities": output["logits"], **heads}.items()}

    def uncertain(self, maps: Mapping[str, torch.Tensor], kind: str) -> torch.Tensor:
        """Bool (B, 1, *spatial) of classes, (B, K, *spatial) of regions."""
        return decided(maps["conservative"], kind) != decided(maps["radical"], kind)


class SoftmaxThreshold:
    """Uncertain where the main head's probability of what it decides is below a threshold.

    Args:
        threshold: in [0.5, 1].

    Raises:
        SuiteError: a threshold out of range.
    """

    heads: tuple[str, ...] = ()

    def __init__(self, threshold: Share = 0.8) -> None:
        if not 0.5 <= threshold <= 1:
            raise SuiteError(f"model.mask.threshold={threshold}: a decision has a probability between 0.5 and 1")
        self.threshold = threshold

    def head_loss(self, method: Any, output: Any, target: torch.Tensor) -> float:
        return 0.0

    def maps(self, method: Any, view: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"probabilities": method.probabilities(method.network(view))}

    def uncertain(self, maps: Mapping[str, torch.Tensor], kind: str) -> torch.Tensor:
        return confidence(maps.get("mean", maps["probabilities"]), kind) < self.threshold


class DropoutMask(SoftmaxThreshold):
    """Uncertain where the mean of several passes with dropout (Gal & Ghahramani, ICML 2016) is not confident enough.

    Args:
        threshold: of the confidence, in [0.5, 1].
        passes: 50 in Shi et al. (Table VI), with a rate of 0.5.
    """

    def __init__(self, threshold: Share = 0.8, passes: Count = 50) -> None:
        super().__init__(threshold)
        self.passes = _at_least_one("passes", passes)

    def maps(self, method: Any, view: torch.Tensor) -> dict[str, torch.Tensor]:
        maps = super().maps(method, view)
        with mc_dropout(method.network):
            passes = [method.probabilities(method.network(view)) for _ in range(self.passes)]
        return {**maps, "mean": torch.stack(passes).mean(dim=0)}


class AugmentationMask(SoftmaxThreshold):
    """Uncertain where the mean over randomly changed copies of the image, and the image itself, is not confident enough.

    Args:
        threshold: of the confidence, in [0.5, 1].
        passes: changed copies; 20 in Shi et al. (Table VI).
        flip: mirror half of the copies along the first axis (in 2D there).
        scale: range of the factor by which copies are resized, or None (0.8 to 1.1 in 2D there).
        crop: side of a random box relative to the image, or None: each copy then answers for its box only (in 3D there).

    Raises:
        SuiteError: a range or share that makes no sense.
    """

    def __init__(
        self,
        threshold: Share = 0.8,
        passes: Count = 20,
        flip: bool = True,
        scale: Annotated[Sequence[Positive], ASCENDING] | None = (0.8, 1.1),
        crop: PositiveShare | None = None,
    ) -> None:
        super().__init__(threshold)
        if scale is not None and not (len(scale) == 2 and 0 < scale[0] <= scale[1]):
            raise SuiteError(f"model.mask.scale={list(scale)}: expected [smallest, largest] factor, or null")
        if crop is not None and not 0 < crop <= 1:
            raise SuiteError(f"model.mask.crop={crop}: a share of the side in (0, 1], or null")
        self.passes, self.flip, self.scale, self.crop = _at_least_one("passes", passes), flip, scale, crop

    def maps(self, method: Any, view: torch.Tensor) -> dict[str, torch.Tensor]:
        maps = super().maps(method, view)
        total, count = maps["probabilities"].clone(), torch.ones_like(maps["probabilities"][:, :1])
        for _ in range(self.passes):
            box = self._box(view, method.network.divisor)
            total[box] += self._copied(method, view[box])
            count[box] += 1
        return {**maps, "mean": total / count}

    def _box(self, view: torch.Tensor, divisor: Sequence[int]) -> tuple[slice, ...]:
        if self.crop is None:
            return (slice(None), slice(None))
        sizes = [_fitting(self.crop * side, by, side) for side, by in zip(view.shape[2:], divisor, strict=True)]
        starts = [int(torch.randint(side - size + 1, ())) for side, size in zip(view.shape[2:], sizes, strict=True)]
        return (slice(None), slice(None), *(slice(a, a + size) for a, size in zip(starts, sizes, strict=True)))

    def _copied(self, method: Any, image: torch.Tensor) -> torch.Tensor:
        """Probabilities of one changed copy, on the grid of the image."""
        size, mode = image.shape[2:], ("bilinear", "trilinear")[image.dim() - 4]
        flipped = self.flip and bool(torch.rand(()) < 0.5)
        image = image.flip(2) if flipped else image
        if self.scale is not None:
            factor = float(torch.empty(()).uniform_(*self.scale))
            other = [_fitting(factor * side, by) for side, by in zip(size, method.network.divisor, strict=True)]
            image = F.interpolate(image, other, mode=mode, align_corners=False)
        maps = method.probabilities(method.network(image))
        maps = F.interpolate(maps, size, mode=mode, align_corners=False) if self.scale is not None else maps
        return maps.flip(2) if flipped else maps


class Aleatoric:
    """Uncertain where the softmax of logits drawn from N(f, sigma^2) scatters; sigma is a head of its own (Kendall & Gal, NeurIPS 2017, Eq. 12).

    sigma = softplus of that head. It learns from the likelihood of the labels under the mean of the drawn probabilities, which is added
    to the loss of f.

    Args:
        deviation: certain where the standard deviation of every class's probability is below this; 0.001 in Shi et al. (Table VI).
        samples: logits drawn; 20 in 2D there, 10 in 3D.
    """

    heads = ("sigma",)

    def __init__(self, deviation: NotNegative = 0.001, samples: Count = 20) -> None:
        if samples < 2:
            raise SuiteError(f"model.mask.samples={samples}: a deviation needs at least 2")
        self.deviation, self.samples = deviation, samples

    def head_loss(self, method: Any, output: Mapping[str, Any], target: torch.Tensor) -> torch.Tensor:
        logits, sigma = output["logits"], F.softplus(output["heads"][0])
        generator = method.generator("aleatoric")
        voxelwise = voxel_cross_entropy if method.target.kind == "softmax" else voxel_binary_cross_entropy
        drawn = [logits + sigma * self._normal(logits, generator) for _ in range(self.samples)]
        values = -torch.stack([-voxelwise(z, target) for z in drawn]).logsumexp(dim=0) + torch.tensor(float(self.samples)).log()
        valid = (target != -1).float()
        return weighted_mean(values, valid[:, 0] if method.target.kind == "softmax" else valid)

    def maps(self, method: Any, view: torch.Tensor) -> dict[str, torch.Tensor]:
        with every_head(method.network):
            output = method.network(view)
        logits, sigma = output["logits"], F.softplus(output["heads"][0])
        drawn = [method.target.activate(logits + sigma * self._normal(logits)) for _ in range(self.samples)]
        return {"probabilities": method.target.activate(logits), "deviation": torch.stack(drawn).std(dim=0, correction=0)}

    def uncertain(self, maps: Mapping[str, torch.Tensor], kind: str) -> torch.Tensor:
        deviation = maps["deviation"].amax(dim=1, keepdim=True) if kind == "softmax" else maps["deviation"]
        return deviation >= self.deviation

    def _normal(self, like: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)


def _fitting(length: float, divisor: int, most: int | None = None) -> int:
    """The multiple of `divisor` next to `length`, at least one and at most what fits into `most`."""
    steps = max(1, round(length / divisor))
    return divisor * (steps if most is None else min(steps, most // divisor))


def _at_least_one(name: str, value: int) -> int:
    if value < 1:
        raise SuiteError(f"model.mask.{name}={value}: at least 1")
    return value


CertaintyMask = ConservativeRadical | SoftmaxThreshold | Aleatoric


def with_heads(network: Any, heads: int) -> Any:
    """A network factory -> one that makes the network with so many heads.

    Raises:
        SuiteError: (when called) a network that has no heads to replicate.
    """

    def factory(**options: Any) -> nn.Module:
        try:
            made = network(**options, heads=heads)
        except TypeError as error:
            if "heads" not in str(error):
                raise
            made = None
        if not hasattr(made, "branches"):
            raise SuiteError("this method needs a network with heads: model/network=multi_head_unet, multi_head_vnet or multi_head_resnet")
        return made

    return factory
