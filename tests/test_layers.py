"""The floors of the house: the contracts hold, each of them fails on an import that it forbids, and no string hides one."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("lesionbench", "lightning_modules", "datamodules", "callbacks", "hydra_plugins")
LINT = Path(sys.executable).parent / "lint-imports"

GROUND_FLOOR = {  # module -> an import that its floor forbids
    "lesionbench.case": "lesionbench.reports.runs",
    "lesionbench.task": "lesionbench.jobs.console",
    "lesionbench.keyed": "lightning_modules.ramps",
    "lesionbench.voxels": "datamodules.split",
    "lesionbench.views": "callbacks.gather",
}
FLOORS = {
    "lesionbench.reports.statistics": "lightning_modules.ramps",
    "lesionbench.reports.sheets": "lesionbench.jobs.console",
    "lightning_modules.ramps": "datamodules.split",
    "lightning_modules.supervised.supervised": "lesionbench.jobs.console",
    "datamodules.sampling": "lightning_modules.schedules",
    "datamodules.split": "callbacks.gather",
    "callbacks.gather": "lesionbench.jobs.console",
    "lesionbench.jobs.console": "hydra_plugins.lesionbench_optuna.optuna_search",
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The packages and the contracts, to be spoiled."""
    folder = tmp_path_factory.mktemp("house")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def lint(folder: Path) -> str:
    """What lint-imports says, as `make lint` calls it."""
    return subprocess.run([LINT, "--no-cache"], cwd=folder, capture_output=True, text=True, timeout=60).stdout


def test_the_contracts_hold(copy):
    assert "2 kept, 0 broken" in lint(copy)


@pytest.mark.parametrize("forbidden", [GROUND_FLOOR, FLOORS], ids=["ground floor", "floors"])
def test_an_import_of_a_floor_above_breaks_a_contract(copy, forbidden):
    files = {copy / f"{module.replace('.', '/')}.py": above for module, above in forbidden.items()}
    sound = {file: file.read_text() for file in files}
    try:
        for file, above in files.items():
            file.write_text(f"{sound[file]}\n\ndef inside():\n    import {above}\n")
        said = " ".join(lint(copy).split())  # lines are folded
    finally:
        for file, text in sound.items():
            file.write_text(text)
    assert [f"{module} -> {above}" for module, above in forbidden.items() if f"{module} -> {above} (l." not in said] == []


def test_no_module_is_named_by_a_string_instead_of_imported():
    hidden = re.compile(r"(?:get_class|get_method|get_object|import_module)\(\s*f?[\"']|_target_[\"']\s*:\s*[\"']")
    found = [f"{p.relative_to(ROOT)}: {hit}" for p in (ROOT / "lesionbench").rglob("*.py") for hit in hidden.findall(p.read_text())]
    assert found == []


def test_lint_checks_the_contracts():
    assert re.search(r"^lint:.*\n(?:\t.*\n)*\t\S*lint-imports\b", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
