"""Training patches per second with nnU-Net's default augmentation: this suite, torchio.Queue and nnU-Net, one worker each.

    python benchmarks/loader_speed.py --nnunet-python <python of an environment with nnunetv2> [--root <BraTS folder> --layout 2018] [--out <folder>]
    python benchmarks/loader_speed.py --memory

All sides get the same cases, patches of 128^3 x 4 in batches of two, the same transforms with the same probabilities and ranges, and one
loader process. Blocks of batches are timed in turn (A B C, A B C, ...), the other sides' processes stopped meanwhile; the medians are
compared. A torchio.Queue that draws several patches of a volume augments them together, once; with one patch a volume every patch is
augmented for itself, as on the other sides. `--out` keeps a picture of what each side
makes. `--memory` instead prints how much memory the loading process holds with 6 and 60 cases and with twice the volume side.
Without `--root`, cases are simulated at 1 mm in BraTS layout.
"""

import argparse
import multiprocessing
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from datamodules.base import CaseDataModule
from datamodules.brats import BraTS
from datamodules.folder import Folder
from datamodules.sampling import Sampling
from datamodules.simulated.brats_layout import write_brats
from datamodules.simulated.simulation import Simulation
from datamodules.split import Split
from lesionbench.geometry import read_volume, write_volume

SIDE, BATCH, AHEAD, BLOCK, ROUNDS = 128, 2, 5, 8, 5
CHANNELS = ("t1", "t1ce", "t2", "flair")


def augmentation():
    """conf/augmentation/nnunet.yaml, built."""
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    return instantiate(OmegaConf.load(Path(__file__).parent.parent / "conf" / "augmentation" / "nnunet.yaml"))


def prepared(data: CaseDataModule) -> CaseDataModule:
    data.prepare_data()
    data.setup("fit")
    return data


def suite(root: Path, workers: int = 1, batches: int = 10_000, layout: str = "2020", cache: Path | None = None) -> CaseDataModule:
    """The suite's BraTS data module on every case of `root`."""
    return prepared(
        BraTS(
            root, layout=layout, cache=cache, patch=(SIDE,) * 3, batch_size=BATCH, samples_per_epoch=batches * BATCH, split=Split(test=0, val=0),
            sampling=Sampling("foreground", share=0.33), augmentation=augmentation(), num_workers=workers,
        )
    )  # fmt: skip


def above_zero(values: torch.Tensor) -> torch.Tensor:
    return values > 0


def torchio_queue(data: CaseDataModule, per_volume: int) -> Iterator[dict]:
    """Endless batches of torchio.Queue over the same cases: whole volumes are loaded and augmented, then patches are drawn from them."""
    import torchio
    from torch.utils.data import DataLoader

    ours = augmentation()
    transforms = [
        torchio.ZNormalization(masking_method=above_zero),
        torchio.RandomAffine(scales=(0.7, 1.4), isotropic=True, degrees=0, p=0.2),
        torchio.RandomAffine(scales=0, degrees=30, p=0.2),
        torchio.RandomFlip(axes=(0, 1, 2), flip_probability=0.5),
        *list(ours.transforms)[:-1],  # all but the mask, which the volumes do not carry
    ]
    subjects = [
        torchio.Subject(image=torchio.ScalarImage([str(p) for p in case.images.values()]), label=torchio.LabelMap(str(case.label)))
        for case in data.parts["train"]
    ]
    sampler = torchio.LabelSampler(SIDE, label_name="label", label_probabilities={0: 0.67, 1: 0.11, 2: 0.11, 4: 0.11})
    while True:
        queue = torchio.Queue(
            torchio.SubjectsDataset(subjects, transform=torchio.Compose(transforms)), max_length=4 * per_volume, samples_per_volume=per_volume,
            sampler=sampler, num_workers=1,
        )  # fmt: skip
        yield from DataLoader(queue, batch_size=BATCH, num_workers=0)


class Loader:
    """One side whose worker processes belong to this process; they are stopped while other sides are timed."""

    def __init__(self, batches: Iterator, skip: int, count: int) -> None:
        self.batches, self.skip, self.count, self.workers = batches, skip, count, set()

    def speed(self) -> float:
        """Patches per second of `count` batches, after `skip` that may have been made ahead."""
        others = set(multiprocessing.active_children()) - self.workers
        self._send(signal.SIGCONT)
        for _ in range(self.skip):
            next(self.batches)
        start = time.perf_counter()
        for _ in range(self.count):
            next(self.batches)
        speed = self.count * BATCH / (time.perf_counter() - start)
        self.workers = set(multiprocessing.active_children()) - others
        self._send(signal.SIGSTOP)
        return speed

    def end(self) -> None:
        self._send(signal.SIGCONT)  # so that they can end with their loader

    def _send(self, number: int) -> None:
        for worker in self.workers:
            if worker.is_alive():
                os.kill(worker.pid, number)


class NNUNet:
    """nnU-Net's loader in a process of its own, asked by line."""

    def __init__(self, python: str, data: CaseDataModule, folder: Path) -> None:
        cases = folder / "cases"
        cases.mkdir()
        whole = data.case_loader(data.parts["train"]).dataset
        for n in range(len(whole)):
            item = whole[(n, False)]
            np.savez(
                cases / f"case{n}.npz", image=item["image"].numpy(), label=item["label"][0].numpy(), brain=item["brain_mask"][0].numpy()
            )
        script = Path(__file__).parent / "nnunet_loader.py"
        command = [python, str(script), str(cases), str(folder / "data set"), str(SIDE), str(BATCH)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
        while self._answer() != "ready":
            pass
        os.killpg(self.process.pid, signal.SIGSTOP)

    def _answer(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("nnU-Net's side ended; see above")
        return line.strip()

    def _ask(self, line: str) -> float:
        os.killpg(self.process.pid, signal.SIGCONT)
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        answer = float(self._answer())
        os.killpg(self.process.pid, signal.SIGSTOP)
        return answer

    def speed(self) -> float:
        return BLOCK * BATCH / self._ask(str(BLOCK))

    def end(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)

    def batch(self, folder: Path) -> dict:
        self._ask(f"show {folder / 'shown.npz'}")
        return dict(np.load(folder / "shown.npz"))


def speeds(arguments: argparse.Namespace, scratch: Path) -> None:
    root = arguments.root or write_brats(scratch / "brats", Simulation(spacing=1.0), arguments.cases)
    data = suite(Path(root), layout=arguments.layout if arguments.root else "2020", cache=scratch / "cache")
    sides: dict[str, Loader | NNUNet] = {"suite": Loader(iter(data.train_dataloader()), AHEAD, BLOCK)}
    for n in (1, 8):
        sides[f"torchio.Queue, {n} patch(es) a volume"] = Loader(torchio_queue(data, n), 4 * n // BATCH, 4 * n // BATCH)
    if arguments.nnunet_python:
        sides["nnU-Net"] = nnunet = NNUNet(arguments.nnunet_python, data, scratch)
    if arguments.out:
        shown = {"suite": next(iter(data.train_dataloader())), "torchio.Queue": next(torchio_queue(data, 8))}
        shown["torchio.Queue"] = {k: shown["torchio.Queue"][k]["data"] for k in ("image", "label")}
        if arguments.nnunet_python:
            shown["nnU-Net"] = nnunet.batch(scratch)
        picture(shown, Path(arguments.out))
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, side in sides.items():
            found[name].append(side.speed())
    for side in sides.values():
        side.end()
    print(f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}; {len(data.parts['train'])} cases")
    base = statistics.median(found["suite"])
    for name, values in found.items():
        middle = statistics.median(values)
        print(f"{name:36s} {middle:6.2f} patches/s  ({min(values):.2f} to {max(values):.2f})  suite is {base / middle:.2f} x as fast")


def picture(shown: dict[str, dict], out: Path) -> None:
    """Middle slices of the first batch of each side."""
    import matplotlib.pyplot as plt

    out.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(len(shown), 2 * BATCH, figsize=(3 * BATCH * 2, 3 * len(shown)), squeeze=False)
    for row, (name, batch) in zip(axes, shown.items(), strict=True):
        for b in range(BATCH):
            image, label = (np.asarray(batch[k])[b, :, :, :, SIDE // 2] for k in ("image", "label"))
            row[2 * b].imshow(image[3].T, cmap="gray", origin="lower")
            row[2 * b + 1].imshow(label[0].T, origin="lower", vmin=0, vmax=4)
            row[2 * b].set_title(f"{name}: FLAIR, mean {np.asarray(batch['image'])[b].mean():.2f}")
    for axis in axes.flat:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(out / "loaders.png", dpi=70)
    plt.close(figure)


def memory(scratch: Path) -> None:
    """Largest resident memory of this process while it makes 24 batches, for several data sets; each in a fresh process."""
    small = write_brats(scratch / "small", Simulation(spacing=1.0), 6)
    folder, large = scratch / "sixty", scratch / "large"
    for n, case in enumerate(suite(small, workers=0).parts["train"]):
        images = {c: read_volume(path) for c, path in case.images.items()}
        label = read_volume(case.label)
        for copy in range(10):
            (folder / "images").mkdir(parents=True, exist_ok=True)
            (folder / "labels").mkdir(exist_ok=True)
            for c, path in case.images.items():
                (folder / "images" / f"case{n}x{copy}_{c}.nii.gz").symlink_to(path)
            (folder / "labels" / f"case{n}x{copy}.nii.gz").symlink_to(case.label)
        for c, (values, affine, _) in images.items():
            write_volume(large / "images" / f"case{n}_{c}.nii", values.repeat(2, 0).repeat(2, 1).repeat(2, 2).astype(np.int16), affine)
        write_volume(large / "labels" / f"case{n}.nii", label[0].repeat(2, 0).repeat(2, 1).repeat(2, 2).astype(np.uint8), label[1])
    print(f"{platform.machine()}, Python {platform.python_version()}; resident memory while making 24 batches of two 128^3 x 4 patches")
    base = None
    for name, root in {"6 cases": small, "60 cases": folder, "6 cases, 2 x the side": large}.items():
        command = [sys.executable, __file__, "--resident", str(root)]
        for _ in range(2):  # the first run fills the cache
            answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peak = float(answer.split()[-1])
        base = base or peak
        print(f"{name:24s} {peak:7.0f} MB  {peak / base:.3f}")


def resident(root: Path) -> None:
    """Prints this process' largest resident memory in MB over 24 batches."""
    if (root / "images").is_dir():
        classes = {"background": 0, "necrosis": 1, "edema": 2, "enhancing": 4}
        data = prepared(
            Folder(
                root, channels=CHANNELS, classes=classes, patch=(SIDE,) * 3, batch_size=BATCH, samples_per_epoch=48, check=False,
                split=Split(test=0, val=0), sampling=Sampling("foreground", share=0.33), augmentation=augmentation(),
            )
        )  # fmt: skip
    else:
        data = suite(root, workers=0, batches=24)
    peak = 0
    torch.set_num_threads(1)
    for _ in data.train_dataloader():
        with open("/proc/self/status") as file:
            peak = max(peak, int(next(line for line in file if line.startswith("VmRSS")).split()[1]))
    print(peak / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nnunet-python", help="Python of an environment with nnunetv2; left out: nnU-Net is not measured")
    parser.add_argument("--root", help="folder of BraTS cases; left out: simulated cases")
    parser.add_argument("--layout", default="2020", help="challenge year of --root")
    parser.add_argument("--cases", type=int, default=6, help="number of simulated cases")
    parser.add_argument("--out", help="folder for a picture of what each side makes")
    parser.add_argument("--memory", action="store_true", help="measure memory, not speed")
    parser.add_argument("--resident", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.resident:
        resident(Path(arguments.resident))
        return
    with tempfile.TemporaryDirectory() as scratch:
        memory(Path(scratch)) if arguments.memory else speeds(arguments, Path(scratch))


if __name__ == "__main__":
    main()
