"""The base of every data set: a data set finds its cases and names its task; splitting, checking, caching, sampling and streams are here."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal, TypedDict

import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader

from datamodules.cache import CaseCache
from datamodules.integrity import ERROR, Finding, check_cases, raise_on_errors, render
from datamodules.preprocessing import Preprocessing, dataset_statistics, histogram_statistics, labeled_statistics
from datamodules.samples import VIEWS, KeyedSampler, TrainingSamples, collate
from datamodules.sampling import Sampling
from datamodules.split import Split
from datamodules.transforms.augmentation import as_chain, needs
from datamodules.whole_cases import WholeCases, WholeCaseSampler
from datamodules.workers import WorkerLoader, heed_parent
from lesionbench.batch import Batch
from lesionbench.case import Case
from lesionbench.errors import SuiteError, unknown
from lesionbench.geometry import volume_file
from lesionbench.keyed import key
from lesionbench.maps import MapStore
from lesionbench.ranges import ASCENDING, Axis, BelowOne, Count, NotNegative, Share, Whole
from lesionbench.task import Task

CASE_SETS = ("train", "labeled", "unlabeled")


class Narrowing(TypedDict, total=False):
    """What is used of a data set's task, see `Task.narrowed`."""

    channels: Sequence[str] | None
    regions: Sequence[str] | Mapping[str, Sequence[str]] | None
    inputs: Sequence[str] | None
    slice_axis: Axis | None


class Policy(TypedDict, total=False):
    """Options of `Sampling`."""

    name: str
    share: Share
    weights: Mapping[str, NotNegative]
    jitter: Whole


class Stream(TypedDict, total=False):
    """One stream of training batches."""

    cases: Literal["train", "labeled", "unlabeled"]
    share: Annotated[Sequence[Share], ASCENDING]
    batch_size: Count
    sampling: Policy


class CaseDataModule(pl.LightningDataModule):
    """Cases in, batches out. A data set overrides `default_task` and `find_cases`, and `materialize` if it makes its own files.

    Args:
        root: folder of the data set.
        task: `{channels: [...], regions: [...], inputs: [...], slice_axis: n}` narrows the data set's task, adds inputs, or cuts its slices
            along another axis; None or missing keys leave it.
        preprocessing: what is done once per case (see `Preprocessing`).
        split: who is trained, validated and tested on (see `Split`).
        sampling: where training samples are cut (see `Sampling`).
        view, patch, slab, voxels: form of a training sample (see `TrainingSamples`). Evaluation always gets whole cases.
        batch_size: samples per process and batch of a stream that does not say its own.
        samples_per_epoch: an epoch, in samples of the first stream over all processes.
        augmentation: TorchIO transform applied to training samples, or a list of them.
        streams: name -> `{cases: train|labeled|unlabeled, share: [a, b], batch_size: n, sampling: {...}}`. One stream arrives bare, several as
            a mapping; one that is null is left out. Batches of `unlabeled` cases carry no label at all. `share` takes of the patients of
            these cases, in an order that belongs to `split.seed`, those from the share a to the share b (0 <= a < b <= 1): [0, 0.5] and
            [0.5, 1] are two halves.
        extra_maps: per-case map -> `nearest` or `linear`, loaded, cropped and augmented with the image from `maps`.
        check: run the integrity check once per set of files before training.
        cache: folder of the preprocessed cases; default `<root>/.cache`.
        num_workers: loader processes.
        limit_cases: use only the first so many cases (debugging).
        labels: folder with a label map `<case>.nii.gz` for each case, in the task's values on disk, that replaces the data set's own (what
            a segmentation run predicted, say); a case without one has no label.
        channel_dropout: probability, in [0, 1), with which each channel is missing from a training sample (see `TrainingSamples`).
        repeat: see `TrainingSamples`.
        seed: of the training samples.

    Raises:
        SuiteError: on unknown names, missing data, too few cases; before training.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        task: Narrowing | None = None,
        preprocessing: Preprocessing | None = None,
        split: Split | None = None,
        sampling: Sampling | None = None,
        view: str = "patch",
        patch: Sequence[Count] | None = None,
        slab: Count = 3,
        voxels: Count = 4096,
        batch_size: Count = 2,
        samples_per_epoch: Count = 100,
        augmentation: Callable | Sequence[Callable] | None = None,
        streams: Mapping[str, Stream | None] | None = None,
        extra_maps: Mapping[str, str] | None = None,
        check: bool = True,
        cache: str | Path | None = None,
        num_workers: Whole = 0,
        limit_cases: Count | None = None,
        labels: str | Path | None = None,
        channel_dropout: BelowOne = 0.0,
        repeat: Count | None = None,
        seed: Whole = 0,
    ) -> None:
        super().__init__()
        if view not in VIEWS:
            raise unknown("view (data.view)", view, VIEWS)
        if view == "slab" and slab % 2 == 0:
            raise SuiteError(f"data.slab={slab}: a slab has a middle slice, so it must be odd")
        if not 0 <= channel_dropout < 1:
            raise SuiteError(f"data.channel_dropout={channel_dropout} is a probability: expected 0 <= p < 1")
        self.root = Path(root).expanduser()
        narrowing: dict[str, Any] = {k: v for k, v in dict(task or {}).items() if v is not None}
        self.task: Task = self.default_task().narrowed(**narrowing)
        self.preprocessing = preprocessing or Preprocessing()
        self.split, self.sampling = split or Split(), sampling or Sampling()
        self.view, self.patch, self.slab, self.voxels = view, None if patch is None else tuple(patch), slab, voxels
        self.batch_size, self.samples_per_epoch = batch_size, samples_per_epoch
        self.augmentation = as_chain(augmentation)
        self.streams: dict[str, dict[str, Any]] = {
            name: dict(spec) for name, spec in (streams or {"default": {}}).items() if spec is not None
        }
        for name, spec in self.streams.items():
            if spec.get("cases", "train") not in CASE_SETS:
                raise unknown(f"data.streams.{name}.cases", spec["cases"], CASE_SETS)
            ends = tuple(spec.get("share", (0, 1)))
            if len(ends) != 2 or not 0 <= ends[0] < ends[1] <= 1:
                raise SuiteError(f"data.streams.{name}.share={list(ends)}: expected [a, b] with 0 <= a < b <= 1, such as [0, 0.5]")
            if "sampling" in spec:
                spec["sampling"] = Sampling(**spec["sampling"])
        self.extra_maps, self.check = dict(extra_maps or {}), check
        for name in self.task.inputs:
            if name not in ("brain_mask", *self.extra_maps):
                raise unknown("further input (task.inputs)", name, ["brain_mask", *self.extra_maps])
        for name in needs(self.augmentation) - {"brain_mask", "label", "raters", *self.extra_maps}:
            raise unknown("map (mask of the augmentation)", name, ["brain_mask", "label", "raters", *self.extra_maps])
        self.allow_missing = self.preprocessing.allow_missing
        self.cache_root = Path(cache).expanduser() if cache else self.root / ".cache"
        self.num_workers, self.limit_cases, self.repeat, self.seed = num_workers, limit_cases, repeat, seed
        self.labels = None if labels is None else Path(labels).expanduser()
        self.channel_dropout = channel_dropout
        self.doubts = ""  # what the integrity check warned of, once the data are prepared
        self.maps: MapStore | None = None  # set by whoever owns the run folder
        self.statistics: dict | None = None
        self.parts: dict[str, list[Case]] = {}
        self.predict_cases: list[Case] | None = None
        self._prepared = False
        self._resume = (0, 0)

    # what a data set answers

    def default_task(self) -> Task:
        """The data set's own task."""
        raise TypeError(f"{type(self).__name__} must define default_task()")

    def find_cases(self) -> list[Case]:
        """Every case under `root`; a pure function of the folder."""
        raise TypeError(f"{type(self).__name__} must define find_cases()")

    def materialize(self) -> None:
        """Makes the files under `root`, for data sets that are generated; nothing by default."""

    def not_made(self) -> dict[str, str]:
        """Makes what `materialize` does, and says of which cases that failed: id -> why; for data sets that can tell them apart."""
        self.materialize()
        return {}

    # preparation

    @property
    def store(self) -> CaseCache:
        """The cache of preprocessed cases."""
        return CaseCache(self.cache_root, self.task, self.preprocessing)

    def cases(self) -> list[Case]:
        """The cases used, in a fixed order."""
        cases = self.ordered(self.find_cases())[: self.limit_cases]
        return cases if self.labels is None else with_labels(cases, self.labels)

    def ordered(self, cases: Sequence[Case]) -> list[Case]:
        """The cases in the order that `limit_cases` takes them: by id."""
        return sorted(cases, key=lambda c: c.id)

    def divided(self, cases: Sequence[Case]) -> dict[str, list[Case]]:
        """The parts of the split; only cases that have labels are divided."""
        return self.split.divide([c for c in cases if c.label is not None or c.raters])

    def findings(self, cases: Sequence[Case] | None = None, progress: bool = True) -> list:
        """The integrity check of `cases` (default: all) with the split that training would use."""
        cases = self.cases() if cases is None else cases
        try:
            parts = self.divided(cases)
            splits, more = {name: [c.id for c in parts[name]] for name in ("train", "val", "test")}, []
        except SuiteError as error:
            splits, more = {}, [Finding("error", "data.split", None, "these cases cannot be split", str(error))]
        options: dict[str, Any] = {
            "allow_missing": self.allow_missing,
            "progress": progress,
            "header": self.preprocessing.header,
            "grid": self.preprocessing.grid,
        }
        return more + check_cases(cases, self.task, splits=splits, **options)

    def prepare_data(self) -> None:
        """Generates, checks and caches what is not there yet. Runs in one process per machine."""
        if self._prepared:
            return
        self.materialize()
        cases = self.cases()
        if not cases:
            raise SuiteError(f"{self.root}: no cases found")
        if self.predict_cases is None:
            parts = self.divided(cases)  # too few cases: said now, not after the caching
            for name, spec in self.streams.items():
                if "share" in spec and spec.get("cases", "train") != "unlabeled":  # whom others may join
                    self._stream_cases(name, spec, parts)
        if self.check:
            self._check_once(cases)
        self.store.prepare(cases, workers=self.num_workers)
        self._prepared = True

    def leave_out_unusable(self) -> dict[str, str]:
        """Checks and prepares the cases to predict, and leaves out those that cannot be used: id -> why.

        Raises:
            SuiteError: none is left.
        """
        left_out = self.not_made()
        cases = [case for case in self.predict_cases or () if case.id not in left_out]
        if self.check:
            options: dict[str, Any] = {
                "allow_missing": self.allow_missing,
                "header": self.preprocessing.header,
                "grid": self.preprocessing.grid,
            }
            for finding in check_cases(cases, self.task, splits={"predict": [c.id for c in cases]}, **options):
                if finding.level == ERROR:
                    left_out.setdefault(
                        finding.case, ": ".join(str(part) for part in (finding.file, finding.message, finding.value) if part)
                    )
        cases = [case for case in cases if case.id not in left_out]
        try:
            self.store.prepare(cases, workers=self.num_workers)
        except SuiteError:  # the others are there by now
            for case in cases:
                try:
                    self.store.prepare([case], progress=False)
                except SuiteError as error:
                    left_out[case.id] = str(error)
        self.predict_cases = [case for case in cases if case.id not in left_out]
        if not self.predict_cases:
            raise SuiteError("no case can be predicted:\n" + "\n".join(f"  {name}: {why}" for name, why in left_out.items()))
        self._prepared = True
        return left_out

    def fingerprint(self) -> str | None:
        """Sixteen characters that tell the cases, once they are prepared: their ids and what their files hold, wherever these lie."""
        return self.store.fingerprint(self.cases())

    def _check_once(self, cases: Sequence[Case]) -> None:
        """Checks unless these very files have passed before."""
        found = [(str(f.resolve()), f.stat()) for c in cases for f in c.files if f.exists()]
        stamps = [(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns) for path, status in found]
        marker = (
            self.cache_root
            / "checked"
            / f"{key(stamps, self.task.to_dict(), vars(self.split), self.allow_missing, self.preprocessing.header, self.preprocessing.grid):016x}.json"
        )
        if marker.exists():
            self.doubts = json.loads(marker.read_text()).get("doubts", "")
            return
        findings = self.findings(cases)
        raise_on_errors(findings)
        if findings:
            self.doubts = render(findings)
            print(self.doubts)
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.write_text(json.dumps({"cases": len(cases), "warnings": len(findings), "doubts": self.doubts}))

    def setup(self, stage: str | None = None) -> None:
        if stage == "predict" and self.predict_cases is not None:
            return
        self._divide()
        if stage in (None, "fit"):
            for name, spec in self.streams.items():
                self._stream_cases(name, spec, self.parts)

    def _stream_cases(self, name: str, spec: Mapping[str, Any], parts: Mapping[str, Sequence[Case]]) -> Sequence[Case]:
        """The cases that a stream draws on.

        Raises:
            SuiteError: there are none.
        """
        which = spec.get("cases", "train")
        found = parts[which]
        if not found:
            why = f"labeled={self.split.labeled}" if self.split.test != "all" else "test=all"
            raise SuiteError(f"stream '{name}' has no cases: data.split.{why} leaves {which} empty")
        if "share" not in spec:
            return found
        chosen = self.split.share(found, *spec["share"])
        if not chosen:
            count = len({case.patient for case in found})
            raise SuiteError(
                f"stream '{name}' has no cases: data.streams.{name}.share={list(spec['share'])} of {count} {which} patient(s) is none; widen it"
            )
        return chosen

    def _divide(self) -> None:
        if self.parts:
            return
        cases = self.cases()
        self.parts = self.divided(cases)
        self.parts["predict"] = cases
        if self._wants("unlabeled"):
            self.parts["unlabeled"] += self.without_label(cases)
        over_cases = {"dataset": dataset_statistics, "histogram": histogram_statistics}.get(self.preprocessing.normalize)
        if over_cases is not None and self.statistics is None:
            self.statistics = over_cases([self.store.open(c).stats for c in self.parts["train"]])
        if self.preprocessing.normalize == "ct" and self.statistics is None:
            self.statistics = labeled_statistics([self.store.open(c).labeled_values() for c in self.parts["labeled"]])

    def without_label(self, cases: Sequence[Case]) -> list[Case]:
        """Cases that have no label and join the `unlabeled` ones: of nobody who is validated or tested, or left out by `split.inner_folds`."""
        held_out = {c.patient for part in ("val", "test", "left_out") for c in self.parts.get(part, ())}
        return [c for c in cases if c.label is None and not c.raters and c.patient not in held_out]

    def _wants(self, cases: str) -> bool:
        return any(spec.get("cases") == cases for spec in self.streams.values())

    # loaders

    @property
    def _rank_world(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    @property
    def batches_per_epoch(self) -> int:
        """Batches of an epoch and process.

        Raises:
            SuiteError: an epoch shorter than one batch over all processes.
        """
        _, world = self._rank_world
        first = next(iter(self.streams.values())).get("batch_size", self.batch_size)
        batches = self.samples_per_epoch // (first * world)
        if batches < 1:
            raise SuiteError(f"data.samples_per_epoch={self.samples_per_epoch} is less than one batch of {first} on {world} process(es)")
        return batches

    def train_dataloader(self) -> DataLoader | CombinedLoader:
        loaders = {name: self.stream_loader(name, spec) for name, spec in self.streams.items()}
        return next(iter(loaders.values())) if len(loaders) == 1 else CombinedLoader(loaders, mode="min_size")

    def stream_loader(self, name: str, spec: Mapping[str, Any]) -> DataLoader:
        """Training batches of one stream, `spec` as in `streams`."""
        rank, world = self._rank_world
        which = spec.get("cases", "train")
        batch_size = spec.get("batch_size", self.batch_size)
        samples = TrainingSamples(
            name,
            self._stream_cases(name, spec, self.parts),
            self.store,
            self.task,
            self.preprocessing,
            spec.get("sampling", self.sampling),
            seed=self.seed,
            labeled=which != "unlabeled",
            view=self.view,
            patch=self.patch,
            slab=self.slab,
            voxels=self.voxels,
            augmentation=self.augmentation,
            maps=self.extra_maps,
            store=self.maps,
            statistics=self.statistics,
            channel_dropout=self.channel_dropout,
            repeat=self.repeat,
        )
        sampler = KeyedSampler(self.batches_per_epoch, batch_size, rank, world, self._start)
        return WorkerLoader(samples, batch_size=batch_size, sampler=sampler, collate_fn=collate, **self._loading)

    @property
    def _loading(self) -> dict[str, Any]:
        return {"num_workers": self.num_workers, "worker_init_fn": heed_parent, "pin_memory": torch.cuda.is_available()}

    def case_loader(self, cases: Sequence[Case], statistics: dict | None = None) -> DataLoader:
        """Whole cases, each once over all processes; normalized by other `statistics` than the training cases' where they are given."""
        known = statistics or self.statistics
        data = WholeCases(cases, self.store, self.task, self.preprocessing, statistics=known, maps=self.extra_maps, store=self.maps)
        return WorkerLoader(
            data, batch_size=1, sampler=WholeCaseSampler(len(cases), *self._rank_world), collate_fn=collate, **self._loading
        )

    def unlabeled_loader(self) -> DataLoader:
        """Whole unlabeled training cases, without labels even where there are some."""
        return self.case_loader([replace(c, label=None, raters=[]) for c in self.parts["unlabeled"]])

    def val_dataloader(self) -> DataLoader | list:
        return self.case_loader(self.parts["val"]) if self.parts["val"] else []

    def test_dataloader(self) -> DataLoader:
        if not self.parts["test"]:
            raise SuiteError("too few cases: the test part is empty; set data.split.test or data.split.folds")
        return self.case_loader(self.parts["test"])

    def predict_dataloader(self) -> DataLoader:
        return self.case_loader(self.parts["predict"] if self.predict_cases is None else self.predict_cases)

    def predict_ids(self) -> list[str]:
        """Ids of the cases that `predict` will visit, known before it starts."""
        return [c.id for c in (self.cases() if self.predict_cases is None else self.predict_cases)]

    def case_batch(self, case_id: str, task: Task, preprocessing: Preprocessing, statistics: dict | None = None) -> dict[str, Any]:
        """One raw case as an evaluation batch, preprocessed in another way than this data module's (a member of an ensemble, say)."""
        known = {c.id: c for cases in (*self.parts.values(), self.predict_cases or ()) for c in cases}
        case = known[case_id] if case_id in known else next(c for c in self.cases() if c.id == case_id)
        with TemporaryDirectory(prefix="lesionbench-") as folder:
            cache = CaseCache(Path(folder), task, preprocessing)
            cache.prepare([case], progress=False)
            return collate([WholeCases([case], cache, task, preprocessing, statistics=statistics)[(0, False)]])

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> dict[str, Any]:
        """Moves tensors (of every stream); lists, such as native labels and geometry, stay where they are."""

        def moved(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {k: moved(v) for k, v in value.items()}
            return value.to(device, non_blocking=True) if torch.is_tensor(value) else value

        return moved(batch)

    # resume in mid-epoch: position of the next sample, and which versions of the maps belong to it

    def _start(self) -> tuple[int, int]:
        epoch, done = self._resume
        current = self.trainer.fit_loop.epoch_progress.current.processed if self.trainer is not None else 0
        if current > epoch:
            return current, 0
        return epoch, done

    def state_dict(self) -> dict[str, Any]:
        loop = self.trainer.fit_loop
        epoch, batch = loop.epoch_progress.current, loop.epoch_loop.batch_progress
        finished = batch.is_last_batch and epoch.processed < epoch.ready
        position = {"epoch": epoch.processed + int(finished), "batch": 0 if batch.is_last_batch else batch.current.processed}
        return {**position, "maps": self.maps.state_dict() if self.maps is not None else {}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.trainer.state.fn != TrainerFn.FITTING:  # a checkpoint that is only tested must not turn the maps back
            return
        self._resume = (int(state_dict["epoch"]), int(state_dict["batch"]))
        if self.maps is not None:
            self.maps.load_state_dict(state_dict["maps"])


def with_labels(cases: Sequence[Case], folder: Path) -> list[Case]:
    """The cases with `<folder>/<case>.nii.gz` (or `.nii`) for their label; without one, and without raters, where there is no such file.

    Raises:
        SuiteError: no folder, or nothing in it for any case.
    """
    found = {case.id: volume_file(folder, case.id) for case in cases}
    if cases and not any(found.values()):
        raise SuiteError(f"data.labels={folder}: no label map for any of {len(cases)} cases; expected files such as {cases[0].id}.nii.gz")
    return [replace(case, label=found[case.id], raters=[]) for case in cases]
