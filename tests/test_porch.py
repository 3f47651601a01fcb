"""What a contributor meets first agrees with what the project does: CONTRIBUTING, CHANGELOG, the workflow, pre-commit, templates."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
MAKEFILE = (ROOT / "Makefile").read_text()
PYPROJECT = (ROOT / "pyproject.toml").read_text()
TARGETS = set(re.findall(r"^(\w+):", MAKEFILE, flags=re.MULTILINE))
PAPERS = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


def recipe(target: str) -> str:
    """The commands of a make target."""
    return re.search(rf"^{target}:.*\n((?:\t.*\n)+)", MAKEFILE, flags=re.MULTILINE)[1]


@pytest.mark.parametrize("paper", PAPERS, ids=lambda path: path.name)
def test_links_and_paths_lead_somewhere(paper):
    text = paper.read_text()
    links = [target.partition("#")[0] for target in re.findall(r"\]\(([^)]+)\)", text) if not target.startswith("http")]
    paths = re.findall(
        r"`((?:lesionbench|lightning_modules|datamodules|callbacks|conf|docs|tests|benchmarks|\.ci|\.github)/[\w/.]*)`", text
    )
    assert [name for name in {*links, *paths} if not (ROOT / name).exists()] == []


def test_commands_of_contributing_exist():
    text = PAPERS[0].read_text()
    assert set(re.findall(r"(?:^|`)make (\w+)", text, flags=re.MULTILINE)) <= TARGETS
    assert {"test", "lint", "docs"} <= set(re.findall(r"^make (\w+)", text, flags=re.MULTILINE))


def test_changelog_names_the_version():
    versions = re.findall(r"^## (\S+)", PAPERS[1].read_text(), flags=re.MULTILINE)
    assert versions[0] == "Unreleased"
    assert versions[1] == re.search(r'^version = "(.+)"', PYPROJECT, flags=re.MULTILINE)[1]
    kinds = set(re.findall(r"^### (\w+)", PAPERS[1].read_text(), flags=re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_workflow_calls_what_a_contributor_calls():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    commands = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in workflow["jobs"].items()}
    assert commands == {"test": ["make test", "make lint"], "docs": ["make docs"]}
    oldest = re.search(r'^requires-python = ">=(.+)"', PYPROJECT, flags=re.MULTILINE)[1]
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"][0] == oldest
    assert re.findall(r"^make .*$", (ROOT / ".ci/run").read_text(), flags=re.MULTILINE) == commands["test"]


def test_pre_commit_runs_the_tools_of_lint():
    hooks = [hook for repository in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"] for hook in repository["hooks"]]
    tools = {hook["entry"].removeprefix(".venv/bin/").split(" --")[0] for hook in hooks if hook["language"] == "system"}
    assert tools == {tool.split(" --")[0].removesuffix(" .") for tool in re.findall(r"\t\$\(BIN\)/(.*)", recipe("lint"))}


def test_forms_of_issues():
    forms = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
    assert [form.stem for form in forms] == ["bug", "config", "data_set", "method"]
    for form in forms:
        read = yaml.safe_load(form.read_text())
        if form.stem == "config":
            continue
        assert {"name", "description", "body"} <= set(read)
        names = [field["id"] for field in read["body"]]
        assert len(set(names)) == len(names)
        for field in read["body"]:
            assert field["type"] in {"input", "textarea", "checkboxes", "dropdown", "markdown"}
            assert field["attributes"]["label"]
