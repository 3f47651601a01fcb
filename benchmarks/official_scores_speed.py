"""The scores of BraTS 2026 (glioma, six regions) of one case of 240 x 240 x 155 with 30 lesions: this suite against the official evaluator.

    LESIONBENCH_BRATS_PYTHON=<python with BraTS-evaluation 0.0.10 and panoptica 2.1.7> python benchmarks/official_scores_speed.py [rounds]

Both start from label maps in memory and end with all numbers of all regions, in turn, each on one thread; the official evaluator is panoptica with the
challenge's configuration, in a process of its own. Fails if the suite is less than 8 x as fast, or if a number differs by more than 1e-6.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from interleaved import machine, medians, seconds
from scipy import ndimage

from lesionbench.prediction import Prediction
from lesionbench.task import Task
from lightning_modules.metrics import CaseMetrics

GRID, LESIONS, FASTER = (240, 240, 155), 30, 8
CLASSES = {"background": 0, "netc": 1, "snfh": 2, "et": 3, "rc": 4}
REGIONS = {"wt": ("netc", "snfh", "et"), "tc": ("netc", "et"), "netc": ("netc",), "snfh": ("snfh",), "et": ("et",), "rc": ("rc",)}
NAMES = {"tp": "all_instance_tp", "fp": "all_instance_fp", "fn": "all_instance_fn"}
NAMES |= {f"sq_{m}{end}": f"lesionwise_{m}_{stat}" for m in ("dsc", "nsd", "hd95") for end, stat in (("", "mean"), ("_std", "std"))}
NAMES |= {f"global_bin_{m}": f"global_{m}" for m in ("dsc", "nsd", "hd95")}

OFFICIAL = """
import importlib.util, json, os, sys, time, warnings
import numpy as np
from panoptica import Panoptica_Evaluator
warnings.simplefilter("ignore")
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what the package prints is no answer
folder = os.path.dirname(importlib.util.find_spec("brats_evaluation").origin)
evaluator = Panoptica_Evaluator.load_from_config(os.path.join(folder, "configs", "config_gli.yaml"))
maps = np.load(sys.argv[1])
for line in sys.stdin:
    start = time.perf_counter()
    found = evaluator.evaluate(maps["prediction"], maps["truth"], voxelspacing=(1.0, 1.0, 1.0))
    rows = {region: {k: float(v) for k, v in result.to_dict().items()} for region, result in found.items()}
    print(json.dumps([time.perf_counter() - start, rows]), file=answers, flush=True)
"""


def case() -> tuple[np.ndarray, np.ndarray]:
    """Prediction and truth: lesions with edema, rim, core and some cavities, which the prediction moves, misses, splits and adds to."""
    draw = np.random.RandomState(0)
    truth, prediction = np.zeros(GRID, np.uint8), np.zeros(GRID, np.uint8)
    apart = [(x, y, z) for x in (45, 82, 120, 158, 195) for y in (60, 120, 180) for z in (50, 105)]
    for number, center in enumerate(apart[:LESIONS]):
        radius = draw.uniform(3, 13)
        values = (2, 3, 4 if number % 5 == 0 else 1)
        for array, shift in ((truth, 0), (prediction, draw.randint(-2, 3, 3))):
            place = np.asarray(center) + shift
            box = tuple(slice(c - 16, c + 17) for c in place)
            distance = np.sqrt(sum(x**2 for x in np.mgrid[-16:17, -16:17, -16:17]))
            distance += ndimage.gaussian_filter(draw.standard_normal(distance.shape), 2) * radius
            for value, share in zip(values, (1, 0.7, 0.45), strict=True):
                array[box][distance < share * radius] = value
        if number % 7 == 0:
            prediction[tuple(slice(c - 18, c + 19) for c in center)] = 0
    prediction[:, :, 48:50] = 0
    specks = ndimage.gaussian_filter(draw.standard_normal(GRID), 1.5) > 0.36
    prediction[specks] = 3
    return prediction, truth


def main() -> None:
    torch.set_num_threads(1)
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    prediction, truth = case()
    task, metrics = Task(("t1",), CLASSES, REGIONS), CaseMetrics(["brats2026"])
    labels, classes = (torch.from_numpy(x.astype(np.int8)) for x in (prediction, truth))
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "maps.npz", prediction=prediction, truth=truth)
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [os.environ["LESIONBENCH_BRATS_PYTHON"], "-c", OFFICIAL, str(Path(folder) / "maps.npz")]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=one_thread
        ) as process:

            def official() -> tuple[float, dict[str, dict[str, float]]]:
                process.stdin.write("\n")
                process.stdin.flush()
                return tuple(json.loads(process.stdout.readline()))

            ours = partial(metrics, Prediction(labels=labels), classes, task, (1.0, 1.0, 1.0))
            rows, theirs = {row["region"]: row for row in ours()}, official()[1]
            worst = 0.0
            for region, values in theirs.items():
                for name, column in NAMES.items():
                    a, b = rows[region][column], values[name]
                    if math.isinf(b) and name == "global_bin_hd95":
                        b = 373.0  # what the official table makes of it
                    if not (a == b or (math.isnan(a) and math.isnan(b))):
                        worst = max(worst, abs(a - b))
            times = medians({"suite": partial(seconds, ours), "official": lambda: official()[0]}, rounds)
            process.stdin.close()
    ratio = times["official"] / times["suite"]
    print(machine())
    print(
        f"{ndimage.label(truth, np.ones((3, 3, 3)))[1]} lesions; found {rows['wt']['all_instance_tp']:.0f}, false {rows['wt']['all_instance_fp']:.0f}"
    )
    print("  ".join(f"{name} {value:.2f} s" for name, value in times.items()))
    print(f"the suite is {ratio:.1f} x as fast (median of {rounds} rounds); largest difference {worst:.1g}")
    if ratio < FASTER or not worst <= 1e-6:
        sys.exit(f"expected {FASTER} x and a difference of at most 1e-6")


if __name__ == "__main__":
    main()
