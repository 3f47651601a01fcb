"""How long until something happens: `run.py --help` against `import torch`, and the first training batch of a run with a warm cache.

python benchmarks/startup_speed.py
"""

import subprocess
import sys
import tempfile
from pathlib import Path

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


def first_batch(scratch: str) -> float:
    """Seconds from the start of the command to the end of its first batch."""
    command = [sys.executable, "-u", RUN, f"data.root={scratch}/data", f"runs={scratch}/runs", *RUNNING, "stages=[{name:fit,run:fit}]"]
    return seconds(lambda: subprocess.run(command, check=True, capture_output=True))


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
        print(
            f"a run of one batch, warm cache, from the command to its end: {medians({'run': lambda: first_batch(scratch)}, 3)['run']:.2f} s"
        )


if __name__ == "__main__":
    main()
