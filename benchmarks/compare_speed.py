"""How long does it take to compare many runs? Makes fake run folders in a temporary folder and times `compare` on them.

    python benchmarks/compare_speed.py [number of runs, default 1000]

Every run has a config of 350 lines, 20 cases x 3 regions x 2 members x 5 metrics, curves of 1,020 points, calibration counts and three
pictures of 200 kB; 10 seeds and 5 folds per group.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml

from lesionbench.reports.comparison import compare
from lesionbench.reports.html_report import write_html
from lesionbench.results import write_json, write_rows

SEEDS, FOLDS, CASES = 10, 5, 20
METRICS = ("dice", "hd95_mm", "sensitivity", "specificity", "precision")


def make_run(root: Path, number: int) -> None:
    """Writes run folder `number`: seed fastest, then fold, then experiment."""
    seed, fold, method = number % SEEDS, number // SEEDS % FOLDS, number // (SEEDS * FOLDS)
    experiment = f"method{method:03d}/fake"
    folder = root / experiment / f"{fold:08x}" / f"seed={seed}"
    generator = np.random.default_rng(number)
    rows = [
        {"case": f"case{fold * CASES + i:03d}", "patient": "", "site": "", "member": member, "region": region}
        | dict(zip(METRICS, generator.random(len(METRICS)), strict=True))
        for i in range(CASES)
        for member in ("", "teacher")
        for region in ("WT", "TC", "ET")
    ]
    block = {f"option{i}": {"_target_": "package.module.Name", "rate": 0.1, "sizes": [1, 2, 3]} for i in range(6)}
    config = {
        "experiment": experiment,
        "experiment_name": experiment,
        "seed": seed,
        "data": {"name": "fake", "split": {"fold": fold}},
        "objective": {"name": "val/dice"},
    }
    config |= {f"part{i}": block for i in range(8)}
    write_rows(folder / "test" / "cases.csv", rows)
    write_json(folder / "summary.json", {"experiment": experiment, "seed": seed, "status": "finished", "cost": {"parameters": 1e6}})
    dumper = type("PlainDumper", (yaml.SafeDumper,), {"ignore_aliases": lambda *_: True})
    (folder / "config.yaml").write_text(yaml.dump(config, Dumper=dumper))
    points = [f"{i},{i // 50},train/loss,{1 / (i + 1)}" for i in range(1000)] + [
        f"{i},{i // 50},val/dice,{i / 1000}" for i in range(0, 1000, 50)
    ]
    (folder / "metrics.csv").write_text("\n".join(["iteration,epoch,name,value", *points]) + "\n")
    counts = [f",{region},{place},100,{place * 6},{place * 5}" for region in ("WT", "TC", "ET") for place in range(15)]
    (folder / "test" / "calibration.csv").write_text("\n".join(["member,region,bin,voxels,probability,true", *counts]) + "\n")
    (folder / "figures").mkdir()
    for name in ("best", "median", "worst"):
        (folder / "figures" / f"{name}.png").write_bytes(bytes(200_000))


def main() -> None:
    """Prints seconds without tests, with tests against one group, and for the report of the latter."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    with tempfile.TemporaryDirectory() as name:
        for number in range(count):
            make_run(Path(name), number)
        for baseline in (None, "method000/fake"):
            start = time.perf_counter(), time.process_time()
            comparison = compare([name], baseline=baseline, out=Path(name) / "out")
            print(f"{count} runs, {len(comparison.groups)} groups, {len(comparison.tests)} tests: {passed(*start)}")
        start = time.perf_counter(), time.process_time()
        report = write_html(comparison, Path(name) / "report.html")
        print(f"their HTML report, {report.stat().st_size / 1e6:.0f} MB: {passed(*start)} more")


def passed(wall: float, processor: float) -> str:
    """Seconds since then by the clock and of this process' work, which differ on a busy machine."""
    return f"{time.perf_counter() - wall:.2f} s ({time.process_time() - processor:.2f} s of processor time)"


if __name__ == "__main__":
    main()
