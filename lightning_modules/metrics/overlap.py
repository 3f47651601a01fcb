"""Overlap and volume of two masks, from four counts."""

import numpy as np


def overlap_metrics(prediction: np.ndarray, truth: np.ndarray, total: int | None = None) -> dict[str, float]:
    """Overlap measures of two boolean masks of one shape.

    Args:
        prediction, truth: masks, any number of axes. Voxels to ignore are False in both.
        total: number of voxels that count, where the masks are a crop or hold ignored voxels; default: all of the mask. Only
            specificity depends on it.

    Returns:
        `dice` 2TP / (2TP + FP + FN), `jaccard` TP / (TP + FP + FN), `sensitivity` TP / (TP + FN), `precision` TP / (TP + FP) and
        `specificity` TN / (TN + FP), all in [0, 1], and `volume_difference` (V_prediction - V_truth) / V_truth, signed, from -1.
        Empty masks follow BraTS: both empty gives Dice and Jaccard 1, one empty 0. What is 0/0 otherwise (sensitivity without
        truth, precision without prediction, specificity without background) is NaN. The volume difference is 0 when both masks
        are empty and NaN when only the truth is.
    """
    hit, predicted, true = (int(np.count_nonzero(m)) for m in (prediction & truth, prediction, truth))
    total = truth.size if total is None else total
    either = predicted + true - hit
    return {
        "dice": 2 * hit / (predicted + true) if either else 1.0,
        "jaccard": hit / either if either else 1.0,
        "sensitivity": _ratio(hit, true),
        "precision": _ratio(hit, predicted),
        "specificity": _ratio(total - either, total - true),
        "volume_difference": _ratio(predicted - true, true) if either else 0.0,
    }


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
