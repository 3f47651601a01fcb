"""Names that changed after 0.1.0: checkpoints, run folders and commands from before go on working.

One table for all: `current` brings a configuration that was written with the old names to today's, `recorded` brings today's back to the
names under which runs were first hashed, so that a run keeps its folder.
"""

from collections.abc import Mapping
from typing import Any

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
# what `experiment=` names: the folder, or one file
EXPERIMENTS = {
    "agreement/": "multi_rater/",
    "colearning/": "co_learning/",
    "cps/": "cross_pseudo_supervision/",
    "recipe/brats2020": "supervised/brats2020_nnunet",
    "recipe/": "nnunet_region_loss_ensemble/",
    "reciprocal/": "reciprocal_adversarial/",
    "vat/": "virtual_adversarial_training/",
}
# other words of the command line, up to the equals sign or whole
OPTIONS = {
    "model=colearning": "model=co_learning",
    "model=cps": "model=cross_pseudo_supervision",
    "model=reciprocal": "model=reciprocal_adversarial",
    "model=vat": "model=virtual_adversarial_training",
    "model/network=branched_resnet": "model/network=multi_head_resnet",
    "model/network=branched_unet": "model/network=multi_head_unet",
    "model/network=branched_vnet": "model/network=multi_head_vnet",
    "model/network=window": "model/network=slab",
    "model/inferer=pack": "model/inferer=slab",
    "data.view=window": "data.view=slab",
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
    return config


def recorded_experiment(name: str) -> str:
    """The name under which the runs of an experiment were first kept."""
    return _replaced(name, _inverse(EXPERIMENTS))


def words(argument: str) -> str:
    """One word of the command line, in today's names; the values of a sweep (`experiment=a,b`) each."""
    key, equals, value = argument.partition("=")
    if key in ("experiment", "+experiment"):
        return f"{key}=" + ",".join(_replaced(name, EXPERIMENTS) for name in value.split(","))
    if argument in OPTIONS:
        return OPTIONS[argument]
    name = key.lstrip("+~")
    for old, new in OPTIONS.items():
        if "=" not in old and (name == old or name.startswith(f"{old}.")):
            return key.replace(old, new, 1) + equals + value
        if "=" in old and name == old.partition("=")[0] and "," in value:
            pairs = {o.partition("=")[2]: n.partition("=")[2] for o, n in OPTIONS.items() if o.partition("=")[0] == name}
            return f"{key}=" + ",".join(pairs.get(one, one) for one in value.split(","))
    return argument


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
