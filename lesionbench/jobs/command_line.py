"""The command line: help without waiting, and configuration mistakes answered with what exists and the nearest match."""

import re
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from lesionbench.errors import SuiteError, nearest
from lesionbench.moved import words

CONF = Path(__file__).parents[2] / "conf"

JOBS = {
    "fit": "run the experiment's stages: train, then test (default)",
    "test": "test ckpt=... on the test part of the data; several as an ensemble",
    "predict": "apply ckpt=... to the NIfTI files in input=..., write masks to out=...",
    "tune": "choose the smallest volume of a region on out-of-fold predictions",
    "compare": "compare run folders: table, costs, paired tests",
    "dashboard": "make a comparison workspace of the runs on Weights & Biases",
    "check": "integrity check of a data set",
    "prepare": "preprocess and cache a data set ahead of training",
    "simulate": "write simulated cases to out=... in a BraTS layout",
    "show": "pictures of cases and of augmented training samples",
}
OPTIONS = {
    "experiment=NAME": "what to run (below); default supervised/simulated",
    "data.root=DIR": "where the data set is; default $LESIONBENCH_DATA/<name> or data/<name>",
    "trainer=NAME": "cpu, gpu, ddp, ddp_sim, multinode",
    "seed=N": "seed of training; -m seed=0,1,2 runs three",
    "sweep=NAME": "search with Optuna (tpe: 'model.optimizer.lr=tag(log,interval(1e-4,1e-2))'), or seeds, folds",
    "launcher=NAME": "where the jobs of a sweep run: basic, joblib, submitit_local, submitit_slurm, ray",
    "epochs=N": "length of training; an epoch is data.samples_per_epoch samples",
    "data.batch_size=N": "samples per process and step; accumulate=K adds up K batches",
    "model/loss=NAME": "and model/network=, model/optimizer=, model/scheduler=, metrics=, augmentation=",
    "logger=[csv,wandb]": "where curves and pictures go: csv, tensorboard, wandb",
    "resume=true": "go on where the same command was interrupted",
    "debug=tiny": "also fast, overfit, profile",
}


def help_text() -> str:
    """What `run.py --help` prints; made from the folder of configurations, so it is never out of date."""
    lines = [
        "lesionbench: experiments in brain-lesion and medical-MRI segmentation",
        "",
        "  python run.py [job=JOB] [experiment=NAME] [key=value ...]",
        "",
    ]
    lines += ["Jobs", *_columns(JOBS), "", "Options people change", *_columns(OPTIONS), "", "Groups (group=name)"]
    groups = {str(d.relative_to(CONF)): ", ".join(options(str(d.relative_to(CONF)))) for d in _groups()}
    lines += [*_columns(groups), "", "Examples"]
    lines += [
        f"  {e}"
        for e in (
            "python run.py",
            "python run.py -m seed=0,1,2 model/loss=dice_ce,focal",
            "python run.py sweep=supervised hydra.sweeper.trials=30",
            "python run.py job=compare compare.group_by=[model.loss._target_]",
        )
    ]
    lines += ["", "Flags: -m multirun (sweep over comma-separated values), --cfg job prints the configuration, --info all, --hydra-help"]
    return "\n".join(lines)


def renamed(arguments: Sequence[str]) -> list[str]:
    """The arguments in today's names; what had another one in an earlier release is said on stderr."""
    today = [words(argument) for argument in arguments]
    for old, new in zip(arguments, today, strict=True):
        if old != new:
            print(f"{old} is now called {new}", file=sys.stderr)
    return today


def quoted(arguments: Sequence[str]) -> list[str]:
    """Quotes values that hold an equals sign, as run folders do (`seed=0`); Hydra would take them for a syntax error."""

    def one(argument: str) -> str:
        key, equals, value = argument.partition("=")
        if key.startswith("-") or "=" not in value or "'" in value or '"' in value:
            return argument
        return key + equals + re.sub(r"[^\[\]{},:]*=[^\[\]{},]*", lambda match: f"'{match.group()}'", value)

    return [one(a) for a in arguments]


def options(group: str) -> list[str]:
    """Names that a configuration group offers."""
    root = CONF / group
    found = (p for p in root.rglob("*.yaml") if not p.name.startswith("_"))
    return sorted(str(p.relative_to(root).with_suffix("")) for p in found if group == "experiment" or p.parent == root)


def explain(error: Exception, arguments: Sequence[str]) -> SuiteError:
    """A configuration error of Hydra or OmegaConf in one screen: what was wrong, what exists, the nearest match."""
    text = str(error)
    from hydra.errors import InstantiationException

    if "'optuna" in text and find_spec("optuna") is None:
        return SuiteError("a search needs Optuna: pip install -e '.[sweeps]'")
    if isinstance(error, InstantiationException):  # a class that does not exist, or an argument that it does not have
        return SuiteError(re.sub(r", (set|see) .*?HYDRA_FULL_ERROR=1.*?(?=\n|$)", "", text).replace("\nfull_key: ", "\nin: "))
    key = (
        re.search(r"full_key: (\S+)", text)
        or re.search(r"Could not override '([^']+)'", text)
        or re.search(r"Key '([^']+)' is not in struct", text)
    )
    if key and "/" in key.group(1):
        return SuiteError(_unused_group(key.group(1)))
    if key:
        return SuiteError(_unknown_key(key.group(1), arguments))
    missing = re.search(r"Could not find '([^']+)'", text)
    if missing and missing.group(1).startswith("hydra/launcher/"):
        extra = "ray" if missing.group(1).endswith("ray") else "sweeps"
        return SuiteError(f"launcher={missing.group(1).rpartition('/')[2]} is not installed: pip install -e '.[{extra}]'")
    if missing:
        group, _, name = missing.group(1).rpartition("/")
        while group and not (CONF / group).is_dir():
            group, _, head = group.rpartition("/")
            name = f"{head}/{name}"
        if group.startswith("experiment/"):
            group, name = "experiment", f"{group.removeprefix('experiment/')}/{name}"
        if group:
            return SuiteError(f"There is no {group}={name}{nearest(name, options(group))}")
        return SuiteError(f"There is no group '{name}'{nearest(name, [str(d.relative_to(CONF)) for d in _groups()])}")
    return SuiteError(text)


def _unused_group(name: str) -> str:
    """A group that is overridden, but that nothing in the composed configuration has."""
    group, groups = name.partition("@")[0], [str(d.relative_to(CONF)) for d in _groups()]
    if group not in groups:
        return f"There is no group '{group}'{nearest(group, groups)}"
    return f"{name}=...: the chosen model and data have no {name} that could be replaced; leave it out, or choose those that have"


def _unknown_key(full: str, arguments: Sequence[str]) -> str:
    from hydra import compose
    from hydra.core.global_hydra import GlobalHydra
    from hydra.initialize import initialize_config_dir
    from omegaconf import DictConfig

    GlobalHydra.instance().clear()
    choices = [a for a in arguments if a.partition("=")[0].lstrip("+") in {str(d.relative_to(CONF)) for d in _groups()} and "," not in a]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=choices, return_hydra_config=full.startswith("hydra."))

    def keys(node: DictConfig, prefix: str = "") -> Iterator[str]:
        for k in node:
            yield f"{prefix}{k}"
            child = node._get_node(k)
            if isinstance(child, DictConfig) and not child._is_none() and not child._is_interpolation():
                yield from keys(child, f"{prefix}{k}.")

    import difflib

    known = list(keys(cfg))
    parent = full.rpartition(".")[0]
    beside = [k for k in known if k.rpartition(".")[0] == parent]
    close = difflib.get_close_matches(full, known, n=3, cutoff=0.6)
    hint = f"; did you mean {' or '.join(close)}?" if close else "."
    return (
        f"There is no key '{full}'{hint}"
        + (f" Beside it: {', '.join(beside)}" if beside else "")
        + f"\nTo add a key all the same, write +{full}=..."
    )


def _groups() -> list[Path]:
    return sorted(d for d in CONF.rglob("*") if d.is_dir() and "experiment/" not in str(d.relative_to(CONF)) and any(d.iterdir()))


def _columns(rows: dict[str, str]) -> list[str]:
    width = max(map(len, rows))
    return [f"  {name:{width}}  {text}" for name, text in rows.items()]
