"""The stage that carries the cases of training and validation to cubes. Called by `run.py`."""

from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from lesionbench.batch import Batch
from lesionbench.checkpoint import build_method, initialize_from
from lesionbench.cubes import CubeStore
from lesionbench.keyed import key
from lesionbench.progress import tracked
from lesionbench.task import Task
from lightning_modules.supervised.two_phase_omt import TwoPhaseOMT
from lightning_modules.transport.warp import Warp


def write_cubes(cfg: DictConfig, folder: Path) -> Path:
    """Maps every case of training and validation to the cube of `cfg.model`, and stores cubes and maps in `folder`.

    In phase II the training cases are magnified where their labels say, those of validation where the network of phase I does, whose weights
    are in `cfg.init_from`. Cases that were stored before a kill are kept.

    Raises:
        SuiteError: a map that cannot be inverted, a full disk; settings that do not fit.
    """
    from hydra.utils import instantiate

    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    data = instantiate(cfg.data, _convert_="all")
    method: TwoPhaseOMT = build_method(OmegaConf.to_container(cfg.model, resolve=True), data.task)
    if cfg.init_from and method.first is not None:
        initialize_from(method, cfg.init_from, cfg.init_prefix)
    method.eval().to("cuda" if cfg.trainer.get("accelerator") != "cpu" and torch.cuda.is_available() else "cpu")
    data.prepare_data()
    data.setup("fit")
    parts = {part: data.parts[part] for part in ("train", "val")}
    origin = {"task": data.task.to_dict(), "preprocessing": data.preprocessing.to_dict(), "statistics": data.statistics}
    origin |= {"cases": data.fingerprint()}
    store = CubeStore(folder)
    store.begin(f"{key(origin, method.transport.key, method.cube, method.channel, method.region, parts_of(parts)):016x}")
    with torch.inference_mode():
        for part, cases in parts.items():
            left = [c for c in cases if not store.has(c.id)]
            for batch in tracked(data.case_loader(left), len(left), f"{folder.name}, {part}"):
                _store(store, data.transfer_batch_to_device(batch, method.device, 0), method, truth=part == "train")
    store.finish(parts, origin)
    return folder


def parts_of(parts: dict[str, list]) -> dict[str, list[str]]:
    """The ids of cases by part."""
    return {part: [case.id for case in cases] for part, cases in parts.items()}


def _store(store: CubeStore, batch: Batch, method: TwoPhaseOMT, truth: bool) -> None:
    task, label = method.task, batch["label"][0, 0]
    tumor = task.region_masks(label)[task.region_names.index(method.region)] if truth else None
    warp = method.warp(batch, tumor)
    image, psi = method.pull(batch, warp)
    cube = warp.pull_labels(label, psi)
    row = conversion(task, label, cube, warp, batch["brain_mask"][0, 0])
    store.write(
        batch["case"][0],
        task,
        image.cpu().numpy(),
        cube.cpu().numpy(),
        (warp.nodes.cpu().numpy(), warp.box, warp.shape, warp.density.cpu().numpy()),
        row,
    )


def conversion(task: Task, label: torch.Tensor, cube: torch.Tensor, warp: Warp, brain: torch.Tensor) -> dict[str, float]:
    """What a map does to a case, for each region: its share of the brain, of the mass and of the cube (Table 2 of the paper), and the conversion
    loss 1 - 2 |A and B| / (|A| + |B|) between its voxels and those that come back from the cube (Table 1), 0 where there are none.

    Args:
        label, cube: class indices on the volume and in the cube.
        brain: mask on the volume.
    """
    back = warp.push(cube[None])[0] * brain
    volumes = [task.region_masks(m) for m in (label, cube, back)]
    row = {}
    for name, mass, before, there, after in zip(task.regions, warp.mass(volumes[0]), *volumes, strict=True):
        total = int(before.sum() + after.sum())
        row[f"{name}_brain"] = int(before.sum()) / max(int(brain.sum()), 1)
        row[f"{name}_mass"] = float(mass)
        row[f"{name}_cube"] = float(there.double().mean())
        row[f"{name}_loss"] = 1 - 2 * int((before & after).sum()) / total if total else 0.0
    return row
