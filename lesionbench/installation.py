"""Where this copy of the program lies and how it was started: a clone is run by `python run.py`, an installed wheel by `lesionbench`."""

import sys
from pathlib import Path

_PACKAGE = Path(__file__).parent

CLONE = None if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent
"""The top of the clone; None for a wheel, which has the configurations inside the package."""

CONF = _PACKAGE / "conf" if CLONE is None else CLONE / "conf"
"""The configurations of the suite."""


def command() -> str:
    """How the user calls the program, for the commands that are printed."""
    return "lesionbench" if Path(sys.argv[0]).stem == "lesionbench" else "python run.py"


def install(extra: str) -> str:
    """The command that adds an optional part of the suite, an extra of pyproject.toml."""
    return f"pip install 'lesionbench[{extra}]'" if CLONE is None else f"pip install -e '.[{extra}]'"
