"""The command line: help without waiting, and configuration mistakes answered with what exists and the nearest match."""

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from lesionbench.errors import SuiteError, nearest
from lesionbench.installation import CONF, command, install
from lesionbench.moved import words

JOBS = {
    "fit": "run the experiment's stages: train, then test (default)",
    "test": "test ckpt=... on the test part of the data; several as an ensemble",
    "predict": "apply ckpt=... to the images in input=..., write masks to out=...",
    "tune": "choose the smallest volume of a region on out-of-fold predictions",
    "compare": "compare run folders: table, costs, paired tests",
    "dashboard": "make a comparison workspace of the runs on Weights & Biases",
    "check": "integrity check of a data set",
    "prepare": "preprocess and cache a data set ahead of training",
    "simulate": "write simulated cases to out=... in a BraTS layout",
    "export_dataset": "write a data set to out=... as nnU-Net reads it, with the same folds",
    "plan": "spacing, patch, batch and depth from the data by nnU-Net's rules, as an experiment",
    "show": "pictures of cases and of augmented training samples",
    "methods": "every method and network: paper, needs, experiments, what was measured; one in full with name=...",
}
OPTIONS = {
    "benchmark=NAME": "data, network, budget and metrics; default simulated",
    "model=NAME": "the method that is run on it (job=methods lists them); default supervised",
    "experiment=NAME": "a paper's own settings instead (job=methods lists them)",
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
    "--config-dir DIR": "a folder like conf/ with configurations of your own; own modules are found in the current directory",
}


def own_folder(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The user's own folder of configurations (`--config-dir`), and the arguments with it, and `-m`, in front.

    Hydra takes no overrides on both sides of a flag, and Lightning adds some at the end when it repeats the command for a further process.

    Raises:
        SuiteError: the folder does not exist, or none is named.
    """
    sweep: list[str] = []
    left, named = [], None
    rest = iter(arguments)
    for argument in rest:
        flag, equals, value = argument.partition("=")
        if flag in ("--config-dir", "-cd"):
            named = value if equals else next(rest, "")
        elif argument in ("-m", "--multirun"):
            sweep = [argument]
        else:
            left.append(argument)
    if named is None:
        return None, [*sweep, *left]
    if not named or not Path(named).is_dir():
        raise SuiteError(f"--config-dir={named}: no such folder; it holds what conf/ holds, such as model/mine.yaml")
    return Path(named), ["--config-dir", named, *sweep, *left]


def help_text(own: Path | None = None) -> str:
    """What `--help` prints; made from the suite's configurations and the user's own, so it is never out of date."""
    from lesionbench.jobs.catalog import families

    program = command()
    lines = [
        "lesionbench: experiments in brain-lesion and medical-MRI segmentation",
        "",
        f"  {program} [job=JOB] [benchmark=NAME model=NAME | experiment=NAME] [key=value ...]",
        "",
    ]
    lines += ["Jobs", *_columns(JOBS), "", "Options people change", *_columns(OPTIONS), ""]
    lines += [f"Methods by family ({program} job=methods lists them with their experiments, job=methods NAME says all about one)"]
    lines += [*_columns({family: ", ".join(names) for family, names in families().items() if family != "networks"}), ""]
    groups = {group: ", ".join(options(group, own)) for group in _groups(own)}
    added = sorted(set(options("experiment", own)) - set(options("experiment")))
    groups["experiment"] = ", ".join(["METHOD/DATA, see job=methods", *added])
    lines += ["Groups (group=name)", *_columns(groups), "", "Examples"]
    lines += [
        f"  {program} {e}".rstrip()
        for e in (
            "",
            "-m seed=0,1,2 model/loss=dice_ce,focal",
            "-m benchmark=blobs model=supervised,mean_teacher,ua_mt",
            "sweep=supervised hydra.sweeper.trials=30",
            "job=compare compare.group_by=[model.loss._target_]",
        )
    ]
    lines += ["", "Flags: -m multirun (sweep over comma-separated values), --cfg job prints the configuration, --info all, --hydra-help"]
    return "\n".join(lines)


def renamed(arguments: Sequence[str], own: Path | None = None) -> list[str]:
    """The arguments in today's names; what had another one in an earlier release is said on stderr.

    Where an experiment became a benchmark and a model, a model or benchmark that is named besides goes on to win.
    """
    named = {argument.partition("=")[0] for argument in arguments}
    today = []
    for argument in arguments:
        new = words(argument, own)
        if new != [argument]:
            print(f"{argument} is now called {' '.join(new)}", file=sys.stderr)
        today += new if len(new) == 1 else [word for word in new if word.partition("=")[0] not in named]
    return today


def quoted(arguments: Sequence[str]) -> list[str]:
    """The arguments with quotes around values that Hydra's grammar does not know, such as paths with an equals sign (`seed=0`), umlauts or
    parentheses; `~/` at their beginning is the home folder. What the grammar knows stays as it is, and so does a call of one of its
    functions or a bracket that is not closed: Hydra says what is wrong with it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()

    def known(argument: str) -> bool:
        try:
            parser.parse_override(argument)
        except HydraException:
            return False
        return True

    def one(argument: str) -> str:
        key, equals, value = argument.partition("=")
        if not key or key.startswith("-") or not equals or known(argument):
            return argument
        candidate = key + equals + _quoted(value, lambda part: known(f"key={part}"))
        return candidate if known(candidate) else argument

    return [one(a) for a in arguments]


_FUNCTIONS = ("choice", "range", "interval", "glob", "sort", "shuffle", "tag", "int", "float", "str", "bool")  # of Hydra's grammar


def _quoted(value: str, known: Callable[[str], bool]) -> str:
    """The value with quotes around as little of it as will do."""
    if known(value):
        return value
    parts = _parts(value)
    if len(parts) > 1:
        return ",".join(_quoted(part, known) for part in parts)
    if value[:1] + value[-1:] == "[]":
        return "[" + ",".join(_quoted(part, known) for part in _parts(value[1:-1])) + "]"
    if value[:1] + value[-1:] == "{}":
        pairs = [part.partition(":") for part in _parts(value[1:-1])]
        return "{" + ",".join(f"{key}{colon}{_quoted(inner, known)}" for key, colon, inner in pairs) + "}"
    function, bracket, inner = value.partition("(")
    if bracket and function in _FUNCTIONS:
        return f"{function}({','.join(_quoted(part, known) for part in _parts(inner[:-1]))})" if inner.endswith(")") else value
    if value[:1] in ("[", "{", "'", '"'):
        return value
    if value.startswith("~/"):
        value = str(Path.home() / value[2:])
    escaped = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), value)
    return f"'{escaped}'"


def _parts(text: str) -> list[str]:
    """The text, cut at commas outside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        depth += (character in "([{") - (character in ")]}") if not quote else 0
        if character == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def named(arguments: Sequence[str]) -> list[str]:
    """The arguments, with the bare words of `job=methods coranet` as `name=coranet`; Hydra takes no bare words."""
    if "job=methods" not in arguments:
        return list(arguments)
    others: list[str] = []
    bare: list[str] = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        value_of_flag = before.startswith("-") and "=" not in before and before not in ("-m", "--multirun")
        (others if "=" in argument or argument.startswith(("-", "~")) or value_of_flag else bare).append(argument)
    return [*others, f'name="{" ".join(bare)}"'] if bare else others


def options(group: str, own: Path | None = None) -> list[str]:
    """Names that a configuration group offers, in the suite and in the user's own folder."""
    found = [(root / group, p) for root in _roots(own) for p in (root / group).rglob("*.yaml") if not p.name.startswith("_")]
    return sorted({p.relative_to(root).with_suffix("").as_posix() for root, p in found if group == "experiment" or p.parent == root})


def runs_of(model: str, own: Path | None = None) -> list[str]:
    """Commands that run a method, without the program: its experiments, then the benchmarks that it has no experiment for.

    A method that stands on `_semi_supervised` runs where labels are few, `supervised` everywhere; all others have their experiments, and
    so have further settings of another model (`coranet_code`).
    """
    experiments = options("experiment", own)
    found = [f"experiment={name}" for name in experiments if name.startswith(f"{model}/")]
    parts = _built_on("model", model, own)
    variant = "_target_" not in _content("model", model, own)
    for benchmark in options("benchmark", own):
        few = "_few_labels" in _built_on("benchmark", benchmark, own) and not benchmark.endswith("_full")
        fits = benchmark != "none" if model == "supervised" else few and "_semi_supervised" in parts and not variant
        if fits and f"{model}/{benchmark}" not in experiments:
            found.append(f"benchmark={benchmark} model={model}")
    return found


def _built_on(group: str, name: str, own: Path | None) -> set[str]:
    """Names of the files of its own group that a configuration stands on."""
    entries = _content(group, name, own).get("defaults", [])
    direct = {entry for entry in entries if isinstance(entry, str) and entry != "_self_"}
    return direct.union(*(_built_on(group, entry, own) for entry in direct))


def _content(group: str, name: str, own: Path | None) -> dict:
    """What stands in a configuration file; nothing where there is none."""
    import yaml

    file = next((f for f in (root / group / f"{name}.yaml" for root in reversed(_roots(own))) if f.is_file()), None)
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where it was built
    return (yaml.load(file.read_text(), Loader=loader) if file else None) or {}


def explain(error: Exception, arguments: Sequence[str]) -> SuiteError:
    """A configuration error of Hydra or OmegaConf in one screen: what was wrong, what exists, the nearest match."""
    text, own = str(error), own_folder(arguments)[0]
    from hydra.errors import InstantiationException, OverrideParseException
    from omegaconf.errors import InterpolationKeyError, InterpolationResolutionError

    if isinstance(error, OverrideParseException):
        key, _, value = error.override.partition("=")
        return SuiteError(
            f"{error.override}: not in Hydra's grammar of overrides ({text.splitlines()[0]}); a text is quoted twice: '{key}=\"{value}\"'"
        )
    if "'optuna" in text and find_spec("optuna") is None:
        return SuiteError(f"a search needs Optuna: {install('sweeps')}")
    if isinstance(error, InstantiationException):  # a class that does not exist, or an argument that it does not have
        return SuiteError(re.sub(r", (set|see) .*?HYDRA_FULL_ERROR=1.*?(?=\n|$)", "", text).replace("\nfull_key: ", "\nin: "))
    if isinstance(error, InterpolationResolutionError) and not isinstance(error, InterpolationKeyError):
        place, reason = re.search(r"full_key: (\S+)", text), re.sub(r"^.* raised while resolving interpolation: ", "", text.splitlines()[0])
        return SuiteError(f"{place.group(1)}: {reason}" if place else reason)
    key = (
        re.search(r"full_key: (\S+)", text)
        or re.search(r"Could not override '([^']+)'", text)
        or re.search(r"Key '([^']+)' is not in struct", text)
    )
    if key and "/" in key.group(1):
        return SuiteError(_unused_group(key.group(1), own, arguments))
    if key:
        return SuiteError(_unknown_key(key.group(1), arguments, own))
    missing = re.search(r"Could not (?:find|load) '([^']+)'", text)
    if missing and missing.group(1).startswith("hydra/launcher/"):
        extra = "ray" if missing.group(1).endswith("ray") else "sweeps"
        return SuiteError(f"launcher={missing.group(1).rpartition('/')[2]} is not installed: {install(extra)}")
    if missing:
        group, _, name = missing.group(1).rpartition("/")
        while group and not any((root / group).is_dir() for root in _roots(own)):
            group, _, head = group.rpartition("/")
            name = f"{head}/{name}"
        if group.startswith("experiment/"):
            group, name = "experiment", f"{group.removeprefix('experiment/')}/{name}"
        if group:
            return SuiteError(f"There is no {group}={name}{nearest(name, options(group, own))}")
        return SuiteError(f"There is no group '{name}'{nearest(name, _groups(own))}")
    return SuiteError(text)


def _unused_group(name: str, own: Path | None, arguments: Sequence[str]) -> str:
    """A group that is overridden, but that nothing in the composed configuration has."""
    group, groups = name.partition("@")[0], _groups(own)
    if group not in groups:
        return f"There is no group '{group}'{nearest(group, groups)}"
    chosen = {key: value for key, _, value in (argument.partition("=") for argument in arguments)}
    model = chosen.get("model")
    if model and "experiment" not in chosen and not any(key.partition("@")[0] == group for key in chosen):
        known = "\n".join(f"  {run}" for run in runs_of(model, own)) or "  (none)"
        benchmark = chosen.get("benchmark", "simulated")
        return f"model={model} does not run on benchmark={benchmark}, which chooses a {group}: the method has none. It is run with\n{known}"
    return f"{name}=...: the chosen model and data have no {name} that could be replaced; leave it out, or choose those that have"


def _unknown_key(full: str, arguments: Sequence[str], own: Path | None) -> str:
    from hydra import compose
    from hydra.core.global_hydra import GlobalHydra
    from hydra.initialize import initialize_config_dir
    from omegaconf import DictConfig

    GlobalHydra.instance().clear()
    groups = set(_groups(own))
    choices = [a for a in arguments if a.partition("=")[0].lstrip("+") in groups and "," not in a]
    if own is not None:
        choices.append(f"hydra.searchpath=['file://{own.absolute()}']")
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


def _roots(own: Path | None) -> list[Path]:
    return [CONF] if own is None else [CONF, own]


def _groups(own: Path | None) -> list[str]:
    """Names of the groups that a user chooses from; what lies below `experiment/` is part of an experiment's name."""
    folders = ((root, d) for root in _roots(own) for d in root.rglob("*") if d.is_dir() and any(d.iterdir()))
    names = {d.relative_to(root).as_posix() for root, d in folders}
    return sorted(name for name in names if not name.startswith(("experiment/", "settings")))


def _columns(rows: dict[str, str]) -> list[str]:
    width = max(map(len, rows))
    return [f"  {name:{width}}  {text}" for name, text in rows.items()]
