"""A stand-in for SLURM on one machine: what `sbatch`, `srun`, `scontrol requeue` and `sacct` do to a process, and no more.

Called as `python slurm_stand_in.py <program> <arguments>`; `install` puts scripts of these names into a folder for PATH.
"""

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

PROGRAMS = ("sbatch", "srun", "scontrol", "sacct")


def install(folder: Path) -> Path:
    """Writes the programs into `folder`, which also keeps the jobs."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in PROGRAMS:
        program = folder / name
        program.write_text(f'#!/bin/sh\nSTAND_IN="{folder}" exec "{sys.executable}" "{__file__}" {name} "$@"\n')
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return folder


def sbatch(folder: Path, script: str) -> None:
    """Starts the job, or every job of the array, in the background."""
    text = Path(script).read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, flags=re.MULTILINE))
    nodes, tasks = int(options.get("nodes", 1)), int(options.get("ntasks-per-node", 1))
    shared = {
        "SLURM_NTASKS": str(nodes * tasks), "SLURM_NTASKS_PER_NODE": str(tasks), "SLURM_NNODES": str(nodes), "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_NODELIST": "127.0.0.1", "SLURM_JOB_NODELIST": "127.0.0.1", "SLURM_JOB_NAME": "run",
    }  # fmt: skip
    jobs = {"100": {"SLURM_JOB_ID": "100"}}
    if "array" in options:
        first, last = map(int, re.match(r"(\d+)-(\d+)", options["array"]).groups())
        array = {"SLURM_ARRAY_JOB_ID": "100"}
        jobs = {f"100_{n}": {**array, "SLURM_JOB_ID": str(101 + n), "SLURM_ARRAY_TASK_ID": str(n)} for n in range(first, last + 1)}
    for name, own in jobs.items():
        job = {"script": script, "restarts": 0, "set": {**shared, **own}}
        (folder / f"{name}.json").write_text(json.dumps(job))
        start(job)
    print("Submitted batch job 100")


def start(job: dict) -> None:
    """Runs a batch script by itself."""
    changed = {**job["set"], **({"SLURM_RESTART_COUNT": str(job["restarts"])} if job["restarts"] else {})}
    kept = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    nowhere = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.Popen(["bash", job["script"]], env={**kept, **changed}, start_new_session=True, **nowhere)


def srun(folder: Path, *arguments: str) -> None:
    """Runs the command in every task; output goes to files of the folder."""
    command = list(arguments)
    while command[0].startswith("--"):
        command.pop(0) if "=" in command[0] or command[0] == "--unbuffered" else [command.pop(0), command.pop(0)]
    tasks = []
    for rank in range(int(os.environ["SLURM_NTASKS"])):
        place = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0"}
        with (folder / f"{os.environ['SLURM_JOB_ID']}_{rank}.log").open("a") as log:
            tasks.append(subprocess.Popen(command, env={**os.environ, **place}, stdout=log, stderr=log))
    sys.exit(max(task.wait() for task in tasks))


def scontrol(folder: Path, action: str, job_id: str) -> None:
    """`requeue`: starts the job anew."""
    path = folder / f"{job_id}.json"
    job = json.loads(path.read_text())
    job["restarts"] += 1
    path.write_text(json.dumps(job))
    if action == "requeue":
        start(job)


def sacct(folder: Path, *_: str) -> None:
    """All jobs run for ever; that one is done is seen by its result."""
    print("JobID|State|NodeList", *(f"{p.stem}|RUNNING|127.0.0.1" for p in sorted(folder.glob("*.json"))), sep="\n")


if __name__ == "__main__":
    {"sbatch": sbatch, "srun": srun, "scontrol": scontrol, "sacct": sacct}[sys.argv[1]](Path(os.environ["STAND_IN"]), *sys.argv[2:])
