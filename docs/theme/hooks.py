"""What the site adds to the pages: the papers at the top of the repository, a reference from the docstrings, formulas, and folders in the navigation.

MkDocs calls the functions that begin with `on_`; nothing here imports the suite.
"""

import ast
import html
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

# page of the site -> file of the repository that it shows
PAPERS = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "benchmarks.md": "benchmarks/README.md",
}
# what pages link to as it is
COPIES = ("LICENSE", "CITATION.cff", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tests" / "papers").glob("*.yaml")))

# page of the reference -> title and package whose public names it documents
PACKAGES = {
    "networks": ("Networks", "lightning_modules.networks"),
    "losses": ("Losses", "lightning_modules.losses"),
    "metrics": ("Metrics", "lightning_modules.metrics"),
    "callbacks": ("Callbacks", "callbacks"),
}
# page of the reference -> title and single modules, whole
MODULES = {
    "inferers": ("Inferers", ["lightning_modules.inferers"]),
    "language": (
        "Tasks, cases, predictions",
        [f"lesionbench.{name}" for name in ("task", "case", "target", "prediction", "geometry", "checkpoint", "errors")],
    ),
    "comparison": ("Comparison of runs", ["lesionbench.reports.comparison", "lesionbench.reports.statistics"]),
}
OBJECTS = {"lightning_modules": "Methods", "datamodules": "Data sets"}

# families of methods, folders of lightning_modules/, in the order and by the titles of the navigation; one that is not listed follows by its name
FAMILIES = {
    "supervised": "Supervised",
    "semi_supervised": "Semi-supervised",
    "anomaly": "Anomaly",
    "raters": "Several raters",
    "habitats": "Habitats and survival",
    "evaluation": "Evaluation",
}
NO_FAMILIES = ("networks", "losses", "metrics")
RECIPES = "Recipes"


# --- navigation ------------------------------------------------------------------------------------------------------------------


def expanded(nav: list[Any], pages: set[str]) -> list[Any]:
    """The navigation with `folder/*` replaced by the pages of that folder that are named nowhere else; those of methods by family."""
    named = {entry for entry in leaves(nav) if not entry.endswith("*")}

    def inside(entry: Any) -> list[Any]:
        if isinstance(entry, dict):
            return [
                {title: [found for e in child for found in inside(e)] if isinstance(child, list) else child}
                for title, child in entry.items()
            ]
        if not entry.endswith("*"):
            return [entry]
        found = sorted(page for page in pages - named if posixpath.dirname(page) == posixpath.dirname(entry))
        return by_family(found) if entry == "methods/*" else found

    return [found for entry in nav for found in inside(entry)]


def by_family(pages: list[str]) -> list[dict[str, list[str]]]:
    """Pages of methods under the families whose folder has a module of that name; a method without one is a recipe made of others."""
    modules = {path.stem: path.parent.name for path in (ROOT / "lightning_modules").glob("*/*.py") if path.parent.name not in NO_FAMILIES}
    families: dict[str, list[str]] = {title: [] for title in FAMILIES.values()}
    recipes = []
    for page in pages:
        family = modules.get(posixpath.basename(page).removesuffix(".md"))
        title = FAMILIES.get(family or "", (family or "").replace("_", " ").capitalize())
        (families.setdefault(title, []) if title else recipes).append(page)
    return [{title: found} for title, found in {**families, RECIPES: recipes}.items() if found]


def leaves(nav: list[Any]) -> Iterator[str]:
    """Every page that a navigation names."""
    for entry in nav:
        if isinstance(entry, str):
            yield entry
        else:
            for child in entry.values():
                yield from leaves(child if isinstance(child, list) else [child])


# --- reference -------------------------------------------------------------------------------------------------------------------


def public(package: str) -> dict[str, str]:
    """Public names of a package (its `__all__`) and the modules that define them, read from its `__init__.py`."""
    tree = ast.parse((ROOT / package.replace(".", "/") / "__init__.py").read_text())
    constants = {n.targets[0].id: n.value for n in tree.body if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name)}

    def strings(node: ast.expr) -> list[str]:
        if isinstance(node, ast.Constant):
            return [str(node.value)]
        if isinstance(node, ast.Starred):
            return strings(node.value)
        if isinstance(node, ast.Name):
            return strings(constants[node.id])
        if isinstance(node, ast.Dict):
            return [name for key in node.keys if key for name in strings(key)]
        return [name for element in node.elts for name in strings(element)]  # a list or a tuple

    homes = {alias.asname or alias.name: node.module for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    lazy = [name for name in strings(constants["__all__"]) if name not in homes]
    return {**{name: homes[name] for name in strings(constants["__all__"]) if name in homes}, **_defined_in(package, lazy)}


def _defined_in(package: str, names: list[str]) -> dict[str, str]:
    """The modules of a package that define these names at their top level."""
    found = {}
    for path in sorted((ROOT / package.replace(".", "/")).rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in names:
                found.setdefault(node.name, module)
    return found


def reference() -> dict[str, str]:
    """Pages of the reference, as Markdown: name of the file -> text."""
    pages = {}
    for root, title in OBJECTS.items():
        families: dict[str, list[str]] = {}
        for name, module in public(root).items():
            family = module.split(".")[1] if module.count(".") > 1 else ""
            families.setdefault(family, []).append(f"{module}.{name}")
        for family, names in families.items():
            page = title.lower().replace(" ", "_")
            heading = f"{title}: {FAMILIES.get(family, family.replace('_', ' ')).lower()}" if family else title
            pages[f"reference/{page}{'_' if family else ''}{family}.md"] = _page(heading, names)
    for page, (title, package) in PACKAGES.items():
        pages[f"reference/{page}.md"] = _page(title, [f"{module}.{name}" for name, module in public(package).items()])
    for page, (title, modules) in MODULES.items():
        pages[f"reference/{page}.md"] = _page(title, modules)
    return pages


def _page(title: str, objects: list[str]) -> str:
    return f"# {title}\n\n" + "".join(f"::: {name}\n\n" for name in objects)


# --- MkDocs ----------------------------------------------------------------------------------------------------------------------


def on_files(files: Any, config: Any) -> Any:
    """Adds the papers and the reference."""
    from mkdocs.structure.files import File

    made = {**{page: rebased((ROOT / source).read_text(), source, page) for page, source in PAPERS.items()}, **reference()}
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    for name in COPIES:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    config.nav = expanded(config.nav, {file.src_uri for file in files.documentation_pages()})
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links that leave docs/ lead to the papers, where those are pages."""
    return markdown if page.file.src_uri in PAPERS else rebased(markdown, f"docs/{page.file.src_uri}", page.file.src_uri)


def rebased(text: str, source: str, page: str) -> str:
    """The links of `source`, a file of the repository, as `page` of the site needs them."""
    places = {file: shown for shown, file in PAPERS.items()}

    def link(match: re.Match[str]) -> str:
        target, hash_, anchor = match[1].partition("#")
        if not target or ":" in target:
            return match[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        shown = places.get(file) or (file if file in COPIES else file.removeprefix("docs/"))
        return f"]({posixpath.relpath(shown, posixpath.dirname(page) or '.')}{hash_}{anchor})"

    parts = re.split(r"(^```.*?^```)", text, flags=re.MULTILINE | re.DOTALL)  # code stays as it is
    return "".join(part if part.startswith("```") else re.sub(r"\]\(([^)\s]+)\)", link, part) for part in parts)


def on_page_content(content: str, page: Any, config: Any, files: Any) -> str:
    """Formulas become MathML, which browsers show without a script."""
    import logging

    try:
        content = with_formulas(content)
    except ValueError as error:
        logging.getLogger("mkdocs.hooks").warning("%s: %s", page.file.src_uri, error)
    return content


def with_formulas(content: str) -> str:
    r"""HTML with every formula of arithmatex, \(...\) or \[...\], as MathML.

    Raises:
        ValueError: a formula that is not LaTeX.
    """
    from math_core import LatexError, LatexToMathML

    converter = LatexToMathML(annotation=True)

    def formula(match: re.Match[str]) -> str:
        latex = html.unescape(match[2])
        try:
            return converter.convert_with_local_state(latex.strip(), displaystyle=match[1] == "div")
        except LatexError as error:
            raise ValueError(f"{latex}: {error}") from None

    found = re.sub(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', formula, content, flags=re.DOTALL)
    text = re.sub(r"<(code|pre|math)\b.*?</\1>", "", found, flags=re.DOTALL)
    if "$$" in text:
        raise ValueError("a formula $$...$$ needs empty lines around it")
    return found
