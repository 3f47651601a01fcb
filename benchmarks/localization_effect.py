"""What a crop around the tumor and the wider network that it leaves memory for do for the core: a table of
docs/methods/residual_unet_localization.md.

    python benchmarks/localization_effect.py localization.csv [seed ...]

Drawn volumes of 32^3 voxels with one tumor, a small core in it that is a little brighter in T1ce, and specks as bright as the core all over the
volume. `one stage`: a narrow network (4 channels) draws the core on the whole volume. `two stages`: a network of the same widths draws the tumor, and
one of four times its widths the core on a crop of 16^3 around what the first one finds; `oracle`: the same around the true tumor. All are
trained for 150 steps on samples of one volume; the crop has room for the wide network in less than the memory that the narrow one holds for a
backward pass on the whole volume, and `held` says how much of it is used (MiB). Dice on 16 other volumes. Seeds 0, 1, 2 unless given.
"""

import csv
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from lesionbench.target import RegionSigmoid
from lesionbench.task import Task
from lightning_modules import LocalizedUNet
from lightning_modules.inferers import Whole
from lightning_modules.localization import box_around
from lightning_modules.losses import RegionBCEDice
from lightning_modules.networks import ResidualUNet

SIDE, CROP, JITTER, TRAINED, TESTED, STEPS, RATE = 32, 16, 2, 24, 16, 150, 3e-3
NARROW, WIDE = (4, 8, 16), (16, 32, 64)
TASK = Task(("t1ce", "flair"), {"background": 0, "core": 1, "edema": 2}, {"WT": ("core", "edema"), "TC": ("core",)})


def volumes(count: int, draw: torch.Generator) -> dict[str, torch.Tensor]:
    """Images (B, 2, 32, 32, 32) and labels (B, 1, 32, 32, 32)."""
    grid = torch.stack(torch.meshgrid(*[torch.arange(float(SIDE))] * 3, indexing="ij"))

    def uniform(low: float, high: float, size: int = 1) -> torch.Tensor:
        return low + (high - low) * torch.rand(size, generator=draw)

    def ball(center: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
        return (grid - center[:, None, None, None]).square().sum(dim=0).sqrt() < radius

    images, labels = [], []
    for _ in range(count):
        image = 0.5 * torch.randn(2, *(SIDE,) * 3, generator=draw)
        middle = uniform(7, SIDE - 8, 3)
        tumor, core = ball(middle, uniform(4, 5.5)), ball(middle + uniform(-1, 1, 3), uniform(1.6, 2.6))
        label = torch.zeros((SIDE,) * 3, dtype=torch.long)
        label[tumor], label[tumor & core] = 2, 1
        image[1][tumor] += 1
        bright = tumor & core
        for _ in range(8):
            bright = bright | (ball(uniform(1, SIDE - 2, 3), uniform(1.6, 2.6)) & ~tumor)
        image[0][bright] += 1
        images.append(image)
        labels.append(label[None])
    return {"image": torch.stack(images), "label": torch.stack(labels)}


def stage(region: str, widths: Sequence[int], forerunners: Mapping[str, Any] | None = None) -> LocalizedUNet:
    """A stage in small; `forerunners` in place of paths as a checkpoint has them."""
    network = partial(ResidualUNet, features=widths)
    return LocalizedUNet(
        TASK,
        network=network,
        loss=RegionBCEDice(),
        inferer=Whole(4),
        target=RegionSigmoid,
        region=region,
        forerunners=forerunners,
        crop=(CROP,) * 3,
    )


def around_lesion(batch: dict[str, torch.Tensor], draw: torch.Generator) -> dict[str, torch.Tensor]:
    """The crop of a training sample: around the middle of the lesion, moved by up to `JITTER` voxels along each axis."""
    voxels = (batch["label"][0, 0] > 0).nonzero()
    middle = (voxels.amin(dim=0) + voxels.amax(dim=0) + 1) // 2 + torch.randint(-JITTER, JITTER + 1, (3,), generator=draw)
    box = box_around(middle.clamp(0, SIDE - 1).tolist(), (CROP,) * 3, (SIDE,) * 3)
    return {name: values[(..., *box)] for name, values in batch.items()}


def train(method: LocalizedUNet, data: Mapping[str, torch.Tensor], seed: int, cut: Callable | None = None) -> None:
    """`STEPS` steps of Adam on one volume each, or on a crop of it."""
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam([p for p in method.parameters() if p.requires_grad], lr=RATE)
    method.train()
    for _ in range(STEPS):
        chosen = torch.randint(TRAINED, (1,), generator=draw)
        batch = {name: values[chosen] for name, values in data.items()}
        loss = method.compute_loss(batch if cut is None else cut(batch, draw))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    method.eval()


def dice(method: LocalizedUNet, data: Mapping[str, torch.Tensor], region: str, truth: str | None = None) -> float:
    """Mean Dice of a region; `truth` names a forerunner whose answer is replaced by the true tumor."""
    place, found = TASK.region_names.index(region), []
    for number in range(TESTED):
        label = data["label"][number : number + 1]
        batch = {"image": data["image"][number : number + 1], "case": [str(number)]}
        if truth is not None:
            batch[truth] = (label > 0).float()
        with torch.no_grad():
            marked = method.answer(batch).regions[place] > 0.5
        true = TASK.region_masks(label[0, 0])[place]
        found.append(float(2 * (marked & true).sum() / (marked.sum() + true.sum())))
    return round(statistics.mean(found), 4)


def held(network: nn.Module, side: int) -> float:
    """MiB that a forward pass of one sample in float32 keeps for the backward pass, weights left out."""
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(torch.randn(1, len(TASK.channels), *(side,) * 3))
    return sum(storage.nbytes() for storage in kept.values()) / 2**20


def compared(seed: int) -> list[dict[str, Any]]:
    """A row for each way."""
    draw = torch.Generator().manual_seed(seed)
    train_set, test_set = volumes(TRAINED, draw), volumes(TESTED, draw)
    torch.manual_seed(seed)
    where, one = stage("WT", NARROW), stage("TC", NARROW)
    train(where, train_set, seed)
    train(one, train_set, seed)
    origin = {"task": TASK.to_dict(), "patients": []}
    options = {"network": partial(ResidualUNet, features=NARROW), "loss": RegionBCEDice(), "inferer": Whole(4), "target": RegionSigmoid}
    two = stage("TC", WIDE, {"where": {"method": partial(LocalizedUNet, region="WT", **options), **origin}})
    two.forerunners["where"].load_state_dict(where.state_dict())
    train(two, train_set, seed, around_lesion)
    memory = {"one stage": held(one.network, SIDE), "two stages": held(two.network, CROP)}
    return [
        {"seed": seed, "way": "one stage", "core": dice(one, test_set, "TC"), "tumor": None, "held": round(memory["one stage"], 2)},
        {
            "seed": seed,
            "way": "two stages",
            "core": dice(two, test_set, "TC"),
            "tumor": dice(where, test_set, "WT"),
            "held": round(memory["two stages"], 2),
        },
        {"seed": seed, "way": "oracle", "core": dice(two, test_set, "TC", "where"), "tumor": None, "held": round(memory["two stages"], 2)},
    ]


def main(path: str, seeds: Sequence[int]) -> None:
    """Writes and prints the rows of all seeds, then their means and standard deviations."""
    torch.set_num_threads(1)
    rows = [row for seed in seeds for row in compared(seed)]
    for way in ("one stage", "two stages", "oracle"):
        of = [row for row in rows if row["way"] == way and row["seed"] not in ("mean", "std")]
        for name, summary in (("mean", statistics.mean), ("std", statistics.stdev)):
            if len(of) > 1:
                rows.append(
                    {"seed": name, "way": way, "core": round(summary(row["core"] for row in of), 4), "tumor": None, "held": of[0]["held"]}
                )
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(row)


if __name__ == "__main__":
    main(sys.argv[1], [int(seed) for seed in sys.argv[2:]] or [0, 1, 2])
