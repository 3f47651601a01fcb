"""Cutting boxes out of images and pasting them into others (after Yun et al., CutMix, ICCV 2019; Bai et al., CVPR 2023)."""

from collections.abc import Sequence

import torch


def box_mask(
    count: int, shape: Sequence[int], ratio: float, generator: torch.Generator, inside: torch.Tensor | None = None
) -> torch.Tensor:
    """Masks (count, 1, *shape), float: 0 in one random box of sides round(ratio * side) each, 1 elsewhere.

    Args:
        count: number of masks.
        shape: spatial sides.
        ratio: side of the box over side of the image, in (0, 1).
        generator: of the positions.
        inside: None = uniform over all positions; else bool (count, 1, *shape): the middle of the box is drawn among these voxels (such
            as the brain, so that no box holds only air) and the box then pushed into the image. Empty counts as None.
    """
    mask = torch.ones((count, 1, *shape), device=generator.device)
    sides = [max(1, round(ratio * side)) for side in shape]
    for number in range(count):
        draws = torch.rand(len(shape), generator=generator, device=generator.device).tolist()
        starts = [int(draw * (side - box + 1)) for draw, side, box in zip(draws, shape, sides, strict=True)]
        places = None if inside is None else inside[number, 0].nonzero()
        if places is not None and len(places):
            middle = places[int(draws[0] * len(places))].tolist()
            starts = [min(max(m - box // 2, 0), side - box) for m, side, box in zip(middle, shape, sides, strict=True)]
        mask[(number, 0, *(slice(start, start + box) for start, box in zip(starts, sides, strict=True)))] = 0
    return mask


def mix(background: torch.Tensor, box: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """background * mask + box * (1 - mask), in the type of `background`; images, labels and one-hot maps alike."""
    return torch.where(mask.bool(), background, box.to(background.dtype))


def halves(labeled: torch.Tensor, unlabeled: torch.Tensor) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """The pairs (labeled, unlabeled) that are mixed: of the first halves of both batches, and of the second.

    A half is that of the smaller batch, at least one sample; a batch of one sample is both halves.
    """
    half = max(1, min(len(labeled), len(unlabeled)) // 2)
    return (labeled[:half], unlabeled[:half]), (labeled[-half:], unlabeled[-half:])
