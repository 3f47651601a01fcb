"""The pages of methods: one skeleton, equations, commands, options with the defaults that they really have, results that lie beside them."""

import ast
import importlib
import math
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from lesionbench.jobs.command_line import CONF
from tests.harness import composed
from tests.test_docs import ROOT, blocks, called, keys, overrides

HEADINGS = ["Paper", "Method", "Run", "Options", "Settings", "Departures", "Results"]
PACKAGES = ("lightning_modules", "datamodules", "callbacks", "lesionbench")
ABSENT = "no such key"
RECIPES = (
    "attention_unet_positive_mining",
    "cmm_net_3d",
    "deepseg_nnunet_staple_ensemble",
    "emsvit",
    "ensemble",
    "hardnet_bts",
    "hierarchical_global_modality_interaction",
    "maab_unet",
    "modality_ablation_unet",
    "modified_unet_horizontal",
    "nnsegnet",
    "nnunet_region_loss_ensemble",
    "resunet3d_pei",
    "swin_unetr",
)  # have a page, but no file of their own in conf/model
PAGES = [page for page in sorted((ROOT / "docs" / "methods").glob("*.md")) if page.stem != "index"]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def sections(page: Path) -> dict[str, str]:
    """Level-2 heading -> what stands below it; what comes before the first one under the empty heading. Fenced code holds no heading."""
    found, heading, fenced = {"": ""}, "", False
    for line in page.read_text().splitlines(keepends=True):
        fenced ^= line.startswith("```")
        if not fenced and (match := re.match(r"## (.+)$", line)):
            heading = match[1]
            assert heading not in found, f"{page.name}: two sections {heading}"
            found[heading] = ""
        else:
            found[heading] += line
    return found


def section(page: Path, heading: str) -> str:
    """One section."""
    return sections(page).get(heading, "")


def table(text: str, header: list[str]) -> list[list[str]]:
    """Rows of all tables with this header; a | inside of backticks or behind a backslash parts no cells."""
    rows, inside = [], False
    for line in text.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|(?=(?:[^`]*`[^`]*`)*[^`]*$)", line.strip())[1:-1]]
        if not line.startswith("|"):
            inside = False
        elif cells == header:
            inside = True
        elif inside and not all(set(cell) <= set("-:") for cell in cells):
            rows.append(cells)
    return rows


@cache
def configuration(*arguments: str) -> DictConfig:
    """The composed configuration with Hydra's own."""
    return composed(*arguments, hydra=True)


def composed_by(page: Path) -> Iterator[DictConfig]:
    """What the commands of a page's section Run compose, in their order."""
    return (configuration(*overrides(call)) for call in called(section(page, "Run")))


@each_page
def test_sweeps_are_not_of_processes_that_repeat_the_command(page):
    """`trainer=ddp` in a sweep is refused, unless SLURM starts the processes."""
    for call in called(section(page, "Run") + section(page, "Results")):
        if {"-m", "--multirun"} & set(call):
            strategy = configuration(*overrides(call)).trainer.get("strategy")
            assert strategy is None or "launcher=submitit_slurm" in call, " ".join(call)


def resolved(name: str) -> Any:
    """What a dotted name of Python means, a module or something in one.

    Raises:
        ImportError, AttributeError: nothing of that name.
    """
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise ImportError(name)


def full_names(text: str) -> list[str]:
    """Dotted names in backticks that begin with a package of the project."""
    return re.findall(rf"`((?:{'|'.join(PACKAGES)})(?:\.[A-Za-z]\w*)+)`", text)


@cache
def defined() -> tuple[set[str], set[str]]:
    """Names of all classes, and of all functions and methods of the project."""
    nodes = [node for package in PACKAGES for file in (ROOT / package).rglob("*.py") for node in ast.walk(ast.parse(file.read_text()))]
    return {n.name for n in nodes if isinstance(n, ast.ClassDef)}, {n.name for n in nodes if isinstance(n, ast.FunctionDef)}


def code_names(text: str) -> list[str]:
    """Names in backticks that are code of the project: a class, or behind a dot also a function (`UMM`, `losses.VAT`, `staple.staple_of`)."""
    classes, functions = defined()
    names = [name.split(".") for name in re.findall(r"`([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)`", text)]
    return [".".join(name) for name in names if name[-1] in classes or (len(name) > 1 and name[-1] in functions)]


def same(told: Any, real: Any) -> bool:
    """Whether a default is what it is said to be; numbers as exactly as three digits can tell."""
    if isinstance(told, float | int) and isinstance(real, float | int) and bool not in (type(told), type(real)):
        return math.isclose(told, real, rel_tol=1e-3)
    if isinstance(told, list) and isinstance(real, list):
        return len(told) == len(real) and all(map(same, told, real))
    if isinstance(told, dict) and isinstance(real, dict):
        return told.keys() == real.keys() and all(same(value, real[name]) for name, value in told.items())
    return type(told) is type(real) and told == real


def default(key: str, cfg: DictConfig) -> Any:
    """The value of a key in a configuration, what is chosen of a group (a key with a slash), or ABSENT."""
    if "/" in key:
        return cfg.hydra.runtime.choices.get(key, ABSENT)
    if key not in keys(OmegaConf.to_container(cfg, resolve=False)):
        return ABSENT
    parent, _, name = key.rpartition(".")
    if OmegaConf.is_missing(OmegaConf.select(cfg, parent), name):
        return "???"
    real = OmegaConf.select(cfg, key)
    return OmegaConf.to_container(real, resolve=True) if OmegaConf.is_config(real) else real


def wrong_option(key: str, told: str, configurations: Iterable[DictConfig]) -> str | None:
    """What is wrong with an option and the default that a page tells; right if it is that in one of the configurations."""
    said = OmegaConf.to_container(OmegaConf.create(f"value: {told}"))["value"]
    found = []
    for cfg in configurations:
        found.append(default(key, cfg))
        if same(said, found[-1]):
            return None
    return f"{key}: {told}, in truth {found}"


def methods() -> list[str]:
    """Files of conf/model that are methods; a preset begins with its method's name (coranet_paper)."""
    names = sorted(f.stem for f in (CONF / "model").glob("*.yaml") if not f.stem.startswith("_"))
    return [name for name in names if not any(name.startswith(f"{other}_") for other in names)]


def test_every_method_has_a_page_and_every_page_a_method():
    assert sorted(page.stem for page in PAGES) == sorted([*methods(), *RECIPES])


@each_page
def test_skeleton(page):
    found = sections(page)
    told = (ROOT / "tests" / "papers" / f"{page.stem}.yaml").exists()
    assert [heading for heading in found if heading] == [heading for heading in HEADINGS if told or heading != "Settings"]
    title, _, sentence = found[""].strip().partition("\n")
    assert re.fullmatch(r"# \S.*", title)
    assert re.fullmatch(r"[^#|`\n-][^\n]*(?:\n[^#|`\n-][^\n]*)*\.", sentence.strip()), "one sentence below the title says what it is"
    assert all(text.strip() for text in found.values())


@each_page
def test_paper_is_cited(page):
    text = section(page, "Paper")
    assert re.search(r"(?:19|20)\d\d", text) or "No paper:" in text, (
        "authors, title, venue, year; or a sentence that begins with `No paper:`"
    )
    assert code_names(text), "the name of the code that implements it, such as `lightning_modules.MeanTeacher`"


@each_page
def test_method_has_equations_and_names_their_code(page):
    assert page.read_text().count("$$") % 2 == 0
    text = section(page, "Method")
    equations = re.findall(r"^\$\$\n(.+?)\n\$\$$", text, flags=re.MULTILINE | re.DOTALL)
    assert equations or "No equation:" in text, "$$ on lines of their own around LaTeX; or a sentence that begins with `No equation:`"
    for equation in equations:
        bare = equation.replace(r"\{", "").replace(r"\}", "")
        assert bare.count("{") == bare.count("}"), equation
        assert equation.count(r"\left") - equation.count(r"\leftarrow") == equation.count(r"\right") - equation.count(r"\rightarrow"), (
            equation
        )
        assert equation.count(r"\begin") == equation.count(r"\end"), equation
        assert not re.search(r"^[-+=>#*]", equation, flags=re.MULTILINE), f"Markdown reads more than a sum in a line of {equation}"
    assert code_names(text), "the name of the code that computes it"


@each_page
def test_code_that_is_named_exists(page):
    wrong = []
    for name in sorted(set(full_names(page.read_text()))):
        try:
            resolved(name)
        except (ImportError, AttributeError) as error:
            wrong.append(f"{name}: {error}")
    assert wrong == []


@each_page
def test_first_command_runs_on_embedded_data(page):
    assert get_class(next(composed_by(page)).data._target_).__module__.startswith("datamodules.simulated.")


@each_page
def test_options_and_defaults_are_real(page):
    """What the model alone has (`model.`, and groups `model/`) by its own defaults; all else as a command of the section Run composes it."""
    rows = table(section(page, "Options"), ["key", "default", "meaning"])
    assert rows or "No options:" in section(page, "Options"), (
        "a table | key | default | meaning |; or a sentence that begins with `No options:`"
    )
    alone = None if page.stem in RECIPES else configuration("benchmark=none", f"model={page.stem}")
    wrong = []
    for cells in rows:
        match = re.fullmatch(r"`([a-z_]+(?:[./@][a-z_0-9]+)*)`", cells[0])
        if len(cells) == 3 and match:
            own = alone and match[1].startswith(("model.", "model/")) and default(match[1], alone) is not ABSENT
            wrong.append(wrong_option(match[1], cells[1].strip("`"), [alone] if own else composed_by(page)))
        else:
            wrong.append(f"{' | '.join(cells)}: one whole key such as `model.decay`, its default, its meaning")
    assert list(filter(None, wrong)) == []


@each_page
def test_departures_are_three_lists(page):
    text = section(page, "Departures")
    lists = re.findall(r"(?:^- .*\n(?:^  .*\n|^\n(?=- ))*)+", f"{text}\n", flags=re.MULTILINE)
    assert len(lists) == 3, "followed, open in the paper, departed from; each a list with - and a line of its own before it"


@each_page
def test_results_are_there_or_said_to_be_missing(page):
    text = section(page, "Results")
    if "Not run:" not in text:
        assert re.search(r"\]\(\.\./results/\w+\.csv\)", text), "a link to the committed CSV; or a sentence that begins with `Not run:`"
        assert re.search(r"(?:^|`)python \S", text, flags=re.MULTILINE), "the command beside the table"
    for name in re.findall(r"\]\((\.\./results/[^)]+)\)", text):
        assert (page.parent / name).is_file(), name


def test_the_rules_see_what_is_wrong(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A\n\nB.\n\n## Run\n\n```bash\n## no heading\n```\n\n| key | default | meaning |\n|---|---|---|\n| `a` | `x|y` | z |\n"
    )
    assert list(sections(page)) == ["", "Run"]
    assert blocks(page, "bash") == ["## no heading\n"]
    assert table(section(page, "Run"), ["key", "default", "meaning"]) == [["`a`", "`x|y`", "z"]]
    text = "`lightning_modules.losses.VAT`, `losses.VAT`, `staple.staple`, `staple`, `lightning_modules/base.py`, `model.decay`, `VAT()`"
    assert full_names(text) == ["lightning_modules.losses.VAT"]
    assert code_names(text) == ["lightning_modules.losses.VAT", "losses.VAT", "staple.staple"]
    assert resolved("lightning_modules.losses.vat.VAT.forward").__name__ == "forward"
    for name in ("lightning_modules.losses.vat.NAT", "lightning_modules.lost.VAT"):
        with pytest.raises((ImportError, AttributeError)):
            resolved(name)
    cfg = configuration("benchmark=none", "model=mean_teacher")
    right = {
        "model.decay": "0.99",
        "model/ramp": "gaussian",
        "model.ema_warmup": "true",
        "model.predict_with": "null",
        "model.weights": "{consistency: 1.0}",
    }
    assert [wrong_option(*option, [cfg]) for option in right.items()] == [None] * 5
    false = {
        "model.decay": "0.9",
        "model/ramp": "linear",
        "model.ema_warmup": "1",
        "model.predict_with": "teacher",
        "model.rate": "1",
        "model/gate": "uamt",
    }
    assert None not in [wrong_option(*option, [cfg]) for option in false.items()]
    assert not same({"a": 1}, {"a": 1, "b": 2})
    assert not same([1, 2], [1])
    assert same([0.005, 2 / 3], [5e-3, 0.6667])
