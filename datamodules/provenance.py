"""What a derived file was made from, told by content: dates of files come from archives and copies, and say nothing about which is newer."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

SMALL = 256 * 1024  # bytes; the content of such a file is compared even where nothing else has changed

Stamps = dict[str, dict[str, Any] | None]


def stamps(sources: Iterable[Path | str]) -> Stamps:
    """Path of every source -> where links lead, size, dates (of the content, and of the last change of any kind; ns), a digest of the file
    and one of its content, which does not depend on how it is compressed; None for one that is missing."""
    return {os.path.abspath(source): _stamp(source, digest=True) for source in sources}


def current(recorded: Mapping[str, Any], sources: Iterable[Path | str]) -> Stamps | None:
    """Today's stamps if the sources are those that were recorded, with the same contents, wherever they were copied to under these paths;
    None if a source differs, is missing or is new.

    A large file whose place, size and dates are as recorded is not read: no program can set the date of the last change.
    """
    found: Stamps = {}
    for source in sources:
        path = os.path.abspath(source)
        before, now = recorded.get(path), _stamp(source, digest=False)
        if now is None or not isinstance(before, Mapping) or before.get("size") != now["size"]:
            return None
        if now["size"] <= SMALL or any(before.get(k) != v for k, v in now.items()):
            now = _stamp(source, digest=True)
            if now is None or before.get("digest") != now["digest"]:
                return None
        else:
            now = {**before, **now}
        found[path] = now
    return found if len(found) == len(recorded) else None


def derive(targets: Sequence[Path], sources: Sequence[Path], make: Callable[[], object]) -> None:
    """Calls `make`, which writes `targets`, unless they are there and were made from just these sources with just these contents.

    What they were made from is kept beside the first target, as `.<name>.json`.
    """
    record = targets[0].with_name(f".{targets[0].name}.json")
    before = _read(record)
    if before is not None and all(target.exists() for target in targets):
        now = current(before, sources)
        if now is not None:
            if now != before:
                _write(record, now)
            return
    now = stamps(sources)  # before they are read: one that changes meanwhile is found out of date the next time
    make()
    _write(record, now)


def _stamp(source: Path | str, digest: bool) -> dict[str, Any] | None:
    try:
        status = os.stat(source)
        stamp: dict[str, Any] = {
            "path": os.path.realpath(source), "size": status.st_size, "modified": status.st_mtime_ns, "changed": status.st_ctime_ns,
        }  # fmt: skip
        if digest:
            with open(source, "rb") as file:
                stamp["digest"] = stamp["content"] = _digest(file)
                if str(source).endswith(".gz") and status.st_size > 18:  # a gzip file ends with checksum and size of what it holds
                    file.seek(-8, os.SEEK_END)
                    stamp["content"] = file.read().hex()
    except FileNotFoundError:
        return None
    return stamp


def _digest(file: Any) -> str:
    found = hashlib.blake2b(digest_size=16)
    while block := file.read(1 << 20):
        found.update(block)
    return found.hexdigest()


def _read(record: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(record.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _write(record: Path, content: Stamps) -> None:
    """In one step: another process may read it."""
    temporary = record.with_name(f"{record.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content))
    temporary.replace(record)
