"""Weights & Biases: one W&B run for one run folder."""

import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.loggers.logger import rank_zero_experiment
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from callbacks.overlays import View, gray_range
from lesionbench.errors import unknown


class WandbRun(WandbLogger):
    """The W&B run of a run folder: configuration, curves over iterations, figures, result table, checkpoints on request.

    A run folder that is resumed goes on with its W&B run, in whatever process. Name, group, tags and job type come from the folder's
    `config.yaml`, see `described`.

    Args:
        folder: run folder, or that of one of its stages, which is a W&B run of its own.
        project: W&B project.
        entity: W&B user or team; None = your default.
        offline: keep everything in `<folder>/wandb`.
        checkpoints: which are sent as artifacts when training ends, of `best` and `last`.
        tags: further tags.
        options: of `wandb.init`, before those that are derived.

    Attributes:
        muted: while True, what is logged is dropped.

    Raises:
        SuiteError: an unknown checkpoint.
    """

    def __init__(
        self,
        folder: str,
        project: str = "lesionbench",
        entity: str | None = None,
        offline: bool = False,
        checkpoints: Sequence[str] = (),
        tags: Sequence[str] = (),
        **options: Any,
    ) -> None:
        for kind in checkpoints:
            if kind not in ("best", "last"):
                raise unknown("checkpoint (logger.wandb.checkpoints)", kind, ["best", "last"])
        super().__init__(save_dir=folder, project=project, offline=offline, entity=entity)
        self._wandb_init.pop("anonymous", None)  # Lightning hands it on though nobody set it, and W&B warns of it
        self.folder, self.checkpoints, self.tags, self.options = Path(folder), list(checkpoints), list(tags), options
        self._process = os.getpid()
        self.muted = False
        self._place: int | None = None  # of the next row, which is its W&B step; None = after those that W&B has
        self._held = 0  # rows that W&B has

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The `wandb.Run`; made on first use, for only then the run folder is complete."""
        if self._experiment is None:
            import wandb

            known = {**self._wandb_init, **described(self.folder), **self.options}
            known["tags"] = [*known["tags"], *self.tags]
            if wandb.run is not None and wandb.run.id != known["id"]:  # of another job of the sweep, or another stage
                wandb.finish()
            self._experiment = wandb.run or self._begun(known)
            self._id = self._experiment.id
            self._held = max(self._experiment.step, held(self.folder, self._id))
        return self._experiment

    def _begun(self, known: dict[str, Any]) -> Any:
        import wandb

        begun = wandb.init(mode="offline" if self._offline else None, **known)
        begun.define_metric("iteration", hidden=True)
        begun.define_metric("*", step_metric="iteration")
        objective = known["config"]["objective"]
        if objective["name"]:
            begun.define_metric(objective["name"], step_metric="iteration", summary=f"{objective['mode']},last")
        return begun

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the run has its configuration from the start."""

    @property
    def place(self) -> int:
        """Number of rows so far, in this process and those that it continues."""
        return self._held if self._place is None else self._place

    @rank_zero_only
    def wind_back(self, place: int) -> None:
        """The next row is that after the first `place`; to be called when a run resumes. Rows that W&B has are not sent again."""
        self._place = place

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Under the logged `iteration`, else under `step`."""
        if self.muted:
            return
        run, row = self.experiment, self.place
        self._place = row + 1
        if row >= self._held:
            run.log({**({} if step is None else {"iteration": step}), **metrics}, step=row, commit=True)

    @rank_zero_only
    def log_summary(self, values: Mapping[str, float]) -> None:
        """Single values of the run, such as its test scores."""
        self.experiment.summary.update(dict(values))

    @rank_zero_only
    def log_overlays(self, key: str, case: str, views: Sequence[View], regions: Sequence[str]) -> None:
        """Slices of a case with truth and prediction as masks; of regions that overlap, the inner one is seen."""
        names = {0: "outside", **{r + 1: name for r, name in enumerate(regions)}}
        masks = [
            {
                layer: {"mask_data": _innermost(regions_of), "class_labels": names}
                for layer, regions_of in layers.items()
                if regions_of is not None
            }
            for layers in ({"truth": view.truth, "prediction": view.prediction} for view in views)
        ]
        captions = [f"{case}, {view.name} {view.index}" for view in views]
        # W&B shows images side by side rightly only if they are equally large
        size = np.max([view.image.shape[1:] for view in views], axis=0)
        masks = [{layer: {**mask, "mask_data": _framed(mask["mask_data"], size)} for layer, mask in layers.items()} for layers in masks]
        self.log_image(key, [_framed(_gray(view.image[0]), size) for view in views], caption=captions, masks=masks)

    @rank_zero_only
    def log_checkpoints(self, folder: Path) -> None:
        """Sends the checkpoints that were asked for, as versions of one artifact."""
        import wandb

        for kind in self.checkpoints:
            path = folder / f"{kind}.ckpt"
            if path.exists():
                artifact = wandb.Artifact(f"checkpoint-{self.experiment.id}", type="model", metadata={"kind": kind})
                artifact.add_file(str(path), policy="immutable")  # no copy: training has ended
                self.experiment.log_artifact(artifact, aliases=[kind])

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Ends the W&B run where the Trainer failed, or in a forked process; else it stays open for the next stage."""
        if self._experiment is not None and (status == "failed" or os.getpid() != self._process):
            self._experiment.finish(exit_code=int(status == "failed"))
            self._experiment = None


def held(folder: Path, run_id: str) -> int:
    """Number of rows, those in between that got lost included, of the W&B run `run_id` in the files of earlier processes that were offline."""
    steps = [
        int(item.value_json)
        for path in folder.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb")
        for record in records(path)
        for item in record.history.item
        if item.key == "_step" or list(item.nested_key) == ["_step"]
    ]
    return max(steps, default=-1) + 1


def records(path: Path) -> Iterator[Any]:
    """The complete records of a `.wandb` file (protocol buffers `wandb_internal.Record`), which a killed process may have left torn.

    It begins with 7 bytes; then come blocks of 32 KiB from its beginning, with parts of records behind a head of 7 bytes (checksum, length,
    type 1 = whole, 2, 3, 4 = first, middle, last part): https://github.com/google/leveldb/blob/main/doc/log_format.md.
    """
    from wandb.proto import wandb_internal_pb2

    data, place, content = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        content += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4) and place <= len(data):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(content)
            yield record
            content = b""


def described(folder: Path) -> dict[str, Any]:
    """What `wandb.init` is told about a run folder.

    `id` belongs to the folder and the time it was begun: the same after every interruption. `name` has experiment, fold and seed;
    `group` joins the folds and seeds of one configuration; `job_type` is `fit`, `test` or the stage; `tags` and `config.run` name
    method, data set, fold and seed.
    """
    run = folder if (folder / "config.yaml").exists() else folder.parent
    stage = "" if run == folder else folder.name
    cfg = OmegaConf.load(run / "config.yaml")
    split = cfg.data.get("split") or {}
    fold = split.get("fold") if split.get("folds") else None
    data = [cfg.data._target_.rsplit(".", 1)[-1], *(str(cfg.data[k]) for k in ("layout", "variant") if cfg.data.get(k))]
    facts = {"method": cfg.model._target_.rsplit(".", 1)[-1], "data": " ".join(data), "fold": fold, "seed": cfg.seed}
    summary = json.loads((run / "summary.json").read_text())
    replicate = "".join(f" {key}={facts[key]}" for key in ("fold", "seed") if facts[key] is not None)
    identity = [run.parent.name, run.name.replace("=", ""), f"{int(summary['started']):x}", *([stage] if stage else [])]
    return {
        "id": "-".join(identity),
        "name": f"{cfg.experiment_name}{replicate}{f' {stage}' if stage else ''}",
        "group": f"{cfg.experiment_name} {summary['variant']}",
        "job_type": stage or cfg.job,
        "tags": [f"{key}={value}" for key, value in facts.items() if value is not None],
        "config": {**OmegaConf.to_container(cfg, resolve=True), "run": {**facts, "folder": str(run)}},
    }


def _innermost(masks: np.ndarray) -> np.ndarray:
    """Region masks (R, h, w), outermost first -> (h, w) with 0 outside, else the number of the innermost region, from 1."""
    return np.max(masks * np.arange(1, len(masks) + 1, dtype=np.uint8)[:, None, None], axis=0)


def _framed(image: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """(h, w) -> `size`, in the middle of zeros."""
    before = [(whole - own) // 2 for own, whole in zip(image.shape, size, strict=True)]
    return np.pad(image, [(b, whole - own - b) for b, own, whole in zip(before, image.shape, size, strict=True)])


def _gray(image: np.ndarray) -> np.ndarray:
    """(h, w) -> 8-bit grey levels, as in the figures."""
    low, high = gray_range([image])
    return (255 * np.clip((image.astype(np.float32) - low) / (high - low), 0, 1)).astype(np.uint8)
