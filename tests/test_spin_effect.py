"""What subpixel guidance does for lesions of a few pixels: the frozen experiment `spin/simulated_stroke`, and its code path in seconds."""

import runpy
from pathlib import Path
from statistics import mean

import pytest

from tests.harness import rows, run, run_folders

SMALL = ("le25", "le100")  # strata of slices whose largest lesion has at most 100 pixels
TWIN = [
    "epochs=1", "data.samples_per_epoch=8", "data.count=4", "data.split.test=1", "data.split.val=0", "data.spacing=6", "patch=[36,36]", "data.batch_size=4",
    "model.network.widths=[4,4,4,4,4]", "model.network.decoder_widths=[4,4,4,4,4,4]", "objective.name=null",
]  # fmt: skip


def small_lesion_dice(folder: Path, spg: str, seed: int, *more: str) -> float:
    """Trains and tests one arm (the four subpixels are averaged); Dice pooled over the test slices with small lesions only."""
    runs = folder / f"{spg}-{seed}"
    run(
        "experiment=spin/simulated_stroke", f"model.network.spg={spg}", "model.network.downsampler=bilinear", f"seed={seed}", f"runs={runs}",
        f"data.root={folder / 'data'}", "threads=1", *more,
    )  # fmt: skip
    (found,) = run_folders(runs)
    total = {c: sum(int(row[f"slices_{s}_{c}"]) for row in rows(found) for s in SMALL) for c in ("n", "hit", "predicted", "true")}
    assert total["n"] > 0
    assert (found / "test" / "slices.csv").exists()
    return 2 * total["hit"] / (total["predicted"] + total["true"])


@pytest.mark.slow
def test_guidance_finds_small_lesions(tmp_path):
    dice = {spg: [small_lesion_dice(tmp_path, spg, seed) for seed in range(3)] for spg in ("none", "learned")}
    assert mean(dice["learned"]) > mean(dice["none"]) + 0.02, dice


def test_code_path_of_the_effect(tmp_path):
    dice = [small_lesion_dice(tmp_path, spg, 0, *TWIN) for spg in ("none", "learned")]
    assert all(0 <= d <= 1 for d in dice)
    script = runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "small_lesions.py"))
    found = {(row["model.network.spg"], row["stratum"]): row for row in script["table"]([tmp_path])}
    for spg, pooled in zip(("none", "learned"), dice, strict=True):
        assert found[spg, "slices le25"]["seeds"] == 1
        if not found[spg, "slices le100"]["n"]:
            assert found[spg, "slices le25"]["dice"] == pytest.approx(pooled, abs=1e-4)
