"""Does the memory of an ensemble grow with the number of its members?

    python benchmarks/ensemble_memory.py [side of the volume, default 128]

Each line is a process of its own that predicts one random case of that many voxels along each side with 1, 2, 4 and 8 members: first its
peak resident memory, then what the fusion holds when the last member has answered. Members are checkpoints of a 3D U-Net with random
weights. Fails if mean or vote need so much more with eight members than with two as a third of
six members' weights, or if STAPLE holds more than one bit per member, region and voxel.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

MEMBERS = (1, 2, 4, 8)
FEATURES = (4, 4, 8, 16, 512, 4)  # most weights where there are few voxels: 32 MiB each that would show if they piled up


def task():
    from datamodules.readers.brats_files import brats_task

    return brats_task("2020")


def write_members(folder: Path, number: int) -> list[str]:
    """Checkpoints as run.py writes them."""
    import torch

    from datamodules import Preprocessing
    from lesionbench.checkpoint import build_method

    config = {
        "_target_": "lightning_modules.Supervised",
        "network": {"_target_": "lightning_modules.networks.basic_unet", "_partial_": True, "dimensions": 3, "features": list(FEATURES)},
        "loss": {"_target_": "lightning_modules.losses.RegionBCEDice"},
        "target": {"_target_": "lesionbench.target.RegionSigmoid", "_partial_": True},
        "inferer": {"_target_": "lightning_modules.inferers.Window", "patch": [64, 64, 64], "overlap": 0.0},
    }
    paths = []
    for place in range(number):
        torch.manual_seed(place)
        method = build_method(config, task())
        own = {
            "model": config,
            "task": task().to_dict(),
            "preprocessing": Preprocessing(crop="none").to_dict(),
            "statistics": None,
            "patients": [],
            "iteration": 0,
        }
        paths.append(str(folder / f"{place}.ckpt"))
        torch.save({"state_dict": method.state_dict(), "lesionbench": own}, paths[-1])
    return paths


def measure(fusion: str, paths: list[str], side: int) -> None:
    """Prints the peak of this process in MiB, before the members and after them, and the bytes that the fusion holds."""
    from types import SimpleNamespace

    import numpy as np
    import torch

    from callbacks.cost import peak_memory
    from datamodules import Preprocessing
    from lesionbench.geometry import Geometry
    from lightning_modules.evaluation.ensemble import Ensemble
    from lightning_modules.raters.fusion import FUSIONS

    torch.set_num_threads(1)
    held = []
    for kind in FUSIONS.values():  # looks at the fusion when it is asked for its result
        original = kind.result

        def result(self, original=original):
            tensors = [v for v in vars(self).values() if isinstance(v, torch.Tensor)]
            held.append(sum(t.numel() * t.element_size() for t in tensors) + sum(b.nbytes for b in getattr(self, "_bits", [])))
            return original(self)

        kind.result = result
    ensemble = Ensemble(task(), checkpoints=paths, fusion=fusion)
    data = SimpleNamespace(task=task(), preprocessing=Preprocessing(crop="none"), statistics=None)
    ensemble._trainer = SimpleNamespace(datamodule=data)
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 4, side, side, side, generator=generator)
    batch = {"image": image, "case": ["a"], "patient": ["a"], "geometry": [Geometry.of(np.eye(4), (side,) * 3)]}
    ensemble.predict_case(batch)
    print(json.dumps({"peak": peak_memory(), "held": held[-1]}))


def main() -> None:
    side = int(sys.argv[1]) if len(sys.argv) > 1 else 128
    print(f"{platform.machine()}, one thread, Python {platform.python_version()}, {side}^3 voxels, 3 regions")
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        paths = write_members(Path(folder), max(MEMBERS))
        for fusion in ("mean", "vote", "staple"):
            found = []
            for number in MEMBERS:
                arguments = [sys.executable, __file__, "--one", fusion, str(side), *paths[:number]]
                found.append(json.loads(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.splitlines()[-1]))
            peaks = "  ".join(f"{n}: {f['peak']:5.0f} MiB, {f['held'] / 2**20:5.1f} held" for n, f in zip(MEMBERS, found, strict=True))
            print(f"{fusion:6}  {peaks}", flush=True)
            weights = (MEMBERS[-1] - MEMBERS[1]) * Path(paths[0]).stat().st_size / 2**20
            if fusion != "staple" and (found[-1]["peak"] - found[1]["peak"] > weights / 3 or found[-1]["held"] != found[1]["held"]):
                wrong.append(fusion)
            if fusion == "staple" and any(f["held"] != n * 3 * side**3 // 8 for n, f in zip(MEMBERS, found, strict=True)):
                wrong.append(fusion)
    if wrong:
        raise SystemExit(f"memory grows: {', '.join(wrong)}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        measure(sys.argv[2], sys.argv[4:], int(sys.argv[3]))
    else:
        main()
