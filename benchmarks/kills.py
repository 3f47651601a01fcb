"""Kills jobs of every kind at random moments, fills their disk, starts them beside themselves, and compares what is there in the end with what an
undisturbed job leaves: every file, byte by byte, but for times.

    PYTHONPATH=. python benchmarks/kills.py --kills 60 --disks 20 --crowds 3 --minutes 20 --out kills.csv

A kill is a SIGKILL, in turns after a random share of the time that the job takes, and ahead of a random one of its operations on files (opening
to write, renaming, making a folder, removing). A full disk is a file system in memory that has room for a random share of what the job writes;
it needs root, or `unshare --map-root-user --mount` ahead of the command. Then the same command is given again, with `resume=true` where it
trains. Ends with status 1 where anything differs.
"""

import argparse
import csv
import gzip
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from interleaved import machine

from lesionbench.study import open_study
from tests.fake_data import write_fake_folder
from tests.harness import SMALL

LIGHT = ["threads=1", "data.num_workers=0", "data.check=false"]
FOLDER = [
    *(text.replace("{", "{{").replace("}", "}}") for text in SMALL),
    "data.root={given}/folder",
    "callbacks.figures={{_target_:callbacks.OverlayFigures,folder:'${{run_folder}}'}}",
    "trainer.log_every_n_steps=1",
]
BLOBS = [
    *LIGHT, "data.root={given}/blobs", "data.cache={work}/cache", "data.count=14", "data.split.test=2", "data.split.val=2", "data.split.labeled=3", "epochs=3", "data.samples_per_epoch=8",
    "data.batch_size=2", "model.network.features=[4,8]", "trainer.log_every_n_steps=1", "callbacks.checkpoint.every_n_batches=3",
]  # fmt: skip
OWN_RUNS = ["runs={work}/runs", "resume=true"]
EXACT = "callbacks.checkpoint.every_n_batches=3"
LR = "model.optimizer.lr=tag(log,interval(1e-4,1e-1))"


@dataclass
class Job:
    """A command that leaves its files in the folder `{work}`, and what it may read: `{given}`."""

    name: str
    kind: str
    arguments: Sequence[str]


JOBS = [
    Job("prepare", "caching", ["job=prepare", *FOLDER, "data.cache={work}/cache"]),
    Job("simulate", "simulated cases", ["job=simulate", "out={work}/data", "simulate.count=3", "simulate.spacing=8"]),
    Job("supervised", "caching, training, test, figures, predictions", [*FOLDER, *OWN_RUNS, "data.cache={work}/cache", EXACT]),
    Job("workers", "the same with two loader processes", [*FOLDER, *OWN_RUNS, "data.cache={work}/cache", EXACT, "data.num_workers=2"]),
    Job("mean_teacher", "semi-supervised", ["benchmark=blobs", "model=mean_teacher", *BLOBS, *OWN_RUNS]),
    Job("pseudo_label", "semi-supervised with a map store", ["benchmark=blobs", "model=pseudo_label", *BLOBS, *OWN_RUNS, "model.labels=stored", "model.warm_start=0"]),
    Job("reciprocal", "two optimizers, values measured at the start", [
        "experiment=supervised/folder", "model=reciprocal_adversarial", *LIGHT, "augmentation=light", "data.samples_per_epoch=8", "data.batch_size=2", "data.split.test=2", "data.split.val=1",
        "data.channels=[t1,flair]", "metrics.names=[dice,error_auroc]", "trainer.log_every_n_steps=1", *OWN_RUNS, "data.root={given}/shells", "data.cache={work}/cache", EXACT, "patch=[16,16,16]", "model.network.width=4", "model.critic.norm=spectral",
        "data.classes={{background:0,core:1,rim:2}}", "data.regions={{ALL:[core,rim],CORE:[core]}}", "epochs=2",
    ]),
    Job("fae", "seven stages, a search, a clustering", [
        "experiment=fae/folder", *LIGHT, "data.root={given}/survival", "data.cache={work}/cache", *OWN_RUNS, EXACT, "data.channels=[t1,flair]", "data.split.test=4", "epochs=2",
        "habitats.encoder.batch_size=256", "habitats.encoder.samples_per_epoch=40", "habitats.voxels_per_patient=200", "habitats.repeats=2",
        "habitats.search={{initial:2,iterations:1,clusters:[3,4],quantile:[0.8,1.0]}}",
    ]),
    Job("test", "test of a checkpoint", [*FOLDER, *OWN_RUNS, "job=test", "ckpt={given}/trained/seed=0/checkpoints/best.ckpt"]),
    Job("predict", "predictions", ["job=predict", "ckpt={given}/trained/seed=0/checkpoints/best.ckpt", "input={given}/folder/images", "out={work}/out", "trust=[tests]", "writer.uncertainty=true", "overwrite=true"]),
    Job("show", "pictures of cases", ["job=show", *FOLDER, "data.cache={work}/cache", "out={work}/show", "show.cases=2", "show.samples=2", "overwrite=true"]),
    Job("compare", "tables, tests and a report", ["job=compare", "compare.runs=[{given}/trained]", "compare.group_by=[seed]", "out={work}/compared", "overwrite=true"]),
    Job("tune", "a threshold of volume", ["job=tune", "tune.runs=[{given}/trained]", "tune.region=lesion", "tune.grid=null", "out={work}/tuned.json", "overwrite=true"]),
    Job("sweep", "a sweep over two seeds", ["-m", *FOLDER, *OWN_RUNS, EXACT, "seed=0,1", "epochs=2"]),
    Job("search", "a search with its study", ["-m", "sweep=tpe", "hydra.sweeper.trials=3", LR, *FOLDER, *OWN_RUNS, EXACT, "epochs=2"]),
]  # fmt: skip
TIMES = {
    "started",
    "finished",
    "wall_s",
    "train_s",
    "validation_s",
    "test_s",
    "predict_s",
    "samples_per_s",
    "iteration_s",
    "data_wait",
    "peak_memory_mb",
}
COST = {"seconds", "waited", "peak"}  # the same in checkpoints
PATIENCE = 300.0  # seconds for one command
ROOM = "2g"


# one command


def start(job: Job, places: Mapping[str, Path], log: Path, operations: Any = None, at: int = -1) -> multiprocessing.Process:
    """The command in a process and process group of its own, which kills itself ahead of its operation number `at` on the files of `{work}`."""
    arguments = [text.format(**places) for text in job.arguments]
    process = multiprocessing.get_context("fork").Process(target=_program, args=(arguments, places["work"], log, operations, at))
    process.start()
    return process


def _program(arguments: list[str], work: Path, log: Path, operations: Any, at: int) -> None:
    from hydra.core.global_hydra import GlobalHydra

    from lesionbench.jobs.program import main

    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
    os.environ.pop("LESIONBENCH_RUN_FOLDER", None)
    os.chdir(work)
    GlobalHydra.instance().clear()
    sys.argv = ["run.py", *arguments]
    program = os.getpid()

    def watch(event: str, values: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(values[2], int) and values[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (writes or event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir")) and str(values[0]).startswith(str(work)):
            with operations.get_lock():
                operations.value += 1
                if operations.value == at:
                    os.kill(program, signal.SIGKILL)

    if operations is not None:
        sys.addaudithook(watch)
    main()


def end(process: multiprocessing.Process) -> int:
    """The exit status; a command that hangs is ended, which counts as a failure."""
    process.join(PATIENCE)
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    return process.exitcode


# what it leaves


def content(path: Path) -> Any:
    """What two runs must have in common in a file; times are left out."""
    if path.suffix == ".json":
        return _without(json.loads(path.read_text()), TIMES)
    if path.suffix in (".ckpt", ".pt"):
        return _plain(_without(torch.load(path, weights_only=True), COST))
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            rows = [{name: value for name, value in row.items() if not _a_time(name)} for row in csv.DictReader(file)]
        return [row for row in rows if path.name != "metrics.csv" or not _a_time(row["name"])]
    if path.suffix == ".gz":
        return gzip.decompress(path.read_bytes())  # its head has the time
    if path.suffix == ".db":
        return [(t.number, t.state.name, t.params, t.values) for t in open_study(path).trials]
    return path.read_bytes()


def _a_time(name: str) -> bool:
    """Whether a column or a curve has seconds."""
    return name == "seconds" or name.rpartition("/")[2].startswith("s_") or name.startswith("perf/")


def _without(node: Any, names: set[str]) -> Any:
    if isinstance(node, dict):
        return {k: _without(v, names) for k, v in node.items() if k not in names}
    return [_without(v, names) for v in node] if isinstance(node, list | tuple) else node


def _plain(node: Any) -> Any:
    """Tensors as bytes, which are equal or not."""
    if isinstance(node, torch.Tensor):
        return str(node.dtype), tuple(node.shape), node.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(node, np.ndarray):
        return node.tobytes()
    if isinstance(node, dict):
        return {k: _plain(v) for k, v in node.items()}
    return [_plain(v) for v in node] if isinstance(node, list) else node


def contents(folder: Path) -> dict[str, Any]:
    """File below `folder` -> what is in it; without Hydra's record of a sweep, a file named for the time of each command."""
    return {
        str(p.relative_to(folder)): content(p)
        for p in sorted(folder.rglob("*"))
        if p.is_file() and ".sweeps" not in p.parts and p.suffix != ".lock"
    }


def differences(whole: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """What is not the same, in words."""
    missing = [f"{name} is missing" for name in whole.keys() - found.keys()]
    more = [f"{name} is there besides" for name in found.keys() - whole.keys()]
    other = [f"{name}: {_where(whole[name], found[name])}" for name in whole.keys() & found.keys() if whole[name] != found[name]]
    return sorted([*missing, *more, *other])


def _where(whole: Any, found: Any) -> str:
    """The place of the first difference."""
    if isinstance(whole, dict) and isinstance(found, dict):
        for key in [*whole, *found]:
            if key not in whole or key not in found:
                return f"{key} only {'before' if key in whole else 'now'}"
            if whole[key] != found[key]:
                return f"{key}: {_where(whole[key], found[key])}"
    if isinstance(whole, list) and isinstance(found, list):
        for number, (a, b) in enumerate(zip(whole, found, strict=False)):
            if a != b:
                return f"[{number}]: {_where(a, b)}"
        return f"{len(whole)} -> {len(found)} entries"
    return f"{str(whole)[:60]} -> {str(found)[:60]}"


# rooms


class Scratch:
    """The folder that a job works in, always at the same path, so that what it writes does not differ by that; and what it reads."""

    def __init__(self, folder: Path) -> None:
        self.given, self.work, self.log = folder / "given", folder / "work", folder / "log"
        self.places = {"given": self.given, "work": self.work}
        self.given.mkdir()
        self.work.mkdir()

    def empty(self) -> None:
        for path in self.work.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def run(self, job: Job) -> tuple[int, str]:
        """The command to its end: exit status and what it printed."""
        code = end(start(job, self.places, self.log))
        return code, self.log.read_text(errors="replace")

    def give(self) -> None:
        """What the jobs read: cases, and two runs trained on them."""
        write_fake_folder(self.given / "folder", 8, shape=(14, 12, 10))
        write_fake_folder(self.given / "survival", 12, shape=(14, 12, 10), survival=True)
        write_fake_folder(self.given / "shells", 8, shape=(18, 16, 16), classes={"background": 0, "core": 1, "rim": 2})
        for seed in (0, 1):
            code, printed = self.run(Job("", "", [*FOLDER, f"seed={seed}", "runs={given}/runs", "data.cache={given}/cache"]))
            if code:
                sys.exit(printed)
        (trained,) = (path for path in (self.given / "runs").glob("*/*/*") if path.is_dir())
        trained.rename(self.given / "trained")


@dataclass
class Whole:
    """What a job leaves that nothing disturbs, and what it took."""

    files: dict[str, Any]
    seconds: float
    operations: int
    bytes: int


def whole(job: Job, scratch: Scratch) -> Whole:
    scratch.empty()
    operations = multiprocessing.get_context("fork").Value("i", 0)
    begun = time.perf_counter()
    code = end(start(job, scratch.places, scratch.log, operations))
    if code:
        sys.exit(f"{job.name}, undisturbed: exit status {code}\n{scratch.log.read_text()}")
    size = sum(path.stat().st_size for path in scratch.work.rglob("*") if path.is_file())
    return Whole(contents(scratch.work), time.perf_counter() - begun, operations.value, size)


# what is done to it; each returns (what, was it done, differences)


def killed(job: Job, scratch: Scratch, known: Whole, draw: random.Random, number: int) -> tuple[str, bool, list[str]]:
    scratch.empty()
    operations = multiprocessing.get_context("fork").Value("i", 0)
    if number % 2:
        at = draw.randint(1, known.operations)
        what = f"ahead of operation {at} of {known.operations}"
        code = end(start(job, scratch.places, scratch.log, operations, at))
    else:
        share = draw.uniform(0.05, 0.95)
        what = f"after {100 * share:.0f}% of the time"
        process = start(job, scratch.places, scratch.log)
        process.join(share * known.seconds)
        if process.is_alive():
            process.kill()
        code = end(process)
    return what, code == -signal.SIGKILL, _again(job, scratch, known)


def filled(job: Job, scratch: Scratch, known: Whole, draw: random.Random, number: int) -> tuple[str, bool, list[str]]:
    scratch.empty()
    share = draw.uniform(0.05, 0.95)
    _mount(scratch.work, max(int(share * known.bytes), 4096))
    try:
        code, printed = scratch.run(job)
        lines = [line for line in printed.splitlines() if "error" in line.lower() or "Traceback" in line]
        told = (
            []
            if code == 0 or (len(lines) == 1 and "Traceback" not in printed)
            else [f"told in {len(lines)} lines: {' | '.join(lines)[:200]}"]
        )
        subprocess.run(["mount", "-o", f"remount,size={ROOM}", str(scratch.work)], check=True)
        return f"room for {100 * share:.0f}% of {known.bytes / 1e6:.1f} MB", code != 0, [*told, *_again(job, scratch, known)]
    finally:
        subprocess.run(["umount", "--lazy", str(scratch.work)], check=True)


def _mount(folder: Path, size: int) -> None:
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True)
    if made.returncode:
        sys.exit(f"{made.stderr}--disks needs root: unshare --map-root-user --mount python benchmarks/kills.py ...")


def crowded(job: Job, scratch: Scratch, known: Whole, draw: random.Random, number: int) -> tuple[str, bool, list[str]]:
    """Two or three processes at once; all end well, or one does and the others say in one line that it is at work."""
    scratch.empty()
    count = 2 + number % 2
    logs = [scratch.log.with_name(f"log{n}") for n in range(count)]
    processes = [start(job, scratch.places, log) for log in logs]
    codes = [end(process) for process in processes]
    told = [log.read_text(errors="replace") for log, code in zip(logs, codes, strict=True) if code]
    bad = [
        f"exit status {max(codes)}: {text[-300:]}"
        for text in told
        if "Traceback" in text or sum("error:" in line for line in text.splitlines()) != 1
    ]
    return (
        f"{count} processes at once",
        True,
        [*bad, *(["none ended well"] if all(codes) else []), *differences(known.files, contents(scratch.work))],
    )


def _again(job: Job, scratch: Scratch, known: Whole) -> list[str]:
    """The same command once more: what differs then."""
    code, printed = scratch.run(job)
    return [*([f"exit status {code}: {printed[-300:]}"] if code else []), *differences(known.files, contents(scratch.work))]


WAYS = {"kills": killed, "disks": filled, "crowds": crowded}
SHARED = ("prepare", "supervised", "fae", "search")  # by several processes: a cache, a run folder, one with stages, a study


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=15)
    parser.add_argument("--disks", type=int, default=0)
    parser.add_argument("--crowds", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=20.0, help="no job is begun after")
    parser.add_argument("--jobs", default="", help="names, with commas; all if none is given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="CSV file of all that was done")
    given = parser.parse_args()
    chosen = [job for job in JOBS if not given.jobs or job.name in given.jobs.split(",")]
    rows = []
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        scratch = Scratch(Path(folder))
        for module in ("callbacks", "datamodules", "lightning_modules", "lesionbench.jobs.main"):
            import_module(module)  # once: the commands are forked
        scratch.give()
        begun = time.perf_counter()
        for row in done(chosen, scratch, {way: getattr(given, way) for way in WAYS}, given.seed):
            rows.append(row)
            for text in row["differences"]:
                print(f"{row['job']}, {row['what']}: {text}", flush=True)
            if time.perf_counter() - begun > 60 * given.minutes:
                print(f"stopped after {given.minutes:g} minutes")
                break
    table(rows)
    if given.out:
        with given.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows({**row, "differences": "; ".join(row["differences"])} for row in rows)
    sys.exit(any(row["differences"] for row in rows))


def done(jobs: Sequence[Job], scratch: Scratch, counts: Mapping[str, int], seed: int) -> Iterator[dict[str, Any]]:
    """Row after row; the jobs take turns, so that an early end leaves out no kind of them."""
    known: dict[str, Whole] = {}
    for way, count in counts.items():
        turn = [job for job in jobs if way != "crowds" or job.name in SHARED]
        for number in range(count):
            job = turn[number % len(turn)]
            if job.name not in known:
                known[job.name] = whole(job, scratch)
            rounds = number // len(turn)
            draw = random.Random(f"{seed} {way} {job.name} {rounds}")
            begun = time.perf_counter()
            what, hit, differing = WAYS[way](job, scratch, known[job.name], draw, rounds)
            yield {
                "way": way, "job": job.name, "what": what, "hit": hit, "files": len(known[job.name].files), "seconds": round(time.perf_counter() - begun, 1),
                "differences": differing,
            }  # fmt: skip


def table(rows: Sequence[Mapping[str, Any]]) -> None:
    print(f"{'job':14} {'done to it':10} {'times':>5} {'in time':>7} {'files':>5} {'differing':>9}")
    for way in WAYS:
        for job in [*JOBS, None]:
            own = [row for row in rows if row["way"] == way and job in (None, _of(row))]
            if own:
                name, files, kind = (job.name, own[0]["files"], f"  {job.kind}") if job else ("all", "", "")
                hit, differing = sum(row["hit"] for row in own), sum(bool(row["differences"]) for row in own)
                print(f"{name:14} {way:10} {len(own):5} {hit:7} {files:5} {differing:9}{kind}")


def _of(row: Mapping[str, Any]) -> Job:
    return next(job for job in JOBS if job.name == row["job"])


if __name__ == "__main__":
    main()
