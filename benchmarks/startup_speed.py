"""How long until something happens: `run.py --help` against `import torch`, and the first training batch of a run with a warm cache.

python benchmarks/startup_speed.py
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from interleaved import machine, medians, seconds

RUN = str(Path(__file__).parent.parent / "run.py")
ROUNDS = 5
RUNNING = [
    "data.limit_cases=6",
    "data.split.test=1",
    "data.split.val=1",
    "epochs=1",
    "data.samples_per_epoch=2",
    "threads=1",
    "callbacks.figures=null",
]


def call(*command: str) -> None:
    subprocess.run([sys.executable, *command], check=True, capture_output=True)


class FirstBatch(pl.Callback):
    """Says when the first training batch is there, by the clock of the machine, since it is asked by another process."""

    def on_train_batch_start(self, *_: Any) -> None:
        print(f"first batch at {time.time()}", flush=True)


def first_batch(scratch: str) -> float:
    """Seconds from the start of the command to its first training batch."""
    command = [sys.executable, RUN, f"data.root={scratch}/data", f"runs={scratch}/runs", *RUNNING, "stages=[{name:fit,run:fit}]"]
    command.append("+callbacks.first={_target_:startup_speed.FirstBatch}")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}
    start = time.time()
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    (line,) = (line for line in done.stdout.splitlines() if "first batch at" in line)
    return float(line.rpartition(" ")[2]) - start


def main() -> None:
    print(machine())
    ways = {
        "run.py --help": lambda: seconds(lambda: call(RUN, "--help")),
        "import torch": lambda: seconds(lambda: call("-c", "import torch")),
    }
    times = medians(ways, ROUNDS)
    print(
        "  ".join(f"{name} {value:.2f} s" for name, value in times.items()), f"ratio {times['run.py --help'] / times['import torch']:.2f}"
    )
    with tempfile.TemporaryDirectory() as scratch:
        first_batch(scratch)  # makes and caches the cases
        print(f"from the command to its first training batch, warm cache: {medians({'run': lambda: first_batch(scratch)}, 3)['run']:.2f} s")


if __name__ == "__main__":
    main()
