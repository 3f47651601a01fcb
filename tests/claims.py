"""What a paper says of its settings, against what the experiment named for it does: `tests/papers/<method>.yaml`, the tables made from these files, and their check.

    python -m tests.claims        # writes the section "Settings" of every page anew

A file names the experiment that is composed, and lists what the paper states, what it leaves open and was decided, and what is done otherwise on purpose:

    experiment: maab_unet/brats2021
    stated:
      - {what: learning rate, where: Sect. 3.2, text: "1e-4", is: {model.optimizer.lr: 1.0e-4}}
    open:
      - {what: epsilon of Dice, why: that of most implementations, is: {model.loss.smooth: 1.0e-5}}
    departed:
      - {what: epochs, where: Sect. 3.2, text: "300", why: half of it is enough, is: {epochs: 150}}

`is` holds keys of the composed configuration (`stages[1].override...` too, `model/network` for what is chosen of a group) with their values. `test` names the test
function that shows what no key can tell. An entry may name an `experiment` of its own, and `with` further words of the command line.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from lesionbench.jobs.command_line import CONF
from tests.harness import composed

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "tests" / "papers").glob("*.yaml"))
KINDS = {"stated": {"what", "where", "text"}, "open": {"what", "why"}, "departed": {"what", "where", "text", "why"}}
OPTIONAL = {"is", "test", "experiment", "with"}
NO_SETTINGS = ("stages", "rounds", "callbacks", "writer", "compare", "hydra")  # told where the text speaks of them
HEADER = "| setting | the paper | here | |\n|---|---|---|---|\n"


def read(file: Path) -> dict[str, Any]:
    """A file of claims; numbers as YAML 1.1 has them, so that `1e-4` is none and has to be written `1.0e-4`."""
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def entries(claims: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every entry with its kind."""
    return ((kind, entry) for kind in KINDS for entry in claims.get(kind, ()))


@cache
def configuration(*words: str) -> DictConfig:
    """What a command composes, with Hydra's choices."""
    return composed(*words, hydra=True)


def command(claims: Mapping[str, Any], entry: Mapping[str, Any]) -> tuple[str, ...]:
    """The words that compose what an entry is about."""
    named = entry.get("experiment", claims["experiment"])
    return *named.split(), *entry.get("with", ())


def words(claims: Mapping[str, Any], entry: Mapping[str, Any]) -> tuple[str, ...]:
    """`command`, with a bare name understood as an experiment."""
    return tuple(word if "=" in word else f"experiment={word}" for word in command(claims, entry))


def found(cfg: DictConfig, key: str) -> Any:
    """The value of a key in plain data; what is chosen of a group for a key with a slash. A key that is not there is None, as null is."""
    if "/" in key:
        return cfg.hydra.runtime.choices.get(key)
    value = OmegaConf.select(cfg, key)
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def differences(claims: Mapping[str, Any], more: Sequence[str] = ()) -> list[str]:
    """What the experiments say otherwise than the claims, a line each; `more` are words for every command."""
    lines = []
    for _, entry in entries(claims):
        cfg = configuration(*words(claims, entry), *more)
        for key, value in entry.get("is", {}).items():
            real = found(cfg, key)
            if (type(real) is not type(value) and not {type(real), type(value)} <= {int, float}) or real != value:
                lines.append(f"{entry['what']}: {key} is {real!r}, not {value!r}")
    return lines


def malformed(claims: Mapping[str, Any]) -> list[str]:
    """What is wrong with a file itself, a line each."""
    lines = [f"{name}: no such part" for name in claims if name not in {*KINDS, "experiment"}]
    for kind, entry in entries(claims):
        name = entry.get("what", "an entry")
        lines += [f"{kind}, {name}: lacks {key}" for key in sorted(KINDS[kind] - set(entry))]
        lines += [f"{kind}, {name}: {key} is no key of it" for key in sorted(set(entry) - KINDS[kind] - OPTIONAL)]
        if not entry.get("is") and not entry.get("test"):
            lines.append(f"{kind}, {name}: neither `is` nor `test`")
        if entry.get("test") and not tested(entry["test"]):
            lines.append(f"{kind}, {name}: {entry['test']} is no test")
    return lines


def tested(name: str) -> bool:
    """Whether `tests/x.py::test_y` is a test."""
    file, _, function = name.partition("::")
    path = ROOT / file
    return path.is_file() and re.search(rf"^def {re.escape(function)}\(", path.read_text(encoding="utf-8"), re.M) is not None


def own_settings(experiment: str) -> set[str]:
    """Keys with plain values in the file of an experiment and in those of the same folder that it builds on."""
    told: set[str] = set()

    def walk(node: Any, prefix: str) -> None:
        for key, value in node.items():
            if isinstance(value, dict) and value:
                walk(value, f"{prefix}{key}.")
            elif not str(value).startswith("${"):  # which is told where the value stands
                told.add(f"{prefix}{key}")

    def visit(name: str) -> None:
        content = yaml.safe_load((CONF / "experiment" / f"{name}.yaml").read_text(encoding="utf-8")) or {}
        for part in content.pop("defaults", ()):
            if isinstance(part, str) and part.startswith(f"/experiment/{experiment.split('/')[0]}/"):
                visit(part.removeprefix("/experiment/"))
        walk({key: value for key, value in content.items() if key not in NO_SETTINGS}, "")

    visit(experiment)
    return told


def untold(name: str, claims: Mapping[str, Any]) -> list[str]:
    """Settings in the files of the method's experiments of the claims that no entry tells of."""
    experiments = {
        word.removeprefix("experiment=") for _, entry in entries(claims) for word in words(claims, entry) if word.startswith("experiment=")
    }
    own = {key for experiment in experiments if experiment.split("/")[0] == name for key in own_settings(experiment)}
    told = guarded(claims)
    return sorted(
        key
        for key in own
        if not any(key == known or known.startswith((f"{key}.", f"{key}[")) or key.startswith(f"{known}.") for known in told)
    )


def guarded(claims: Mapping[str, Any]) -> set[str]:
    """All keys that the claims hold a value of."""
    return {key for _, entry in entries(claims) for key in entry.get("is", {})}


def settings(claims: Mapping[str, Any]) -> str:
    """The claims as the Markdown of a page."""
    rows = []
    for kind, entry in entries(claims):
        values = [
            f"`{key.removesuffix('._target_')}`: {value.rsplit('.', 1)[-1]}" if key.endswith("._target_") else f"`{key}={_told(value)}`"
            for key, value in entry.get("is", {}).items()
        ]
        here = ", ".join(values) or "see the test"
        where = f"{entry['text']} ({entry['where']})" if "text" in entry else "open"
        note = {"stated": "", "open": entry.get("why", ""), "departed": f"**departed**: {entry.get('why', '')}"}[kind]
        if "experiment" in entry or "with" in entry:
            here += f" in `{' '.join(command(claims, entry))}`"
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in (entry["what"], where, here, note)) + " |")
    opening = f"Of `{claims['experiment']}`, against the text of the paper; made from [this file](../../tests/papers/{{name}}.yaml), which the tests compare with the experiment.\n\n"
    return opening + HEADER + "\n".join(rows) + "\n"


def _told(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(_told, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_told(v)}" for k, v in value.items()) + "}"
    return str(value)


def page_with(text: str, name: str, claims: Mapping[str, Any]) -> str:
    """A page's text with its section "Settings" made from the claims, before "Departures"."""
    section = "## Settings\n\n" + settings(claims).replace("{name}", name) + "\n"
    without = re.sub(r"^## Settings\n.*?(?=^## )", "", text, flags=re.M | re.S)
    before, mark, after = without.partition("## Departures\n")
    return before + section + mark + after


def main() -> None:
    """Writes the pages."""
    for file in FILES:
        page = ROOT / "docs" / "methods" / file.name.replace(".yaml", ".md")
        old = page.read_text(encoding="utf-8")
        new = page_with(old, file.stem, read(file))
        if new != old:
            page.write_text(new, encoding="utf-8")
            print(f"{page.relative_to(ROOT)}: written anew")


if __name__ == "__main__":
    main()
