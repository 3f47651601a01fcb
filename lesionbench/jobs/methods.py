"""The job `methods`: the catalog as a table, as JSON, as the index of the documentation's method pages, or one entry in full."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from lesionbench.errors import SuiteError, unknown
from lesionbench.installation import CLONE, command
from lesionbench.jobs.catalog import EFFECTS, FOLDER, INDEX, NEEDS, Entry, entries, families, find, write_index
from lesionbench.jobs.console import say

PAGE = "docs/methods/index.md"


def methods(cfg: DictConfig) -> None:
    """Shows the catalog, or the entry `name`; `report=json` prints JSON, `out=FILE.json` writes it, `report=docs` renews page and index.

    Raises:
        SuiteError: no such name or report, a file that is not JSON, a page that only a clone has.
    """
    if cfg.report not in (None, "json", "docs"):
        raise unknown("report", cfg.report, ["docs", "json", "null"])
    if cfg.out and Path(cfg.out).suffix != ".json":
        raise SuiteError(f"out={cfg.out}: job=methods writes JSON, out=<file>.json")
    if cfg.report == "docs":
        if cfg.name or cfg.out:
            raise SuiteError("report=docs writes the page and the index of all methods: leave name= and out= away")
        write_docs()
        return
    entry = None
    if cfg.name:
        entry = find(cfg.name)
        entry = replace(entry, parameters=counted(entry)["parameters"])
    data = [one.plain() for one in entries()] if entry is None else entry.plain()
    if cfg.out:
        Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
        Path(cfg.out).write_text(_json(data))
        say(f"written to {cfg.out}")
    elif cfg.report == "json":
        say(_json(data).rstrip())
    else:
        from rich.console import Console

        # beside a terminal, lines are for files and other programs: wide, unless the user says how wide
        console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160, highlight=False)
        console.print(table() if entry is None else detail(entry))


def counted(entry: Entry) -> dict[str, Any]:
    """What the index holds of an entry: trained parameters, and of a network the dimensions that it can have; built on the meta device.

    Raises:
        SuiteError: the entry's configuration cannot be composed or built.
    """
    import torch
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from lesionbench.checkpoint import build_method

    if "checkpoint" in entry.needs:
        return {"parameters": None}

    cfg = _composed(entry.built)
    task = instantiate(cfg.data, _convert_="all").task

    def built() -> Any:
        with torch.device("meta"):
            method = build_method(OmegaConf.to_container(cfg.model, resolve=True), task)
        return method.network if entry.is_network else method

    found = built()
    result: dict[str, Any] = {"parameters": sum(p.numel() for p in found.parameters() if p.requires_grad)}
    if entry.is_network:
        dimensions = {2.5 if found.slab else found.dimensions}
        for other in {2, 3} - dimensions if "dimensions" in cfg.model.network else ():
            cfg.model.network.dimensions, cfg.patch = other, [64] * other
            try:
                dimensions.add(built().dimensions)
            except SuiteError:  # says which it is made for
                continue
        result["dimensions"] = sorted(dimensions)
    return result


def _composed(overrides: tuple[str, ...]) -> DictConfig:
    """The configuration of these overrides, also inside of a job that Hydra runs."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from lesionbench.installation import CONF

    state = GlobalHydra.instance()
    running, state.hydra = state.hydra, None
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose("config", overrides=[*overrides, "run_folder=run"])
    finally:
        state.hydra = running


def table() -> Any:
    """All entries for a terminal: nothing is cut, what does not fit is wrapped."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=None, padding=(0, 1), pad_edge=False, header_style="bold", expand=True)
    longest = max(len(name) for names in families().values() for name in names)
    shown.add_column("name", no_wrap=True, min_width=longest)
    shown.add_column("paper, needs, run by", ratio=8, overflow="fold")
    shown.add_column("size", ratio=2, overflow="fold")
    shown.add_column("effect, as measured here", ratio=7, overflow="fold")
    every = entries()
    for family in families():
        shown.add_row()
        shown.add_row(Text(family, style="bold"))
        for entry in every:
            if entry.family == family:
                about = (_paper(entry), ", ".join(entry.needs), _run_by(entry))
                size = (_dimensions(entry), millions(entry.parameters))
                shown.add_row(
                    entry.name, *map(Text, ("\n".join(filter(None, about)), "\n".join(filter(None, size)), entry.evidence.line()))
                )
    notes = [
        "Parameters are those that are trained, in the configuration that `name=` tells. More on one of them:",
        f"  {command()} job=methods name=mean_teacher",
        f"All of it as JSON: {command()} job=methods report=json",
    ]
    return Group(shown, Text("\n".join(["", *notes])))


def _paper(entry: Entry) -> str:
    return " ".join(str(part) for part in (entry.paper, entry.year) if part)


def _dimensions(entry: Entry) -> str:
    return " ".join(f"{d:g}D" for d in entry.dimensions)


def millions(count: int | None) -> str:
    """A number of parameters, in millions where it is large."""
    return "" if count is None else f"{count / 1e6:.3g} M" if count >= 1e5 else f"{count:,}"


def _run_by(entry: Entry) -> str:
    """Benchmarks and experiments by folder, the method's own folder not named; of many their number."""
    kinds = {"benchmark": list(entry.benchmarks), "experiment": list(entry.experiments)}
    return "; ".join(_few(names, f"{kind}s", entry.name) for kind, names in kinds.items() if names)


def _few(names: list[str], kind: str, own: str) -> str:
    if len(names) > 7:
        return f"{len(names)} {kind}"
    folders: dict[str, list[str]] = {}
    for name in names:
        folder, _, rest = name.rpartition("/")
        folders.setdefault(folder, []).append(rest)
    return ", ".join(", ".join(rest) if folder in ("", own) else f"{folder}/: {', '.join(rest)}" for folder, rest in folders.items())


def detail(entry: Entry) -> Any:
    """One entry in full."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=None, padding=(0, 1), pad_edge=False, show_header=False)
    shown.add_column(no_wrap=True)
    shown.add_column(overflow="fold")
    group = "model/network" if entry.is_network else "model"
    rows = {
        "name": f"{entry.name}: {entry.title}",
        "family": entry.family,
        "paper": ", ".join(part for part in (_paper(entry), entry.link) if part) or "none",
        "class": entry.target,
        "needs": "\n".join(f"{need}: {NEEDS[need]}" for need in entry.needs) or ("" if entry.is_network else "nothing"),
        "dimensions": _dimensions(entry),
        "parameters": "those of its checkpoints"
        if entry.parameters is None
        else f"{entry.parameters:,} trained, with {' '.join(entry.built)}",
        "configuration": "\n".join(f"{group}={name}" for name in entry.configs),
        "benchmarks": "\n".join(f"benchmark={name} model={entry.name}" for name in entry.benchmarks),
        "experiments": "\n".join(f"experiment={name}" for name in entry.experiments),
        "effect": f"{entry.evidence.line()}\n({EFFECTS[entry.evidence.effect]})",
        "figures": f"docs/results/{entry.evidence.csv}" if entry.evidence.csv else "",
        "page": f"docs/{entry.page}",
    }
    for key, value in rows.items():
        if value:
            shown.add_row(Text(key, style="bold"), Text(value))
    return shown


def write_docs() -> None:
    """Counts everything anew and writes the index and the documentation's page from it.

    Raises:
        SuiteError: an installed wheel, which has no documentation.
    """
    if CLONE is None:
        raise SuiteError("report=docs: the documentation is in the clone, not in an installed package")
    write_index({entry.name: counted(entry) for entry in entries()})
    (CLONE / PAGE).write_text(page())
    say(f"written: {INDEX.relative_to(CLONE)}, {PAGE}")


def page() -> str:
    """The page of all methods and networks, from the entries and the opening sentence of each method's own page."""
    assert CLONE is not None
    lines = [
        f"<!-- made by `python run.py job=methods report=docs` from {FOLDER.name}/*/*.yaml; changes belong there -->",
        "",
        "# Methods and networks",
        "",
        "Every method by family, with what it learns from and whether the gain that it claims shows in what was measured here; then the networks. The same in a terminal, as JSON, and one",
        "entry in full, with the experiments that run it:",
        "",
        "```bash",
        "python run.py job=methods",
        "python run.py job=methods report=json",
        "python run.py job=methods name=mean_teacher",
        "```",
        "",
        "| effect | |",
        "|---|---|",
        *(f"| {effect} | {meaning} |" for effect, meaning in EFFECTS.items()),
        "",
        "Parameters are those that are trained, in the configuration that the last command names. How an entry is made: [adding a method](../adding_a_method.md).",
    ]
    every = entries()
    for family in families():
        lines += ["", f"## {family.replace('_', '-').capitalize()}", ""]
        titles = ["", "paper", "needs", "dimensions", "parameters", "effect"]
        if family == "networks":
            titles.remove("needs")
        lines += [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
        for entry in every:
            if entry.family == family:
                lines.append(_row(entry))
    return "\n".join(lines) + "\n"


def _row(entry: Entry) -> str:
    link = entry.page.removeprefix("methods/") if entry.page.startswith("methods/") else f"../{entry.page}"
    what = f"[{entry.title}]({link}), `{entry.name}`" if entry.is_network else f"[{entry.title}]({link}): {_opening(entry)}"
    figures = f" ([CSV](../results/{entry.evidence.csv}))" if entry.evidence.csv else ""
    needs = [] if entry.is_network else [", ".join(entry.needs)]
    cells = [what, _paper(entry), *needs, _dimensions(entry), millions(entry.parameters), entry.evidence.line() + figures]
    return f"| {' | '.join(cells)} |"


def _opening(entry: Entry) -> str:
    """The paragraph below the title of a method's page, which says in a sentence what it does."""
    assert CLONE is not None
    text = (CLONE / "docs" / entry.page).read_text()
    return " ".join(text.split("\n\n")[1].split())


def _json(data: Any) -> str:
    return json.dumps(data, indent=1, ensure_ascii=False) + "\n"
