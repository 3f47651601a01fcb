"""Streaming best Dice, AUPRC and AUROC of one full volume against scikit-learn's exact ones: `python benchmarks/anomaly_metrics.py [rounds]`."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import platform
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from sklearn.metrics import auc, precision_recall_curve, roc_auc_score

from lesionbench.prediction import Prediction
from lesionbench.task import Task
from lightning_modules.metrics import DatasetMetrics

SHAPE = (240, 240, 155)
TASK = Task(("flair",), {"background": 0, "lesion": 1})
SCORES: dict[str, Callable[[np.random.Generator, np.ndarray], np.ndarray]] = {
    "bounded": lambda rng, true: rng.beta(2, 5, true.size) * 0.7 + 0.3 * rng.random(true.size) * true,
    "heavy-tailed": lambda rng, true: np.abs(rng.standard_cauchy(true.size)) * (1 + 4 * true),
}


def volume(name: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Float32 scores and bool truth of one volume: 16 % of it brain, 7 % of the brain lesion, 0 outside."""
    rng = np.random.default_rng(seed)
    size = int(np.prod(SHAPE))
    brain = rng.random(size) < 0.16
    true = brain & (rng.random(size) < 0.07)
    scores = np.zeros(size, np.float32)
    scores[brain] = SCORES[name](rng, true[brain])
    return scores, true


def exact(scores: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """AUPRC and AUROC by scikit-learn, and the best Dice of all thresholds from the same curve."""
    precision, recall, _ = precision_recall_curve(true, scores)
    dice = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return {"dice_best": float(dice.max()), "auprc": auc(recall, precision), "auroc": roc_auc_score(true, scores)}


def streaming(*volumes: tuple[np.ndarray, np.ndarray]) -> tuple[dict[str, float], int]:
    """The same by `DatasetMetrics`, and the bytes that it holds."""
    metric = DatasetMetrics(["dice_best", "auprc", "auroc"])
    for scores, true in volumes:
        metric.update(Prediction(scores=torch.from_numpy(scores)), torch.from_numpy(true.astype(np.int8)), TASK)
    (counts,) = metric.everywhere.values()
    return metric.compute()[""]["lesion"], sum(a.nbytes for a in (counts.values, counts.positives, counts.negatives))


def main(rounds: int = 3) -> None:
    """Prints, for each kind of scores, the ratio of times (both measured in turn), the largest difference, and the memory held."""
    print(f"{platform.machine()}, {os.cpu_count()} cores, one thread, Python {platform.python_version()}")
    for name in SCORES:
        seconds: dict[str, list[float]] = {"exact": [], "streaming": []}
        for seed in range(rounds):
            case = volume(name, seed)
            results = {}
            for kind, measure in (("exact", lambda c=case: exact(*c)), ("streaming", lambda c=case: streaming(c)[0])):
                start = time.perf_counter()
                results[kind] = measure()
                seconds[kind].append(time.perf_counter() - start)
            error = max(abs(results["exact"][k] - results["streaming"][k]) for k in results["exact"])
        ratio = statistics.median(e / s for e, s in zip(seconds["exact"], seconds["streaming"], strict=True))
        held = [streaming(*(volume(name, s) for s in range(n)))[1] / 1e6 for n in (1, 4)]
        print(
            f"{name:12s} {case[0].size / 1e6:.1f} M voxels: scikit-learn {statistics.median(seconds['exact']):.2f} s, streaming "
            f"{statistics.median(seconds['streaming']):.2f} s, {ratio:.1f} times faster; largest difference {error:.1e}; "
            f"holds {held[0]:.1f} MB after 1 volume, {held[1]:.1f} MB after 4"
        )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
