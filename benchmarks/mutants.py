"""Breaks the core of every method, one line at a time, and lists the changes that its tests do not notice.

    python benchmarks/mutants.py [METHOD ...] [--list]

`benchmarks/mutants.yaml` holds, for each method, the tests that are run and the changes: a file, a text that stands in it exactly once, and what is put in its place.
Everything happens in a copy in a temporary folder. A change counts as noticed when a test fails; when none does, it is a survivor, and the exit status is 1.
Every change is tried by a child of a process that has the large libraries already, so that it costs what its tests cost. Slow tests are left out.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
LIST = Path(__file__).with_suffix(".yaml")
COPIED = (
    "lesionbench",
    "lightning_modules",
    "datamodules",
    "callbacks",
    "hydra_plugins",
    "conf",
    "tests",
    "benchmarks",
    "docs",
    "run.py",
    "pyproject.toml",
)


@dataclass(frozen=True)
class Mutant:
    """One change.

    Attributes:
        method: name of the method it belongs to.
        tests: arguments of pytest.
        file: that is changed, from the top of the project.
        old: a text that stands in it once.
        new: what takes its place.
    """

    method: str
    tests: tuple[str, ...]
    file: str
    old: str
    new: str

    def applied(self, text: str) -> str:
        """The file's text with the change.

        Raises:
            ValueError: the old text does not stand in it exactly once, or nothing changes.
        """
        if text.count(self.old) != 1 or self.old == self.new:
            raise ValueError(f"{self.method}: {self.old!r} stands {text.count(self.old)} times in {self.file}")
        return text.replace(self.old, self.new)


def mutants(names: list[str] | None = None) -> Iterator[Mutant]:
    """All changes, or those of some methods, in the order of the file."""
    for method, known in yaml.safe_load(LIST.read_text(encoding="utf-8")).items():
        if names and method not in names:
            continue
        for file, changes in known["changes"].items():
            for old, new in changes:
                yield Mutant(method, tuple(known["tests"].split()), file, old, new)


def noticed(mutant: Mutant, copy: Path) -> bool:
    """Whether a test fails in the copy with the change, which is undone."""
    path = copy / mutant.file
    before = path.read_text(encoding="utf-8")
    path.write_text(mutant.applied(before), encoding="utf-8")
    child = os.fork()
    if child == 0:
        status = 2
        try:
            status = _tested(mutant, copy)
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    path.write_text(before, encoding="utf-8")
    if status not in (0, 1):
        print(f"  (the tests ended with {status}: {mutant.file}, {mutant.new!r})", file=sys.stderr)
    return status != 0


def _tested(mutant: Mutant, copy: Path) -> int:
    import pytest

    os.chdir(copy)
    sys.path[:] = [str(copy), *(p for p in sys.path if Path(p or ".").resolve() not in (ROOT, ROOT / "benchmarks"))]
    sys.dont_write_bytecode = True
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore", *mutant.tests]))


def main() -> None:
    """Prints survivors, and a count for each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*")
    parser.add_argument("--list", action="store_true", help="only print the changes")
    arguments = parser.parse_args()
    chosen = list(mutants(arguments.methods))
    if arguments.list:
        for mutant in chosen:
            print(f"{mutant.method}  {mutant.file}: {mutant.old!r} -> {mutant.new!r}")
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import monai.networks.nets  # noqa: F401
    import pytorch_lightning  # noqa: F401
    import torchio  # noqa: F401

    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            source = ROOT / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, copy / name)
        for method in dict.fromkeys(mutant.method for mutant in chosen):
            own = [mutant for mutant in chosen if mutant.method == method]
            start, left = time.monotonic(), [mutant for mutant in own if not noticed(mutant, copy)]
            for mutant in left:
                print(f"  SURVIVES {mutant.file}: {mutant.old!r} -> {mutant.new!r}")
            print(f"{method}: {len(own) - len(left)} of {len(own)} changes noticed ({time.monotonic() - start:.0f} s)", flush=True)
            survivors += len(left)
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
    main()
