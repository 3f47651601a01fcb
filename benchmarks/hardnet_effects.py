"""Tables of docs/methods/hardnet_bts.md; each is printed and written as CSV.

    python benchmarks/hardnet_effects.py traffic hardnet_traffic.csv
    python benchmarks/hardnet_effects.py pooling hardnet_pooling.csv [seed ...]
    python benchmarks/hardnet_effects.py answers hardnet_answers.csv NAME=FOLDER ...

`traffic`: harmonic blocks of the network against dense blocks of equal depth and about equal parameters: channels read and written by the
convolutions per voxel, and what is held per voxel for the backward pass (counted, nothing is timed).
`pooling`: a narrow network without a halving convolution, trained for 200 steps on volumes of noise with lesions of one to three voxels,
by way of pooling: how many lesions of 64 new volumes are found, and how much of what is marked is lesion. Seeds 0, 1, 2 unless given.
`answers`: mean test Dice over cases and regions of all tested runs under each folder, their mean and standard deviation.
"""

import csv
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from lesionbench.results import read_rows
from lightning_modules.losses import DeepSupervision, RegionBCEDice
from lightning_modules.networks import HarDNet
from lightning_modules.networks.hardnet import ConvBlock

BLOCKS = ((64, 14, 8, 18), (128, 16, 16, 20), (256, 20, 16, 24))  # input channels, growth, layers, growth of the dense block
SIDE, STEPS, TESTED = 24, 200, 64


def traffic() -> list[dict[str, Any]]:
    """A row for each kind of each block."""
    rows = []
    for n_in, growth, layers, dense in BLOCKS:
        found = []
        for kind, width in (("harmonic", growth), ("dense", dense)):
            block = ConvBlock(3, n_in, width, layers, kind=kind)
            found.append({
                "input": n_in,
                "layers": layers,
                "block": kind,
                "parameters": sum(p.numel() for p in block.parameters()),
                "channels": sum(m.in_channels + m.out_channels for m in block.modules() if isinstance(m, nn.Conv3d)),
                "held": held(block, n_in),
            })  # fmt: skip
        for row in found:
            rows.append({**row, **{f"{k}, dense to harmonic": round(found[1][k] / found[0][k], 2) for k in ("channels", "held")}})
    return rows


def held(block: nn.Module, n_in: int, side: int = 8) -> int:
    """Bytes per voxel that a forward pass in float32 keeps for the backward pass, weights left out."""
    own = {p.untyped_storage().data_ptr() for p in (*block.parameters(), *block.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.numel() >= side**3:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = block(torch.randn(1, n_in, *(side,) * 3))
    del out
    return round(sum(kept.values()) / side**3)


def volumes(count: int, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, list[list[tuple[torch.Tensor, ...]]]]:
    """Noise with one to five bright lines of one to three voxels: images, masks (B, 1, x, y, z), and the voxels of every lesion."""
    image, mask = torch.randn(count, 1, *(SIDE,) * 3, generator=draw), torch.zeros(count, 1, *(SIDE,) * 3)
    lesions: list[list[tuple[torch.Tensor, ...]]] = []
    for number in range(count):
        lesions.append([])
        for _ in range(int(torch.randint(1, 6, (), generator=draw))):
            length, axis = int(torch.randint(1, 4, (), generator=draw)), int(torch.randint(3, (), generator=draw))
            start = torch.randint(2, SIDE - 4, (3,), generator=draw)
            where = tuple(start[a] + (torch.arange(length) if a == axis else torch.zeros(length, dtype=torch.long)) for a in range(3))
            mask[number, 0][where] = 1
            lesions[-1].append(where)
    return image + 4 * mask, mask, lesions


def pooling(seeds: Sequence[int]) -> list[dict[str, Any]]:
    """A row for each way of pooling and seed, then one of means."""
    rows = [{"pool": pool, "seed": seed, **trained(pool, seed)} for pool in ("soft", "avg", "max") for seed in seeds]
    measures = ("recall", "precision", "loss")
    for pool in ("soft", "avg", "max"):
        of = [row for row in rows if row["pool"] == pool and row["seed"] != "mean"]
        rows.append({"pool": pool, "seed": "mean", **{m: statistics.mean(row[m] for row in of) for m in measures}})
        if len(of) > 1:
            rows.append({"pool": pool, "seed": "std", **{m: statistics.stdev(row[m] for row in of) for m in measures}})
    return rows


def trained(pool: str, seed: int) -> dict[str, float]:
    """Recall of lesions (any voxel marked), precision of voxels, and the mean loss of the last 20 steps."""
    torch.manual_seed(seed)
    network = HarDNet(1, 1, features=(8,) * 6, growth=(4,) * 4, layers=(4,) * 4, pool=pool, stem_stride=1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    loss, draw = DeepSupervision(RegionBCEDice(batch=True), [1, 0.5, 0.25, 0.125, 0.0625]), torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(STEPS):
        image, mask, _ = volumes(2, draw)
        value = loss(network(image), mask)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    network.eval()
    image, mask, lesions = volumes(TESTED, torch.Generator().manual_seed(1000 + seed))
    with torch.no_grad():
        marked = torch.cat([network(part) > 0 for part in image.split(8)])
    hits = [bool(marked[number, 0][where].any()) for number, of in enumerate(lesions) for where in of]
    precision = float(mask[marked].mean()) if marked.any() else 0.0
    return {"recall": statistics.mean(hits), "precision": precision, "loss": statistics.mean(losses[-20:])}


def answers(folders: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each NAME=FOLDER, its runs in the order of the seeds with which their networks were trained."""
    rows = []
    for name, _, folder in (given.partition("=") for given in folders):
        found = {}
        for path in sorted(Path(folder).rglob("test/cases.csv")):
            values = [row["dice"] for row in read_rows(path) if row["member"] == "" and row["region"]]
            found[seed_of(path.parent.parent)] = statistics.mean(values)
        dice = [value for _, value in sorted(found.items())]
        spread = statistics.stdev(dice) if len(dice) > 1 else 0.0
        rows.append(
            {
                "answer": name,
                "seeds": " ".join(sorted(found)),
                "mean": statistics.mean(dice),
                "std": spread,
                "values": " ".join(f"{d:.4f}" for d in dice),
            }
        )
    return rows


def seed_of(run: Path) -> str:
    """The seed with which what a run tested was trained: that of its checkpoint's path, else its own; `all` of an ensemble."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    if "checkpoints" in config["model"]:
        return "all"
    checkpoint = config["stages"][-1].get("checkpoint")
    return str(config["seed"]) if checkpoint is None else re.findall(r"seed=(\d+)", checkpoint)[-1]


def main(what: str, out: str, *given: str) -> None:
    """Writes and prints one of the tables."""
    rows = traffic() if what == "traffic" else answers(given) if what == "answers" else pooling([int(seed) for seed in given] or [0, 1, 2])
    with Path(out).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.4f}" if isinstance(v, float) and v != round(v, 2) else v for k, v in row.items()} for row in rows)
    print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
    for row in rows:
        print("| " + " | ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()) + " |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
