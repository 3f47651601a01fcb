"""`Cascade`, the base of methods in rounds: a network is trained behind others, trained before it, that stay as they are."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pytorch_lightning.trainer.states import TrainerFn
from torch import nn

from lesionbench.batch import Batch
from lesionbench.checkpoint import load_method
from lesionbench.errors import SuiteError, unknown
from lesionbench.keyed import torch_seeded
from lesionbench.prediction import Prediction
from lesionbench.task import Task
from lightning_modules.base import Method
from lightning_modules.segmentation import SegmentationMethod

_TAKEN = (
    "image",
    "label",
    "raters",
    "rater_mask",
    "channel_mask",
    "brain_mask",
    "outside",
    "case",
    "patient",
    "site",
    "attributes",
    "geometry",
    "again",
)
_ELSEWHERE = ("format", "model", "preprocessing", "statistics", "monitored", "gradients")  # no state of a method, or of its training alone


class Cascade(SegmentationMethod):
    """One round of several: holds the networks of earlier rounds, its forerunners, frozen, and answers for them too.

    A checkpoint has the configuration and the weights of every forerunner in it, so that it predicts with no other file. For a whole case
    the forerunners are asked in their order; one that is a cascade itself and has a forerunner of the same name as this one shares it,
    and is not asked twice. In training what they say comes from the map store, under their names (see `lesionbench.jobs.forerunner_maps`).
    Test-time copies are made of what its own network sees; the forerunners are asked once.

    Args:
        region: the one of the task's regions that the network draws, which has one output channel then; None = all of them. Regions that it
            does not draw are those of the last forerunner that does, and empty where none does.
        forerunners: name -> checkpoint. One that is null is left out. What a checkpoint of this class carries in place of the path is
            `{method, task, preprocessing, statistics, patients, state}`, the last for `on_load_checkpoint`.
        trust: packages whose classes the checkpoints may build beside those of the suite.
        options: what else `SegmentationMethod` takes.

    Attributes:
        untouched: parts that `init_from` leaves as they are; the stored maps belong to their weights.
        shows_maps: whether the network gets what the forerunners say as further channels, behind those of the image.

    Raises:
        SuiteError: a region that the task does not have, or one alone with a target that is none of regions; a checkpoint that cannot be
            read, whose region has other values on disk, that needs a channel that is not there, or that was trained behind another
            forerunner of the same name.
    """

    untouched = ("forerunners",)
    shows_maps = False

    def __init__(
        self,
        task: Task,
        *,
        network: Any,
        region: str | None = None,
        forerunners: Mapping[str, str | Mapping[str, Any] | None] | None = None,
        trust: Sequence[str] = (),
        **options: Any,
    ) -> None:
        if region is not None and region not in task.regions:
            raise unknown("region (model.region)", region, task.regions)
        found = {name: _brought(name, given, trust) for name, given in (forerunners or {}).items() if given is not None}
        read = {name for name in found if isinstance((forerunners or {})[name], str)}
        before = {name: method for name, (method, _) in found.items()}
        for name, method in before.items():
            _check(name, method, task)
            _share(name, method, before, read)
        shown = sum(len(drawn(method)) for method in before.values()) if self.shows_maps else 0

        def of_round(in_channels: int, out_channels: int) -> nn.Module:
            return network(in_channels=in_channels + shown, out_channels=out_channels if region is None else 1)

        super().__init__(task, network=of_round, **options)
        if region is not None and self.target.kind != "sigmoid":
            raise SuiteError(
                f"model.region={region} has an output of its own, {type(self.target).__name__} has none: use model/target=regions"
            )
        self.region = region
        self.forerunners = nn.ModuleDict(before).requires_grad_(False)
        for module in self.forerunners.modules():
            module.training = True  # like any new module, until `train` or `eval` is called: Lightning warns of others
        self.origins = {name: origin for name, (_, origin) in found.items()}

    # frozen

    def train(self, mode: bool = True) -> "Cascade":
        """Lightning's and torch's switch; forerunners stay in evaluation mode."""
        super().train(mode)
        self.forerunners.eval()
        return self

    def on_train_start(self) -> None:
        super().on_train_start()
        self.train()  # Lightning, which warns of modules in evaluation mode, has looked by now

    # training

    def check(self, data: Any) -> None:
        super().check(data)
        for name, origin in self.origins.items():
            theirs = origin.get("preprocessing")
            if theirs is not None and hasattr(data, "preprocessing") and type(data.preprocessing).from_dict(theirs) != data.preprocessing:
                now = data.preprocessing.to_dict()
                differing = ", ".join(f"{k}: {theirs.get(k)} -> {now[k]}" for k in now if theirs.get(k) != now[k])
                raise SuiteError(
                    f"model.forerunners.{name} was trained with another preprocessing than data.preprocessing has ({differing})"
                )
            if getattr(data, "statistics", None) and origin.get("statistics") != data.statistics:
                raise SuiteError(
                    f"model.forerunners.{name} was trained with other statistics of the training cases; use the same data.split"
                )
        lacking = [name for name in self.forerunners if name not in getattr(data, "extra_maps", {})] if self.shows_maps else []
        if lacking:
            raise SuiteError(
                f"the network is shown what {', '.join(lacking)} said of training cases: set data.extra_maps="
                f"{{{', '.join(f'{name}: nearest' for name in lacking)}}}, written by a stage {{run: maps, map: {lacking[0]}, ...}} before"
            )

    def training_target(self, batch: Batch) -> torch.Tensor:
        target = super().training_target(batch)
        return target if self.region is None else target[:, self._place(self.region)][:, None]

    def _place(self, region: str) -> int:
        return self.task.region_names.index(region)

    # prediction

    def predict_case(self, batch: Batch) -> Prediction:
        """What this round and those before say; outside of training the forerunners are asked, whatever maps are stored."""
        training = self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        return self.answer(batch if training else {k: v for k, v in batch.items() if k not in self.forerunners})

    def answer(self, batch: Batch) -> Prediction:
        """`predict_case` in which forerunners whose maps `batch` holds are not asked."""
        known = self.ask(batch)
        return self.decode(self.assembled(self.draw(batch, known), known))

    def draw(self, batch: Batch, known: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Maps (1, K, X, Y, Z) of the own network, given what the forerunners say."""
        return self.infer(batch, self.predict_maps)["probabilities"]

    def ask(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Name of each forerunner -> probabilities (1, R, X, Y, Z) of the R regions that it draws, as precise as the store has them."""
        known: dict[str, torch.Tensor] = {}
        case = {k: v for k, v in batch.items() if k not in self.forerunners}
        for name, method in self.forerunners.items():
            if name in batch:
                known[name] = batch[name].float()
                continue
            theirs = method.forerunners if isinstance(method, Cascade) else {}
            shared = {n: maps for n, maps in known.items() if n in theirs and theirs[n] is self.forerunners[n]}
            known[name] = said(method, {**_view(case, self.task, method.task), **shared}).float()
        return known

    def assembled(self, own: torch.Tensor, known: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Maps (1, R, X, Y, Z) of all regions of the task: the own one, and those of the forerunners."""
        if self.region is None:
            return own
        maps = own.new_zeros(1, len(self.task.regions), *own.shape[2:])
        for name, method in self.forerunners.items():
            for channel, region in enumerate(drawn(method)):
                if region in self.task.regions:
                    maps[:, self._place(region)] = known[name][:, channel]
        maps[:, self._place(self.region)] = own[:, 0]
        return maps

    # checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        own = checkpoint["lesionbench"]
        if own["model"] is not None:
            own["model"] = {**own["model"], "forerunners": dict(self.origins)}
        own["patients"] = sorted({*own["patients"], *(p for origin in self.origins.values() for p in origin["patients"])})


def drawn(method: Method) -> list[str]:
    """The regions that a method draws itself."""
    region = getattr(method, "region", None)
    return list(method.task.regions) if region is None else [region]


def said(method: Method, batch: Batch) -> torch.Tensor:
    """What a trained method says about the one whole case of `batch`: probabilities (1, R, X, Y, Z), float16, of the regions that it draws.

    Raises:
        SuiteError: a method that gives neither probabilities nor masks.
    """
    with torch.no_grad(), torch_seeded(method.seed, "case", batch["case"][0]):
        prediction = method.answer(batch) if isinstance(method, Cascade) else method.predict_case(batch)
    regions = prediction.regions
    if regions is None:
        if prediction.labels is None:
            raise SuiteError(f"{type(method).__name__} gives neither probabilities nor masks of regions, and cannot be a forerunner")
        regions = method.task.region_masks(prediction.labels)
    return regions[[method.task.region_names.index(region) for region in drawn(method)]][None].half()


def _brought(name: str, given: str | Mapping[str, Any], trust: Sequence[str]) -> tuple[Method, dict[str, Any]]:
    """A forerunner, and what a checkpoint carries to build it again."""
    if not name.isidentifier() or name in _TAKEN:
        raise SuiteError(
            f"model.forerunners: '{name}' names no map; take a name of letters, digits and _ that batches do not use otherwise"
        )
    if isinstance(given, str):
        method, own = load_method(given, trust)
        origin = {"method": {**own["model"], "_partial_": True}, "task": own["task"], "patients": list(own.get("patients") or [])}
        state = {k: v for k, v in own.items() if k not in (*origin, *_ELSEWHERE)}
        return method, {**origin, "preprocessing": own.get("preprocessing"), "statistics": own.get("statistics"), "state": state}
    method = given["method"](task=Task.from_dict(given["task"]))
    method.on_load_checkpoint({"lesionbench": dict(given.get("state") or {})})
    return method, dict(given)


def _check(name: str, method: Method, task: Task) -> None:
    """Refuses a forerunner that cannot answer for this task."""
    lacking = [c for c in (*method.task.channels, *method.task.inputs) if c not in (*task.channels, *task.inputs)]
    if lacking:
        raise SuiteError(f"model.forerunners.{name} needs the channel(s) {', '.join(lacking)}; there are {', '.join(task.channels)}")
    values, theirs = task.region_values(), method.task.region_values()
    for region in drawn(method):
        if region in values and values[region] != theirs[region]:
            raise SuiteError(
                f"model.forerunners.{name}: its region {region} holds the values {sorted(theirs[region])}, not {sorted(values[region])}"
            )


def _share(name: str, method: Method, before: Mapping[str, Method], read: set[str]) -> None:
    """Has a forerunner that is a cascade use those of this one that have the same names."""
    if not isinstance(method, Cascade):
        return
    for inner, own in method.forerunners.items():
        if inner not in before or inner == name:
            continue
        if {name, inner} <= read and not _same(own, before[inner]):
            raise SuiteError(
                f"model.forerunners.{name} was trained behind another {inner} than model.forerunners.{inner}; give it that one"
            )
        method.forerunners[inner] = before[inner]


def _same(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def _view(batch: Batch, ours: Task, theirs: Task) -> dict[str, Any]:
    """The case with the channels of another task."""
    names, wanted = (*ours.channels, *ours.inputs), (*theirs.channels, *theirs.inputs)
    if names == wanted:
        return dict(batch)
    places = [names.index(name) for name in wanted]
    return {**batch, **{key: batch[key][:, places] for key in ("image", "channel_mask", "outside") if key in batch}}
