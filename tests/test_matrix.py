"""Every experiment file: composes at full size, builds its networks, then fits, tests and predicts with debug=tiny on fake data.

A new file under conf/experiment/ is covered without touching this test; a new data set needs a writer in tests/fake_data.py.
"""

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from lesionbench.checkpoint import build_method
from lesionbench.jobs.command_line import options
from tests.fake_data import WRITERS
from tests.harness import composed, rows, run, run_folders

EXPERIMENTS = options("experiment")


@pytest.fixture(scope="session")
def roots(tmp_path_factory):
    """Where each data set's fake (or, for simulated, generated) cases are; written on first use."""
    made = {}

    def root(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = WRITERS[name](folder) if name in WRITERS else folder
        return made[name]

    return root


def data_set(cfg) -> str:
    """Which writer makes the data of an experiment."""
    return f"brats{cfg.data.layout}" if "layout" in cfg.data else cfg.data._target_.rsplit(".", 1)[-1].lower()


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_full_size_builds_on_meta(experiment, tmp_path):
    cfg = composed(f"experiment={experiment}", f"run_folder={tmp_path}")
    assert OmegaConf.to_container(cfg, resolve=True)
    data = instantiate(cfg.data, _convert_="all")
    with torch.device("meta"):
        method = build_method(OmegaConf.to_container(cfg.model, resolve=True), data.task)
    assert not any(stage.run == "fit" for stage in cfg.stages) or sum(p.numel() for p in method.parameters()) > 0
    for callback in cfg.callbacks.values():
        instantiate(callback, _convert_="all")


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_runs_tiny(experiment, roots, tmp_path):
    root = roots(data_set(composed(f"experiment={experiment}")))
    more = ["data.channels=[t1,flair]"] if experiment.endswith("/folder") else []
    common = [f"experiment={experiment}", "debug=tiny", "trainer=cpu", f"data.root={root}", f"runs={tmp_path}", "threads=1"]
    run(*common, *more)
    (folder,) = run_folders(tmp_path)
    assert rows(folder)
    fits = any(stage.run == "fit" for stage in composed(*common).stages)
    checkpoint = next((p for p in (folder / "checkpoints" / f"{name}.ckpt" for name in ("best", "last")) if p.exists()), None)
    run("job=predict", *common, *more, *([f"ckpt={checkpoint}"] if fits else []), f"out={tmp_path / 'out'}")
    assert list((tmp_path / "out" / "predictions").glob("*.nii.gz"))
