"""The effect of semi-supervised methods on the toy of blobs: runs them, and makes the tables of docs/semi_supervised.md and its methods.

    python benchmarks/semi_effect.py run <folder> <rows> <seeds>     rows and seeds separated by commas; rows `all` or names as below
    python benchmarks/semi_effect.py table <folder> <name>

A seed draws its own training images and weights; the 60 test images are always the same. `table` writes docs/results/<name>.csv (Dice of
every row, member and seed, mean and deviation over seeds, mean and deviation of the difference to the labeled images alone of the same
seeds, and how many of these differences are above 0) and prints it as Markdown.
"""

import csv
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import open_dict

from lesionbench.jobs.command_line import CONF, quoted
from lesionbench.jobs.composition import complete
from lesionbench.jobs.main import run_job
from lesionbench.resolvers import register
from lesionbench.results import read_rows

RESULTS = Path(__file__).parent.parent / "docs" / "results"
CPS = ["benchmark=blobs", "model=co_learning", "model.weights.teacher=0", "model.weights.mix=0"]
CPS_TEACHER = ["benchmark=blobs", "model=co_learning", "model.weights.mix=0"]
MIX = ["benchmark=blobs", "model=co_learning", "model.weights.cps=0", "model.weights.teacher=0", "model.mix_target=teacher"]
ROWS = {
    "supervised": ["benchmark=blobs", "model=supervised"],
    "full": ["benchmark=blobs_full", "model=supervised"],
    "mean_teacher": ["benchmark=blobs", "model=mean_teacher", "model.predict_members=true"],
    "cps": ["benchmark=blobs", "model=cross_pseudo_supervision", "model.predict_members=true"],
    "co_students": [*CPS, "model.weights.cps=0"],
    "co_cps": CPS,
    "co_cps_teacher": CPS_TEACHER,
    "co_mix": MIX,
    "co_all": ["benchmark=blobs", "model=co_learning"],
    "co_all_different": ["benchmark=blobs", "model=co_learning", "model.init=different"],
    "gap_supervised": ["benchmark=blobs", "model=supervised", "data.gap=true"],
    "gap_co_cps_teacher": [*CPS_TEACHER, "data.gap=true"],
    "gap_co_all": ["benchmark=blobs", "model=co_learning", "data.gap=true"],
}


def run(folder: str, rows: str, seeds: str) -> None:
    """Runs what has not been run yet, one run after the other in this process."""
    for seed in seeds.split(","):
        for name in ROWS if rows == "all" else rows.split(","):
            runs = Path(folder) / name / f"seed={seed}"
            if not list(runs.rglob("test/cases.csv")):
                register()
                overrides = [*ROWS[name], f"seed={seed}", f"runs={runs}", "threads=1", "callbacks.progress=null", "metrics.names=[dice]"]
                with initialize_config_dir(str(CONF), version_base="1.3"):
                    cfg = compose("config", overrides=quoted(overrides), return_hydra_config=True)
                with open_dict(cfg):
                    choices = cfg.pop("hydra").runtime.choices
                complete(cfg, choices)
                os.environ.pop("LESIONBENCH_RUN_FOLDER", None)  # of the run before
                run_job(cfg)


def dice(path: Path) -> dict[str, float]:
    """Member -> mean Dice over test cases."""
    values = defaultdict(list)
    for row in read_rows(path):
        values[row["member"] or "method"].append(row["dice"])
    return {member: statistics.mean(found) for member, found in values.items()}


def table(folder: str, name: str) -> None:
    """Writes and prints the table of all runs under `folder`."""
    found = {}
    for row in ROWS:
        runs = {int(p.name.partition("=")[2]): next(p.rglob("test/cases.csv"), None) for p in (Path(folder) / row).glob("seed=*")}
        found[row] = {seed: dice(path) for seed, path in sorted(runs.items()) if path is not None}
    seeds = sorted({seed for runs in found.values() for seed in runs})
    lines = []
    for row, runs in found.items():
        for member in next(iter(runs.values()), {}):
            values = {seed: runs[seed][member] for seed in runs}
            gains = [v - found[baseline(row)][s]["method"] for s, v in values.items() if s in found[baseline(row)]]
            above = f"{sum(g > 0 for g in gains)} of {len(gains)}"
            lines.append({"row": row, "member": member, **values, **spread("", values.values()), **spread("gain_", gains), "above": above})
    with (RESULTS / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in line.items()} for line in lines)
    print("| row | member | " + " | ".join(map(str, seeds)) + " | mean ± std | gain ± std | above |\n" + "|---" * (len(seeds) + 5) + "|")
    for line in lines:
        cells = " | ".join(f"{line[s]:.3f}" if s in line else "" for s in seeds)
        gain = f"{line['gain_mean']:+.3f} ± {line['gain_std']:.3f}"
        print(f"| {line['row']} | {line['member']} | {cells} | {line['mean']:.3f} ± {line['std']:.3f} | {gain} | {line['above']} |")


def baseline(row: str) -> str:
    """The row of labeled images alone that a row is compared with."""
    return "gap_supervised" if row.startswith("gap_") else "supervised"


def spread(prefix: str, values: Collection[float]) -> dict[str, float]:
    """Mean and standard deviation, 0 of a single value."""
    return {f"{prefix}mean": statistics.mean(values), f"{prefix}std": statistics.stdev(values) if len(values) > 1 else 0.0}


if __name__ == "__main__":
    {"run": run, "table": table}[sys.argv[1]](*sys.argv[2:])
