"""Every option of every configuration group: a value of the wrong type or out of range is refused by name, before anything is prepared."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from enum import Enum
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, get_args, get_origin
from unittest.mock import patch

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lesionbench.checkpoint import build_method
from lesionbench.errors import SuiteError
from lesionbench.jobs.arguments import check_arguments, fits, parameters
from lesionbench.jobs.command_line import CONF, explain, runs_of
from lesionbench.jobs.program import _suite_error
from lesionbench.ranges import ASCENDING, BelowOne, Positive, Range
from lesionbench.task import Task
from lightning_modules.evaluation.attacks import Attack
from tests.harness import SMALL, composed, run, shared

OBJECTS = ("model", "data", "augmentation", "callbacks", "logger", "metrics", "postprocessing", "trainer", "sweep")
GROUPS = sorted({p.parent.relative_to(CONF).as_posix() for p in CONF.rglob("*.yaml") if p.relative_to(CONF).parts[0] in OBJECTS})
PASSED = {"self", "kind", "task", "params", "in_channels", "out_channels", "total_iterations"}  # by the program, not by a configuration

ONE_REGION = Task(channels=("flair",), classes={"background": [0], "lesion": [1]}, regions={"lesion": ["lesion"]}, raters=3)


def nodes(config: Any) -> Iterator[dict]:
    """What is built, at any depth of plain data."""
    if isinstance(config, dict):
        if "_target_" in config:
            yield config
        config = list(config.values())
    for value in config if isinstance(config, list) else ():
        yield from nodes(value)


def targets(group: str) -> dict[str, set[str]]:
    """Everything that the files of a group build -> the options that they give it."""
    found: dict[str, set[str]] = {}
    for path in (CONF / group).glob("*.yaml"):
        for node in nodes(yaml.safe_load(path.read_text())):
            found.setdefault(node["_target_"], set()).update(node)
    return found


def signatures(group: str) -> Iterator[tuple[str, str, Any]]:
    """Target, option, and what its signature says, for all that may be given in a group."""
    for target, given in targets(group).items():
        for option, (hint, _) in parameters(target, tuple(sorted(given))).items():
            if option not in PASSED:
                yield target, option, hint


def wrong_types(hint: Any) -> list[Any]:
    """Values that are of none of the types in the words of a signature."""
    words = str(hint)
    candidates = [
        ({"nonsense": {"nonsense": []}}, r"Any|object"),
        ("nonsense", r"str|Path|Literal|Any|object"),
        (True, r"bool|Any|object"),
        (1.5, r"float|Any|object"),
    ]
    return [value for value, accepted in candidates if not re.search(accepted, words)]


def out_of_range(hint: Any) -> list[Any]:
    """Numbers beyond each end that a signature names, one far below 0 where it names none, and no number at all."""
    kind, inner = get_origin(hint), get_args(hint)
    if hasattr(hint, "__metadata__"):
        rules = [rule for rule in hint.__metadata__ if isinstance(rule, Range)]
        whole = hint.__origin__ is int
        ends = [e for r in rules for e in (None if r.low is None else r.low - 1, None if r.high is None else r.high + 1.5) if e is not None]
        found = [int(e) if whole else float(e) for e in ends]
        return [*found, *([] if whole else [float("nan")])] if rules else out_of_range(hint.__origin__)
    if hint in (int, float):
        return [-7] if hint is int else [-7.5, float("nan")]
    values = [value for one in inner for value in out_of_range(one)] if kind is not None else []
    if (kind is not None and "Mapping" in str(kind)) or kind is dict:
        return [{"nonsense": value} for value in values]
    if kind in (list, tuple) or "Sequence" in str(kind):
        return [[value] * (len(inner) if kind is tuple and Ellipsis not in inner else 2) for value in values]
    return values


def judged(target: str, option: str, value: Any) -> str | None:
    """What is said of one option before anything is built; None where it passes."""
    try:
        check_arguments(OmegaConf.create({"place": {"_target_": target, option: value}}))
    except SuiteError as error:
        return str(error)
    return None


@cache
def chosen(group: str, target: str) -> tuple[DictConfig, dict]:
    """A configuration with the first choice of a group that builds `target`, and that part of it as plain data."""
    name = next(path.stem for path in sorted((CONF / group).glob("*.yaml")) if f"{target}\n" in re.sub("[,}]", "\n", path.read_text()))
    place = group.replace("/", ".")
    if group == "model":
        cfg = composed(*next(iter(runs_of(name)), "").split())
    else:
        cfg = shared().copy()
        OmegaConf.set_struct(cfg, False)
        cfg.run_folder = "nowhere"
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(CONF), version_base="1.3"):
            OmegaConf.update(cfg, place, OmegaConf.select(compose(f"{group}/{name}"), place), merge=False)
    plain = OmegaConf.to_container(cfg, resolve=True)
    for part in group.split("/"):
        plain = plain[part]
    return cfg, plain


def make(group: str, target: str, option: str, value: Any) -> None:
    """Builds a choice of this group that has `target`, with the value for its option, as the program does before it prepares anything."""
    cfg, plain = chosen(group, target)
    plain = deepcopy(plain)
    next(node for node in nodes(plain) if node["_target_"] == target)[option] = value
    with torch.device("meta"):
        if group == "model":
            data = instantiate(cfg.data, _convert_="all")
            build_method(plain, data.task).check(data)
            return
        thing = instantiate(plain, _convert_="all")
        if group == "model/network":
            thing(in_channels=4, out_channels=4, **({"channels": ["flair", "t1", "t1ce", "t2"]} if target.endswith("PairedUNet") else {}))
        elif group == "model/target":
            thing(ONE_REGION)
        elif group == "callbacks":
            for callback in thing.values():
                if hasattr(callback, "check"):
                    callback.check(SimpleNamespace(task=ONE_REGION))


FREE = {  # any name may be given: of places, people, runs, files and what they hold, attributes of cases, devices
    "folder", "project", "entity", "prefix", "name", "version", "map", "mask", "checkpoint", "transfer_from", "file", "image", "label", "time", "event", "region",
    "model_registry", "process_group_backend", "device", "devices", "strategy", "threshold",
}  # fmt: skip
LATER = {"monitor"}  # known once the method is: see test_what_is_watched_is_what_validation_gives
FILLED_IN = {"accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm"}  # see test_what_the_program_fills_in


class Side(Enum):
    LEFT = "l"
    RIGHT = "r"


@pytest.mark.parametrize(
    ("hint", "fine", "wrong"),
    [
        (float, [1, 1.5, -2], [True, "1", None, math.inf, math.nan, [1]]),
        (int, [1, -2], [1.0, True, "1"]),
        (bool, [True], [1, "true"]),
        (str | None, ["a", None], [1, ["a"]]),
        (Path, ["a/b", "~"], [1, ["a"]]),
        (tuple[int, float], [[1, 2]], [[1], [1, 2, 3], [1.5, 2], "12", {"a": 1}]),
        (tuple[int, ...], [[], [1, 2]], [[1.5]]),
        (Sequence[str], [[], ["a"]], ["ab", [1]]),
        (Mapping[str, int], [{}, {"a": 1}], [{"a": 1.5}, ["a"]]),
        (Literal["a", 1] | None, ["a", 1, None], [True, "b"]),
        (Side, ["LEFT", "r"], ["up", 1]),
        (torch.nn.Module, [{"_target_": "torch.nn.Identity"}], ["dice", 1, {"a": 1}]),
        (Callable[[int], float] | Sequence[Callable], [{"_target_": "math.sqrt"}, [{"_target_": "math.sqrt"}]], ["sqrt", ["sqrt"]]),
        (Attack, [{"norm": "l2", "eps": 1, "steps": 0}], [{"norm": "l2", "eps": 1}, {"norm": "l2", "eps": 1, "steps": 0, "more": 1}, {"norm": "l3", "eps": 1, "steps": 0}]),
        (Any, [1, "a", None, {}], []),
        (BelowOne, [0, 0.99], [1, -0.1]),
        (Annotated[Sequence[Positive], ASCENDING], [[1, 1], [0.5, 2]], [[2, 1], [1], [0, 1]]),
    ],
)  # fmt: skip
def test_what_serves_for_what(hint, fine, wrong):
    assert [value for value in fine if not fits(value, hint)] == []
    assert [value for value in wrong if fits(value, hint)] == []


def test_a_default_is_fine_whatever_the_signature_says():
    def odd(size: int = None, names: list = ()):  # noqa: RUF013
        return size, names

    with patch("hydra.utils.get_object", lambda name: odd):
        check_arguments(OmegaConf.create({"a": {"_target_": "odd", "size": None}}))
        with pytest.raises(SuiteError, match=r"a\.size=big: odd expects a whole number"):
            check_arguments(OmegaConf.create({"a": {"_target_": "odd", "size": "big"}}))


@pytest.mark.parametrize("group", GROUPS)
def test_a_wrong_type_is_refused_by_name(group):
    """The signature says what an option is; a number serves as a name nowhere, and true is no number."""
    for target, option, hint in signatures(group):
        for value in wrong_types(hint):
            said = judged(target, option, value)
            assert said is not None, f"{target} takes {option}={value} ({hint})"
            assert f"place.{option}={value}: {target} expects" in said
            assert len(said.splitlines()) == 1


@pytest.mark.parametrize("group", GROUPS)
def test_what_is_out_of_range_is_refused_by_name(group):
    """By the range in the signature, or by the constructor; a number without a range says so, and a name is one of a list or any."""
    for target, option, hint in signatures(group):
        if option in FILLED_IN:
            continue
        words = str(hint)
        names = ["nonsense"] if re.search(r"\bstr\b", words) and "Path" not in words and option not in FREE | LATER else []
        for value in [*names, *out_of_range(hint)]:
            said = judged(target, option, value) or refusal(group, target, option, value)
            assert said is not None, f"{target} takes {option}={value} ({hint})"
            assert str(value) in said, said
            assert any(word in said for word in (option, "in: ", target.rpartition(".")[2])), said
            assert len(said.splitlines()) < 20


def refusal(group: str, target: str, option: str, value: Any) -> str | None:
    """What the program says of a value that no signature refuses."""
    try:
        make(group, target, option, value)
    except SuiteError as error:
        return str(error)
    except InstantiationException as error:
        return str(explain(error, []))
    return None


TWO = "stages=[{name:fit,run:fit},{name:test,run:test,override:%s}]"
CLASSIFIER = [
    "model._target_=tests.toys.CaseClassifier",
    "~model.network",
    "~model.loss",
    "~model.target",
    "~model.inferer",
    "objective.name=val/accuracy",
]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective.name=val/dcie"], "objective.name=val/dcie: no value of a validation with validation_metrics=['dice']; did you mean 'val/dice'"),
        (["objective.name=val/hd95_mm"], "objective.name=val/hd95_mm: no value of a validation"),
        (["objective.name=val/dice_WT"], "objective.name=val/dice_WT: no value of a validation"),
        (["objective.name=dice"], "objective.name=dice: no value of a validation"),
        (["callbacks=[default,early_stopping]", "callbacks.early_stopping.monitor=val/loss"], "callbacks.early_stopping.monitor=val/loss: no value"),
        (["model.scheduler.warmup_iterations=12"], "scheduler: warmup_iterations=12 of total_iterations=12 leaves none to train"),
        (["model.scheduler.warmup_iterations=6", "accumulate=2"], "scheduler: warmup_iterations=6 of total_iterations=6 leaves none to train"),
        (["model/scheduler=plateau", "model.monitor=train/loss"], "model.monitor=train/loss: no value of a validation"),
        (["stages=[{name:fit,run:fit},{name:more,run:fit,override:{objective:{name:val/dise}}}]"], "objective.name=val/dise: no value"),
        ([TWO % "{metrics:{names:[dise]}}"], "Unknown metric 'dise'; did you mean 'dice'"),
        ([TWO % "{metrics:{bins:none}}"], "metrics.bins=none: lightning_modules.metrics.CaseMetrics expects a whole number, at least 1"),
        ([TWO % "{postprocessing:{min_volume:{nope:3}}}"], "Unknown region (postprocessing) 'nope'"),
        (["metrics.space=network", "postprocessing.min_volume={lesion:3}"], "postprocessing counts voxels of the native grid, metrics.space=network"),
        ([*CLASSIFIER, "mirror=[0]"], "mirror and test_time: CaseClassifier has no inferer"),
        ([*CLASSIFIER, "test_time=flips"], "mirror and test_time: CaseClassifier has no inferer"),
        ([TWO % "{writer:{members:both}}"], "writer.members=both: callbacks.NiftiWriter expects true or false"),
        (["writer.on_test=later"], "writer.on_test=later: callbacks.NiftiWriter expects true or false"),
        (
            ["callbacks=[default,flair_baseline]", "+callbacks.baseline.method.equalize=nose"],
            "equalize",
        ),
        (["augmentation=nnunet", "+augmentation.mask.mask=brain"], "Unknown map (mask of the augmentation) 'brain'; did you mean 'brain_mask'"),
        (["data.streams={default:{share:[0,1.5]}}"], "data.streams"),
        (["data.streams={default:{sampling:{name:forground}}}"], "sampling policy (data.sampling.name) 'forground'"),
        (["job=test", "ckpt=[a.ckpt,b.ckpt]", "ensemble.staple_margin=wide"], "ensemble.staple_margin=wide: lightning_modules.Ensemble expects a whole number"),
        (["job=test", "ckpt=[a.ckpt,b.ckpt]", "ensemble.weights=[1,-1]"], "ensemble.weights=[1, -1]: lightning_modules.Ensemble expects a list"),
        (["job=test", "ckpt=[a.ckpt,b.ckpt]", "ensemble.fusion=median"], "Unknown ensemble.fusion 'median'"),
        (["job=test", "ckpt=[a.ckpt,b.ckpt]", "ensemble.policy=best"], "Unknown ensemble.policy 'best'"),
        (["job=test", "ckpt=[a.ckpt,b.ckpt]"], "a.ckpt: no such checkpoint"),
    ],
)  # fmt: skip
def test_what_a_later_stage_needs_is_looked_at_before_the_first(overrides, message, tmp_path):
    """Nothing is read, prepared or left behind: the data of these runs are not even there."""
    with pytest.raises((SuiteError, InstantiationException)) as caught:
        run(*SMALL, f"data.root={tmp_path / 'data'}", f"runs={tmp_path / 'runs'}", *overrides)
    assert message in str(_suite_error(caught.value)).replace("\n", " ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["experiment=reciprocal_adversarial/toy2d", "attacked.attacks=[{norm:l3,eps:1,steps:0}]"], "attacked.attacks=[{'norm': 'l3'"),
        (
            ["experiment=reciprocal_adversarial/toy2d", "attacked.attacks=[{norm:l2,eps:1,steps:0,transfer:true}]"],
            "model.transfer_from is null",
        ),
        (
            ["experiment=stochastic/simulated", "asked.moves=turns"],
            "asked.moves=turns: lightning_modules.Stochastic expects flips or dihedral",
        ),
        (["experiment=stochastic/simulated", "asked.dropout=false"], "all passes would be alike"),
        (
            ["experiment=supervised/brats2020_missing", "missing.subsets=[[flare]]", "trainer=cpu"],
            "Unknown modality (model.subsets) 'flare'",
        ),
    ],
)
def test_a_stage_that_needs_the_checkpoint_of_another_is_looked_at_too(overrides, message, tmp_path):
    with pytest.raises(SuiteError) as caught:
        run(*overrides, f"data.root={tmp_path / 'data'}", f"runs={tmp_path / 'runs'}")
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())
