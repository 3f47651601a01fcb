"""Files that appear whole: after an error, a kill, on a full disk; and what is cleared away afterwards."""

import errno
import multiprocessing
import os
import shutil
import signal
import sqlite3
import time

import nibabel as nib
import numpy as np
import pytest
import torch

from callbacks.csv_logger import CurvesLogger
from datamodules.simulated.simulation import Simulation, write_folder
from lesionbench import written
from lesionbench.errors import SuiteError
from lesionbench.geometry import write_volume
from lesionbench.maps import MapStore
from lesionbench.results import write_json, write_rows
from lesionbench.written import STALE_SECONDS, aside, clear, full, prefix, whole
from tests.fake_data import write_fake_folder
from tests.harness import SMALL, program, run, run_folders, run_killed


def breaking(path, content: bytes, error: Exception):
    """Writes half of a file and then meets an error."""
    with whole(path) as temporary:
        temporary.write_bytes(content)
        raise error


def test_a_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with whole(path) as temporary:
        temporary.write_text("one")
        assert not path.exists()
        assert temporary.parent == path.parent
        assert temporary.name.endswith("-a.txt")  # writers go by the ending
    assert path.read_text() == "one"
    with pytest.raises(ZeroDivisionError):
        breaking(path, b"two", ZeroDivisionError())
    assert path.read_text() == "one"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]
    assert aside(path) != aside(path)


@pytest.mark.parametrize(
    "error",
    [
        OSError("1000000 requested and 393200 written"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 832 vs 726"),
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("PytorchStreamWriter failed writing file data/0"),
        sqlite3.OperationalError("database or disk is full"),
    ],
    ids=["numpy", "torch at its end", "disk", "quota", "torch", "SQLite"],
)
def test_a_full_disk_is_told_in_one_line_and_keeps_what_was_there(tmp_path, error):
    path = tmp_path / "last.ckpt"
    path.write_text("good")
    message = r"no space left for last\.ckpt, which needs more than 0\.3 MB; .* are free\. .*resume=true"
    with pytest.raises(SuiteError, match=message) as caught:
        breaking(path, bytes(300_000), error)
    assert str(caught.value).startswith(str(tmp_path))
    assert len(str(caught.value).splitlines()) == 1
    assert path.read_text() == "good"
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


WRITERS = {
    "JSON": lambda folder: write_json(folder / "a.json", {"a": 1}),
    "rows": lambda folder: write_rows(
        folder / "a.csv", [{"case": "a", "patient": "a", "site": "", "member": "", "region": "", "dice": 1.0}]
    ),
    "NIfTI": lambda folder: write_volume(folder / "a.nii.gz", np.zeros((2, 2, 2), np.uint8), np.eye(4)),
    "map": lambda folder: MapStore(folder).write("a", "case", np.zeros((2, 2, 2))),
    "curves": lambda folder: CurvesLogger(str(folder)).truncate_after(3),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_writer_finds_a_full_disk(tmp_path, monkeypatch, kind):
    WRITERS[kind](tmp_path)
    if kind == "curves":
        (tmp_path / "metrics.csv").write_text("iteration,epoch,name,value\n1,0,train/loss,0.5\n")
    before = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def no_room(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(written.os, "replace", no_room)
    with pytest.raises(SuiteError, match="no space left for"):
        WRITERS[kind](tmp_path)
    assert {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_clearing_takes_what_the_dead_left_and_nothing_else(tmp_path, capsys):
    process = multiprocessing.get_context("fork").Process(target=os._exit, args=(0,))
    process.start()
    process.join()
    mine = prefix()
    host = mine.split("-")[1]
    (tmp_path / "below").mkdir()
    left = [tmp_path / f".writing-{host}-{process.pid}-00-last.ckpt", tmp_path / "below" / f".writing-{host}-{process.pid}-01-x"]
    old = tmp_path / ".writing-other-1-00-x"
    stay = [tmp_path / f"{mine}00-x", tmp_path / ".writing-other-1-01-x", tmp_path / "last.ckpt"]
    for path in (left[0], old, *stay):
        path.write_bytes(bytes(200_000))
    left[1].mkdir()
    (left[1] / "image.npy").write_bytes(bytes(100_000))
    os.utime(old, (time.time() - 2 * STALE_SECONDS,) * 2)
    clear(tmp_path, below=True)
    assert sorted(p for p in tmp_path.rglob("*") if p.is_file()) == sorted(stay)
    assert f"{tmp_path}: removed 3 unfinished file(s) or folder(s) of processes that were killed, 0.5 MB" in capsys.readouterr().out
    clear(tmp_path, below=True)
    assert capsys.readouterr().out == ""


def test_the_first_write_to_a_folder_clears_what_the_dead_left_there(tmp_path, capsys):
    """Whichever job it is, also those whose folder is the user's own."""
    process = multiprocessing.get_context("fork").Process(target=os._exit, args=(0,))
    process.start()
    process.join()
    left = tmp_path / f".writing-{prefix().split('-')[1]}-{process.pid}-00-mask.nii.gz"
    left.write_bytes(bytes(10))
    write_json(tmp_path / "a.json", {})
    assert not left.exists()
    assert "removed 1 unfinished file(s)" in capsys.readouterr().out
    left.write_bytes(bytes(10))
    write_json(tmp_path / "b.json", {})  # not at every file: a folder may have thousands
    assert left.exists()


def test_a_database_without_room_is_told_in_one_line(tmp_path):
    def full_database():
        from lesionbench.jobs import main

        def job(cfg):
            try:
                raise ValueError("(sqlite3.OperationalError) database or disk is full\n[SQL: INSERT]")  # SQLAlchemy's words
            except ValueError as error:
                raise KeyError("This typically happens due to invalid data in the commit") from error  # Optuna's

        main.JOBS["methods"] = job

    code, printed = program(tmp_path / "log", "job=methods", before=full_database)
    assert code == 1
    assert printed == (
        "error: no space left for a file or for the study of a search; what was complete is kept: make room, and the same command goes on\n"
    )


def test_a_run_that_is_killed_while_it_saves_leaves_nothing_after_its_resume(tmp_path, capsys, monkeypatch):
    folder = write_fake_folder(tmp_path / "data", 6, shape=(12, 10, 8))
    common = [*SMALL, f"data.root={folder}", f"runs={tmp_path / 'runs'}"]
    replace, saved = os.replace, []

    def killed(source, target):
        if str(target).endswith("last.ckpt"):
            saved.append(target)
            if len(saved) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(written.os, "replace", killed)
        assert run_killed(*common) == -signal.SIGKILL
    (found,) = run_folders(tmp_path / "runs")
    assert len(list(found.rglob(".writing-*"))) == 1
    run(*common, "resume=true")
    assert not list(found.rglob(".writing-*"))
    assert "removed 1 unfinished file(s)" in capsys.readouterr().out


def test_a_checkpoint_that_finds_no_room_ends_the_training(tmp_path, monkeypatch):
    folder = write_fake_folder(tmp_path / "data", 6, shape=(12, 10, 8))
    common = [*SMALL, f"data.root={folder}", f"runs={tmp_path / 'runs'}"]
    real, saved = torch.save, []

    def no_room(content, place, *more, **options):
        saved.append(place)
        if len(saved) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(content, place, *more, **options)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", no_room)
        with pytest.raises(SuiteError, match=r"no space left for (last|best)\.ckpt"):
            run(*common)
    (found,) = run_folders(tmp_path / "runs")
    assert not list(found.rglob(".writing-*"))
    run(*common, "resume=true")
    run(*common, f"runs={tmp_path / 'whole'}")
    (other,) = run_folders(tmp_path / "whole")
    weights = [torch.load(f / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for f in (found, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def test_leftovers_among_simulated_cases_go(tmp_path):
    old = tmp_path / ".writing-other-1-00-x"
    old.mkdir()
    os.utime(old, (time.time() - 2 * STALE_SECONDS,) * 2)
    write_folder(tmp_path, Simulation(spacing=8.0), range(1))
    assert not old.exists()
    assert nib.load(next((tmp_path / "labels").iterdir())).shape


def test_what_is_free_counts_the_half_written_file(tmp_path, monkeypatch):
    assert "needs more than 2.50 GB; 1.23 GB are free" in str(full(tmp_path / "a", 2_500_000_000, 1_234_000_000))
    usage = shutil.disk_usage(tmp_path)._replace(free=2_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(SuiteError, match=r"more than 0\.3 MB; 2\.3 MB are free"):
        breaking(tmp_path / "a", bytes(300_000), OSError(errno.ENOSPC, "No space left on device"))
