"""Lesion-wise measures: every connected component counts as one lesion, however large. Components touch by face, edge or corner."""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from lightning_modules.metrics.box import bounding_box

FEW_RUNS = 50
"""Components are found run by run where there are fewer runs of voxels than a grid's voxels over this."""


class LesionCounts(NamedTuple):
    """`detected` and `missed` true lesions, and `false` predicted lesions."""

    detected: int
    missed: int
    false: int


def components(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Connected components (26 neighbors in 3D, 8 in 2D) of a boolean mask: labels 1..n in the order of their first voxels, and n.

    The labels are those of `scipy.ndimage.label`, at a tenth of the cost where few voxels of a large grid are set.
    """
    mask = np.ascontiguousarray(mask)
    *rows, width = mask.shape
    voxels = np.flatnonzero(mask)
    if not voxels.size:
        return np.zeros(mask.shape, np.int32), 0
    first = np.r_[True, (np.diff(voxels) > 1) | (voxels[1:] % width == 0)]  # of a run of voxels along the last axis
    if np.count_nonzero(first) > mask.size / FEW_RUNS:
        return ndimage.label(mask, structure=np.ones((3,) * mask.ndim))
    starts, ends = voxels[first], voxels[np.r_[first[1:], True]]
    places = np.unravel_index(starts // width, rows) if rows else ()
    edges = [np.empty((2, 0), np.int64)]
    for offset in product((-1, 0, 1), repeat=len(rows)):
        if offset <= (0,) * len(rows):
            continue  # every pair of rows is looked at from one side
        moved = [place + step for place, step in zip(places, offset, strict=True)]
        inside = np.flatnonzero(np.all([(place >= 0) & (place < size) for place, size in zip(moved, rows, strict=True)], axis=0))
        row = np.ravel_multi_index([place[inside] for place in moved], rows) * width
        low, high = np.maximum(starts[inside] % width - 1, 0) + row, np.minimum(ends[inside] % width + 1, width - 1) + row
        begin, stop = np.searchsorted(ends, low), np.searchsorted(starts, high, side="right")  # runs of that row that touch
        counts = stop - begin
        others = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(begin, counts)
        edges.append(np.stack([np.repeat(inside, counts), others]))
    ones, twos = np.concatenate(edges, axis=1)
    graph = coo_array((np.ones(len(ones), bool), (ones, twos)), shape=(len(starts),) * 2)
    n, of_run = connected_components(graph, directed=False)
    labels = np.zeros(mask.size, np.int32)
    labels[voxels] = np.repeat(of_run + 1, ends - starts + 1)
    return labels.reshape(mask.shape), int(n)


def overlaps(found: np.ndarray, lesions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Voxels that every true lesion shares with every predicted one (true, predicted), and the sizes (true,) and (predicted,) in voxels.

    Args:
        found, lesions: labels 1..n of the predicted and of the true lesions, arrays of one shape; 0 is background.
    """
    places = np.flatnonzero((found > 0) | (lesions > 0))
    found, lesions = found.ravel()[places], lesions.ravel()[places].astype(np.int64)
    n_found, n_lesions = int(found.max(initial=0)), int(lesions.max(initial=0))
    joint = np.bincount(lesions * (n_found + 1) + found, minlength=(n_lesions + 1) * (n_found + 1)).reshape(n_lesions + 1, n_found + 1)
    return joint[1:, 1:], joint[1:].sum(axis=1), joint[:, 1:].sum(axis=0)


def lesion_counts(prediction: np.ndarray, truth: np.ndarray, min_iou: float = 0.0) -> LesionCounts:
    """Lesions found, missed and made up.

    A true and a predicted lesion match when they share a voxel (`min_iou=0`, as in ISLES 2022) or when their intersection over union is
    at least `min_iou`. A true lesion with a match is detected, one without is missed; a predicted lesion without a match is false.

    Args:
        prediction, truth: boolean masks of one shape.
        min_iou: in [0, 1].
    """
    box = bounding_box(prediction | truth)
    shared, true_sizes, found_sizes = overlaps(components(prediction[box])[0], components(truth[box])[0])
    union = true_sizes[:, None] + found_sizes - shared
    match = (shared > 0) & (shared >= min_iou * union)
    detected = int(match.any(axis=1).sum())
    return LesionCounts(detected, len(true_sizes) - detected, len(found_sizes) - int(match.any(axis=0).sum()))


def lesion_f1(prediction: np.ndarray, truth: np.ndarray, min_iou: float = 0.0) -> float:
    """F1 over lesions, 2 detected / (2 detected + missed + false), in [0, 1]; 1 when both masks are empty. See `lesion_counts`."""
    detected, missed, false = lesion_counts(prediction, truth, min_iou)
    return 2 * detected / (2 * detected + missed + false) if detected + missed + false else 1.0


def lesion_dice(prediction: np.ndarray, truth: np.ndarray, dilation: int = 0) -> float:
    """Lesion-wise Dice in the manner of BraTS 2023, in [0, 1]; 1 when both masks are empty.

    Every true lesion is compared with the union of the predicted lesions that reach into it; a predicted lesion that reaches into none
    counts as a further lesion with Dice 0; the result is the mean. No lesion is left out for its size.

    Args:
        prediction, truth: boolean masks of one shape.
        dilation: true lesions that touch once both are dilated so many voxels are one, and "into it" means into the dilated lesion
            (BraTS 2023 glioma: 3). The dilated voxels themselves are not scored.
    """
    pairs, false = joined_lesions(prediction, truth, dilation)
    scores = [2 * np.count_nonzero(found & lesion) / (np.count_nonzero(lesion) + np.count_nonzero(found)) for lesion, found in pairs]
    return sum(scores) / (len(scores) + false) if scores or false else 1.0


def joined_lesions(prediction: np.ndarray, truth: np.ndarray, dilation: int = 0) -> tuple[list[tuple[np.ndarray, np.ndarray]], int]:
    """Every true lesion with the predicted lesions that reach into it, and the number of predicted lesions that reach into none.

    Args:
        prediction: boolean mask.
        truth: boolean mask of the same shape, whose lesions that touch once dilated are one; or integers, the numbers 1..n of lesions as they
            are to be told apart.
        dilation: see `lesion_dice`.

    Returns:
        pairs of masks, the lesion and the union of its predicted ones (empty where there is none), on the box that holds both.
    """
    if not (prediction.any() or truth.any()):
        return [], 0
    box = bounding_box(prediction | (truth > 0))
    found, n_found = components(np.pad(prediction[box], dilation))  # the padding lets lesions grow as on the whole grid
    truth = np.pad(truth[box], dilation)
    lesions = components(_dilated(truth, dilation))[0] * truth if truth.dtype == bool else truth
    found_boxes, reached, pairs = ndimage.find_objects(found), np.zeros(n_found + 1, bool), []
    for index, tight in enumerate(ndimage.find_objects(lesions), start=1):
        window = tuple(slice(max(s.start - dilation, 0), s.stop + dilation) for s in tight)
        partners = np.unique(found[window][_dilated(lesions[window] == index, dilation)])
        partners = partners[partners > 0]
        reached[partners] = True
        around = zip(tight, *(found_boxes[partner - 1] for partner in partners), strict=True)
        both = tuple(slice(min(s.start for s in axis), max(s.stop for s in axis)) for axis in around)
        pairs.append((lesions[both] == index, np.isin(found[both], partners)))
    return pairs, n_found - int(np.count_nonzero(reached))


def lesions_across_tissues(
    tissues: Mapping[str, np.ndarray], neighbors: Mapping[str, Sequence[str]], dilation: int
) -> dict[str, np.ndarray]:
    """Lesions of tissues where lesions of one tissue that touch the same lesion of another are one.

    At first, lesions that touch once dilated are one. Then each tissue is joined by its neighbors in turn: a lesion that touches some of the
    neighbor's goes by the first of these, in the order of their first voxels once dilated. Neighbors are taken as they were at first.

    Args:
        tissues: boolean masks of one shape, the whole grid.
        neighbors: tissue -> the tissues that join its lesions, in turn.
        dilation: in voxels, by faces and edges.

    Returns:
        the numbers of the lesions, 1..n and 0 elsewhere, by tissue.
    """
    grid = next(iter(tissues.values())).shape
    inside = bounding_box(np.logical_or.reduce(list(tissues.values())))
    box = tuple(slice(max(s.start - dilation, 0), min(s.stop + dilation, size)) for s, size in zip(inside, grid, strict=True))
    first = {name: components(_dilated(mask[box], dilation))[0] * mask[box] for name, mask in tissues.items()}
    joined = {}
    for name, others in neighbors.items():
        lesions = first[name]
        for other in others:
            lesions = _joined_by(lesions, first[other])
        joined[name] = np.zeros(grid, np.int32)
        joined[name][box] = lesions
    return joined


def _joined_by(lesions: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Lesions numbered anew: those whose smallest number of touching `others` is the same are one."""
    count = int(others.max(initial=0))
    groups = [0]  # of every lesion: the number of the other one, or one of its own behind all of these
    for number, tight in enumerate(ndimage.find_objects(lesions), start=1):
        window = tuple(slice(max(s.start - 1, 0), s.stop + 1) for s in tight)
        touched = others[window][_dilated(lesions[window] == number, 1)]
        groups.append(int(touched[touched > 0].min(initial=count + number)))
    return np.unique(groups, return_inverse=True)[1].astype(np.int32)[lesions]


def _dilated(mask: np.ndarray, steps: int) -> np.ndarray:
    structure = ndimage.generate_binary_structure(mask.ndim, min(2, mask.ndim))  # faces and edges
    return ndimage.binary_dilation(mask, structure, iterations=steps) if steps else mask
