"""The table of the toy with scanners in docs/methods/flair_threshold.md, and every draw of it as CSV, from the root:

python -m benchmarks.equalization_effect docs/results/flair_threshold_scanners.csv
"""

import csv
import sys

import numpy as np

from tests.test_anomaly import MAPS, toy_scores

SEEDS = range(100, 105)
MEASURES = ("dice_best", "auprc", "auroc", "brain_auroc")


def main() -> None:
    """Prints mean ± std over the draws of every measure of every map; writes the draws where a file is named."""
    found = {seed: toy_scores(seed) for seed in SEEDS}
    print("| map | Dice (test-tuned) | AUPRC | AUROC | AUROC in the brain |\n|---|---|---|---|---|")
    for name in MAPS:
        values = np.array([scores[name] for scores in found.values()])
        print(f"| {name} | " + " | ".join(f"{m:.3f} ± {s:.3f}" for m, s in zip(values.mean(0), values.std(0, ddof=1), strict=True)) + " |")
    for file in sys.argv[1:]:
        with open(file, "w", newline="", encoding="utf-8") as out:
            rows = csv.writer(out, lineterminator="\n")
            rows.writerow(["seed", "map", *MEASURES])
            rows.writerows([seed, name, *(f"{v:.6f}" for v in scores[name])] for seed, scores in found.items() for name in MAPS)


if __name__ == "__main__":
    main()
