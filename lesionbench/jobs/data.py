"""Jobs on a data set alone: check, prepare, simulate, show."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lesionbench.errors import Incomplete, SuiteError, unknown
from lesionbench.installation import command
from lesionbench.jobs.console import say


def check(cfg: DictConfig) -> None:
    """Checks every case of the data set and prints what it holds and all findings at once."""
    from hydra.utils import instantiate

    from datamodules.integrity import ASTRAY, ERROR, Finding, render
    from datamodules.overview import overview

    data = instantiate(cfg.data, _convert_="all")
    astray, strict, data.allow_missing = [], data.allow_missing, True  # missing channels are found case by case
    try:
        data.materialize()
        cases = data.cases()
    except Incomplete as error:
        cases, astray = data.ordered(error.cases), [Finding(ERROR, "data.root", data.root, ASTRAY, str(error))]
    finally:
        data.allow_missing = strict
    findings = [*astray, *data.findings(cases)]
    say(render(findings) if findings else f"{data.root}: nothing to report")
    say(overview(cases, data.task, data.preprocessing.header))
    if any(f.level == "error" for f in findings):
        raise SuiteError(f"{sum(f.level == 'error' for f in findings)} error(s) in {data.root}; see above")


def prepare(cfg: DictConfig) -> None:
    """Fills the cache ahead of training, after an estimate of its size and a look at the free space."""
    from hydra.utils import instantiate

    from datamodules.overview import cut_off

    data = instantiate(cfg.data, _convert_="all")
    data.materialize()
    cases = data.cases()
    cache = data.store
    data.cache_root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(data.cache_root).free
    say(f"{len(cases)} cases, about {cache.estimate(cases) / 1e9:.2f} GB in {data.cache_root} ({free / 1e9:.0f} GB free)")
    data.prepare_data()
    say(f"{len(cases)} cases ready")
    outside = cut_off(data)
    if outside:
        worst = sorted(outside, key=lambda case: -outside[case])[:5]
        say(
            f"crop=center leaves out {sum(outside.values())} labeled voxel(s) of {len(outside)} case(s), most of "
            + ", ".join(f"{case} ({outside[case]})" for case in worst)
        )


def simulate(cfg: DictConfig) -> None:
    """Writes simulated cases to `out` in the true layout of a BraTS year (`simulate.layout`)."""
    if not cfg.out:
        raise SuiteError("job=simulate needs out=<new folder>")
    from datamodules.simulated.brats_layout import write_brats
    from datamodules.simulated.simulation import Simulation

    options = OmegaConf.to_container(cfg.simulate, resolve=True)
    count, layout = options.pop("count"), options.pop("layout")
    path = write_brats(Path(cfg.out), Simulation(**options), count, str(layout))
    say(f"{count} cases in {path}; train on them with\n  {command()} benchmark=brats2020 data.layout={layout} data.root={path}")


def plan(cfg: DictConfig) -> None:
    """Reads the data set, prints a configuration with the reason of every value, and writes it as an experiment to `out`."""
    from hydra.utils import instantiate

    from datamodules import planning

    data = instantiate(cfg.data, _convert_="all")
    data.materialize()
    cases = [c for c in data.cases() if c.label is not None or c.raters] or data.cases()

    def tell(number: int) -> None:
        if number * 10 // len(cases) > (number - 1) * 10 // len(cases):
            say(f"{number} of {len(cases)} cases read")

    found = planning.fingerprint(cases, data.task, data.preprocessing.header, tell)
    made = planning.plan(found, cfg.plan.memory_gib)
    width = max(len(name) for name, _, _ in made.reasons)
    for name, value, reason in made.reasons:
        say(f"{name:{width}}  {value}\n{'':{width}}    {reason}")
    path = planning.write_experiment(made, Path(cfg.out or "experiment/plan.yaml"), data.root)
    home = path.parent.parent if path.parent.name == "experiment" else None
    use = (
        f"{command()} --config-dir {home} experiment={path.stem} ..."
        if home
        else "put it into a folder experiment/ and name that folder's parent in --config-dir"
    )
    say(f"written to {path}; train with the same data options and\n  {use}")


def export_dataset(cfg: DictConfig) -> None:
    """Writes the data set to `out` in the raw format of another program (`layout`), with the folds of `data.split`."""
    from hydra.utils import instantiate

    from datamodules.export import LAYOUTS, export_nnunet

    if cfg.layout not in LAYOUTS:
        raise unknown("layout", str(cfg.layout), LAYOUTS)
    if not cfg.out:
        raise SuiteError("job=export_dataset needs out=<new folder>, such as out=nnUNet_raw/Dataset001_Name")
    data = instantiate(cfg.data, _convert_="all")
    path = export_nnunet(data, Path(cfg.out), say)
    say(
        f"{len(data.cases())} cases in {path}; splits_final.json goes to nnUNet_preprocessed/{path.name}/ after nnUNetv2_plan_and_preprocess"
    )


def show(cfg: DictConfig) -> None:
    """Writes montages of cases (`cases.png`) and of augmented training samples as the network gets them (`samples.png`) to `out`."""
    from hydra.utils import instantiate

    from callbacks.figures import montage

    data = instantiate(cfg.data, _convert_="all")
    data.prepare_data()
    data.setup("fit")
    out = Path(cfg.out or "show")
    whole = data.case_loader(data.parts["train"][: cfg.show.cases]).dataset
    items = [whole[(i, False)] for i in range(len(whole))]
    cases = [(i["case"], i["image"], i["label"][0] if "label" in i else None, data.task, i["geometry"].network_spacing) for i in items]
    montage(cases, out / "cases.png")
    if data.view != "voxels":  # single voxels have no picture
        loader = data.train_dataloader()
        stream = (loader if not hasattr(loader, "flattened") else loader.flattened[0]).dataset
        samples = [stream[(0, position)] for position in range(cfg.show.samples)]
        spacing = items[0]["geometry"].network_spacing
        montage([_drawable(sample, data.view, data.task, spacing) for sample in samples], out / "samples.png")
    say(f"written to {out}")


def _drawable(sample: Mapping[str, Any], view: str, task: Any, spacing: Sequence[float]) -> tuple[str, Any, Any, Any, Sequence[float]]:
    """A training sample as a volume that `montage` draws; a slice, and the middle one of a slab, as a volume of one slice."""
    image, label = sample["image"], sample["label"][0] if "label" in sample else None
    if view != "patch":
        image = (image if view == "slice" else image[..., image.shape[-1] // 2])[..., None]
        label = None if label is None else label[..., None]
        spacing = [*(s for axis, s in enumerate(spacing) if axis != task.slice_axis), 1.0]
        task = task if task.slice_axis == 2 else replace(task, unit="vox")  # right and left are marked on axial slices alone
    return sample["case"], image, label, task, spacing
