"""Files and folders that are made aside and appear at their place once they are complete.

What is being made is called `.writing-<host>-<pid>-<token>-<name>` and lies beside its place. A reader never sees half of it, an error takes
it away, and what a killed process left can be told from what a living one is at.
"""

import errno
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from lesionbench.errors import SuiteError
from lesionbench.keyed import key

STALE_SECONDS = 3600  # after which what another host was at counts as left behind
FULL = (errno.ENOSPC, errno.EDQUOT)
_IN_WORDS = (" requested and ", "PytorchStreamWriter", "inline_container")  # np.save; torch.save, which may fail twice
_OF_SQLITE = "database or disk is full"
_PREFIX = ".writing-"
_tidied: set[Path] = set()  # folders that this process has written to


def aside(path: Path) -> Path:
    """Where `path` is made, a name that no other call gets; nothing is created."""
    return path.with_name(f"{prefix()}{secrets.token_hex(4)}-{path.name}")


def prefix() -> str:
    """How the names of what this process is at begin."""
    return f"{_PREFIX}{_host()}-{os.getpid()}-"


@contextmanager
def whole(path: Path | str) -> Iterator[Path]:
    """A path to write a file to, which takes the place of `path` when the block ends; after an error the old file is still there.

    The first time that a process writes to a folder, what killed ones left there goes (see `clear`).

    Raises:
        SuiteError: the disk is full; names folder and file, what was written and what is free.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.parent not in _tidied:
        _tidied.add(path.parent)
        clear(path.parent)
    temporary = aside(path)
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException as error:
        written = temporary.stat().st_size if temporary.exists() else 0
        free = shutil.disk_usage(path.parent).free + written  # before it goes: a program that still has it open keeps its room for a while
        temporary.unlink(missing_ok=True)
        if is_full(error):
            raise full(path, written, free) from error
        raise


def is_full(error: BaseException) -> bool:
    """Whether an error says that the disk or the quota is exhausted; NumPy, torch and SQLite say so in words of their own."""
    cause: BaseException | None = error
    while cause is not None:  # SQLAlchemy and Optuna wrap it
        if _OF_SQLITE in str(cause):
            return True
        cause = cause.__cause__
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in FULL
    return isinstance(error, OSError | RuntimeError) and any(words in str(error) for words in _IN_WORDS)


def full(path: Path, written: int, free: int) -> SuiteError:
    """The error for a file that found no more room after so many bytes."""
    return SuiteError(
        f"{path.parent}: no space left for {path.name}, which needs more than {size(written)}; {size(free)} are free. "
        "What was complete is kept: make room, and the same command with resume=true goes on. Other places are set by runs=, out= and data.cache=<folder>"
    )


@contextmanager
def locked(path: Path, refusal: str) -> Iterator[TextIO]:
    """Only one process at a time is inside for a lock file; the lock goes with the process, however it ends, and those it forks do not have it.

    Yields the file, open to append. Inside, no other file object of the process may be opened on it: closing that would end the lock.

    Raises:
        SuiteError: another process is inside; says `refusal`.
    """
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # which of them is up to the system
            raise SuiteError(refusal) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):  # file systems that know no locks
                raise
        yield file


def clear(folder: Path, below: bool = False) -> None:
    """Removes what writers that are gone left in a folder (`below`: in all folders below it as well), and says so.

    A writer of this host is gone when its process is, one of another host when it has not touched the thing for an hour.
    """
    count = removed = 0
    for path in sorted((folder.rglob if below else folder.glob)(f"{_PREFIX}*")):
        try:
            held = _bytes(path)
            if not _left(path):
                continue
        except FileNotFoundError:  # its writer has just finished, or another process cleared it
            continue
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        count, removed = count + 1, removed + held
    if count:
        print(f"{folder}: removed {count} unfinished file(s) or folder(s) of processes that were killed, {size(removed)}")


def size(count: int) -> str:
    """A number of bytes in words."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _left(path: Path) -> bool:
    host, _, rest = path.name.removeprefix(_PREFIX).partition("-")
    pid = rest.partition("-")[0]
    if host == _host() and pid.isdigit():
        return not _alive(int(pid))
    return time.time() - path.stat().st_mtime > STALE_SECONDS


def _bytes(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.stat().st_size


def _host() -> str:
    return f"{key(socket.gethostname()):x}"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
