"""What co-learning claims, on the toy of blobs: a short version of one claim, and (slow) the experiments as documented."""

import statistics

import pytest
import torch

from datamodules.simulated.blobs import blob
from lesionbench.keyed import numpy_generator
from lightning_modules import CoLearning
from lightning_modules.inferers import SliceWise
from lightning_modules.losses import SoftDice
from lightning_modules.networks import MultiHeadUNet
from tests.harness import rows, run, run_folders
from tests.methods.test_co_learning import TASK


def images(name: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    made = [blob(numpy_generator("effect", name, number)) for number in range(count)]
    return torch.stack([torch.from_numpy(i) for i, _ in made])[:, None], torch.stack([torch.from_numpy(m) for _, m in made])[:, None].long()


def network(in_channels: int, out_channels: int, **more) -> MultiHeadUNet:
    return MultiHeadUNet(in_channels, out_channels, dimensions=2, features=[8, 16], norm="group", **more)


def warmed(init: str) -> dict[str, float]:
    """Dice of every network after a short supervised warm start."""
    torch.manual_seed(0)
    variants = [{"upsampling": "linear"}, {"upsampling": "nearest"}]
    module = CoLearning(
        TASK, network=network, loss=SoftDice(include_background=True), inferer=SliceWise(), variants=variants, init=init, rates=(0.05, 0.05)
    )
    optimizer = torch.optim.Adam(module.optimizer_groups()["main"], lr=1e-2)
    image, label = images("train", 4)
    for iteration in range(60):
        turn = iteration % 4
        batch = {"image": image.rot90(turn, (2, 3)), "label": label.rot90(turn, (2, 3))}
        module.warm_losses(batch)["supervised"].backward()
        optimizer.step()
        optimizer.zero_grad()
        module.teacher.update()
    image, label = images("test", 20)
    with torch.no_grad():
        hard = {name: module.eval().hard(answer(image)) for name, answer in module.predictors().items()}
    return {name: float(2 * (h * label).sum() / (h + label).sum()) for name, h in hard.items()}


def test_an_average_of_students_answers_only_where_they_started_alike():
    same, different = warmed("same"), warmed("different")
    assert min(same["student1"], same["student2"], different["student1"], different["student2"]) > 0.6
    assert same["teacher"] > different["teacher"] + 0.05


@pytest.mark.slow
def test_co_learning_helps_and_needs_equal_first_weights(tmp_path):
    """Means over three seeds: with co-learning above the labeled images alone, and the teacher of equal above that of different weights."""

    def means(name: str, *overrides: str) -> dict[str, float]:
        for seed in (10, 11, 12):
            run(*overrides, f"seed={seed}", f"data.root={tmp_path / 'data'}", f"runs={tmp_path / name}", "threads=1")
        found: dict[str, list[float]] = {}
        for folder in run_folders(tmp_path / name):
            for row in rows(folder):
                found.setdefault(row["member"], []).append(float(row["dice"]))
        return {member: statistics.mean(values) for member, values in found.items()}

    supervised = means("supervised", "benchmark=blobs", "model=supervised")
    full = means("full", "benchmark=blobs", "model=co_learning")
    different = means("different", "benchmark=blobs", "model=co_learning", "model.init=different")
    assert full[""] > supervised[""]
    assert full["teacher"] > different["teacher"] + 0.05
