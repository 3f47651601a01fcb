"""The table of docs/left_atrium.md: semi-supervised methods on twelve scans, from the run folders of `sweep=left_atrium_small`.

    python benchmarks/left_atrium_small.py <folder of runs> [<folder of runs> ...]

Writes docs/results/left_atrium_small.csv (one line per method and test scan) and prints, as Markdown, mean and standard deviation over
the scans on which all methods have been tested, and the difference in Dice to the labeled scans alone, paired by scan.
"""

import csv
import statistics
import sys
from pathlib import Path

from omegaconf import OmegaConf

from lesionbench.results import read_rows

RESULTS = Path(__file__).parent.parent / "docs" / "results"
METHODS = {
    "supervised/left_atrium": "labeled scans alone",
    "supervised/left_atrium, linear": "the same, linear upsampling",
    "supervised/left_atrium, nearest": "the same, nearest-neighbor upsampling",
    "mean_teacher/left_atrium": "mean teacher",
    "coranet/left_atrium": "CoraNet",
    "co_learning/left_atrium": "co-learning, mean of the students",
    "supervised/left_atrium_full": "all 9 scans labeled (bound)",
}
METRICS = {"dice": "Dice", "jaccard": "Jaccard", "hd95_pooled_vox": "95HD", "asd_directed_vox": "ASD", "asd_vox": "ASD, symmetric"}


def measured(folders: list[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Experiment, with the upsampling of its network where that is not the default -> test scan -> fold and metrics of the method itself."""
    found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in METHODS}
    for path in sorted(p for folder in folders for p in Path(folder).rglob("test/cases.csv")):
        config = OmegaConf.load(path.parent.parent / "config.yaml")
        upsampling = config.model.network.upsampling
        name = config.experiment_name if upsampling == "transposed" else f"{config.experiment_name}, {upsampling}"
        for row in read_rows(path):
            if row["member"] == "":
                found[name][row["case"]] = {"fold": config.data.split.fold, **{m: row[m] for m in METRICS}}
    return found


def main(*folders: str) -> None:
    """Writes and prints the table."""
    found = measured(list(folders))
    with (RESULTS / "left_atrium_small.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["method", "fold", "case", *METRICS])
        for name, scans in found.items():
            for case, values in sorted(scans.items(), key=lambda item: (item[1]["fold"], item[0])):
                writer.writerow([name, values["fold"], case, *(f"{values[m]:.4f}" for m in METRICS)])
    common = sorted(set.intersection(*(set(scans) for scans in found.values())))
    print(f"{len(common)} scans, folds {sorted({found['supervised/left_atrium'][c]['fold'] for c in common})}")
    print("| method | " + " | ".join(METRICS.values()) + " | Dice, difference | above |\n" + "|---" * (len(METRICS) + 3) + "|")
    for name, title in METHODS.items():
        cells = []
        for metric, digits in zip(METRICS, (3, 3, 1, 1, 1), strict=True):
            values = [found[name][case][metric] for case in common]
            cells.append(f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}")
        gains = [found[name][case]["dice"] - found["supervised/left_atrium"][case]["dice"] for case in common]
        cells.append(f"{statistics.mean(gains):+.3f} ± {statistics.stdev(gains):.3f}")
        cells.append(f"{sum(g > 0 for g in gains)} of {len(gains)}")
        print(f"| {title} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(*sys.argv[1:])
