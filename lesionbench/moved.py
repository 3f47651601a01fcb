"""Names that changed after 0.1.0: checkpoints, run folders and commands from before go on working.

One table for all: `current` brings a configuration that was written with the old names to today's, `recorded` brings today's back to the
names under which runs were first hashed, so that a run keeps its folder.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lesionbench.errors import SuiteError
from lesionbench.installation import CONF

# dotted names: of a class or function, or of a module with everything in it (ends with a dot)
TARGETS = {
    "lightning_modules.CrossPseudo": "lightning_modules.CrossPseudoSupervision",
    "lightning_modules.VirtualAdversarial": "lightning_modules.VirtualAdversarialTraining",
    "lightning_modules.networks.BranchedUNet": "lightning_modules.networks.MultiHeadUNet",
    "lightning_modules.networks.BranchedVNet": "lightning_modules.networks.MultiHeadVNet",
    "lightning_modules.networks.BranchedResNet": "lightning_modules.networks.MultiHeadResNet",
    "lightning_modules.networks.WindowChannels": "lightning_modules.networks.SlabChannels",
    "lightning_modules.inferers.PackWise": "lightning_modules.inferers.SlabWise",
    "lightning_modules.anomaly.choose_threshold": "lesionbench.jobs.choose_threshold.choose_threshold",
    "lightning_modules.rater_targets.": "lightning_modules.raters.rater_targets.",
    "lightning_modules.certainty_masks.": "lightning_modules.semi_supervised.certainty_masks.",
    "datamodules.Planting": "datamodules.LesionInsertion",
    "datamodules.augmentation.": "datamodules.transforms.augmentation.",
    "datamodules.brightness.": "datamodules.transforms.brightness.",
    "datamodules.intensity.": "datamodules.transforms.intensity.",
    "datamodules.placement.": "datamodules.transforms.placement.",
    "datamodules.quarter_turns.": "datamodules.transforms.quarter_turns.",
}
# arguments of the suite's own classes, whatever the class
ARGUMENTS = {"window": "slab", "planting": "insertion", "readings": "decodings"}
# values of an argument
VALUES = {"view": {"window": "slab"}}
# methods of which the experiments on these benchmarks need no file any more, with the names of their folders
_SEMI_SUPERVISED = {
    "co_learning": "colearning", "copy_paste": "copy_paste", "cross_pseudo_supervision": "cps", "entropy_minimization": "entropy_minimization",
    "mean_teacher": "mean_teacher", "pi_model": "pi_model", "pseudo_label": "pseudo_label", "temporal_ensembling": "temporal_ensembling",
    "ua_mt": "ua_mt", "virtual_adversarial_training": "vat",
}  # fmt: skip
# what `experiment=` names: one file, or the folder
EXPERIMENTS = {
    **{f"{old}/simulated": f"{new}/simulated_few_labels" for new, old in _SEMI_SUPERVISED.items()},
    "coranet/simulated": "coranet/simulated_few_labels",
    "supervised_only/blobs": "supervised/blobs",
    "supervised_only/simulated": "supervised/simulated_few_labels",
    "full_supervision/blobs": "supervised/blobs_full",
    "full_supervision/simulated": "supervised/simulated_few_labels_full",
    "agreement/": "multi_rater/",
    "colearning/": "co_learning/",
    "cps/": "cross_pseudo_supervision/",
    "recipe/brats2020": "supervised/brats2020_nnunet",
    "recipe/": "nnunet_region_loss_ensemble/",
    "reciprocal/": "reciprocal_adversarial/",
    "vat/": "virtual_adversarial_training/",
}
# experiments whose configuration said that there is no stream `default`, where today's does not name it
_WITHOUT_DEFAULT_STREAM = {f"{old}/{benchmark}" for old in _SEMI_SUPERVISED.values() for benchmark in ("acdc", "left_atrium")}
# what a group of the command line offers, wherever it is put (`group@package=`), alone or in a list
CHOICES = {
    "model": {
        "colearning": "co_learning",
        "cps": "cross_pseudo_supervision",
        "reciprocal": "reciprocal_adversarial",
        "vat": "virtual_adversarial_training",
    },
    "model/network": {
        "branched_resnet": "multi_head_resnet",
        "branched_unet": "multi_head_unet",
        "branched_vnet": "multi_head_vnet",
        "window": "slab",
    },
    "model/inferer": {"pack": "slab"},
    "callbacks": {"reliability": "uncertainty_calibration"},
    "data.view": {"window": "slab"},
}
# keys of the command line, with everything below them
KEYS = {
    "callbacks.reliability": "callbacks.uncertainty_calibration",
    "data.window": "data.slab",
    "data.planting": "data.insertion",
    "model.network.window": "model.network.slab",
    "model.readings": "model.decodings",
}

_OWN = ("lesionbench.", "lightning_modules.", "datamodules.", "callbacks.")


def current(config: Any) -> Any:
    """A configuration (plain data) written with old names, in today's."""
    return _renamed(config, TARGETS, ARGUMENTS, VALUES)


def recorded(config: Any) -> Any:
    """Today's configuration (plain data) in the names that it had when runs were first hashed."""
    values = {key: _inverse(names) for key, names in VALUES.items()}
    config = _renamed(config, _inverse(TARGETS), _inverse(ARGUMENTS), values)
    if isinstance(config, dict) and isinstance(config.get("experiment_name"), str):
        config["experiment_name"] = recorded_experiment(config["experiment_name"])
        if config["experiment_name"] in _WITHOUT_DEFAULT_STREAM and "unlabeled" in (config["data"].get("streams") or {}):
            config["data"]["streams"]["default"] = None
    return config


def recorded_experiment(name: str) -> str:
    """The name under which the runs of an experiment were first kept."""
    return _replaced(name, _inverse(EXPERIMENTS))


def words(argument: str, own: Path | None = None) -> list[str]:
    """One word of the command line in today's names, which may be several words; the values of a sweep (`experiment=a,b`) each.

    An experiment without a file that is named like a model and a benchmark (`mean_teacher/acdc`) is these two.

    Args:
        own: the user's own folder of configurations, beside the suite's.

    Raises:
        SuiteError: a sweep over experiments of which some are a model and a benchmark now, but not all on one benchmark or of one model.
    """
    key, equals, value = argument.partition("=")
    name = key.lstrip("+~")
    if name == "experiment":
        return _experiments(key, value.split(","), own)
    for old, new in KEYS.items():
        if name == old or name.startswith(f"{old}."):
            return [key.replace(old, new, 1) + equals + value]
    group = name.partition("@")[0]
    choices = {old: new for old, new in CHOICES.get(group, {}).items() if own is None or not (own / group / f"{old}.yaml").is_file()}
    if choices:
        return [key + equals + re.sub(r"\w+", lambda word: choices.get(word[0], word[0]), value)]
    return [argument]


def _experiments(key: str, names: list[str], own: Path | None) -> list[str]:
    roots = [CONF] if own is None else [CONF, own]

    def exists(group: str, name: str) -> bool:
        return any((root / group / f"{name}.yaml").is_file() for root in roots)

    names = [name if exists("experiment", name) else _replaced(name, EXPERIMENTS) for name in names]
    pairs = []  # (model, benchmark) of those that have no file
    for name in names:
        model, _, benchmark = name.partition("/")
        if not exists("experiment", name) and exists("model", model) and exists("benchmark", benchmark):
            pairs.append((model, benchmark))
    if not pairs:
        return [f"{key}=" + ",".join(names)]
    models, benchmarks = ([*dict.fromkeys(part)] for part in zip(*pairs, strict=True))
    if len(pairs) < len(names) or len(models) > 1 < len(benchmarks):
        rest = [name for name in names if tuple(name.split("/")) not in pairs]
        commands = [f"experiment={','.join(rest)}"] if rest else []
        for benchmark in benchmarks:
            commands.append(f"benchmark={benchmark} model={','.join(m for m, b in pairs if b == benchmark)}")
        raise SuiteError(f"{key}={','.join(names)} is no longer one sweep; run\n" + "\n".join(f"  {c}" for c in commands))
    return [f"benchmark={','.join(benchmarks)}", f"model={','.join(models)}"]


def _renamed(node: Any, targets: Mapping[str, str], arguments: Mapping[str, str], values: Mapping[str, Mapping[str, str]]) -> Any:
    if isinstance(node, Mapping):
        own = str(node.get("_target_", "")).startswith(_OWN)
        result = {}
        for key, value in node.items():
            value = _renamed(value, targets, arguments, values)
            if own and isinstance(value, str):
                value = values.get(key, {}).get(value, value)
            result[arguments.get(key, key) if own else key] = value
        return result
    if isinstance(node, list | tuple):
        return [_renamed(value, targets, arguments, values) for value in node]
    return _replaced(node, targets) if isinstance(node, str) and node.startswith(_OWN) else node


def _replaced(name: str, names: Mapping[str, str]) -> str:
    """The name with the first entry that is it, or that it begins with (where the entry ends with a separator)."""
    for old, new in names.items():
        if name == old or (old.endswith((".", "/")) and name.startswith(old)):
            return new + name[len(old) :]
    return name


def _inverse(names: Mapping[str, str]) -> dict[str, str]:
    return {new: old for old, new in names.items()}
