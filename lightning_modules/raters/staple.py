"""STAPLE: what binary masks of several raters (or ensemble members) estimate together, and how reliable each of them is.

The posterior of a voxel depends on nothing but who marked it, so the voxels are counted once by vote pattern (at most 2^R of them) and
expectation maximization runs on the counts: the work per iteration does not grow with the volume.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

MOST_RATERS = 20  # a million patterns
SURE = 1e-12  # sensitivities and specificities are kept this far from 0 and 1, where odds are infinite


@dataclass(frozen=True)
class VotePatterns:
    """The different combinations of votes of P >= 1 patterns and R raters.

    Attributes:
        votes: (P, R), float64, 1 where the rater marked.
        counts: (P,), float64, voxels with this pattern.
    """

    votes: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def of(cls, masks: torch.Tensor, valid: torch.Tensor | None = None) -> "VotePatterns":
        """Counts the patterns of `masks` (R, *spatial), bool, where `valid` (*spatial), bool (default: everywhere).

        Raises:
            ValueError: no rater or more than `MOST_RATERS`, or no valid voxel.
        """
        return cls.of_codes(vote_codes(masks, len(masks)), len(masks), valid)

    @classmethod
    def of_codes(cls, codes: torch.Tensor, raters: int, valid: torch.Tensor | None = None) -> "VotePatterns":
        """The same from the votes of every voxel as bits of one number (see `vote_codes`)."""
        found = torch.bincount((codes if valid is None else codes[valid]).flatten(), minlength=2**raters)
        patterns = found.nonzero()[:, 0]
        if not len(patterns):
            raise ValueError("no valid voxel")
        return cls(_bits(patterns, raters), found[patterns].double())


def vote_codes(masks: Iterable[torch.Tensor], raters: int) -> torch.Tensor:
    """Masks (*spatial), bool, one by one -> one number per voxel (*spatial), uint8 or int32; bit i says whether rater i marked.

    Raises:
        ValueError: no rater or more than `MOST_RATERS`.
    """
    if not 1 <= raters <= MOST_RATERS:
        raise ValueError(f"expected 1 to {MOST_RATERS} masks, got {raters}")
    codes: torch.Tensor | None = None
    for place, mask in enumerate(masks):
        votes = mask.to(torch.uint8 if raters <= 8 else torch.int32) << place
        codes = votes if codes is None else codes.bitwise_or_(votes)
    return codes


def _bits(codes: torch.Tensor, raters: int) -> torch.Tensor:
    """Codes (P,), int64 -> votes (P, R), float64."""
    return ((codes[:, None] >> torch.arange(raters, device=codes.device)) & 1).double()


@dataclass(frozen=True)
class Staple:
    """Fitted STAPLE of R raters.

    Attributes:
        sensitivity, specificity: (R,), float64, of each rater against the estimated truth.
        prior: share of foreground f.
        bias, weights: the posterior is sigmoid(bias + sum_i weights_i * vote_i); float and (R,), float64.
    """

    sensitivity: torch.Tensor
    specificity: torch.Tensor
    prior: float
    bias: float
    weights: torch.Tensor

    def posterior(self, masks: torch.Tensor) -> torch.Tensor:
        """Probability of foreground (*spatial), float32, from masks (R, *spatial) of the same raters, bool."""
        evidence = torch.full(masks.shape[1:], self.bias, dtype=torch.float32, device=masks.device)
        for mask, weight in zip(masks, self.weights.tolist(), strict=True):
            evidence.add_(mask, alpha=weight)
        return evidence.sigmoid_()

    def posterior_of(self, codes: torch.Tensor) -> torch.Tensor:
        """The same from the votes as bits of one number, (*spatial) (see `vote_codes`)."""
        every = torch.arange(2 ** len(self.weights), device=codes.device)
        table = (self.bias + _bits(every, len(self.weights)) @ self.weights).sigmoid().float()
        return torch.stack([table[plane.long()] for plane in codes])


def staple(masks: torch.Tensor, valid: torch.Tensor | None = None, tolerance: float = 1e-14, iterations: int = 10_000) -> Staple:
    """Simultaneous truth and performance level estimation (Warfield et al., IEEE TMI 23, 2004) of one binary region.

    As in ITK, the first estimate is the mean of the masks, the prior is the share of all marks and stays fixed, voxels are
    independent, and the default tolerance is ITK's.

    Args:
        masks: (R, *spatial), bool, one per rater.
        valid: (*spatial), bool, voxels that count.
        tolerance: ends when no sensitivity or specificity changes by more in the square.
        iterations: at most so many.

    Raises:
        ValueError: no rater or more than `MOST_RATERS`, or no valid voxel.
    """
    return staple_of(VotePatterns.of(masks, valid), tolerance, iterations)


def staple_of(patterns: VotePatterns, tolerance: float = 1e-14, iterations: int = 10_000) -> Staple:
    """`staple` of votes that have been counted already."""
    votes, counts = patterns.votes, patterns.counts
    posterior = votes.mean(dim=1)
    prior = float((counts * posterior).sum() / counts.sum())
    odds = torch.tensor(prior, dtype=torch.float64).clamp(SURE, 1 - SURE).logit().item()
    before = None
    for _ in range(iterations):
        inside, outside = counts * posterior, counts * (1 - posterior)
        p = (inside @ votes / inside.sum().clamp_min(SURE)).clamp(SURE, 1 - SURE)
        q = (outside @ (1 - votes) / outside.sum().clamp_min(SURE)).clamp(SURE, 1 - SURE)
        weights = p.logit() + q.logit()
        bias = odds + float(((1 - p).log() - q.log()).sum())
        posterior = (bias + votes @ weights).sigmoid()
        now = torch.cat([p, q])
        if before is not None and float((now - before).square().max()) <= tolerance:
            break
        before = now
    return Staple(p, q, prior, bias, weights)
