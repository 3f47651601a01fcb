"""Checkpoints: read them safely, build the method they hold, and start from the weights of another run."""

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from inspect import isfunction
from pathlib import Path
from typing import Any
from zipfile import ZipFile, is_zipfile

import torch
from torch import nn

from lesionbench.errors import SuiteError
from lesionbench.moved import current
from lesionbench.task import Task

# what the model configuration of a checkpoint may build, by where it is defined: classes of these kinds ...
_KINDS: dict[str, tuple[type, ...]] = {
    "torch.optim.": (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler),
    "torch.nn.": (nn.Module,),
    "monai.networks.": (nn.Module,),
    "monai.losses.": (nn.Module,),
    "lightning_modules.": (nn.Module, torch.optim.Optimizer),  # methods, networks, losses, optimizers
}
# ... the other parts of methods, any class ...
_PARTS = (
    "lesionbench.target.", "lightning_modules.inferers.", "lightning_modules.losses.gated_consistency.", "lightning_modules.metrics.case_metrics.",
    "lightning_modules.postprocessing.", "lightning_modules.ramps.", "lightning_modules.raters.rater_targets.",
    "lightning_modules.semi_supervised.certainty_masks.", "lightning_modules.transport.density.",
)  # fmt: skip
# ... and functions that make networks and schedules
_MAKERS = ("lightning_modules.networks.", "lightning_modules.schedules.")
# of a data module: its classes
_DATA = ("datamodules.",)
_HOLDERS = ("state_dict", "model_state_dict", "model", "network_weights")  # entries under which programs keep a state_dict
_WRAPPERS = ("module", "model", "network", "net", "_orig_mod")  # modules around a network, of which its names in a file tell


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Loads a checkpoint as plain data; nothing in it is executed.

    Raises:
        SuiteError: missing, truncated, or a pickle that holds more than plain data.
    """
    path = Path(path).expanduser()
    checkpoint = _loaded(path)
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise SuiteError(f"{path}: not a checkpoint: it has no 'state_dict'")
    return checkpoint


def _loaded(path: Path) -> Any:
    """What a file of `torch.save` or safetensors holds, as plain data."""
    if not path.is_file():
        raise SuiteError(f"{path}: no such checkpoint; a run writes checkpoints/best.ckpt and checkpoints/last.ckpt")
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise SuiteError(f"{path}: to read it, install the package safetensors") from None
        return load_file(path)
    if _is_torchscript(path):
        raise SuiteError(f"{path}: a TorchScript archive, which is a program; save the state_dict() of the network instead")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch's own text begins with how to load the file all the same, by executing what is in it
        text = re.sub(r"(?s)^Weights only load failed.*?WeightsUnpickler error:\s*", "", str(error).strip())
        reason = text.splitlines()[0][:200] if text else type(error).__name__
        raise SuiteError(f"{path}: not a checkpoint that can be read as plain data; refused ({reason})") from None


def _is_torchscript(path: Path) -> bool:
    if not is_zipfile(path):
        return False
    with ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def load_method(path: str | Path, trust: Sequence[str] = ()) -> tuple[Any, dict[str, Any]]:
    """Builds the method that a checkpoint holds, with its weights: (method, what the checkpoint says of its data).

    Only what makes a method is built (modules, optimizers, schedules, targets, inferers, metrics and the functions that make networks), of
    this suite and the libraries it stands on. `trust` names further packages, or single classes and functions of them; it is the caller's
    word at every depth: what the checkpoint itself says of trust does not count.

    Raises:
        SuiteError: a checkpoint without model configuration, anything else that it would have built, weights that do not fit.
    """
    checkpoint = read_checkpoint(path)
    own = checkpoint.get("lesionbench")
    if not own or not own.get("model"):
        raise SuiteError(
            f"{path}: holds weights but no model configuration; it was not written by this program, so name its experiment to use it"
        )
    own["model"] = _trusting(current(own["model"]), trust)
    refuse_strangers(own["model"], path, trust)
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
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError, AssertionError) as error:  # of options that do not fit
        raise SuiteError(f"model ({config['_target_']}): cannot be built: {type(error).__name__}: {error}") from error
    method.config = dict(config)
    return method


def _trusting(config: Any, trust: Sequence[str]) -> Any:
    """The configuration with the caller's trust in place of its own: that of ensembles and wrappers, which load checkpoints in turn."""
    if isinstance(config, Mapping):
        return {key: list(trust) if key == "trust" else _trusting(value, trust) for key, value in config.items()}
    return [_trusting(value, trust) for value in config] if isinstance(config, list | tuple) else config


def refuse_strangers(config: Any, path: str | Path, trust: Sequence[str] = (), kind: str = "method") -> None:
    """Refuses a configuration (plain data) from a file that the user may not have written, if it would have more built than it is for.

    Args:
        config: with `_target_`s at any depth.
        path: of the file, for the message.
        trust: packages, or single classes and functions, that may be built besides.
        kind: `method`, or `data` for a data module.

    Raises:
        SuiteError: something that makes no part of a method or data module, or a value that would be computed; names it and the file.
    """
    if isinstance(config, str) and "${" in config:  # Hydra would compute it, and it could compute another class to build
        raise SuiteError(f"{path}: its configuration holds '{config}' where a plain value is expected; refused")
    if isinstance(config, Mapping):
        if "_target_" in config:
            _refuse_stranger(str(config["_target_"]), path, trust, kind)
        config = list(config.values())
    if isinstance(config, list | tuple):
        for value in config:
            refuse_strangers(value, path, trust, kind)


def _refuse_stranger(target: str, path: str | Path, trust: Sequence[str], kind: str) -> None:
    """Refuses also what a known module has only imported from elsewhere (`lightning_modules.x.os.system`)."""
    home, found = target, None
    if target.startswith((*_KINDS, *_PARTS) if kind == "method" else _DATA) or _within(target, trust):
        from hydra.utils import get_object

        try:
            found = get_object(target)
            home = f"{getattr(found, '__module__', None)}.{target.rpartition('.')[2]}"
        except Exception as error:
            raise SuiteError(
                f"{path}: would build '{target}', which this installation does not have ({str(error).splitlines()[0]})"
            ) from None
    known = _makes_a_part(found, home) if kind == "method" else isinstance(found, type) and home.startswith(_DATA)
    if not known and not _within(home, trust):
        raise SuiteError(
            f"{path}: would build '{home}', which makes no {kind} of this suite; if you trust it, say trust=[{home}], "
            f"or trust=[{home.split('.')[0]}] for all of its package"
        )


def _within(name: str, trust: Sequence[str]) -> bool:
    return any(name == trusted or name.startswith(f"{trusted}.") for trusted in trust)


def _makes_a_part(found: Any, home: str) -> bool:
    """Whether an object of the suite, or of the libraries it stands on, makes a part of a method."""
    if isinstance(found, type):
        return home.startswith(_PARTS) or any(home.startswith(place) and issubclass(found, kinds) for place, kinds in _KINDS.items())
    return isfunction(found) and home.startswith(_MAKERS) and found.__qualname__ == home.rpartition(".")[2] and found.__name__[0] != "_"


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint or of a file of weights alone, by name.

    Taken are `.ckpt`, `.pt` and `.pth` files that hold a state_dict, bare or as one entry of a mapping, and `.safetensors`.

    Raises:
        SuiteError: missing, a program (TorchScript, a pickled network), or no named tensors in it.
    """
    path = Path(path).expanduser()
    found = _loaded(path)
    for key in _HOLDERS:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
            break
    weights = {str(k): v for k, v in found.items() if torch.is_tensor(v)} if isinstance(found, Mapping) else {}
    if not weights:
        raise SuiteError(f"{path}: holds no tensors by name; expected a state_dict, bare or under one of {', '.join(_HOLDERS)}")
    return weights


def initialize_from(module: nn.Module, path: str | Path, prefixes: Mapping[str, str] | None = None) -> str:
    """Copies every tensor of a checkpoint or file of weights whose name and shape match; returns a report of what was loaded and what not.

    Args:
        prefixes: how names in the file begin -> how they begin here, in whole steps of their path; the empty one begins every name. None =
            the prefix of a common wrapper (`module`, `model`, `network`, `net`, `_orig_mod`, or several) is dropped, and `network` is put
            before names, where more tensors match that way; the report says so.

    Raises:
        SuiteError: nothing matches, or a prefix that begins no name.
    """
    untouched = tuple(getattr(module, "untouched", ()))
    theirs = read_weights(path)
    own = {name: value for name, value in module.state_dict().items() if not any(_begins(name, prefix) for prefix in untouched)}
    if prefixes is None:
        options = [{drop: put} for drop in _wrappers(theirs) for put in ("", "network")]
        weights, taken = max(((_renamed(theirs, o), o) for o in options), key=lambda pair: len(_fitting(pair[0], own)))
    else:
        for prefix in prefixes:
            if not any(_begins(name, prefix) for name in theirs):
                raise SuiteError(f"init_prefix: no name in {path} begins with '{prefix}'; its names are {', '.join(list(theirs)[:3])} ...")
        weights, taken = _renamed(theirs, prefixes), dict(prefixes)
    fitting = _fitting(weights, own)
    if not fitting:
        raise SuiteError(f"init_from={path}: none of its {len(theirs)} weights match this model's {len(own)}{_nearest(weights, own)}")
    module.load_state_dict(fitting, strict=False)
    if hasattr(module, "on_initialized"):
        module.on_initialized(fitting)
    lines = [f"init_from {path}: loaded {len(fitting)} of {len(own)} tensors"]
    lines += [f"  stays as it is: {_pattern(prefix)}" for prefix in untouched if len(own) < len(module.state_dict())]
    lines += [f"  names: '{_pattern(a)}' taken as '{_pattern(b)}'" for a, b in taken.items() if a != b]
    for title, names in [
        (
            "other shape, kept as initialized",
            [f"{k} {tuple(weights[k].shape)} -> {tuple(own[k].shape)}" for k in weights if k in own and k not in fitting],
        ),
        ("not in the checkpoint", [k for k in own if k not in weights]),
        ("only in the checkpoint", [k for k in weights if k not in own]),
    ]:
        if names:
            lines.append(f"  {title} ({len(names)}): {', '.join(names[:6])}{' ...' if len(names) > 6 else ''}")
    return "\n".join(lines)


def _pattern(prefix: str) -> str:
    return f"{prefix.rstrip('.')}.*" if prefix else "*"


def _fitting(weights: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v for k, v in weights.items() if k in own and own[k].shape == v.shape}


def _begins(name: str, prefix: str) -> bool:
    return not prefix or name.startswith(f"{prefix.rstrip('.')}.")


def _renamed(weights: Mapping[str, torch.Tensor], prefixes: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """The tensors under new names; the longest prefix that fits a name counts."""

    def new(name: str) -> str:
        for prefix in sorted(prefixes, key=len, reverse=True):
            if _begins(name, prefix):
                rest = name[len(prefix.rstrip(".")) :].lstrip(".")
                return ".".join(step for step in (prefixes[prefix].rstrip("."), rest) if step)
        return name

    return {new(name): value for name, value in weights.items()}


def _wrappers(names: Iterable[str]) -> list[str]:
    """Prefixes of common wrappers that names begin with, the shortest first, the empty one before all."""
    found = [""]
    for prefix in found:  # grows meanwhile: wrappers lie inside each other
        longer = [f"{prefix}.{wrapper}".lstrip(".") for wrapper in _WRAPPERS]
        found += [p for p in longer if any(_begins(name, p) for name in names)]
    return found


def _nearest(weights: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> str:
    """The nearest of the model's names for the first few of the file, both with shapes."""
    lines = []
    for name in list(weights)[:3]:
        for near in get_close_matches(name, own, n=1, cutoff=0.0):
            lines.append(f"\n  {name} {tuple(weights[name].shape)}, nearest here: {near} {tuple(own[near].shape)}")
    return "".join(lines) + "\n  init_prefix={theirs: ours} renames what they begin with"
