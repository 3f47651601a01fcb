"""`Method`, the base of all methods: optimizers, keyed randomness, results, checkpoints."""

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.states import TrainerFn
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lesionbench.batch import Batch
from lesionbench.errors import SuiteError, unknown
from lesionbench.keyed import key, torch_generator
from lesionbench.prediction import CaseResult, Prediction
from lesionbench.ranges import Count, Positive, Whole
from lesionbench.raters import majority
from lesionbench.task import Task
from lightning_modules.freezing import freeze, rest
from lightning_modules.inferers import Inferer, Mirrored, Predictor, counted
from lightning_modules.metrics import CaseMetrics, DatasetMetrics, PerCaseResults
from lightning_modules.postprocessing import PostProcessing
from lightning_modules.ramps import batches


class Method(pl.LightningModule):
    """A method: what is trained how, and what it says about a case. Subclasses define `training_step` and `predict_case`.

    Args:
        task: channels, classes and regions, from the data.
        optimizer: called with parameters (`functools.partial` of a torch optimizer), or name -> such a call, one for each group that
            `optimizer_groups` names.
        scheduler: called with (optimizer, total_iterations), or name -> such a call like `optimizer`; None = constant learning rate.
        metrics: measured on test cases.
        accumulate: batches whose gradients are summed into one step (of the mean loss), in automatic and manual optimization alike.
        clip: largest norm of the gradient of one optimizer's parameters; None = no clipping.
        seed: of everything random in training.
        monitor: validation value that a plateau schedule watches.
        validation_metrics: names of what is measured on validation cases.
        freeze: parts (see `networks.contract.parts_of`) of all `trained_networks` that stay as they are: their parameters get no gradient
            and no optimizer, and they stay in evaluation mode, so that batch normalization keeps its running statistics.

    Attributes:
        takes_inputs: whether it has use for further input channels (`Task.inputs`).
        streams: the data streams that `training_step` expects.
        writes_maps: per-case maps that training itself writes to the data module's map store.
        reads_maps: per-case maps that a stage before the training makes.
        map_interpolation: `nearest` or `linear`, how the maps that it writes are to be moved with the image.
        iteration: batches trained on so far; drives ramps and keyed randomness. Lightning's `global_step` counts optimizer steps.
        config: plain-data model configuration that a checkpoint carries so that it can be built again; None outside `run.py`.
        postprocessing: rules on the labels of test and predicted cases; None = none. Validation goes without.
        oracles: members of its predictions that were told something of the truth; their rows say so.
        tables: names of the values in the tables of its predictions, which validation logs too; None = cannot be told.
    """

    takes_inputs: bool = False
    streams: tuple[str, ...] = ("default",)
    writes_maps: tuple[str, ...] = ()
    reads_maps: tuple[str, ...] = ()
    inferer: Inferer  # of a method that predicts with networks; others have none
    map_interpolation: str = "nearest"
    oracles: Sequence[str] = ()
    tables: Sequence[str] | None = None

    def __init__(
        self,
        task: Task,
        *,
        optimizer: Callable | Mapping[str, Callable] | None = None,
        scheduler: Callable | Mapping[str, Callable] | None = None,
        metrics: CaseMetrics | None = None,
        accumulate: Count = 1,
        clip: Positive | None = None,
        seed: Whole = 0,
        monitor: str | None = "val/dice",
        validation_metrics: Sequence[str] = ("dice",),
        freeze: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        if task.inputs and not self.takes_inputs:
            raise SuiteError(f"task.inputs={list(task.inputs)}: {type(self).__name__} sees the channels of the image alone; set it to null")
        self.task, self.optimizer, self.scheduler = task, optimizer, scheduler
        self.accumulate, self.clip, self.seed, self.monitor = accumulate, clip, seed, monitor
        self.metrics = metrics or CaseMetrics()
        self.metrics.check(task)
        self.validation_metrics = CaseMetrics(names=list(validation_metrics))
        self.test_results, self.val_results = PerCaseResults(), PerCaseResults()
        self.dataset_results = DatasetMetrics(self.metrics.dataset, self.metrics.thresholds)
        self.frozen_parts = tuple(freeze or ())
        self.iteration = 0
        self.config: dict[str, Any] | None = None
        self.postprocessing: PostProcessing | None = None
        self._monitored: float | None = None  # the monitored value of a validation in this epoch
        self._open_gradients: dict[str, torch.Tensor] = {}  # of a window of accumulation that a stop cut in two

    # what a method answers

    @classmethod
    def streams_of(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        """`streams` of the method that these options (its configuration) would build, told without building it."""
        return cls.streams

    @classmethod
    def maps_of(cls, options: Mapping[str, Any]) -> dict[str, str]:
        """The maps of the method that these options would build -> interpolation, as `data.extra_maps` has it."""
        return dict.fromkeys(cls.writes_maps, cls.map_interpolation)

    def optimizer_groups(self) -> dict[str, list[nn.Parameter]]:
        """Optimizer name -> the parameters it owns; one optimizer over everything trainable by default."""
        return {"main": [p for p in self.parameters() if p.requires_grad]}

    def trained_networks(self) -> dict[str, nn.Module]:
        """The networks by name that `freeze` is about; those that learn to segment, not what only serves their training."""
        network = getattr(self, "network", None)
        return {} if network is None else {"the network": network}

    def predict_case(self, batch: Batch) -> Prediction:
        """What the method says about the one whole case of `batch`, on the network grid."""
        raise TypeError(f"{type(self).__name__} must define predict_case()")

    def measure(
        self, prediction: Prediction, truth: torch.Tensor | None, batch: Batch, metrics: CaseMetrics, spacing: tuple[float, ...]
    ) -> list[dict]:
        """Result rows of one case; a case-level method overrides it to compare `prediction.table` with `batch['attributes']`."""
        if truth is None and not prediction.table:
            return []
        native = metrics.space == "native"
        axis = batch["geometry"][0].native_axis(self.task.slice_axis) if native else self.task.slice_axis
        raters, brain = _raters(batch, native), _brain(batch, metrics)
        return metrics(prediction, truth, self.task, spacing, raters=raters, brain=brain, slice_axis=axis)

    def validated(self) -> list[str] | None:
        """Names (patterns of `fnmatch`) of what validation logs, such as `val/dice` and `val/dice_WT`; None where that cannot be told."""
        if self.tables is None or type(self).measure is not Method.measure:
            return None
        measured = self.validation_metrics.columns(self.task.unit)
        of_regions = [f"val/{name}_{region}" for name in measured for region in self.task.region_names]
        return [*(f"val/{name}" for name in (*measured, *self.tables)), *of_regions]

    def tuned_on(self, batch: Batch) -> bool:
        """Whether the labels that the method predicts come from a threshold that was chosen on this very case; its rows then say so."""
        return False

    def infer(self, batch: Batch, predictor: Predictor, channels: slice = slice(None)) -> dict[str, torch.Tensor]:
        """Maps of the whole case in `batch`, by the method's inferer; beyond its border lies `batch["outside"]`, as in training.

        Args:
            predictor: maps of one view, see `inferers`.
            channels: those that the predictor gets.
        """
        image, outside = batch["image"][:, channels], batch.get("outside")
        predictor = counted(predictor, self.inferer.passes(image.shape[2:], self.task.slice_axis))
        beyond = {} if outside is None or not outside.any() else {"outside": outside[:, channels]}
        return self.inferer(image, predictor, self.task.slice_axis, **beyond)

    def mirror(self, axes: Sequence[int]) -> None:
        """From now on predicts with test-time mirroring along these axes (see `inferers.Mirrored`)."""
        self.average(lambda inferer: Mirrored(inferer, axes))

    def average(self, over: Callable[[Inferer], Inferer]) -> None:
        """From now on predicts with the inferer that `over` makes of its own, such as a mean over moved copies of the case (`inferers.Transformed`)."""
        if not hasattr(self, "inferer"):
            raise SuiteError(f"mirror and test_time: {type(self).__name__} has no inferer that could move a case")
        self.inferer = over(self.inferer)

    def postprocess(self, rules: PostProcessing) -> None:
        """From now on test and predicted cases get these rules.

        Raises:
            SuiteError: metrics on another grid than the native one, whose voxels the rules count.
        """
        if self.metrics.space != "native":
            raise SuiteError(f"postprocessing counts voxels of the native grid, metrics.space={self.metrics.space} measures on another")
        self.postprocessing = rules

    def generator(self, name: str) -> torch.Generator:
        """Keyed randomness for one purpose in the current batch: belongs to (seed, name, iteration, rank)."""
        return torch_generator(self.seed, name, self.iteration, self.global_rank, device=self.device)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles each network in place, so that steps which call a network directly gain as well; arguments of `torch.compile`."""
        for child in self.children():
            for network in child.children() if isinstance(child, nn.ModuleList | nn.ModuleDict) else [child]:
                if any(p.requires_grad for p in network.parameters()):
                    network.compile(*args, **kwargs)

    # frozen parts

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            self._freeze()

    def on_train_start(self) -> None:
        if self.frozen_parts:
            self.train()  # Lightning, which warns of modules in evaluation mode, has looked by now

    def _freeze(self) -> None:
        if self.frozen_parts:
            freeze(self.trained_networks(), self.frozen_parts)

    def train(self, mode: bool = True) -> "Method":
        """Lightning's and torch's switch; frozen parts, also those of teachers, stay in evaluation mode."""
        super().train(mode)
        if mode and self.frozen_parts:
            for network in self.resting_networks():
                rest(network, self.frozen_parts)
        return self

    def resting_networks(self) -> list[nn.Module]:
        """The networks whose frozen parts stay in evaluation mode: those that are trained, and those that follow them."""
        return list(self.trained_networks().values())

    def on_initialized(self, loaded: Collection[str]) -> None:
        """Called when `init_from` has replaced these tensors of the state: what follows from weights is made anew."""

    # clock

    @property
    def total_iterations(self) -> int:
        """Batches of the whole run."""
        return int(self.trainer.num_training_batches * self.trainer.max_epochs)

    def progress(self, length: float | None = None) -> float:
        """Share of the run's batches that are behind, or with `length` (see `ramps.batches`; above 0) of its first so many; may exceed 1."""
        return self.iteration / (self.total_iterations if length is None else batches(length, self.total_iterations))

    def warmup_factor(self, length: float) -> float:
        """min(1, t / length) in batch t = 1, 2, ...; `length` as in `progress`, 0 = no warm-up."""
        return min(1.0, (self.iteration + 1) / max(batches(length, self.total_iterations) if 0 < length < 1 else length, 1))

    # optimizers

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """The optimizer of every group that is trained.

        Raises:
            SuiteError: there is none, or its options do not fit.
        """
        trained = {name: [p for p in params if p.requires_grad] for name, params in self.optimizer_groups().items()}
        groups = {name: params for name, params in trained.items() if params}
        if not groups:
            return {}
        if self.optimizer is None:
            raise SuiteError(f"{type(self).__name__} trains {', '.join(groups)} but model.optimizer is null")
        self._names = list(groups)
        makers = self._by_name("optimizer", self.optimizer)
        try:
            return {name: makers[name](params) for name, params in groups.items()}
        except (TypeError, ValueError, RuntimeError) as error:
            given = {name: getattr(maker, "keywords", {}) for name, maker in makers.items()}
            raise SuiteError(f"model.optimizer: {error} (given {given})") from error

    def configure_optimizers(self) -> Any:
        made = self._optimizers()
        groups, optimizers = list(made), list(made.values())
        if not groups:
            return None
        if self.scheduler is None:
            return optimizers
        total = self.trainer.estimated_stepping_batches
        if not self.automatic_optimization:
            total = -(-self.trainer.num_training_batches // self.accumulate) * self.trainer.max_epochs
        schedulers = self._schedules(made, int(total))
        step, never = {"interval": "step"}, {"interval": "epoch", "frequency": sys.maxsize, "monitor": self.monitor}
        return optimizers, [
            {"scheduler": s, "name": f"lr/{n}", **(never if isinstance(s, ReduceLROnPlateau) else step)}  # see `on_train_epoch_end`
            for s, n in zip(schedulers, groups, strict=True)
        ]

    def check_schedules(self, total_iterations: int) -> None:
        """Makes the schedules of a training of so many optimizer steps, to hear what does not fit before anything is prepared.

        Raises:
            SuiteError: what an optimizer or a schedule finds wrong with its options.
        """
        self._schedules(self._optimizers(), total_iterations)

    def _schedules(self, optimizers: Mapping[str, torch.optim.Optimizer], total_iterations: int) -> list[Any]:
        if self.scheduler is None or not optimizers:
            return []
        plans = self._by_name("scheduler", self.scheduler)
        try:
            return [plans[name](optimizer, total_iterations=total_iterations) for name, optimizer in optimizers.items()]
        except (TypeError, ValueError, KeyError, ArithmeticError) as error:
            given = {name: getattr(plan, "keywords", {}) for name, plan in plans.items()}
            raise SuiteError(f"model.scheduler: {error} (given {given})") from error

    def _by_name(self, option: str, makers: Callable | Mapping[str, Callable]) -> Mapping[str, Callable]:
        """What makes the optimizer or scheduler of each group: the same call for all, or one for each."""
        makers = makers if isinstance(makers, Mapping) else dict.fromkeys(self._names, makers)
        if set(makers) != set(self._names):
            raise SuiteError(f"model.{option} has {sorted(makers)}, the method trains {sorted(self._names)}")
        return makers

    @contextmanager
    def optimizing(self, name: str, advance: bool = True) -> Iterator[Callable[[torch.Tensor], None]]:
        """Manual optimization: inside, only the parameters of optimizer `name` need gradients; call what is yielded with the loss, once.

        It divides by `accumulate`, adds the gradient, and on the last batch of the window clips, steps and advances the schedule (which
        counts batches: of several steps of one optimizer in a batch, all but one say `advance=False`).
        """
        place = self._names.index(name)
        optimizers = self.optimizers()
        optimizer = optimizers[place] if isinstance(optimizers, list) else optimizers
        self.toggle_optimizer(optimizer)
        try:
            yield partial(self._step, optimizer, place, advance)
        finally:
            self.untoggle_optimizer(optimizer)

    def _step(self, optimizer: Any, place: int, advance: bool, loss: torch.Tensor) -> None:
        self.manual_backward(loss / self.accumulate)
        batch = self.trainer.fit_loop.epoch_loop.batch_progress
        if batch.current.ready % self.accumulate and not batch.is_last_batch:
            return
        scaler = getattr(self.trainer.precision_plugin, "scaler", None) if self.accumulate > 1 else None
        scale = scaler.get_scale() if scaler else 1.0
        optimizer.step()
        optimizer.zero_grad()
        if scaler and scaler.get_scale() != scale:  # the other optimizers' sums of this window were made with the old scale
            for parameter in (p for p in self.parameters() if p.grad is not None):
                parameter.grad.mul_(scaler.get_scale() / scale)
        schedulers = self.lr_schedulers() if advance else None
        if schedulers is not None:
            scheduler = schedulers[place] if isinstance(schedulers, list) else schedulers
            if not isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step()

    def on_validation_end(self) -> None:
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            value = self.trainer.callback_metrics.get(self.monitor)
            self._monitored = None if value is None else float(value)

    def on_train_epoch_end(self) -> None:
        """Lightning's hook: a plateau schedule sees each validation once, before the checkpoint of that epoch is written."""
        if self._monitored is None:
            return
        schedulers = self.lr_schedulers() or []
        for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(self._monitored)
        self._monitored = None

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Lightning's hook, after gradients have lost the scale of half precision: clips in manual optimization."""
        if self.clip is not None and not self.automatic_optimization:
            self._clip(optimizer)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clips by `clip`, as manual optimization does; the Trainer's own option stays unused."""
        if self.clip is not None:
            self._clip(optimizer)

    def _clip(self, optimizer: Any) -> None:
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], self.clip)

    # steps

    def check(self, data: Any) -> None:
        """Refuses a data module that the method cannot be trained on, before anything is prepared.

        Raises:
            SuiteError: other streams than `streams`, an extra map that nobody writes, parts that cannot be frozen, or options that no optimizer has.
        """
        self._freeze()
        if self.optimizer is not None:
            self._optimizers()
        offered = tuple(getattr(data, "streams", self.streams))
        if set(offered) != set(self.streams) and len(self.streams) + len(offered) > 2:
            raise SuiteError(f"{type(self).__name__} needs the streams {list(self.streams)}; data.streams offers {list(offered)}")
        stored = {} if getattr(data, "maps", None) is None else data.maps.state_dict()
        known = {
            *self.writes_maps,
            *stored,
            *(self.reads_maps if getattr(data, "maps", None) is None else ()),
        }  # the store comes with the run
        for name in getattr(data, "extra_maps", {}):
            if name not in known:
                raise unknown("map (data.extra_maps)", name, sorted(known))

    def on_fit_start(self) -> None:
        self.check(self.trainer.datamodule)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # dropout and every other draw from the global generator belongs to this iteration, whatever was drawn before
        torch.manual_seed(key(self.seed, "step", self.iteration, self.global_rank))
        if self._open_gradients:
            for name, parameter in self.named_parameters():
                if name in self._open_gradients:
                    parameter.grad = self._open_gradients[name].to(parameter)
            self._open_gradients = {}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.iteration += 1

    def log_terms(self, **terms: torch.Tensor) -> None:
        """Logs loss terms of the current batch under `train/`."""
        self.log_dict({f"train/{k}": v.detach() for k, v in terms.items()} | {"iteration": float(self.iteration + 1)}, batch_size=1)

    def validation_step(self, batch: Batch, batch_idx: int) -> CaseResult | None:
        return self._evaluate(batch, self.val_results, self.validation_metrics)

    def on_test_start(self) -> None:
        self.dataset_results.reset()  # sums: a second test would count every case twice

    def test_step(self, batch: Batch, batch_idx: int) -> CaseResult | None:
        return self._evaluate(batch, self.test_results, self.metrics)

    def predict_step(self, batch: Batch, batch_idx: int) -> CaseResult | None:
        return self._evaluate(batch, None, None)

    def _evaluate(self, batch: Batch, results: PerCaseResults | None, metrics: CaseMetrics | None) -> CaseResult | None:
        geometry = batch["geometry"][0]
        # stochastic inference belongs to the case, so that the order of cases and the number of processes do not matter
        torch.manual_seed(key(self.seed, "case", batch["case"][0]))
        prediction = self.predict_case(batch)
        if batch["again"][0]:
            return None
        native = metrics is None or metrics.space == "native"
        truth = _truth(batch, native)
        if native:
            prediction = self.to_native(prediction, geometry)
        rules = self.postprocessing if results is not self.val_results else None
        if rules is not None:
            prediction = rules(prediction, self.task)
        result = CaseResult(
            batch["case"][0], batch["patient"][0], batch["site"][0], prediction, truth, batch["image"][0], geometry, native=native
        )
        if metrics is not None and results is not None:
            tuned = self.tuned_on(batch) or (rules is not None and result.patient in rules.chosen_on)
            who = {"case": result.case, "patient": result.patient, "site": result.site}
            rows = self.measure(prediction, truth, batch, metrics, result.spacing)
            told = [bool(row.get("region")) and (tuned or row.get("member") in self.oracles) for row in rows]
            result.rows = [{**who, **row, **({"oracle": True} if oracle else {})} for row, oracle in zip(rows, told, strict=True)]
            results.update(result.rows)
            if results is self.test_results and metrics.dataset and truth is not None:
                self.dataset_results.update(prediction, truth, self.task, _brain(batch, metrics), tuned)
        return result

    def to_native(self, prediction: Prediction, geometry: Any) -> Prediction:
        """Brings a prediction to the grid of the file it was made from."""
        return prediction.map(geometry.to_native, partial(geometry.to_native, discrete=True))

    def on_validation_epoch_end(self) -> None:
        rows = self.val_results.compute()
        main = [row for row in rows if row["member"] == ""]
        for region in dict.fromkeys(row["region"] for row in main):
            for name, value in _means([row for row in main if row["region"] == region]).items():
                self.log(f"val/{name}_{region}" if region else f"val/{name}", value)
        for name, value in _means([row for row in main if row["region"]]).items():
            self.log(f"val/{name}", value, prog_bar=True)
        self.log("iteration", float(self.iteration))
        self.val_results.reset()

    # checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        data: Any = getattr(self._trainer, "datamodule", None)
        checkpoint["lesionbench"] = {
            "format": 1,
            "method": f"{type(self).__module__}.{type(self).__qualname__}",
            "iteration": self.iteration,
            "model": self.config,
            "task": self.task.to_dict(),
            "preprocessing": data.preprocessing.to_dict() if hasattr(data, "preprocessing") else None,
            "statistics": getattr(data, "statistics", None),
            "monitored": self._monitored,
            "patients": sorted({c.patient for part in ("train", "unlabeled", "val") for c in getattr(data, "parts", {}).get(part, [])}),
        }
        if self._within_window():  # gradients summed so far belong to the state of a run stopped between two steps
            checkpoint["lesionbench"]["gradients"] = {n: p.grad for n, p in self.named_parameters() if p.grad is not None}

    def _within_window(self) -> bool:
        if self._trainer is None or self.accumulate == 1 or self.trainer.world_size > 1:  # each process has gradients of its own
            return False
        batch = self.trainer.fit_loop.epoch_loop.batch_progress
        return batch.current.ready % self.accumulate != 0 and not batch.is_last_batch

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own = checkpoint.get("lesionbench", {})
        self.iteration = int(own.get("iteration", 0))
        self._monitored = own.get("monitored")
        self._open_gradients = own.get("gradients", {})


def _raters(batch: Batch, native: bool) -> torch.Tensor | None:
    """Every rater's class indices (R, X, Y, Z) of the one case of `batch`; None where there is none."""
    return batch.get("native_raters" if native else "raters", [None])[0]


def _truth(batch: Batch, native: bool) -> torch.Tensor | None:
    """Class indices (X, Y, Z) of the one case of `batch`: its label, else what most raters say; None where there is neither."""
    if "label" in batch:
        return batch["native_label"][0] if native else batch["label"][0, 0]
    raters = _raters(batch, native)
    return None if raters is None else majority(raters)


def _brain(batch: Batch, metrics: CaseMetrics) -> torch.Tensor | None:
    """The brain mask of the one case on the grid of the metrics, where one of them asks for it."""
    if "brain_auroc" not in (*metrics.names, *metrics.dataset) or "brain_mask" not in batch:
        return None
    mask = batch["brain_mask"][0]
    return (batch["geometry"][0].to_native(mask, discrete=True) if metrics.space == "native" else mask)[0]


def _means(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Mean of every metric over the rows that have it (NaN left out)."""
    names = dict.fromkeys(k for row in rows for k in row if k not in ("case", "patient", "site", "member", "region"))
    values = {n: [float(row[n]) for row in rows if row.get(n) is not None and row[n] == row[n]] for n in names}
    return {n: sum(v) / len(v) for n, v in values.items() if v}
