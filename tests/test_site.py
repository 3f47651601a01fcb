"""The documentation as a site: every page is reachable, links fit both places, formulas are LaTeX, the reference names what exists."""

import importlib
import importlib.util
import posixpath
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
NAV = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]


@pytest.fixture(scope="module")
def hooks():
    """docs/theme/hooks.py as MkDocs loads it."""
    spec = importlib.util.spec_from_file_location("site_hooks", DOCS / "theme" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def pages(hooks) -> set[str]:
    """Every page of the site."""
    return {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} | set(hooks.PAPERS) | set(hooks.reference())


def test_every_page_is_reachable_once(hooks, pages):
    named = list(hooks.leaves(hooks.expanded(NAV, pages)))
    assert sorted(named) == sorted(pages)


def test_a_new_page_needs_no_entry(hooks, pages):
    new = {"methods/mean_teacher.md", "methods/nobodys.md", "modality.md"}
    nav = {title: entries for section in hooks.expanded(NAV, pages | new) for title, entries in section.items()}
    families = {title: found for entry in nav["Methods"] if isinstance(entry, dict) for title, found in entry.items()}
    assert "methods/mean_teacher.md" in families["Semi-supervised"]
    assert "methods/nobodys.md" in families["Recipes"]
    assert "modality.md" in nav["Methods"]


def test_families_of_the_navigation_are_folders(hooks):
    assert [name for name in hooks.FAMILIES if not (ROOT / "lightning_modules" / name).is_dir()] == []
    assert hooks.by_family(["methods/modality_pairing.md"]) == [{"Supervised": ["methods/modality_pairing.md"]}]  # a loss has that name too


@pytest.mark.parametrize(
    ("source", "page", "text", "expected"),
    [
        ("README.md", "index.md", "[a](docs/data.md#brats) ![b](docs/images/x.png)", "[a](data.md#brats) ![b](images/x.png)"),
        (
            "README.md",
            "index.md",
            "[a](LICENSE) [b](https://x.org/docs/y) [c](#layout)",
            "[a](LICENSE) [b](https://x.org/docs/y) [c](#layout)",
        ),
        ("docs/methods/umm.md", "methods/umm.md", "[a](../../benchmarks/README.md#x)", "[a](../benchmarks.md#x)"),
        ("docs/methods/umm.md", "methods/umm.md", "[a](../data.md) [b](spin.md)", "[a](../data.md) [b](spin.md)"),
        ("docs/data.md", "data.md", "[a](../CONTRIBUTING.md)", "[a](contributing.md)"),
        ("benchmarks/README.md", "benchmarks.md", "[a](../docs/metrics.md)", "[a](metrics.md)"),
        ("README.md", "index.md", "```\n[a](docs/data.md)\n```\n[a](docs/data.md)", "```\n[a](docs/data.md)\n```\n[a](data.md)"),
    ],
)
def test_links_are_those_of_the_site(hooks, source, page, text, expected):
    assert hooks.rebased(text, source, page) == expected


def test_links_of_all_pages_lead_to_what_the_site_has(hooks, pages):
    sources = {path.relative_to(ROOT).as_posix(): path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    there = pages | set(hooks.COPIES) | {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*") if path.is_file()}
    lost = []
    for source, page in {**sources, **{file: page for page, file in hooks.PAPERS.items()}}.items():
        for target in re.findall(
            r"\]\(([^)\s#]+)", re.sub(r"```.*?```", "", hooks.rebased((ROOT / source).read_text(), source, page), flags=re.S)
        ):
            if ":" not in target and posixpath.normpath(posixpath.join(posixpath.dirname(page), target)) not in there:
                lost.append(f"{source}: {target}")
    assert lost == []


def test_the_reference_names_what_exists(hooks):
    for package in (*hooks.OBJECTS, "lightning_modules.losses", "lightning_modules.metrics", "callbacks"):
        module = importlib.import_module(package)
        found = hooks.public(package)
        assert set(found) == set(module.__all__)
        assert [name for name, home in found.items() if getattr(module, name) is not getattr(importlib.import_module(home), name)] == []
    networks = hooks.public("lightning_modules.networks")  # those of MONAI are loaded lazily
    assert set(networks) == set(importlib.import_module("lightning_modules.networks").__all__)
    objects = re.findall(r"^::: (\S+)", "".join(hooks.reference().values()), flags=re.MULTILINE)
    assert len(objects) == len(set(objects)) > 80
    for name in objects:
        assert any((ROOT / f"{place.replace('.', '/')}.py").is_file() for place in (name, name.rpartition(".")[0])), name


def test_formulas_are_latex(hooks):
    convert = pytest.importorskip("math_core").LatexToMathML().convert_with_local_state
    wrong = []
    for page in DOCS.rglob("*.md"):
        text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        blocks = re.findall(r"\$\$(.+?)\$\$", text, flags=re.DOTALL)
        inline = re.findall(r"(?<![\\$\w])\$([^$\n]+)\$(?!\w)", re.sub(r"\$\$.+?\$\$", "", text, flags=re.DOTALL))
        for formula in [*blocks, *inline]:
            try:
                convert(formula.strip(), displaystyle=True)
            except Exception as error:
                wrong.append(f"{page.name}: {formula}: {error}")
    assert wrong == []


def test_formulas_become_mathml(hooks):
    pytest.importorskip("math_core")
    found = hooks.with_formulas(
        r'<p>the loss <span class="arithmatex">\(a &lt; \frac{1}{2}\)</span></p><div class="arithmatex">\[\sum_i x_i\]</div>'
    )
    assert "arithmatex" not in found
    assert found.count("<math") == 2
    assert 'display="block"' in found
    assert "<mfrac>" in found
    for broken in (r'<span class="arithmatex">\(\frac{1}\)</span>', "<p>$$x$$</p>"):
        with pytest.raises(ValueError, match=r"frac|empty lines"):
            hooks.with_formulas(broken)
    assert hooks.with_formulas("<pre>echo $$</pre>") == "<pre>echo $$</pre>"


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    command = [Path(sys.executable).parent / "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    assert (tmp_path / "site" / "reference" / "losses" / "index.html").is_file()
    assert not list((tmp_path / "site").rglob("*.py*"))
    shutil.rmtree(tmp_path / "site")
