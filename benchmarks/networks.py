"""One training step of every 3D network of `conf/model/network` at one patch: time, peak memory, parameters, multiply-adds, each against `nnunet`.

    python benchmarks/networks.py [--names nnunet swin_unetr ...] [--rounds 3] [--device cuda --precision bf16 --compile] [--out networks.csv]

A patch of 64^3 voxels, two in a batch, four channels, three outputs, one thread on a CPU. A step is forward pass, backward pass and an update of
SGD, and its time on a CPU is that of the processor, which other jobs do not lengthen much. Every step is made by a process of its own, after one that warms up; all networks take their turn in every round, and medians are compared.
Memory is what the process holds at most beyond what it held before the network was made (on a GPU, what torch has allocated at most).
`per multiply-add` is the time of a step through its multiply-adds, against that of `nnunet`. `NAME:OPTION=VALUE` changes an option of a network.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import csv
import multiprocessing
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from interleaved import machine
from torch.utils.flop_counter import FlopCounterMode

from lesionbench.errors import SuiteError
from lesionbench.jobs.command_line import CONF, options
from lesionbench.resolvers import register

SIDE, BATCH, CHANNELS, OUTPUTS = 64, 2, 4, 3
BASE = "nnunet"
# built around other networks, or one of their presets for a data set
NOT_ALONE = (
    "noisy",
    "slab",
    "small_unet",
    "small_subpixel",
    "spatial_autoencoder",
    "thick_2d",
    "thick_2d_noisy",
    "thick_3d",
    "thick_pack",
    "umm_2d",
    "umm_3d",
    "umm_pack",
)
# the weight gradient of its convolution from 1400 to 2048 features with a dilation of 3 takes minutes on a CPU (torch 2.13.0)
INSTEAD = {"cmm_net": "cmm_net:extra_features=[1400,1400]"}


def network(name: str) -> Any:
    """The network in its default configuration, or with the options behind a colon.

    Raises:
        SuiteError: it is not one of three dimensions.
    """
    register()
    name, *changes = name.split(":")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        made_of = [f"model/network={name}", f"patch=[{SIDE},{SIDE},{SIDE}]", *(f"model.network.{change}" for change in changes)]
        cfg = compose("config", overrides=made_of)
    more = {"channels": ["t1", "t1ce", "t2", "flair"]} if name == "paired_unet" else {}  # otherwise those of the task
    made = instantiate(cfg.model.network, _convert_="all")(in_channels=CHANNELS, out_channels=OUTPUTS, **more)
    if made.dimensions != 3 or made.slab:
        raise SuiteError(f"{name} is no 3D network")
    return made


def logits(output: Any) -> list[torch.Tensor]:
    """All maps of a network's output that a loss would see."""
    if torch.is_tensor(output):
        return [output]
    return [output["logits"], *output.get("deep", ()), *output.get("heads", ())]


def counts(name: str) -> tuple[int, int]:
    """Parameters, and multiply-adds of one forward pass of the batch; shapes are enough."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        made = network(name).eval()
        made(torch.empty(BATCH, CHANNELS, SIDE, SIDE, SIDE))
    return sum(p.numel() for p in made.parameters()), counter.get_total_flops() // 2


def step(name: str, device: str, precision: str, compiled: bool, pipe: Any) -> None:
    """Sends seconds and bytes of one training step, or why there is none."""
    try:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        clock = time.perf_counter if device == "cuda" else time.process_time  # of one thread
        with torch.device("meta"):
            network(name)  # what has to be imported is no memory of the network
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        made = network(name).train().to(device)
        optimizer = torch.optim.SGD(made.parameters(), lr=1e-3)
        forward = torch.compile(made) if compiled else made
        image = torch.randn(BATCH, CHANNELS, SIDE, SIDE, SIDE, device=device)
        for _ in range(2):
            start = clock()
            with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
                loss = sum(maps.float().square().mean() for maps in logits(forward(image)))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if device == "cuda":
                torch.cuda.synchronize()
            took = clock() - start
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        pipe.send((took, peak))
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {str(error).splitlines()[0]}")


def measured(name: str, device: str, precision: str, compiled: bool) -> tuple[float, float]:
    """Seconds and bytes of a step in a process of its own.

    Raises:
        SuiteError: what the process ended with.
    """
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=step, args=(name, device, precision, compiled, theirs))
    process.start()
    theirs.close()
    try:
        found = ours.recv()
    except EOFError:
        found = "the process was killed"
    process.join()
    if isinstance(found, str):
        raise SuiteError(f"{name}: {found}")
    return found


def main() -> None:
    """Prints the table, and writes it as CSV where `--out` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [INSTEAD.get(name, name) for name in sorted(set(options("model/network")) - set(NOT_ALONE))]
    parser.add_argument("--names", nargs="+", default=names)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="32", choices=["32", "bf16"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    known: dict[str, tuple[int, int]] = {}
    for name in dict.fromkeys([BASE, *arguments.names]):
        try:
            known[name] = counts(name)
        except SuiteError as error:
            print(f"left out: {error}", file=sys.stderr)
    steps: dict[str, list[tuple[float, float]]] = {name: [] for name in known}
    names = list(known)
    for number in range(arguments.rounds):
        for place, name in enumerate(names[number % len(names) :] + names[: number % len(names)], 1):
            steps[name].append(measured(name, arguments.device, arguments.precision, arguments.compile))
            print(f"round {number + 1} of {arguments.rounds}, {place} of {len(names)}: {name} {steps[name][-1][0]:.2f} s", file=sys.stderr)
    medians = {name: (statistics.median(s for s, _ in found), statistics.median(b for _, b in found)) for name, found in steps.items()}
    rows = []
    for name in sorted(known, key=lambda n: medians[n][0]):
        (parameters, operations), (took, peak) = known[name], medians[name]
        of_base = (took / operations) / (medians[BASE][0] / known[BASE][1])
        rows.append(
            {
                "network": name,
                "seconds": f"{took:.2f}",
                "fastest": f"{min(s for s, _ in steps[name]):.2f}",
                "slowest": f"{max(s for s, _ in steps[name]):.2f}",
                "of nnunet": f"{took / medians[BASE][0]:.2f}",
                "memory (GiB)": f"{peak / 2**30:.2f}",
                "parameters (M)": f"{parameters / 1e6:.3f}",
                "multiply-adds (G)": f"{operations / 1e9:.1f}",
                "per multiply-add": f"{of_base:.2f}",
            }
        )
    print(f"{machine()}; {arguments.device}, {arguments.precision}{', compiled' if arguments.compile else ''}, {arguments.rounds} rounds")
    widths = {key: max(len(key), *(len(row[key]) for row in rows)) for key in rows[0]}
    print("  ".join(key.ljust(width) for key, width in widths.items()))
    for row in rows:
        print("  ".join(row[key].ljust(width) for key, width in widths.items()))
    if arguments.out:
        with arguments.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
