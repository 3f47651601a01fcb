"""Changes every setting that `tests/papers` holds a value of, once, on the command line, and lists the changes that its check does not notice.

    python benchmarks/changed_settings.py [METHOD ...]

A number is multiplied by ten, a zero becomes one, a truth its contrary, a name or a list something else; a choice of a group is left out, since
another choice has other keys. The last line counts. Nothing is written.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from tests.claims import FILES, configuration, differences, entries, read, words


def changed(value: Any) -> str | None:
    """The value's opposite as a word of the command line; None where there is none."""
    if isinstance(value, bool):
        return str(not value).lower()
    if isinstance(value, int | float):
        return str(value * 10 or 1)
    if value is None:
        return "7"
    if isinstance(value, list) and value:
        first = changed(value[0])
        return None if first is None else f"[{','.join([first] * len(value))}]"
    return None if isinstance(value, dict | list) else "something_else"


def main() -> None:
    """Prints the survivors."""
    tried = survivors = 0
    for file in FILES:
        if sys.argv[1:] and file.stem not in sys.argv[1:]:
            continue
        claims = read(file)
        for kind, entry in entries(claims):
            for key, value in entry.get("is", {}).items():
                other = changed(value)
                if "/" in key or "[" in key or other is None:
                    continue
                own = {
                    "experiment": " ".join(words(claims, entry)),
                    kind: [{name: v for name, v in entry.items() if name not in ("experiment", "with")}],
                }
                try:
                    missed = not differences(own, [f"++{key}={other}"])
                except (HydraException, OmegaConfBaseException, ValueError) as error:
                    print(f"{file.stem}: {key}={other} cannot be composed ({str(error).splitlines()[0]})", file=sys.stderr)
                    continue
                tried, survivors = tried + 1, survivors + missed
                if missed:
                    print(f"{file.stem}, {entry['what']}: {key}={other} is not noticed")
                configuration.cache_clear()
    print(f"{tried} settings changed, {survivors} not noticed")


if __name__ == "__main__":
    main()
