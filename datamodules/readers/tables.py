"""Tables that come with a data set: CSV files as spreadsheets write them, and what a cell holds."""

import csv
import json
import re
from pathlib import Path
from typing import Any

from lesionbench.errors import SuiteError

ABSENT = ("", "na", "nan", "n/a")
"""What a cell without a value holds, in lower case."""

_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")
_MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16", b"\xef\xbb\xbf": "utf-8-sig"}


def read_table(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file, without white space around names and values; cells beyond the header are left out.

    UTF-8, or UTF-16 with its mark as spreadsheets save it; separated by commas, or by semicolons or tabs where the header has no comma.

    Raises:
        SuiteError: another encoding, named with its line; a table without a header.
    """
    text = _text(path)
    header = text.partition("\n")[0]
    delimiter = next((d for d in (",", ";", "\t") if d in header), ",")
    if not header.strip():
        raise SuiteError(f"{path}: no header; the first line names the columns")
    rows = csv.DictReader(text.splitlines(keepends=True), delimiter=delimiter)
    return [{k.strip(): (v or "").strip() for k, v in row.items() if k} for row in rows]


def read_json(path: Path) -> Any:
    """The contents of a JSON file.

    Raises:
        SuiteError: another encoding, or no JSON.
    """
    try:
        return json.loads(_text(path))
    except ValueError as error:
        raise SuiteError(f"{path}: not valid JSON ({error})") from None


def parsed(value: Any) -> Any:
    """The number that a text is (`12`, `-0.5`, `1e-3`), else the text as it is (`1_5`, `infinity`, `12 months`)."""
    if not isinstance(value, str) or not _NUMBER.fullmatch(value):
        return value
    return int(value) if re.fullmatch(r"[+-]?\d+", value) else float(value)


def _text(path: Path) -> str:
    data = path.read_bytes()
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SuiteError(f"{path}, line {line}: byte {data[error.start]:#04x} is not UTF-8; save the table as UTF-8") from None
