"""The options of whatever a configuration builds, judged by the signatures that take them before any of it is built."""

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from functools import cache
from inspect import Parameter, isclass, signature
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

from omegaconf import DictConfig, ListConfig, OmegaConf

from lesionbench.errors import SuiteError
from lesionbench.installation import CONF
from lesionbench.ranges import AtLeastOne, Axis, BelowOne, Count, NotNegative, PositiveShare, Range, Real, Rule, Share, Whole

# what signatures of libraries leave open, by the beginning of the module or class that has the option
_BATCHES = Whole | Share | None
_SIZES = NotNegative | Sequence[NotNegative]
_SPAN = NotNegative | Sequence[Real]  # a number n stands for [-n, n], two are the ends of an interval
_LIBRARIES: dict[str, dict[str, Any]] = {
    "torch.optim.": {
        "lr": NotNegative, "betas": tuple[BelowOne, BelowOne], "eps": NotNegative, "weight_decay": NotNegative, "momentum": NotNegative, "dampening": Share,
        "alpha": Share,
    },
    "torchio.": {
        "p": Share, "flip_probability": Share, "axes": Axis | Sequence[Axis | str], "center": Literal["image", "origin"], "default_pad_value": Literal["minimum", "mean", "otsu"] | Real,
        "default_pad_label": Real, "std": _SIZES, "scales": _SIZES, "max_displacement": _SIZES, "degrees": _SPAN, "translation": _SPAN, "mean": _SPAN,
        "log_gamma": _SPAN, "coefficients": _SPAN, "intensity": _SPAN, "downsampling": AtLeastOne | Sequence[AtLeastOne], "restore": Share | None,
        "order": Whole, "num_transforms": Count, "num_spikes": Whole | Sequence[Whole], "num_ghosts": Whole | Sequence[Whole],
        "num_control_points": Annotated[int, Range(4)] | Sequence[Annotated[int, Range(4)]], "locked_borders": Annotated[int, Range(0, 2)],
    },
    "pytorch_lightning.trainer.": {
        "num_nodes": Count, "devices": str | Annotated[int, Range(-1)] | list[Whole], "max_epochs": Count, "min_epochs": Whole | None, "fast_dev_run": bool | Whole,
        "max_steps": Annotated[int, Range(-1)], "min_steps": Whole | None, "max_time": str | dict[str, Whole] | None, "log_every_n_steps": Count,
        "num_sanity_val_steps": Annotated[int, Range(-1)], "check_val_every_n_epoch": Count | None, "reload_dataloaders_every_n_epochs": Whole, "profiler": Literal["simple", "advanced", "pytorch", "xla"] | None,
        "val_check_interval": Count | PositiveShare | str | dict[str, Count] | None, "limit_train_batches": _BATCHES, "limit_val_batches": _BATCHES,
        "limit_test_batches": _BATCHES, "limit_predict_batches": _BATCHES, "overfit_batches": _BATCHES,
    },
    "pytorch_lightning.callbacks.early_stopping.": {
        "monitor": str | None, "patience": Whole, "min_delta": NotNegative, "mode": Literal["min", "max"], "stopping_threshold": Real | None, "divergence_threshold": Real | None,
    },
    "pytorch_lightning.callbacks.weight_averaging.": {
        "device": str | Whole | None, "decay": Share, "update_every_n_steps": Count, "update_starting_at_step": Whole | None, "update_starting_at_epoch": Whole | None,
    },
    "pytorch_lightning.loggers.": {"version": str | Whole | None},
    "pytorch_lightning.strategies.": {"model_averaging_period": Count | None},
    "optuna.pruners.": {"n_startup_trials": Whole, "n_warmup_steps": Whole, "interval_steps": Count, "n_min_trials": Count},
}  # fmt: skip
_FILLED_IN = ("run_folder", "maps")  # by the job
_BUILT = "something to build (a mapping with _target_)"
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a name", NoneType: "null"}


def check_arguments(cfg: DictConfig) -> None:
    """Compares every option of every `_target_` below `cfg` with the type and the range in its signature.

    An option is fine where it is what the signature says, where it is the default, and where it is to be built itself. A whole number
    serves as a number, a list as a tuple or set, a text as a path or as the name of one of an enumeration; true and false are no numbers, and no number is infinite or not a number.

    Raises:
        SuiteError: names option, value, who takes it and what is expected.
    """
    for place, node in _nodes(cfg):
        target = node["_target_"]
        for name, (hint, default) in parameters(target, tuple(map(str, node))).items():
            if name not in node or OmegaConf.is_missing(node, name):
                continue
            option = _typed(node, place, name)
            if option in _FILLED_IN:
                continue
            value = _plain(node[name])
            if not (fits(value, hint) or _same(value, default)):
                raise SuiteError(f"{option}={_shown(value)}: {target} expects {expected(hint)}{_group(place, name, value)}")


def _nodes(config: Any, place: str = "") -> Iterator[tuple[str, DictConfig]]:
    """What is built, with its dotted name; a stage's own changes are judged when they are put in."""
    if isinstance(config, DictConfig) and not (config._is_none() or config._is_missing()):
        if "_target_" in config:
            yield place, config
        children = [(key, f"{place}.{key}".lstrip(".")) for key in config if (place, key) != ("", "stages")]
    elif isinstance(config, ListConfig) and not (config._is_none() or config._is_missing()):
        children = [(key, f"{place}.{key}") for key in range(len(config))]
    else:
        return
    for key, name in children:
        if not OmegaConf.is_missing(config, key) and not OmegaConf.is_interpolation(config, key):  # what it points to has its own turn
            yield from _nodes(config[key], name)


@cache
def parameters(target: str, given: tuple[str, ...] = ()) -> dict[str, tuple[Any, Any]]:
    """Option -> (what its signature says it is, default) of a class or function, with those that a class hands on to its bases.

    Args:
        target: dotted name; an unknown one has no options here, Hydra says what is wrong with it.
        given: names of options that may be taken as keywords without a name of their own.
    """
    from hydra.utils import get_object

    try:
        found = get_object(target)
    except Exception:
        return {}
    options: dict[str, tuple[Any, Any]] = {}
    for owner, maker in _makers(found):
        try:
            hints, own = get_type_hints(maker, include_extras=True), signature(maker).parameters.values()
        except (NameError, TypeError, ValueError, AttributeError):  # names that exist for type checkers alone; built-in code
            break
        for place, known in _LIBRARIES.items():
            if owner.startswith(place):
                hints |= {name: hint for name, hint in known.items() if name in hints}
        named = [p for p in own if p.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY) and p.name in hints]
        options = {p.name: (hints[p.name], p.default) for p in named} | options
        rest = next((p.name for p in own if p.kind is Parameter.VAR_KEYWORD), None)
        if rest is None:
            break
        if hints.get(rest, Any) is not Any:
            options |= {name: (hints[rest], Parameter.empty) for name in given if name not in options and not name.startswith("_")}
    return options


def _makers(found: Any) -> Iterator[tuple[str, Callable]]:
    """What takes the arguments, with where it is defined: the constructors of a class and of its bases, or a function."""
    for base in found.__mro__[:-1] if isclass(found) else ():
        if "__init__" in vars(base):
            yield f"{base.__module__}.{base.__qualname__}", vars(base)["__init__"]
    if not isclass(found):
        yield f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', '')}", found


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _same(value: Any, default: Any) -> bool:
    return default is not Parameter.empty and type(value) is type(default) and value == default


def fits(value: Any, hint: Any) -> bool:
    """Whether a value of a configuration (plain data) may be given where a signature says `hint`."""
    kind, inner = get_origin(hint), get_args(hint)
    if hint in (Any, object, Parameter.empty) or (isinstance(value, dict) and "_target_" in value):
        return True
    if isinstance(value, str) and (
        value.startswith(("artefact:", "contents:")) or value == "???"
    ):  # filled in by a stage, or still missing
        return True
    if kind is Annotated:
        return fits(value, inner[0]) and all(r.holds(value) for r in inner[1:] if isinstance(r, Rule))
    if kind in (Union, UnionType):
        return any(fits(value, one) for one in inner)
    if kind is Literal:
        return any(value == one and type(value) is type(one) for one in inner)
    if hint in (None, NoneType):
        return value is None
    if hint in (int, bool, str):
        return type(value) is hint
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    if isclass(hint) and issubclass(hint, os.PathLike):
        return isinstance(value, str)
    if isclass(hint) and issubclass(hint, Enum):
        return value in [word for one in hint for word in (one.name, one.value)]
    if is_typeddict(hint):
        keys = get_type_hints(hint, include_extras=True)
        return (
            isinstance(value, dict)
            and hint.__required_keys__ <= set(value) <= set(keys)
            and all(fits(v, keys[k]) for k, v in value.items())
        )
    holder = kind or hint
    if not isclass(holder):
        return True
    if issubclass(holder, Mapping):
        pairs = value.items() if isinstance(value, dict) else ()
        return isinstance(value, dict) and (not inner or all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in pairs))
    if issubclass(holder, tuple) and inner and inner[-1] is not Ellipsis:
        return isinstance(value, list) and len(value) == len(inner) and all(map(fits, value, inner))
    if _is_list(holder):
        return isinstance(value, list) and (not inner or all(fits(v, inner[0]) for v in value))
    return False  # something that has to be built


def _is_list(holder: type) -> bool:
    return holder.__name__ in ("Sequence", "Iterable", "Collection", "list", "tuple", "set", "frozenset")


def expected(hint: Any) -> str:
    """What a signature says, in words."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind is Annotated:
        ranges = [str(r) for r in inner[1:] if isinstance(r, Rule) and str(r)]
        return ", ".join([expected(inner[0]), *ranges])
    if kind in (Union, UnionType):
        words = dict.fromkeys(expected(one) for one in inner)
        return ", or ".join([word for word in words if word != _BUILT] or words)
    if kind is Literal:
        return " or ".join(str(one) for one in inner)
    if isclass(hint) and issubclass(hint, Enum):
        return " or ".join(one.name for one in hint)
    if isclass(hint) and issubclass(hint, os.PathLike):
        return "a path"
    if hint in _WORDS or hint is None:
        return _WORDS[hint or NoneType]
    if is_typeddict(hint):
        keys = get_type_hints(hint, include_extras=True).items()
        return "{" + ", ".join(f"{name}: {expected(one)}" for name, one in keys) + "}"
    holder = kind or hint
    if isclass(holder) and issubclass(holder, Mapping):
        return f"a mapping of names to {expected(inner[1])}" if inner and inner[1] is not Any else "a mapping"
    if isclass(holder) and issubclass(holder, tuple) and inner and inner[-1] is not Ellipsis:
        return f"a list of {len(inner)}: {'; '.join(dict.fromkeys(map(expected, inner)))}"
    if isclass(holder) and _is_list(holder):
        return f"a list, each of it {expected(inner[0])}" if inner and inner[0] is not Any else "a list"
    return _BUILT


def _shown(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) < 200 else f"{text[:200]} ..."


def _typed(node: DictConfig, place: str, name: str) -> str:
    """The option as the user would type it: one that only repeats another is known by the other's name."""
    raw = node._get_node(name)
    reference = re.fullmatch(r"\$\{(\w[\w.]*)\}", str(raw._value())) if raw._is_interpolation() else None
    if reference:
        return reference[1]
    return f"{place}.{name}".lstrip(".")


def _group(place: str, name: str, value: Any) -> str:
    """What to write where a name was given instead of something to build, as in model.loss=dice."""
    group = f"{place}.{name}".replace(".", "/")
    return f"; to choose one of the group write {group}={value}" if isinstance(value, str) and (CONF / group).is_dir() else ""
