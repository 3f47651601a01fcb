"""nnU-Net's own plans of fingerprints, for tests of ours.

    python -m tests.nnunet_official

writes `tests/recorded/nnunet_plans.json`, the plans of 40 random fingerprints; it needs nnU-Net (2.8.1 made the file), which the suite does not.
"""

import contextlib
import importlib
import io
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from datamodules.planning import Fingerprint

RECORDED = Path(__file__).parent / "recorded" / "nnunet_plans.json"
FIELDS = ("spacing", "patch", "batch_size", "strides", "kernels", "features")


def drawn(seed: int) -> tuple[Fingerprint, float]:
    """A fingerprint with few or many, isotropic or coarse cases, and GiB to plan for."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(2, 40))
    base = rng.uniform(0.4, 2, 3) * np.array([1, 1, rng.choice([1, 1, 2, 4, 6])])[rng.permutation(3)]
    shapes = rng.integers(20, 300, 3) * np.ones((count, 1), int) + rng.integers(-5, 6, (count, 3))
    channels = tuple(f"c{n}" for n in range(rng.integers(1, 5)))
    found = Fingerprint(base * rng.uniform(0.9, 1.1, (count, 1)), shapes, 1.0, channels, int(rng.integers(2, 6)))
    return found, float(rng.choice([4, 8, 11, 24]))


def planned(found: Fingerprint, gib: float) -> dict[str, Any]:
    """nnU-Net's plan by `FIELDS`, in the suite's axes."""
    with tempfile.TemporaryDirectory() as home, contextlib.redirect_stdout(io.StringIO()):
        for name in ("raw", "preprocessed"):
            (Path(home) / name / "Dataset001_X" / "imagesTr").mkdir(parents=True)
        planner = importlib.import_module("nnunetv2.experiment_planning.experiment_planners.default_experiment_planner")
        planner.nnUNet_raw, planner.nnUNet_preprocessed = (str(Path(home) / name) for name in ("raw", "preprocessed"))
        channels = {str(n): name for n, name in enumerate(found.channels)}
        labels = {"background": 0} | {f"c{n}": n for n in range(1, found.classes)}
        described = {"channel_names": channels, "labels": labels, "numTraining": len(found.shapes), "file_ending": ".nii.gz"}
        told = {
            "spacings": found.spacings[:, ::-1].tolist(),
            "shapes_after_crop": found.shapes[:, ::-1].tolist(),
            "median_relative_size_after_cropping": found.shrinks,
            "foreground_intensity_properties_per_channel": {n: {} for n in channels},
        }
        for part, name, content in (("raw", "dataset", described), ("preprocessed", "dataset_fingerprint", told)):
            (Path(home) / part / "Dataset001_X" / f"{name}.json").write_text(json.dumps(content))
        theirs = planner.ExperimentPlanner("Dataset001_X", gpu_memory_target_in_gb=gib)
        theirs.dataset = {f"case{n}": SimpleNamespace() for n in range(len(found.shapes))}
        theirs.determine_reader_writer = lambda: importlib.import_module("nnunetv2.imageio.simpleitk_reader_writer").SimpleITKIO
        theirs.plan_experiment()
    chosen, order = theirs.plans["configurations"]["3d_fullres"], theirs.plans["transpose_forward"]
    network, back = chosen["architecture"]["arch_kwargs"], [order.index(axis) for axis in range(3)][::-1]

    def ours(values: Any) -> list:
        return [values[a] for a in back]

    return {
        "spacing": [float(v) for v in ours(chosen["spacing"])],
        "patch": [int(v) for v in ours(chosen["patch_size"])],
        "batch_size": int(chosen["batch_size"]),
        "strides": [ours(s) for s in network["strides"]],
        "kernels": [ours(k) for k in network["kernel_sizes"]],
        "features": list(network["features_per_stage"]),
    }


if __name__ == "__main__":
    rows = [json.dumps({"seed": seed, **planned(*drawn(seed))}) for seed in range(40)]
    RECORDED.write_text("[\n" + ",\n".join(rows) + "\n]\n")
