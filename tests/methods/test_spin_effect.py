"""What subpixel guidance does for lesions of a few pixels: on windows of texture with dark ellipses, and on simulated strokes (the frozen
experiment `spin/simulated_stroke`); each once at full length, and once in seconds."""

import runpy
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from lightning_modules.losses import RegionBCE
from lightning_modules.networks import SubpixelNet
from tests.harness import rows, run, run_folders

SMALL = ("le25", "le100")  # strata of slices whose largest lesion has at most 100 pixels
TWIN = [
    "epochs=1", "data.samples_per_epoch=8", "data.count=4", "data.split.test=1", "data.split.val=0", "data.spacing=6", "patch=[36,36]", "data.batch_size=4",
    "model.network.widths=[4,4,4,4,4]", "model.network.decoder_widths=[4,4,4,4,4,4]", "objective.name=null",
]  # fmt: skip
GAIN = 0.02


# windows of texture


def windows(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated texture with 1 to 3 dark ellipses of 1.2 to 3.2 pixels: windows (n, 1, 48, 48, 5), masks of the middle slice (n, 1, 48, 48)."""
    rng = np.random.default_rng(seed)
    z, y, x = np.mgrid[-2:3, 0:48, 0:48]

    def texture(sigma):
        noise = gaussian_filter(rng.standard_normal((5, 48, 48)), sigma)
        return noise / noise.std()

    images, masks = [], []
    for _ in range(count):
        image = 0.35 * texture((2, 3, 3)) + 0.5 * texture(1) + 0.3 * rng.standard_normal((5, 48, 48))
        lesion = np.zeros((5, 48, 48), bool)
        for _ in range(rng.integers(1, 4)):
            row, column, turn, middle = *rng.uniform(4, 44, 2), rng.uniform(0, np.pi), rng.uniform(-1, 1)
            along = (y - row) * np.cos(turn) + (x - column) * np.sin(turn)
            across = (x - column) * np.cos(turn) - (y - row) * np.sin(turn)
            a, b = rng.uniform(1.2, 3.2, 2)
            lesion |= (along / a) ** 2 + (across / b) ** 2 + ((z - middle) / 2.5) ** 2 <= 1
        images.append((image - 2 * lesion).transpose(1, 2, 0))
        masks.append(lesion[2])
    return torch.from_numpy(np.stack(images)[:, None]).float(), torch.from_numpy(np.stack(masks)[:, None]).float()


def window_dice(spg: str, seed: int, cases: int = 400, steps: int = 320) -> float:
    """Pooled Dice on 100 new windows after `steps` batches of eight, Adam at 1e-3 and, from two thirds on, 3e-4; flips; no downsampler."""
    (images, masks), (new, truth) = windows(cases, 2 * seed), windows(100, 2 * seed + 1)
    torch.manual_seed(seed)
    network = SubpixelNet(
        1, 1, spg=spg, downsampler="bilinear", widths=[8, 16, 24, 32, 32], decoder_widths=[32, 24, 16, 8, 8, 8], embedding_width=8
    )
    optimizer, loss = torch.optim.Adam(network.parameters(), lr=1e-3), RegionBCE(positive_weight=1.5)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 if step < 220 * steps / 320 else 3e-4
        chosen = torch.randint(cases, (8,))
        flips = [axis for axis in (2, 3) if torch.rand(()) < 0.5]
        optimizer.zero_grad()
        loss(network(images[chosen].flip(flips)), masks[chosen].flip(flips)).backward()
        optimizer.step()
    network.eval()
    with torch.no_grad():
        found = torch.cat([network(part) > 0 for part in new.split(20)])
    return float(2 * (found * truth).sum() / (found.sum() + truth.sum()))


@pytest.mark.slow
def test_guidance_finds_small_ellipses():
    dice = {spg: [window_dice(spg, seed) for seed in range(2)] for spg in ("none", "learned")}
    print(dice)
    assert mean(dice["learned"]) > mean(dice["none"]) + GAIN, dice


def test_code_path_of_the_ellipses():
    dice = {spg: window_dice(spg, 0, cases=16, steps=2) for spg in ("none", "learned")}
    assert 0 < dice["learned"] < 1
    assert dice["none"] != dice["learned"]


# simulated strokes


def small_lesion_dice(folder: Path, spg: str, seed: int, *more: str) -> float:
    """Trains and tests one arm (the four subpixels are averaged); Dice pooled over the test slices with small lesions only."""
    runs = folder / f"{spg}-{seed}"
    run(
        "experiment=spin/simulated_stroke", f"model.network.spg={spg}", "model.network.downsampler=bilinear", f"seed={seed}", f"runs={runs}",
        f"data.root={folder / 'data'}", "threads=1", "callbacks.figures=null", *more,
    )  # fmt: skip
    (found,) = run_folders(runs)
    total = {c: sum(int(row[f"slices_{s}_{c}"]) for row in rows(found) for s in SMALL) for c in ("n", "hit", "predicted", "true")}
    assert total["n"] > 0
    assert (found / "test" / "slices.csv").exists()
    return 2 * total["hit"] / (total["predicted"] + total["true"])


@pytest.mark.slow
def test_guidance_finds_small_strokes(tmp_path):
    dice = {spg: [small_lesion_dice(tmp_path, spg, seed) for seed in range(3)] for spg in ("none", "learned")}
    assert mean(dice["learned"]) > mean(dice["none"]) + GAIN, dice


def test_code_path_of_the_strokes(tmp_path):
    dice = [small_lesion_dice(tmp_path, spg, 0, *TWIN) for spg in ("none", "learned")]
    script = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "small_lesions.py"))
    found = {(row["model.network.spg"], row["stratum"]): row for row in script["table"]([tmp_path])}
    for spg, pooled in zip(("none", "learned"), dice, strict=True):
        assert found[spg, "slices le25"]["seeds"] == 1
        if not found[spg, "slices le100"]["n"]:
            assert found[spg, "slices le25"]["dice"] == pytest.approx(pooled, abs=1e-4)
