"""The table of the toy with scanners in docs/methods/flair_threshold.md: `python -m benchmarks.equalization_effect`, from the root."""

import numpy as np

from tests.test_anomaly import MAPS, toy_scores

SEEDS = range(100, 105)


def main() -> None:
    """Prints mean ± std over the draws of every measure of every map."""
    found = [toy_scores(seed) for seed in SEEDS]
    print("| map | Dice (test-tuned) | AUPRC | AUROC | AUROC in the brain |\n|---|---|---|---|---|")
    for name in MAPS:
        values = np.array([scores[name] for scores in found])
        print(f"| {name} | " + " | ".join(f"{m:.3f} ± {s:.3f}" for m, s in zip(values.mean(0), values.std(0, ddof=1), strict=True)) + " |")


if __name__ == "__main__":
    main()
