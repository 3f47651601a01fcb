"""How much of the experiment files stands in another one too.

    python benchmarks/config_repetition.py [<commit> ...]     the files of commits, and those that are here

A line counts unless it is blank or a comment; a comment at its end and the amount of white space in it do not matter. It is repeated where
another file has the same line. Lines of the defaults list count like all others.
"""

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
GROUPS = {"experiments": ["experiment"], "experiments, benchmarks and settings": ["experiment", "benchmark", "settings"]}


def lines(text: str) -> list[str]:
    """The lines of a file that count, with single spaces."""
    bare = (re.sub(r"(^|\s)#.*", "", line) for line in text.splitlines())
    return [" ".join(line.split()) for line in bare if line.strip()]


def repetition(texts: Iterable[str]) -> tuple[int, int, int]:
    """Files, lines, and lines that stand in another file too."""
    files = [lines(text) for text in texts]
    found = Counter(line for file in files for line in set(file))
    every = [line for file in files for line in file]
    return len(files), len(every), sum(found[line] > 1 for line in every)


def here(groups: Iterable[str]) -> dict[str, str]:
    """The configuration files of these groups: path -> text."""
    paths = sorted(path for group in groups for path in (ROOT / "conf" / group).rglob("*.yaml"))
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in paths}


def at(commit: str, groups: Iterable[str]) -> dict[str, str]:
    """The same in a commit."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True).stdout

    names = git("ls-tree", "-r", "--name-only", commit, *(f"conf/{group}" for group in groups)).split()
    return {name: git("show", f"{commit}:{name}") for name in names}


def report(title: str, files: Mapping[str, str]) -> None:
    """Prints one line."""
    count, total, repeated = repetition(files.values())
    print(f"{title}: {count} files, {total} lines, {repeated} of them in another file too ({repeated / max(total, 1):.1%})")


if __name__ == "__main__":
    for title, groups in GROUPS.items():
        for commit in sys.argv[1:]:
            report(f"{title}, {commit}", at(commit, groups))
        report(f"{title}, here", here(groups))
