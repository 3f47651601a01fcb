"""Options whose values can be judged before anything is built, whatever the job."""

import math
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lesionbench.errors import SuiteError, unknown

# option -> smallest whole number; null, where an option may be null, is not looked at
_WHOLE = {
    "seed": 0, "epochs": 1, "accumulate": 1, "threads": 1, "data.batch_size": 1, "data.samples_per_epoch": 1, "data.num_workers": 0, "data.limit_cases": 1,
    "data.seed": 0, "data.split.seed": 0, "data.split.folds": 2, "data.split.fold": 0, "tune.trials": 1, "tune.depth": 1,
}  # fmt: skip
_SHARES = ("data.split.test", "data.split.val")  # below 1 a share, else a number of patients
_POSITIVE = ("clip", "model.clip")
_SWITCHES = ("resume", "overwrite", "compile", "data.check")
_CHOICES = {"select": ("best", "last"), "on_error": ("stop", "skip"), "test_time": ("flips", "dihedral"), "objective.mode": ("max", "min")}

# options of Lightning's Trainer that the suite fills in -> its own
_ELSEWHERE = {
    "accumulate_grad_batches": "accumulate", "gradient_clip_val": "clip", "gradient_clip_algorithm": "clip", "callbacks": "callbacks", "logger": "logger",
    "enable_checkpointing": "callbacks.checkpoint", "enable_progress_bar": "callbacks.progress",
}  # fmt: skip


def check_options(cfg: DictConfig) -> None:
    """Refuses values of the wrong type or out of range.

    Raises:
        SuiteError: names option, value and what is expected.
    """

    def values(options: Any) -> list[tuple[str, Any]]:
        found = [(option, OmegaConf.select(cfg, option)) for option in options]
        return [(option, value) for option, value in found if value is not None]

    for option, value in values(_WHOLE):
        if not isinstance(value, int) or isinstance(value, bool) or value < _WHOLE[option]:
            raise SuiteError(f"{option}={value}: expected a whole number, at least {_WHOLE[option]}")
    for option, value in values(_SHARES):
        if option == "data.split.test" and value == "all":
            continue
        if not _number(value) or value < 0 or (value > 1 and value != int(value)):
            raise SuiteError(f"{option}={value}: expected a share of the patients below 1, or their number")
    for option, value in values(_POSITIVE):
        if not _number(value) or value <= 0:
            raise SuiteError(f"{option}={value}: expected a number above 0, or null")
    for option, value in values(_SWITCHES):
        if not isinstance(value, bool):
            raise SuiteError(f"{option}={value}: expected true or false")
    for option, value in values(_CHOICES):
        if value not in _CHOICES[option]:
            raise unknown(option, str(value), _CHOICES[option])
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


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
