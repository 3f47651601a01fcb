"""Whole-volume inference by windows: this suite's `Window` against MONAI's `sliding_window_inference`.

    python benchmarks/inference_speed.py

The same small 3D U-Net, overlap 0.5, Gaussian blending, one window per forward pass, a volume of 4 x 144 x 168 x 138. Time in turn, and the
largest resident memory of a process that does nothing else. Weights at the edges differ (MONAI clamps them otherwise), so blended values
agree only where one window covers a voxel; both are shown.
"""

import importlib
import resource
import subprocess
import sys
from functools import partial

import torch
from interleaved import machine, medians, seconds

VOLUME, PATCH, OVERLAP, ROUNDS = (4, 144, 168, 138), (96, 96, 96), 0.5, 3


def network() -> torch.nn.Module:
    from lightning_modules.networks import basic_unet

    torch.manual_seed(0)
    return basic_unet(4, 4, features=[8, 8, 16, 32, 64, 8]).eval()


def volume() -> torch.Tensor:
    return torch.randn(1, *VOLUME, generator=torch.Generator().manual_seed(0))


def suite(image: torch.Tensor, net: torch.nn.Module) -> torch.Tensor:
    from lightning_modules.inferers import Window

    return Window(PATCH, overlap=OVERLAP)(image, lambda view: {"probabilities": net(view)})["probabilities"]


def monai(image: torch.Tensor, net: torch.nn.Module) -> torch.Tensor:
    from monai.inferers import sliding_window_inference

    return sliding_window_inference(image, PATCH, 1, net, overlap=OVERLAP, mode="gaussian", sigma_scale=0.125)


def peak(name: str) -> float:
    """Peak resident memory in MB of a process of its own that infers once."""
    done = subprocess.run([sys.executable, __file__, name], check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(1)
    ways = {"suite": suite, "MONAI": monai}
    net, image = network(), volume()
    if len(sys.argv) > 1:
        for library in ("monai.inferers", "lightning_modules.inferers"):  # both processes hold the same libraries
            importlib.import_module(library)
        ways[sys.argv[1]](image, net)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    outputs = {name: way(image, net) for name, way in ways.items()}
    gap = (outputs["suite"] - outputs["MONAI"]).abs()
    times = medians({name: partial(seconds, way, image, net) for name, way in ways.items()}, ROUNDS)
    memory = {name: peak(name) for name in ways}
    print(machine())
    for name, value in times.items():
        print(f"{name:6s} {value:6.2f} s  {memory[name]:6.0f} MB peak")
    print(f"suite / MONAI: time {times['suite'] / times['MONAI']:.2f}, memory {memory['suite'] / memory['MONAI']:.2f}")
    print(
        f"logits differ by {gap.median():.2g} (median), {gap.max():.2g} at most; they range over {outputs['suite'].std():.2g} (standard deviation)"
    )


if __name__ == "__main__":
    main()
