"""Lesion-wise evaluation of the BraTS challenges, number for number and with its oddities; docs/metrics.md tells them."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from lightning_modules.metrics.lesions import components, joined_lesions, lesions_across_tissues, overlaps
from lightning_modules.metrics.surface import surface_distances, surface_hd95_by_area, within

PENALTY_2023, PENALTY_2026 = 374.0, 373.0
MIN_DICE = 1e-6  # of a match
JOINED_BY = {"netc": ("et", "rc"), "et": ("netc", "rc"), "rc": ("et", "netc"), "snfh": ("et", "rc", "netc")}  # tissues of 2024, in turn
LARGE, DETECTED = 20.0, 0.1  # metastases: volume in mm^3 from which a lesion is large, Dice from which one is found
SCORES = ("dsc", "nsd", "hd95")

Values = dict[str, float]


def brats2023(
    prediction: np.ndarray,
    truth: np.ndarray,
    spacing: Sequence[float],
    dilation: int = 3,
    min_volume: float = 50.0,
    lesions: np.ndarray | None = None,
) -> Values:
    """Lesion-wise scores of BraTS 2023 (Moawad et al., arXiv:2306.00838; settings and penalties from the challenge's announcement, Synapse
    syn51156910, and its published evaluation, github.com/rachitsaluja/BraTS-2023-Metrics), for one region of one case.

    True lesions that touch once dilated are one. Each is compared with the union of the predicted lesions that reach into it, dilated; the
    dilated voxels are not scored. Missed lesions and predicted ones that reach into none have Dice 0 and HD95 374. True lesions up to
    `min_volume` do not count, nor do predicted ones that reach into them; predicted lesions count whatever their size.

    Args:
        prediction, truth: boolean masks of one shape.
        spacing: voxel size along each axis, in mm.
        dilation: in voxels, by faces and edges: 3 for glioma (adult, Africa, pediatric), 1 for meningioma and metastases.
        min_volume: in mm^3: 50, for metastases 2.
        lesions: numbers 1..n of the true lesions, where others than those that touch once dilated are one (see `tissue_lesions`).

    Returns:
        `lesionwise_score_dice` (1 without lesions), `lesionwise_score_hd95` (mm, weighted by surface area; 0 without lesions), the counts
        `num_tp`, `num_fp`, `num_fn`, and for the whole masks `legacy_dice` and `legacy_hd95` (both empty: 1 and 0; one: 0 and 374).
    """
    pairs, false = joined_lesions(prediction, truth if lesions is None else lesions, dilation)
    pairs = [(lesion, found) for lesion, found in pairs if np.count_nonzero(lesion) * np.prod(spacing) > min_volume]
    scores = np.array([_dice_and_hd95(found, lesion, spacing) for lesion, found in pairs] + [(0.0, PENALTY_2023)] * false).reshape(-1, 2)
    hit = sum(bool(found.any()) for _, found in pairs)
    means = scores.mean(axis=0) if len(scores) else (1.0, 0.0)
    whole = _dice_and_hd95(prediction, truth, spacing) if prediction.any() or truth.any() else (1.0, 0.0)
    return {
        **{"lesionwise_score_dice": float(means[0]), "lesionwise_score_hd95": float(means[1])},
        **{"num_tp": float(hit), "num_fp": float(false), "num_fn": float(len(pairs) - hit)},
        **{"legacy_dice": whole[0], "legacy_hd95": whole[1]},
    }


def tissue_lesions(tissues: Mapping[str, np.ndarray], dilation: int = 3) -> dict[str, np.ndarray]:
    """True lesions of the four tissues of BraTS 2024, glioma after treatment, as its published evaluation tells them apart
    (github.com/rachitsaluja/BraTS-2024-Metrics, metrics_GLI.py as of commit 0ee5855): lesions of a tissue that touch one lesion of another
    tissue are one, see `lesions_across_tissues`. Lesions of the whole tumor and of its core are those of 2023.

    Args:
        tissues: masks of `netc`, `snfh`, `et` and `rc` on the whole grid, axes in the order of the file.
    """
    return lesions_across_tissues(tissues, JOINED_BY, dilation)


def _dice_and_hd95(prediction: np.ndarray, truth: np.ndarray, spacing: Sequence[float]) -> tuple[float, float]:
    sizes = np.count_nonzero(prediction), np.count_nonzero(truth)
    dice = 2 * np.count_nonzero(prediction & truth) / sum(sizes)
    return dice, surface_hd95_by_area(prediction, truth, spacing) if all(sizes) else PENALTY_2023


def brats2026(prediction: np.ndarray, truth: np.ndarray, spacing: Sequence[float], unit: str = "mm", metastases: bool = False) -> Values:
    """What the table of BraTS-evaluation 0.0.10 with panoptica 2.1.7 holds for one region of one case, under the same names.

    True and predicted lesions (26 neighbors) are matched one to one, so that the sum of their Dice is largest. Dice, surface Dice and HD95
    (both directions pooled; surface Dice is the mean of the shares of the two surfaces) are taken over matched pairs, and once more
    between the whole masks.

    Oddities that are kept: distances between whole masks are in voxels, and their surface Dice counts the voxels that coincide (tolerance
    half a voxel); distances between lesions give the first axis the voxel size of the last and the last that of the first (tolerance: the
    smallest one); whole masks without a common voxel have HD95 373; where nothing is matched, the lesion-wise HD95 is infinite; where
    there is no lesion at all, nothing is a number.

    Args:
        prediction, truth: boolean masks of one shape, axes in the order of the file.
        spacing: voxel size along each axis, in `unit`.
        unit: in the names of the two columns that are added.
        metastases: the table of the metastases task. Its lesion-wise numbers are over large true lesions (20 mm^3 and more), where missed
            ones and every false positive of any size add Dice 0, surface Dice 0 and HD95 373, and are NaN without large ones.

    Returns:
        `all_instance_{tp,fp,fn,prec,rec,f1}`, `global_{dsc,nsd,hd95}`, `lesionwise_{dsc,nsd,hd95}_{mean,std}`; for metastases also
        `{large,small}_instance_{tp,fp,fn,prec,rec,f1}`, where a lesion is found from Dice 0.1 on and the false positives are the same for
        both. Added: `lesionwise_{nsd,hd95}_mean_<unit>`, with every voxel size along its own axis, NaN where nothing is matched.
    """
    # Among equally good matchings the order of the lesions decides; the official reader puts the last axis of the file first.
    found, lesions = components(prediction.T)[0], components(truth.T)[0]
    shared, true_sizes, found_sizes = overlaps(found, lesions)
    dice = 2.0 * shared / (true_sizes[:, None] + found_sizes)
    matched, partners = linear_sum_assignment(np.where(dice >= MIN_DICE, 1 - dice, 1 + MIN_DICE))
    real = dice[matched, partners] >= MIN_DICE
    matched, partners = matched[real], partners[real]
    fp = len(found_sizes) - len(matched)
    values = _named("all_instance", _detection(len(matched), fp, len(true_sizes) - len(matched)))
    values |= _named("global", _whole(prediction, truth, shared, true_sizes, found_sizes))

    large = true_sizes * np.prod(spacing) >= LARGE

    def lesionwise(spacing: Sequence[float]) -> np.ndarray:
        """Scores (lesions that count, 3)."""
        scores = np.tile([0, 0, PENALTY_2026], (len(true_sizes), 1))
        scores[matched, 0] = dice[matched, partners]
        scores[matched, 1:] = _surfaces(found, lesions, matched, partners, spacing)
        if not metastases:
            return scores[matched]
        return np.concatenate([scores[large], np.tile([0, 0, PENALTY_2026], (fp, 1))]) if large.any() else scores[:0]

    official = lesionwise(spacing)
    own_axes = official if len(set(spacing)) == 1 else lesionwise(spacing[::-1])
    if len(official):
        means, deviations, true_means = official.mean(axis=0), official.std(axis=0), own_axes.mean(axis=0)
    else:
        nothing = metastases or not (found_sizes.size or true_sizes.size)
        means = np.full(3, math.nan) if nothing else np.array([0, 0, math.inf])
        deviations = true_means = np.full(3, math.nan)
    for name, mean, deviation in zip(SCORES, means, deviations, strict=True):
        values |= {f"lesionwise_{name}_mean": float(mean), f"lesionwise_{name}_std": float(deviation)}
    values |= {f"lesionwise_{name}_mean_{unit}": float(mean) for name, mean in zip(SCORES[1:], true_means[1:], strict=True)}
    if metastases:
        hit = np.zeros(len(true_sizes), bool)
        hit[matched] = dice[matched, partners] >= DETECTED
        for size, of_size in (("large", large), ("small", ~large)):
            counts = _detection(int((hit & of_size).sum()), fp, int((~hit & of_size).sum()), nothing=0.0)
            values |= _named(f"{size}_instance", counts if of_size.any() else dict.fromkeys(counts, math.nan))
    return values


def _named(prefix: str, values: Values) -> Values:
    return {f"{prefix}_{name}": value for name, value in values.items()}


def _detection(tp: int, fp: int, fn: int, nothing: float = math.nan) -> Values:
    """Counts and what follows from them; 0/0 is `nothing`."""

    def ratio(part: float, whole: float) -> float:
        return part / whole if whole else nothing

    return {
        **{"tp": float(tp), "fp": float(fp), "fn": float(fn)},
        **{"prec": ratio(tp, tp + fp), "rec": ratio(tp, tp + fn), "f1": ratio(2 * tp, 2 * tp + fp + fn)},
    }


def _whole(prediction: np.ndarray, truth: np.ndarray, shared: np.ndarray, true_sizes: np.ndarray, found_sizes: np.ndarray) -> Values:
    """Scores of the whole masks, in voxels."""
    if not (true_sizes.size or found_sizes.size):
        return dict.fromkeys(SCORES, math.nan)
    if not shared.any():
        return dict(zip(SCORES, (0.0, 0.0, PENALTY_2026), strict=True))
    forth, back = surface_distances(prediction, truth, (1.0,) * truth.ndim)
    return {
        "dsc": float(2 * shared.sum() / (true_sizes.sum() + found_sizes.sum())),
        "nsd": _surface_dice(forth, back, 0.5),
        "hd95": float(np.percentile(np.concatenate([forth, back]), 95)),
    }


def _surfaces(found: np.ndarray, lesions: np.ndarray, matched: np.ndarray, partners: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Surface Dice and HD95 of every matched pair (pairs, 2)."""
    if not len(matched):
        return np.empty((0, 2))
    true_boxes, found_boxes = ndimage.find_objects(lesions), ndimage.find_objects(found)
    scores = np.empty((len(matched), 2))
    for place, (lesion, partner) in enumerate(zip(matched, partners, strict=True)):
        both = zip(true_boxes[lesion], found_boxes[partner], strict=True)
        box = tuple(slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in both)
        forth, back = surface_distances(found[box] == partner + 1, lesions[box] == lesion + 1, spacing)
        scores[place] = _surface_dice(forth, back, min(spacing)), np.percentile(np.concatenate([forth, back]), 95)
    return scores


def _surface_dice(forth: np.ndarray, back: np.ndarray, tolerance: float) -> float:
    return float(within(forth, tolerance).mean() + within(back, tolerance).mean()) / 2
