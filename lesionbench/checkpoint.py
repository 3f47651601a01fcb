"""Checkpoints: read them safely, build the method they hold, and start from the weights of another run."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lesionbench.errors import SuiteError
from lesionbench.moved import current
from lesionbench.task import Task

_TRUSTED = ("lesionbench.target.", "lightning_modules.", "torch.optim.", "torch.nn.", "monai.networks.", "monai.losses.")


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Loads a checkpoint as plain data; nothing in it is executed.

    Raises:
        SuiteError: missing, truncated, or a pickle that holds more than plain data.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise SuiteError(f"{path}: no such checkpoint; a run writes checkpoints/best.ckpt and checkpoints/last.ckpt")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch's own text begins with how to load the file all the same, by executing what is in it
        text = re.sub(r"(?s)^Weights only load failed.*?WeightsUnpickler error:\s*", "", str(error).strip())
        reason = text.splitlines()[0][:200] if text else type(error).__name__
        raise SuiteError(f"{path}: not a checkpoint that can be read as plain data; refused ({reason})") from None
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise SuiteError(f"{path}: not a checkpoint: it has no 'state_dict'")
    return checkpoint


def load_method(path: str | Path, trust: Sequence[str] = ()) -> tuple[Any, dict[str, Any]]:
    """Builds the method that a checkpoint holds, with its weights: (method, what the checkpoint says of its data).

    Only classes of this suite and of the libraries it builds on are instantiated; `trust` names further packages.

    Raises:
        SuiteError: a checkpoint without model configuration, a class from a package that is not trusted, weights that do not fit.
    """
    checkpoint = read_checkpoint(path)
    own = checkpoint.get("lesionbench")
    if not own or not own.get("model"):
        raise SuiteError(
            f"{path}: holds weights but no model configuration; it was not written by this program, so name its experiment to use it"
        )
    own["model"] = current(own["model"])
    _refuse_strangers(own["model"], path, trust)
    task = Task.from_dict(own["task"])
    method = build_method(own["model"], task)
    try:
        method.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        raise SuiteError(f"{path}: its weights do not fit the model it describes: {' '.join(str(error).split()[:40])}") from None
    method.on_load_checkpoint(checkpoint)
    return method.eval(), own


def build_method(config: Mapping[str, Any], task: Task) -> Any:
    """Builds a method from its model configuration (plain data), which it keeps for its checkpoints."""
    from hydra.utils import instantiate

    # partial, so that the task reaches the method as it is: Hydra would turn a dataclass among the arguments into a dict
    maker = instantiate({**config, "_partial_": True}, _convert_="all")
    try:
        method = maker(task=task)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise SuiteError(f"model ({config['_target_']}): {error}") from error
    method.config = dict(config)
    return method


def _refuse_strangers(config: Any, path: str | Path, trust: Sequence[str]) -> None:
    if isinstance(config, str) and "${" in config:  # Hydra would compute it, and it could compute another class to build
        raise SuiteError(f"{path}: its model configuration holds '{config}' where a plain value is expected; refused")
    if isinstance(config, Mapping):
        if "_target_" in config:
            _refuse_stranger(str(config["_target_"]), path, (*_TRUSTED, *(f"{t}." for t in trust)))
        config = list(config.values())
    if isinstance(config, list | tuple):
        for value in config:
            _refuse_strangers(value, path, trust)


def _refuse_stranger(target: str, path: str | Path, allowed: tuple[str, ...]) -> None:
    """Refuses a target that has a strange name, or that a trusted module has only imported from elsewhere (`lightning_modules.x.os.system`)."""
    home = target
    if target.startswith(allowed):
        from hydra.utils import get_object

        try:
            home = f"{getattr(get_object(target), '__module__', None)}.{target.rpartition('.')[2]}"
        except Exception as error:
            raise SuiteError(
                f"{path}: would build '{target}', which this installation does not have ({str(error).splitlines()[0]})"
            ) from None
    if not home.startswith(allowed):
        raise SuiteError(f"{path}: would build '{home}', which is not of this suite; if you trust it, say trust=[{home.split('.')[0]}]")


def initialize_from(module: nn.Module, path: str | Path) -> str:
    """Copies every weight of a checkpoint whose name and shape match; returns a report of what was loaded and what was not.

    Raises:
        SuiteError: nothing matches.
    """
    weights = read_checkpoint(path)["state_dict"]
    own = module.state_dict()
    fitting = {k: v for k, v in weights.items() if k in own and own[k].shape == v.shape}
    other_shape = [f"{k} {tuple(weights[k].shape)} -> {tuple(own[k].shape)}" for k in weights if k in own and k not in fitting]
    absent = [k for k in own if k not in weights]
    unused = [k for k in weights if k not in own]
    if not fitting:
        raise SuiteError(f"init_from={path}: none of its {len(weights)} weights match this model's {len(own)}")
    module.load_state_dict(fitting, strict=False)
    lines = [f"init_from {path}: loaded {len(fitting)} of {len(own)} tensors"]
    for title, names in [
        ("other shape, kept as initialized", other_shape),
        ("not in the checkpoint", absent),
        ("only in the checkpoint", unused),
    ]:
        if names:
            lines.append(f"  {title} ({len(names)}): {', '.join(names[:6])}{' ...' if len(names) > 6 else ''}")
    return "\n".join(lines)
