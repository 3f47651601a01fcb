"""nnU-Net's side of loader_speed.py; runs in an environment of its own that has nnunetv2 installed.

    python nnunet_loader.py <folder with <case>.npz> <folder for its data set> <patch side> <batch size>

Reads one line per block from standard input (a number of batches, or `show <file>`) and answers with seconds.
"""

import sys
import time
from pathlib import Path

import numpy as np
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import LabelManager

LABELS = {"background": 0, "necrosis": 1, "edema": 2, "enhancing": 3}
AHEAD = 5  # batches that may have been made while others were timed: they do not count
ROTATION = (-30 / 360 * 2 * np.pi, 30 / 360 * 2 * np.pi)


def convert(source: Path, target: Path, patch: tuple[int, int, int]) -> None:
    """Writes every case as nnU-Net's preprocessing would leave it: float32, cropped, z-scored, -1 outside the brain in the label."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.glob("*.npz")):
        case = np.load(path)
        seg = np.where(case["brain"], case["label"], -1).astype(np.int8)[None]
        rng = np.random.default_rng(0)
        places = {}
        for value in (1, 2, 3):
            voxels = np.argwhere(seg == value)
            places[value] = voxels[rng.choice(len(voxels), min(len(voxels), 10000), replace=False)] if len(voxels) else []
        image = case["image"].astype(np.float32)
        blocks, chunks = comp_blosc2_params(image.shape, patch, image.itemsize)
        seg_blocks, seg_chunks = comp_blosc2_params(seg.shape, patch, seg.itemsize)
        nnUNetDatasetBlosc2.save_case(
            image, seg, {"class_locations": places}, str(target / path.stem), chunks=chunks, blocks=blocks, chunks_seg=seg_chunks, blocks_seg=seg_blocks
        )  # fmt: skip


def main() -> None:
    source, target, side, batch = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    patch = (side, side, side)
    convert(source, target, patch)
    transforms = nnUNetTrainer.get_training_transforms(patch, ROTATION, None, (0, 1, 2), False, use_mask_for_norm=[True] * 4)
    initial = get_patch_size(patch, ROTATION, ROTATION, ROTATION, (0.85, 1.25))
    loader = nnUNetDataLoader(
        nnUNetDatasetBlosc2(str(target)), batch, initial, patch, LabelManager(LABELS, None), oversample_foreground_percent=0.33, transforms=transforms
    )  # fmt: skip
    batches = NonDetMultiThreadedAugmenter(loader, None, 1, num_cached=2, seeds=None, pin_memory=False, wait_time=0.002)
    next(batches)
    print("ready", flush=True)
    for line in sys.stdin:
        words = line.split()
        if words[0] == "show":
            shown = next(batches)
            np.savez(words[1], image=shown["data"].numpy(), label=shown["target"].numpy())
            print("0", flush=True)
            continue
        for _ in range(AHEAD):
            next(batches)
        start = time.perf_counter()
        for _ in range(int(words[0])):
            next(batches)
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
