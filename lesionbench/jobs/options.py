"""Options whose values can be judged before anything is built, whatever the job."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args, get_origin

from omegaconf import DictConfig, OmegaConf

from lesionbench.errors import SuiteError, unknown
from lesionbench.jobs.arguments import expected, fits
from lesionbench.ranges import Count, NotNegative, Positive, Whole

_Names = Sequence[str] | str | None
# what is no option of something that is built (see arguments.py) -> what it is; null, where an option may be null, is not looked at
_OPTIONS: dict[str, Any] = {
    "seed": Whole, "epochs": Count, "accumulate": Count, "threads": Count, "clip": Positive | None, "resume": bool, "overwrite": bool, "compile": bool,
    "deterministic": bool | Literal["warn"], "select": Literal["best", "last"], "on_error": Literal["stop", "skip"], "test_time": Literal["flips", "dihedral"],
    "trust": Sequence[str], "validation_metrics": Sequence[str], "objective.name": str, "objective.mode": Literal["max", "min"],
    "tune.runs": _Names, "tune.what": Literal["volume", "thresholds", "suppression"], "tune.region": str, "tune.metric": str, "tune.grid": Sequence[Whole],
    "tune.score": str, "tune.trials": Count, "tune.depth": Count, "tune.data_root": str,
    "compare.runs": _Names, "compare.group_by": Sequence[str], "compare.metrics": _Names, "compare.members": _Names, "compare.regions": _Names,
    "simulate.count": Count, "simulate.layout": str | int, "simulate.variant": str, "simulate.spacing": Positive, "simulate.seed": Whole,
    "plan.memory_gib": Positive, "show.cases": Count, "show.samples": Count, "dashboard.project": str, "dashboard.entity": str, "dashboard.name": str, "dashboard.dry_run": bool,
}  # fmt: skip
_OF_JOBS = ("tune.", "compare.", "simulate.", "plan.", "show.", "dashboard.")
_SHARES = ("data.split.test", "data.split.val")  # below 1 a share, else a number of patients
# options of Lightning's Trainer that the suite fills in -> its own
_ELSEWHERE = {
    "accumulate_grad_batches": "accumulate", "gradient_clip_val": "clip", "gradient_clip_algorithm": "clip", "callbacks": "callbacks", "logger": "logger",
    "enable_checkpointing": "callbacks.checkpoint", "enable_progress_bar": "callbacks.progress",
}  # fmt: skip


def check_options(cfg: DictConfig) -> None:
    """Refuses values of the wrong type or out of range, of options that no job has for itself.

    Raises:
        SuiteError: names option, value and what is expected.
    """
    _check(cfg, [option for option in _OPTIONS if not option.startswith(_OF_JOBS)])
    for option, value in _given(cfg, _SHARES):
        if option == "data.split.test" and value == "all":
            continue
        if not fits(value, NotNegative) or (value > 1 and value != int(value)):
            raise SuiteError(f"{option}={value}: expected a share of the patients below 1, or their number")
    for option in cfg.get("trainer") or ():
        if option in _ELSEWHERE:
            raise SuiteError(f"trainer.{option}={cfg.trainer[option]}: the program fills it in from {_ELSEWHERE[option]}; set that instead")
    mirror = OmegaConf.select(cfg, "mirror")
    axes = list(mirror) if OmegaConf.is_list(mirror) else mirror
    if axes and (not isinstance(axes, list) or len(set(axes)) != len(axes) or not set(axes) <= {0, 1, 2}):
        raise SuiteError(f"mirror={axes}: expected some of the axes 0, 1 and 2, each once, as in mirror=[0,1,2]")
    if axes and cfg.test_time:
        raise SuiteError(
            f"mirror={axes} and test_time={cfg.test_time}: one of them; test_time=flips is mirror=[0,1,2], dihedral has the mirror images too"
        )


def check_job(cfg: DictConfig) -> None:
    """The same of the options that `cfg.job` has for itself.

    Raises:
        SuiteError: names option, value and what is expected.
    """
    _check(cfg, [option for option in _OPTIONS if option.startswith(f"{cfg.job}.")])


def _check(cfg: DictConfig, options: Iterable[str]) -> None:
    for option, value in _given(cfg, options):
        hint = _OPTIONS[option]
        if get_origin(hint) is Literal and isinstance(value, str) and value not in get_args(hint):
            raise unknown(option, value, get_args(hint))
        if not fits(value, hint):
            raise SuiteError(f"{option}={value}: expected {expected(hint)}")


def _given(cfg: DictConfig, options: Iterable[str]) -> list[tuple[str, Any]]:
    """Options and their values, as plain data, that are not null."""
    found = [(option, OmegaConf.select(cfg, option)) for option in options]
    plain = [(option, OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value) for option, value in found]
    return [(option, value) for option, value in plain if value is not None]
