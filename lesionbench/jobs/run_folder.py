"""Run folders: where a run lives, what makes two runs the same, and which stages of it are done."""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from lesionbench.errors import SuiteError
from lesionbench.installation import CLONE
from lesionbench.moved import recorded, recorded_experiment
from lesionbench.written import clear, locked, whole

# what a run is computed with, not what is computed: left out of the hash, so that a run may move between machines and still be the same
_INCIDENTAL = (
    "job", "seed", "resume", "logger", "runs", "run_folder", "maps", "writer", "out", "input", "ckpt", "overwrite", "on_error", "trust", "hydra", "compare", "report", "dashboard", "layout", "plan", "show", "name", "tune", "model.checkpoints",
    "data.root", "data.cache", "data.num_workers", "data.check",
    "trainer.devices", "trainer.num_nodes", "trainer.strategy", "trainer.accelerator", "trainer.enable_progress_bar", "trainer.use_distributed_sampler",
    "warm_start",  # the model's own warm_start has it
    # callbacks that watch; others, such as averaged weights or early stopping, change what is computed
    *(f"callbacks.{c}" for c in (
        "checkpoint", "nan_guard", "cost", "table", "figures", "calibration", "uncertainty_calibration", "risk_coverage", "writer", "learning_rate", "progress", "baseline", "pruner",
    )),
)  # fmt: skip
# options that came later: at this value a run is what it was before they were there, and its hash stays that of earlier runs
_NEUTRAL: dict[str, Any] = {
    "model.freeze": [], "model.cost_norm": "weights", "init_prefix": None, "test_time": None, "task.inputs": None, "data.task.inputs": None,
    "task.slice_axis": None, "data.task.slice_axis": None, "ensemble.tie": "mean",
}  # fmt: skip
_NEUTRAL_ARGUMENTS: dict[str, dict[str, Any]] = {  # of what is built, wherever it stands
    "datamodules.Sampling": {"jitter": 0},
    "datamodules.Split": {"inner_folds": None, "inner_fold": 0},
    "datamodules.Preprocessing": {"crop_size": None, "header": "auto", "grid": "same"},
    "lesionbench.target.RegionSigmoid": {"decoding": "nested", "background": False},
    "lightning_modules.Ensemble": {"tie": "mean"},
    "lightning_modules.inferers.Window": {"starts": "even"},
    "lightning_modules.networks.SubpixelNet": {"latent": "merged"},
    "lightning_modules.networks.segresnet_vae": {"own_decoder": False},
    "lightning_modules.networks.swin_unetr": {"shift": True},
    "lightning_modules.postprocessing.PostProcessing": {
        **dict.fromkeys(("probability", "opening", "closing", "suppress")), "decoding": "nested", "keep_largest": [],
    },
    "lightning_modules.schedules.plateau": {"cooldown": 0},
    "lightning_modules.schedules.steps": {"warmup_iterations": 0},
    "torch.optim.Adam": {"eps": 1e-8},
}  # fmt: skip
_GROWN = [  # lists of presets that came to hold more, and what they held: runs with either are the same
    (["dice", "jaccard", "hd95_pooled", "asd_directed", "asd"], ["dice", "jaccard", "hd95_pooled", "asd"]),  # metrics=semi_supervised
]
_LAUNCH_VARIABLES = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT", "SLURM_JOB_ID", "SLURM_STEP_ID")
_FOLDER_VARIABLE = "LESIONBENCH_RUN_FOLDER"
# what says which run it is, not what came of it; loggers open their files before training begins
_NO_RESULT = (".lock", "config.yaml", "environment.json", "summary.json", "tensorboard", "wandb")


def config_hash(cfg: DictConfig) -> str:
    """Eight characters that tell what is computed: the resolved config less paths, loggers, devices, seed and resume."""
    cfg = cfg.copy()
    with open_dict(cfg):
        cfg.seed = 0  # data and model refer to it
        if "root" in cfg.get("data", {}):  # as do paths below it, which must not tell where the data set lies
            cfg.data.root = f"data/{Path(cfg.data.root).name}"
    data = OmegaConf.to_container(cfg, resolve=True)
    for dotted in (*_INCIDENTAL, *_NEUTRAL):
        *parents, last = dotted.split(".")
        node = data
        for parent in parents:
            node = node.get(parent) or {}
        if dotted in _INCIDENTAL or node.get(last) == _NEUTRAL[dotted]:
            node.pop(last, None)
    return hashlib.sha256(json.dumps(recorded(_as_earlier(data)), sort_keys=True, default=str).encode()).hexdigest()[:8]


def _as_earlier(node: Any) -> Any:
    """A configuration (plain data) without what came later and is neutral."""
    if isinstance(node, dict):
        neutral = _NEUTRAL_ARGUMENTS.get(str(node.get("_target_")), {})
        return {k: _as_earlier(v) for k, v in node.items() if k not in neutral or v != neutral[k]}
    if isinstance(node, list):
        return next((held for holds, held in _GROWN if node == holds), [_as_earlier(value) for value in node])
    return node


def variant_hash(cfg: DictConfig) -> str:
    """The hash less the fold: what the replicates of one configuration, its seeds and folds, have in common."""
    cfg = cfg.copy()
    if "split" in cfg.data and "fold" in cfg.data.split:
        with open_dict(cfg):
            cfg.data.split.fold = 0
    return config_hash(cfg)


class RunFolder:
    """`<runs>/<experiment>/<hash>/seed=N`; the same command again makes `seed=N-2`, `resume=true` continues the newest.

    Under several processes the first one chooses and tells the others through the environment, or through a file named for the launch
    where a scheduler started them all at once.
    """

    def __init__(self, path: Path, made: Path | None = None) -> None:
        """`made` is the topmost folder of `path` that was made for this run; None where the run was there before, or is another process's."""
        self.path, self._made = Path(path), made
        self._marked = False  # by this object

    @classmethod
    def of(cls, cfg: DictConfig, resume: bool = False, same: "Callable[[RunFolder], bool]" = lambda folder: True) -> "RunFolder":
        """The folder for this run, made if it is new.

        Args:
            resume: the newest one there is that is `same`.
        """
        told = os.environ.get(_FOLDER_VARIABLE)
        if told and int(os.environ.get("LOCAL_RANK", 0)) > 0:
            return cls(Path(told))
        runs, own = Path(cfg.runs).absolute(), config_hash(cfg)
        base, before = (runs / name / own for name in (cfg.experiment_name, recorded_experiment(cfg.experiment_name)))
        if resume and before.is_dir() and not base.is_dir():  # begun when the experiment had another name
            base = before
        started_together = "TORCHELASTIC_RUN_ID" in os.environ or "SLURM_JOB_ID" in os.environ
        launch = "-".join(os.environ[v] for v in _LAUNCH_VARIABLES if v in os.environ) if started_together else ""
        rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))
        if launch and rank > 0:
            return cls(_announced(base / f".launch-{launch}"))
        folder = None
        while folder is None:  # until no other process is faster
            named = [path for path in base.glob("seed=*") if re.fullmatch(rf"seed={cfg.seed}(-\d+)?", path.name)]
            existing = sorted(named, key=_number)
            folder = next((begun for begun in map(cls, reversed(existing)) if same(begun)), None) if resume else None
            if folder:
                clear(folder.path, below=True)
            elif made := _made(base, cfg.seed, _number(existing[-1]) + 1 if existing else 1, others=not resume):
                folder = cls(*made)
        if launch:
            _write(base / f".launch-{launch}", str(folder.path))
        os.environ[_FOLDER_VARIABLE] = str(folder.path)
        return folder

    def locked(self) -> AbstractContextManager[Any]:
        """Only one command at a time works on the run.

        Raises:
            SuiteError: another one does.
        """
        refusal = f"{self.path}: another process is at work on this run; without resume=true the command begins one of its own"
        return locked(self.path / ".lock", refusal)

    @property
    def empty(self) -> bool:
        """Whether this very command made the folder and nothing has come of the run yet."""
        if self._made is None:
            return False
        return all(p.is_dir() or p.relative_to(self.path).parts[0] in _NO_RESULT for p in self.path.rglob("*"))

    def discard(self) -> None:
        """Removes an empty folder that this command made, and those above it that it made too and that hold nothing else."""
        if self._made is None:
            return
        made = self._made
        shutil.rmtree(self.path)
        for above in (p for p in self.path.parents if p.is_relative_to(made)):
            try:
                above.rmdir()
            except OSError:  # other runs are in it
                break

    def write_config(self, cfg: DictConfig) -> None:
        """Writes the resolved config and the environment (versions, machine, git revision, command)."""
        _write(self.path / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
        if not (self.path / "environment.json").exists():  # a resumed run keeps what it was started with
            _write(self.path / "environment.json", json.dumps(environment(), indent=1))

    def stage_done(self, name: str) -> dict[str, Any] | None:
        """What a finished stage left (its artefact and result), or None."""
        path = self.path / "stages" / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else None

    @property
    def continued(self) -> bool:
        """Whether the run was there before and this process has ended none of its stages: the present one may have been begun already."""
        return self._made is None and not self._marked

    def mark_done(self, name: str, result: Mapping[str, Any]) -> None:
        """Marks a stage as finished, atomically."""
        self._marked = True
        _write(self.path / "stages" / f"{name}.json", json.dumps(dict(result), indent=1))

    def await_stage(self, name: str, patience: float = 3600.0) -> None:
        """Waits until the first process has marked a stage as finished."""
        deadline = time.monotonic() + patience
        while self.stage_done(name) is None:
            if time.monotonic() > deadline:
                raise SuiteError(f"{self.path}: the first process has not finished stage '{name}' within {patience:.0f} s")
            time.sleep(0.2)

    def last_fitted(self) -> str | None:
        """The checkpoint of the stage that was trained last, or None."""
        marks = sorted((self.path / "stages").glob("*.json"), key=lambda p: p.stat().st_mtime_ns)
        fitted = [done for done in map(json.loads, (m.read_text() for m in marks)) if done["run"] == "fit"]
        return fitted[-1]["artefact"] if fitted else None

    @property
    def summary(self) -> dict[str, Any]:
        """`summary.json`, or {} while there is none."""
        path = self.path / "summary.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def update_summary(self, **values: Any) -> None:
        """Merges `values` into `summary.json`, atomically."""
        _write(self.path / "summary.json", json.dumps({**self.summary, **values}, indent=1))


def environment() -> dict[str, Any]:
    """Versions, machine, git revision and command line of this process."""
    packages: dict[str, str | None] = {}
    for name in ("lesionbench", "torch", "pytorch-lightning", "monai", "torchio", "hydra-core", "numpy", "nibabel"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None

    def git(*args: str) -> str | None:
        if CLONE is None:  # a wheel may lie inside of somebody else's repository
            return None
        try:
            return subprocess.run(["git", "-C", str(CLONE), *args], capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    return {
        "command": " ".join(sys.argv),
        "python": platform.python_version(),
        "packages": packages,
        "machine": {"platform": platform.platform(), "processor": platform.processor(), "cores": os.cpu_count()},
        "git": {"revision": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))},
    }


def _number(path: Path) -> int:
    _, _, number = path.name.partition("=")[2].partition("-")
    return int(number or 1)


def _made(base: Path, seed: int, number: int, others: bool) -> tuple[Path, Path] | None:
    """The new folder, and the topmost one that had to be made for it; one with a higher number, or (not `others`) None, where it is there by now."""
    while True:
        folder = base / (f"seed={seed}" if number == 1 else f"seed={seed}-{number}")
        made = [folder, *(p for p in folder.parents if not p.exists())][-1]
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.mkdir()
            return folder, made
        except FileExistsError:  # another process was faster
            if not others:
                return None
            number += 1
        except FileNotFoundError:  # another process discarded a run, and the folder above it, just now
            continue


def _announced(path: Path, patience: float = 3600.0) -> Path:
    """Waits for the first process, which may have to prepare the cases to know whether a run was computed on them."""
    deadline, oldest = time.monotonic() + patience, time.time() - 120.0
    while not (path.exists() and path.stat().st_mtime > oldest):  # an older one is from an earlier launch of the same name
        if time.monotonic() > deadline:
            raise SuiteError(
                f"{path}: the first process has not announced the run folder within {patience:.0f} s; is the file system shared?"
            )
        time.sleep(0.2)
    return Path(path.read_text())


def _write(path: Path, text: str) -> None:
    with whole(path) as temporary:
        temporary.write_text(text)
