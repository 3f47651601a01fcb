"""Names of groups of runs: what a person types to get such runs, `model=supervised, model.lr=0.1`.

A value below a `_target_` is named by the choice of the command line that it comes from, where that can be told from the configuration.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import yaml

from lesionbench.installation import CONF
from lesionbench.reports.runs import ABSENT, Record, flat, setting, value_text

_TARGET = "._target_"
_BARE = ("experiment", "experiment_name")  # their values say what they are


@dataclass(frozen=True)
class GroupName:
    """The name of a group.

    Attributes:
        text: as tables show it; different for different values of the keys.
        values: shorter and older ways of calling it, which several groups may share: the values without their keys, and as they stand in
            the configuration.
    """

    text: str
    values: frozenset[str]


@dataclass(frozen=True)
class _Part:
    key: str
    value: str

    @property
    def text(self) -> str:
        return self.value if self.key in _BARE else f"{self.key}={self.value}"


def group_names(settings: Sequence[Record], keys: Sequence[str]) -> list[GroupName]:
    """The name of the group of every run: `key=value` for each of the keys that its configuration has, joined by ", ".

    `_target_` keys, and keys of a whole group such as `model.loss`, are named by the choice that gives the value (`model/loss=dice`). The
    name of an experiment stands alone.

    Args:
        settings: the configurations of the runs.
        keys: dotted keys.
    """
    columns = [_parts(settings, key) for key in keys]
    names = []
    for config, parts in zip(settings, zip(*columns, strict=True), strict=True):
        known = [part for part in parts if part is not None]
        plain = ", ".join(value_text(setting(config, key)) for key in keys)
        text = ", ".join(part.text for part in known) or "without " + ", ".join(keys)
        names.append(GroupName(text, frozenset({plain, ", ".join(part.value for part in known)})))
    return names


def _parts(settings: Sequence[Record], key: str) -> list[_Part | None]:
    """How one key is named in each of the runs, None where it is absent; different values differently."""
    values = [setting(config, key) for config in settings]
    identities = [json.dumps(value, sort_keys=True, default=str) for value in values]
    choices: dict[str, set[_Part | None]] = {}
    for config, identity in zip(settings, identities, strict=True):
        choices.setdefault(identity, set()).add(_choice(config, key))
    alone = {identity: next(iter(found)) for identity, found in choices.items() if len(found) == 1}
    taken = Counter(alone.values())
    named: dict[str, _Part] = {}
    for identity, value in dict(zip(identities, values, strict=True)).items():
        choice = alone.get(identity)
        named[identity] = choice if choice is not None and taken[choice] == 1 else _Part(key, _typed(value))
    # absent is the object itself: a configuration may hold the same text
    return [None if value is ABSENT else named[identity] for value, identity in zip(values, identities, strict=True)]


def _typed(value: Any) -> str:
    """A value as YAML reads it back."""
    if not isinstance(value, str):
        return json.dumps(value, sort_keys=True, default=str)
    try:
        plain = yaml.safe_load(value) == value and ", " not in value
    except yaml.YAMLError:
        plain = False
    return value if plain else json.dumps(value, ensure_ascii=False)


@dataclass
class _Option:
    """What a choice sets, by dotted keys, less values that refer to others.

    Attributes:
        own: in its file, and in those of the same group that it is made from.
        nested: in the choices of other groups that it makes.
        depth: number of choices of its group that it is made from.
    """

    own: dict[str, Any]
    nested: dict[str, Any]
    depth: int

    def rank(self, values: Mapping[str, Any]) -> tuple[int, int, int, int]:
        """Small where a configuration with these values is likely to have been made from the choice."""
        equal, nested = (sum(key in values and values[key] == v for key, v in part.items()) for part in (self.own, self.nested))
        return len(self.own) - equal, -equal, len(self.nested) - nested, self.depth


def _choice(settings: Record, key: str) -> _Part | None:
    """The choice of the command line that gives the value of a key, None where there is none or several would do equally well.

    It is the one with the same `_target_` of which the fewest values were changed; of choices that are as good the one that the others
    are made from.
    """
    place = key.removesuffix(_TARGET)
    group, node = place.replace(".", "/"), setting(settings, place)
    if not isinstance(node, Mapping) or "_target_" not in node:
        return None
    values = flat(node)
    ranks: dict[tuple[int, ...], list[str]] = {}
    for name, option in _options(group).items():
        if option.own.get("_target_") == values["_target_"]:
            ranks.setdefault(option.rank(values), []).append(name)
    best = ranks[min(ranks)] if ranks else []
    return _Part(group, best[0]) if len(best) == 1 else None


@cache
def _options(group: str) -> dict[str, _Option]:
    return {file.stem: _option(group, file.stem) for file in sorted((CONF / group).glob("[!_]*.yaml"))}


def _option(group: str, name: str) -> _Option:
    content = yaml.safe_load((CONF / group / f"{name}.yaml").read_text(encoding="utf-8")) or {}
    made = _Option({}, {}, 0)
    for entry in content.pop("defaults", []):
        if isinstance(entry, str):
            if (CONF / group / f"{entry}.yaml").is_file():
                base = _option(group, entry)
                made = _Option(made.own | base.own, made.nested | base.nested, made.depth + base.depth + 1)
        else:
            for where, chosen in entry.items():
                package, values = _nested(group, where, chosen)
                kept = {key: value for key, value in made.nested.items() if not key.startswith(f"{package}.")}  # less what is overridden
                made.nested = kept | values
    made.own |= {key: value for key, value in (flat(content) if content else {}).items() if "${" not in str(value) and value != "???"}
    made.nested = {key: value for key, value in made.nested.items() if key not in made.own}
    return made


def _nested(group: str, where: str, chosen: Any) -> tuple[str, dict[str, Any]]:
    """The package of one entry `where: chosen` of a list of defaults and what it sets; nothing where it is no choice among files."""
    other, _, package = where.removeprefix("override ").partition("@")
    place, package = other.lstrip("/") if other.startswith("/") else f"{group}/{other}", package or other.replace("/", ".")
    if not isinstance(chosen, str) or not (CONF / place / f"{chosen}.yaml").is_file():
        return package, {}
    option = _option(place, chosen)
    return package, {f"{package}.{key}": value for key, value in (option.nested | option.own).items()}
