"""The catalog: every method and network from the YAML file beside it, and what the configurations say about who runs it.

Only files are read, so that all of it can be shown without torch and without composing a configuration. What would take a composed
configuration (numbers of parameters, the dimensions of networks) stands in an index beside the entries, which `job=methods report=docs` makes.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from lesionbench.errors import SuiteError, unknown
from lesionbench.installation import CONF
from lesionbench.jobs.command_line import runs_of
from lesionbench.moved import CHOICES

FOLDER = Path(__file__).parents[2] / "lightning_modules"
INDEX = FOLDER / "catalog.json"

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where it was built

NEEDS = {
    "labels": "labeled cases to train on",
    "unlabeled cases": "cases without labels beside them, whose labels are never read",
    "raters": "several labels of a case, by different raters",
    "lesion-free cases": "cases without a lesion to train on",
    "labels for a threshold": "a few labeled cases, on which one threshold is chosen",
    "tumor masks": "the region that is partitioned, drawn or predicted",
    "survival times": "of every patient, in a table",
    "checkpoint": "of methods that were trained before",
}
EFFECTS = {
    "shown": "the gain that is claimed was measured here, beyond the spread over seeds or cases",
    "partly shown": "on some of the data, or for some of its parts",
    "not shown": "it was measured here, and no such gain was found",
    "not run": "no comparison has been run here",
    "not compared": "a network that no table here compares with another",
}


@dataclass(frozen=True)
class Evidence:
    """What was measured here.

    Attributes:
        effect: one of `EFFECTS`.
        text: the figures, on what data, over how many seeds.
        csv: the file in docs/results that holds them; None where the page alone does.
    """

    effect: str
    text: str = ""
    csv: str | None = None

    def line(self) -> str:
        return f"{self.effect}: {self.text}" if self.text else self.effect


@dataclass(frozen=True)
class Entry:
    """A method or a network.

    Attributes:
        name: of the entry, the model configuration and the page.
        family: the folder that it lies in.
        title: as it is called.
        paper: authors and venue; None for a part that no paper proposes.
        year: of the paper.
        link: DOI or arXiv number.
        needs: what it learns from or starts with, of `NEEDS`; empty for networks.
        dimensions: 2, 2.5, 3.
        target: dotted name of the class or function.
        configs: of conf/model or conf/model/network, its own first, then its variants.
        built: overrides of the configuration whose parameters are counted.
        parameters: that are trained, in that configuration; None where checkpoints bring their own.
        benchmarks, experiments: that run it.
        evidence: what was measured here.
        page: below docs/.
    """

    name: str
    family: str
    title: str
    paper: str | None
    year: int | None
    link: str | None
    needs: tuple[str, ...]
    dimensions: tuple[float, ...]
    target: str
    configs: tuple[str, ...]
    built: tuple[str, ...]
    parameters: int | None
    benchmarks: tuple[str, ...]
    experiments: tuple[str, ...]
    evidence: Evidence
    page: str

    @property
    def is_network(self) -> bool:
        return self.family == "networks"

    def plain(self) -> dict[str, Any]:
        """All of it as plain data."""
        return asdict(self)


def families() -> dict[str, list[str]]:
    """Family -> names of its entries; networks last. Reads no file, only their names."""
    found: dict[str, list[str]] = {}
    for path in sorted(FOLDER.glob("*/*.yaml"), key=lambda p: (p.parent.name == "networks", p)):
        found.setdefault(path.parent.name, []).append(path.stem)
    return found


def entries() -> list[Entry]:
    """Everything, by family and name."""
    return [_entry(family, name) for family, names in families().items() for name in names]


def find(name: str) -> Entry:
    """The entry of this name; that of a variant, a class, a title or a name of an earlier release too.

    Raises:
        SuiteError: nothing is called so; says what is called nearly so.
    """

    def plain(text: str) -> str:
        return "".join(c for c in text.lower() if c.isalnum())

    today = {**CHOICES["model/network"], **CHOICES["model"]}.get(name, name)
    every = entries()
    for entry in every:
        if plain(today) in map(plain, (entry.name, *entry.configs, entry.title)):
            return entry
    for entry in every:  # methods share a class with what is no more than its configuration, which comes after it
        if plain(today) == plain(entry.target.rpartition(".")[2]):
            return entry
    raise unknown("method or network", name, [entry.name for entry in every])


def write_index(index: Mapping[str, Any]) -> None:
    """Writes what was counted of each entry: one a line, so that branches which add one each can be merged."""
    INDEX.write_text("{\n" + ",\n".join(f"{json.dumps(name)}: {json.dumps(index[name])}" for name in sorted(index)) + "\n}\n")
    _index.cache_clear()


@cache
def chosen(group: str, name: str) -> dict[str, str]:
    """What a configuration file chooses by its defaults list, those of the files that it builds on included: group -> name.

    A group goes without its package (`model/network@model.branches.s`) except where a model has several of one group; parts that are
    added to the configuration (`/model/robustness@attacked`) count as `+model/robustness`.
    """
    below: dict[str, str] = {}
    own: dict[str, str] = {}
    for item in _read(CONF / group / f"{name}.yaml").get("defaults") or []:
        if isinstance(item, str):
            path, _, package = item.partition("@")
            if path == "_self_":
                continue
            if not path.startswith("/"):  # beside this file
                path = f"{group}/{name.rpartition('/')[0]}/{path}"
            parent, _, base = path.strip("/").replace("//", "/").rpartition("/")
            if package:
                own[f"+{parent}/{base}"] = package
            else:
                below |= chosen(*_placed(parent, base))
            continue
        for key, value in item.items():
            key, _, package = key.removeprefix("optional ").removeprefix("override ").partition("@")
            key = key.strip("/") if key.startswith("/") or group in ("experiment", "benchmark") else f"{group}/{key}"
            if not isinstance(value, str):
                continue
            if package and key == "model":
                own[f"+model/{value}"] = package
                continue
            if key.split("/")[0] != "model" and "$" not in value:
                below |= chosen(*_placed(key, value))
            own[f"{key}@{package.removeprefix('model.')}" if package else key] = value
    return below | own


def _placed(group: str, name: str) -> tuple[str, str]:
    """Group and name of a configuration; folders below `experiment` belong to the name."""
    head, _, rest = group.partition("/")
    return (head, f"{rest}/{name}") if head == "experiment" and rest else (group, name)


def root(group: str, name: str) -> str:
    """The configuration that says what is built: the one with a `_target_`, which a variant builds on."""
    data = _read(CONF / group / f"{name}.yaml")
    if "_target_" in data:
        return name
    return root(group, next(item for item in data["defaults"] if isinstance(item, str) and item != "_self_"))


@cache
def _read(path: Path) -> dict[str, Any]:
    return yaml.load(path.read_text(), Loader=_LOADER) or {} if path.is_file() else {}


@cache
def _index() -> dict[str, Any]:
    return json.loads(INDEX.read_text()) if INDEX.is_file() else {}


@cache
def _names(group: str) -> list[str]:
    """Configurations of a group that can be chosen."""
    return sorted(
        p.relative_to(CONF / group).with_suffix("").as_posix()
        for p in (CONF / group).rglob("*.yaml")
        if not p.name.startswith("_") and p.stem != "none" and (group == "experiment" or p.parent == CONF / group)
    )


def _entry(family: str, name: str) -> Entry:
    path = FOLDER / family / f"{name}.yaml"
    data = dict(_read(path))
    network = family == "networks"
    group = "model/network" if network else "model"
    configs = [c for c in _names(group) if root(group, c) == name]
    counted = _index().get(name, {})
    built = data.pop("built", [f"{group}={name}"])
    evidence = data.pop("evidence", {"effect": "not compared"} if network else {})
    needs, dimensions = tuple(data.pop("needs", [])), tuple(data.pop("dimensions", counted.get("dimensions", [])))
    if unknown_keys := sorted(set(data) - {"title", "paper", "year", "link", "class", "page"}):
        raise SuiteError(f"{path}: unknown keys {unknown_keys}; see docs/adding_a_method.md")
    try:
        return Entry(
            name=name,
            family=family,
            title=data.pop("title"),
            paper=data.pop("paper"),
            year=data.pop("year"),
            link=data.pop("link"),
            needs=needs,
            dimensions=dimensions,
            target=data.pop("class", None) or _read(CONF / group / f"{name}.yaml")["_target_"],
            configs=tuple(sorted(configs, key=lambda c: (c != name, c))),
            built=tuple(built),
            parameters=counted.get("parameters"),
            benchmarks=_benchmarks(name, network) if configs else (),
            experiments=tuple(e for e in _names("experiment") if name in (_networks if network else _methods)(e)),
            evidence=Evidence(**evidence),
            page=data.pop("page", f"methods/{name}.md"),
        )
    except (KeyError, TypeError) as error:
        raise SuiteError(f"{path}: {error} is missing or wrong; see docs/adding_a_method.md") from None


@cache
def _methods(experiment: str) -> frozenset[str]:
    """The methods that an experiment runs: what it is named for where that is no model, its model, and models of its further stages."""
    choices = chosen("experiment", experiment)
    named = experiment.partition("/")[0]
    recipe = not (CONF / "model" / f"{named}.yaml").is_file() and any(named in names for names in families().values())
    main = named if recipe else root("model", choices.get("model", "supervised"))
    return frozenset({main, *(key.rpartition("/")[2] for key in choices if key.startswith("+model/"))})


@cache
def _networks(experiment: str) -> frozenset[str]:
    """The networks that an experiment runs: those of its model, unless it chooses others."""
    choices = chosen("experiment", experiment)
    model = choices.get("model", "supervised")
    networks = {**chosen("model", model), **choices}
    return frozenset(root("model/network", value) for key, value in networks.items() if key.partition("@")[0] == "model/network")


def _benchmarks(name: str, network: bool) -> tuple[str, ...]:
    """The benchmarks that a method is run on; those that choose a network."""
    if not network:
        words = (word.split()[0].partition("=") for word in runs_of(name))
        return tuple(value for key, _, value in words if key == "benchmark")
    usual = chosen("model", "supervised")
    return tuple(b for b in _names("benchmark") if root("model/network", (usual | chosen("benchmark", b))["model/network"]) == name)
