"""What the maps of two-phase mass transport cost, and what they do to cases.

python benchmarks/omt_conversion.py speed [<rounds>]
    one case there and back: four modalities and the labels into a cube of 128^3, the labels back to the brain, by a stored map, against
    SciPy's `map_coordinates` at the same places, which it is given; in turn. Making the map is timed apart. Fails where both take more than
    three times as long.
python benchmarks/omt_conversion.py cases <csv>
    conversion loss and shares of simulated tumors by kind of map and side of the cube
"""

import csv
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from interleaved import machine, medians, seconds
from scipy.ndimage import map_coordinates

from datamodules import Simulated
from lightning_modules.transport.density import Transport
from lightning_modules.transport.stages import conversion

SHAPE, SIZE = (144, 176, 140), (128, 128, 128)  # about the box of a brain at 1 mm
DATA = Path(tempfile.gettempdir()) / "lesionbench-omt-conversion"
LIMIT = 3.0


def brain() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four modalities (4, X, Y, Z), the brain and class indices of a drawn case: an ellipsoid with a tumor in it."""
    grid = torch.stack(torch.meshgrid(*(torch.linspace(-1, 1, n) for n in SHAPE), indexing="ij"))
    inside = (grid**2).sum(dim=0) < 1
    distance = ((grid - torch.tensor([0.3, -0.2, 0.1])[:, None, None, None]) ** 2).sum(dim=0).sqrt()
    label = sum((distance < r).long() for r in (0.3, 0.2, 0.1))
    generator = torch.Generator().manual_seed(0)
    image = (torch.randn(4, *SHAPE, generator=generator) * 0.3 + 2 * (label > 0) + 1) * inside
    return image, inside, label


def speed(rounds: int) -> None:
    """Prints seconds and ratios, medians over rounds."""
    torch.set_num_threads(1)
    image, inside, label = brain()
    transport = Transport()
    warp = transport.warp(image[0], inside, label > 0)  # also makes the mesh, once for all cases
    psi, f = warp.inverse(SIZE), warp.forward()
    there = np.stack([p.numpy() * n - 0.5 for p, n in zip(psi, warp.sides, strict=True)])
    back = np.stack([p.numpy() * n - 0.5 for p, n in zip(f, SIZE, strict=True)])
    values, labels = image[(slice(None), *warp.inside)].contiguous().numpy(), label[warp.inside].contiguous().numpy()

    def ours() -> None:
        places = warp.inverse(SIZE)
        warp.pull(image, places)
        warp.push(warp.pull_labels(label, places)[None])

    def scipy() -> None:
        for channel in values:
            map_coordinates(channel, there, order=1, mode="nearest")
        map_coordinates(map_coordinates(labels, there, order=0, mode="nearest"), back, order=0, mode="nearest")

    ways: dict[str, Callable[[], object]] = {
        "map_coordinates": scipy,
        "by the map": ours,
        "making the map": lambda: transport.warp(image[0], inside, label > 0),
    }
    found = medians({name: lambda way=way: seconds(way) for name, way in ways.items()}, rounds)
    print(machine())
    for name, taken in found.items():
        print(f"{name:16} {taken:6.2f} s  ratio {taken / found['map_coordinates']:.2f}")
    whole = (found["by the map"] + found["making the map"]) / found["map_coordinates"]
    print(f"a case in all: {whole:.2f} times map_coordinates")
    if whole > LIMIT:
        sys.exit(f"slower than {LIMIT} times map_coordinates")


def cases(out: Path) -> None:
    """Writes one row for each kind of map and side: means over the cases."""
    torch.set_num_threads(1)
    data = Simulated(DATA, count=10, spacing=2.0, simulation_seed=7)
    data.prepare_data()
    data.setup("fit")
    kinds = {
        "resized": (Transport(backend="resize"), False), "Knothe, phase II": (Transport("knothe", dilation=3), True),
        "phase I": (Transport(dilation=3), False), "phase II": (Transport(dilation=3), True), "phase II, gain 1": (Transport(dilation=3, gain=1.0), True),
    }  # fmt: skip
    batches, rows = list(data.case_loader(data.cases())), []
    for kind, (transport, second) in kinds.items():
        found: dict[int, list[dict[str, float]]] = {32: [], 48: [], 64: []}
        start = time.perf_counter()
        for batch in batches:
            image, inside, label = batch["image"][0], batch["brain_mask"][0, 0], batch["label"][0, 0]
            warp = transport.warp(image[data.task.channels.index("flair")], inside, label > 0 if second else None)
            for side, table in found.items():
                cube = warp.pull_labels(label, warp.inverse((side,) * 3))
                table.append(conversion(data.task, label, cube, warp, inside))
        print(kind, f"{time.perf_counter() - start:.0f} s")
        for side, table in found.items():
            means = {name: round(float(np.mean([row[name] for row in table])), 5) for name in table[0]}
            off = max(abs(row["WT_cube"] / row["WT_mass"] - 1) for row in table)
            rows.append({"map": kind, "side": side, "cases": len(table), **means, "WT_off_mass": round(off, 4)})
            print(rows[-1])
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["speed"]:
        speed(int(sys.argv[2]) if len(sys.argv) > 2 else 5)
    elif sys.argv[1:2] == ["cases"] and len(sys.argv) == 3:
        cases(Path(sys.argv[2]))
    else:
        sys.exit(__doc__)
