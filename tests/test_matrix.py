"""Every experiment file, every benchmark, every method that learns from unlabeled cases on every benchmark that has some.

Each composes at full size and builds its networks, then fits and tests with debug=tiny and narrow networks on fake data (slow: at full width);
every method and every data set predicts once. A new experiment, benchmark or method is covered without touching this test; a new data set needs a writer in tests/fake_data.py.
"""

import json

import pytest
import torch
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

from datamodules import Simulated
from lesionbench.checkpoint import build_method
from lesionbench.jobs.arguments import check_arguments
from lesionbench.jobs.command_line import CONF, options, runs_of
from tests.fake_data import WRITERS
from tests.harness import composed, rows, run_composed, run_folders, shared

COMBINATIONS = sorted({f"experiment={e}" for e in options("experiment") if e != "none"}.union(*(runs_of(m) for m in options("model"))))
HUGE = {"experiment=cmm_net_3d/brats2021"}  # 5.8 GB of weights, gradients and moments
SEMI_SUPERVISED = (
    "co_learning", "copy_paste", "cross_pseudo_supervision", "entropy_minimization", "mean_teacher", "pi_model", "pseudo_label",
    "temporal_ensembling", "ua_mt", "virtual_adversarial_training",
)  # fmt: skip


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
    if "layout" in cfg.data:
        return f"brats{cfg.data.layout}"
    name = cfg.data._target_.rsplit(".", 1)[-1].lower()
    return (
        f"{name}_{cfg.data.channels[0]}"
        if name == "folder" and len(cfg.data.channels or ()) == 1 and cfg.data.channels[0] in ("ct", "mr")
        else name
    )


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_full_size_builds_on_meta(combination, tmp_path):
    cfg = shared(*combination.split()).copy()
    cfg.run_folder = str(tmp_path)
    assert OmegaConf.to_container(cfg, resolve=True)
    check_arguments(cfg)
    data = instantiate(cfg.data, _convert_="all")
    with torch.device("meta"):
        method = build_method(OmegaConf.to_container(cfg.model, resolve=True), data.task)
    if any(stage.run == "fit" for stage in cfg.stages):
        assert sum(p.numel() for p in method.parameters()) > 0
        method.check(data)
    for callback in cfg.callbacks.values():
        instantiate(callback, _convert_="all")


def narrow(config, place):
    """Overrides that leave every network a part of its features, and what is done many times a few times."""
    if isinstance(config, dict) and config.get("_target_") == "lightning_modules.networks.swin_unetr":
        yield from (f"{place}.feature_size=12", f"{place}.attention_window=3")
    for key, value in config.items() if isinstance(config, dict) else ():
        if key.endswith(("features", "widths")) and isinstance(value, list):
            if "SpatialAutoencoder" in config["_target_"]:
                continue  # groups of one channel
            yield f"{place}.{key}={[max(8, f // 8) for f in value]}".replace(" ", "")
        elif key == "growth":
            yield f"{place}.{key}={[max(2, g // 4) for g in value]}".replace(" ", "")
        elif key == "width" or (key == "features" and isinstance(value, int)):
            yield f"{place}.{key}={max(8, value // 4)}"
        elif (
            key == "mc_samples"
            or (key == "heads" and isinstance(value, int))
            or (key == "blocks" and config["_target_"].endswith(".dints_search"))
        ):
            yield f"{place}.{key}={min(value, 2)}"
        elif key == "attacks":
            few = json.dumps([{**attack, "steps": min(attack["steps"], 2)} for attack in value], separators=(",", ":"))
            yield f"{place}.{key}={few.replace(chr(34), '')}"
        else:
            yield from narrow(value, f"{place}.{key}")


def smaller(cfg):
    """`narrow` of all that is built, two copies of a case for eight and none for sixteen, and simulated cases of few voxels."""
    for part in {"model", "attacked", "missing", "retrained"} & set(cfg):
        yield from narrow(OmegaConf.to_container(cfg[part]), part)
    if cfg.mirror:
        yield "mirror=[0]"
    if cfg.test_time:
        yield "test_time=null"
    if get_class(cfg.data._target_) is Simulated and cfg.data.variant != "habitats":  # whose clusters need voxels
        yield f"data.spacing={max(4.0, cfg.data.spacing)}"


def check_tiny(combination, roots, tmp_path, cfg, *more):
    benchmark, _, model = combination.partition(" model=")
    more = [*more, *(["data.channels=[t1,flair]"] if combination.endswith("/folder") else [])]
    common = [
        *combination.split(),
        "debug=tiny",
        "trainer=cpu",
        f"data.root={roots(data_set(cfg))}",
        f"runs={tmp_path}",
        "threads=1",
        *more,
    ]
    tiny = composed(*common)
    run_composed(tiny)
    (folder,) = run_folders(tmp_path)
    assert rows(folder)
    if model not in ("", "supervised") and benchmark != "benchmark=blobs":
        return  # a prediction is of the method or of the data: this method predicts on blobs, these data under `supervised`
    checkpoint = next((p for p in (folder / "checkpoints" / f"{name}.ckpt" for name in ("best", "last")) if p.exists()), None)
    fits = any(stage.run == "fit" for stage in cfg.stages)
    run_composed(tiny, job="predict", out=str(tmp_path / "out"), **({"ckpt": str(checkpoint)} if fits else {}))
    assert list((tmp_path / "out" / "predictions").glob("*.nii.gz"))


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_runs_tiny(combination, roots, tmp_path):
    cfg = shared(*combination.split())
    check_tiny(combination, roots, tmp_path, cfg, *smaller(cfg))


@pytest.mark.slow
@pytest.mark.parametrize("combination", [c for c in COMBINATIONS if c not in HUGE])
def test_runs_tiny_at_full_width(combination, roots, tmp_path):
    check_tiny(combination, roots, tmp_path, shared(*combination.split()))


def test_what_had_an_experiment_file_once_is_still_run():
    """The pairs of commit 0c4dcb1 that have no file any more, every benchmark with the supervised method.

    There are no more runs than there were then, but for two of each recipe, one of each BraTS set, three of CoraNet's tables, the
    published settings of SPiN and a toy of context encoding since.
    """
    for benchmark in ("acdc", "blobs", "left_atrium", "simulated_few_labels"):
        assert {f"benchmark={benchmark} model={model}" for model in SEMI_SUPERVISED} <= {*COMBINATIONS}
    for benchmark in options("benchmark"):
        one = f"benchmark={benchmark} model=supervised" in COMBINATIONS
        assert one or f"experiment=supervised/{benchmark}" in COMBINATIONS or benchmark == "none"
    assert len(COMBINATIONS) <= 162


def test_every_model_that_needs_unlabeled_cases_runs_where_labels_are_few():
    for model in options("model"):
        cfg = OmegaConf.load(CONF / "model" / f"{model}.yaml")
        if "unlabeled" in getattr(get_class(cfg.get("_target_", "builtins.object")), "streams", ()):
            assert len(runs_of(model)) >= 4, model
