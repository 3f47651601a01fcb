"""Says before training what a large network takes."""

import math
import os
from typing import Any

from omegaconf import DictConfig

from lesionbench.jobs.console import say

LARGE = 4 * 2**30  # bytes; what takes less is not spoken of
PER_VOXEL = 16 * 2**10  # bytes, more than twice what the greediest network of the suite (swin_unetr, 6.2 KiB) keeps for a voxel of a batch
WIDTHS = ("features", "extra_features", "width", "widths", "channels", "feature_size", "hidden_size")  # what networks call them


def say_memory(cfg: DictConfig, method: Any, data: Any, device: Any) -> None:
    """One line where training takes more than `LARGE`, or than the device has: how much for what, and what to shrink.

    Args:
        method, data: of the stage.
        device: torch's, on which it will train.
    """
    from lightning_modules.segmentation import SegmentationMethod

    if not isinstance(method, SegmentationMethod) or data.view not in ("patch", "slice") or data.patch is None:
        return
    from lightning_modules.memory import training_memory

    spatial = [
        s for axis, s in enumerate(data.patch) if not (data.view == "slice" and len(data.patch) == 3 and axis == data.task.slice_axis)
    ]
    batch = sum(spec.get("batch_size", data.batch_size) for spec in data.streams.values())
    has = _capacity(device)
    weights = sum(p.numel() * p.element_size() for p in method.parameters())
    if 5 * weights + batch * math.prod(spatial) * PER_VOXEL < min(LARGE, has or LARGE):
        return  # whatever is counted, which takes a second for a deep network
    found = training_memory(method, (batch, data.task.in_channels, *spatial))
    if found.total < LARGE and (has is None or found.total < has):
        return
    enough = "" if has is None else f"; {device.type} has {_gib(has)}" + (", which is too little" if found.total > has else "")
    widths = [f"model.network.{name}" for name in WIDTHS if name in cfg.model.get("network", {})]
    fewer = ["data.batch_size (with accumulate)"] if batch > 1 else []
    half = [] if str(cfg.trainer.get("precision", "")).startswith("bf16") else ["precision=bf16-mixed"]
    kept = "" if found.activations is None else f", {_gib(found.activations)} for a batch of {batch} in 32 bits"
    say(
        f"training {type(method.network).__name__} takes at least {_gib(found.total)} of memory: {_gib(found.weights)} for weights and "
        f"gradients, {_gib(found.optimizer)} for the optimizer{kept}{enough}. "
        f"Less of it: {', '.join(['patch', *fewer, *widths, *half])}"
    )


def _capacity(device: Any) -> int | None:
    """Bytes of the device's memory; None where it is not known."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "cpu" and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
