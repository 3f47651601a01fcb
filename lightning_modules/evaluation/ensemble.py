"""Ensembles: any set of checkpoints, of one method or of several, that answer for every case together."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lesionbench.batch import Batch
from lesionbench.checkpoint import load_method
from lesionbench.errors import SuiteError, unknown
from lesionbench.keyed import key
from lesionbench.prediction import Prediction
from lesionbench.ranges import NotNegative, Whole
from lesionbench.target import ClassSoftmax, RegionSigmoid, Target
from lesionbench.task import Task, joined
from lightning_modules.base import Method
from lightning_modules.inferers import Inferer
from lightning_modules.raters.fusion import FUSIONS, Fused, LabelVote, Mean, Staple


@dataclass(frozen=True)
class Member:
    """What is kept of a checkpoint between two cases.

    Attributes:
        path: of the checkpoint.
        task: its own; classes and regions are those of the ensemble, or regions are some of these; the channels may be fewer.
        decoder: its target, which makes labels of region probabilities; None for a method without one.
        patients: whom it was trained or selected on.
    """

    path: str
    task: Task
    decoder: Target | None
    patients: frozenset[str]


class Ensemble(Method):
    """Checkpoints that answer together, fused on the native grid; nothing to train.

    Every member gets the raw case preprocessed in its own way and answers with region probabilities (its masks, where it has none). A
    member is read from its file for each case and let go again, so that neither weights nor maps pile up. The uncertainty map
    `disagreement` is how much the members differ (see `fusion.Fused`).

    A checkpoint of some of the regions answers as a part of its group, whose members know all of them together: the networks that were trained
    for one region each are one model.

    Labels follow from the fused probabilities as the members' targets make them, if all do alike (with the same thresholds and
    decoding); where they differ, by the largest class
    probability if all are softmax over classes, else, and for votes and STAPLE, by nested regions above 1/2.

    Args:
        checkpoints: each one model, or a list of checkpoints that are averaged first and then count as one (the folds of a
            configuration, say, whose means STAPLE fuses; Zeineldin et al., BrainLes 2021), each region over those that know it.
        fusion: `mean`, `vote`, `label_vote` or `staple` (see `lightning_modules.raters.fusion`).
        weights: one positive number per model; None = equal. Not for STAPLE, which estimates them.
        members: keep the labels of every model as member `m1`, `m2`, ... of the prediction, to be measured and written with it. One byte
            per model and voxel.
        out_of_fold: test every case with the checkpoints that were neither trained nor selected on its patient, whichever these are. Else
            all have to answer for every case, and a test patient that any of them knows is refused.
        postprocess_members: apply `postprocess` rules to the labels of each model before the fusion too, which vote and STAPLE then fuse.
        staple_margin: see `fusion.Staple`.
        tie: what a `label_vote` says where no class has the most votes: `mean`, `first` or `background` (see `fusion.LabelVote`).
        keep_loaded: keep all members in memory: faster, and memory grows with their number.
        chosen_on: patients by whose truth members were chosen; their rows are marked `oracle`.
        trust: packages whose classes checkpoints may build beside those of the suite.

    Raises:
        SuiteError: all that is wrong with the members at once: missing or unreadable files, weights that do not fit, another task than
            `task`, a file given twice, a region that nobody of a group knows; unknown options. Before the first case also patients that a member knows.
    """

    def __init__(
        self,
        task: Task,
        *,
        checkpoints: Sequence[str | Sequence[str]],
        fusion: str = "mean",
        weights: Sequence[NotNegative] | None = None,
        members: bool = False,
        out_of_fold: bool = False,
        postprocess_members: bool = True,
        staple_margin: Whole | None = 5,
        tie: Literal["mean", "first", "background"] = "mean",
        keep_loaded: bool = False,
        chosen_on: Sequence[str] = (),
        trust: Sequence[str] = (),
        **options: Any,
    ) -> None:
        super().__init__(task, **options)
        if fusion not in FUSIONS:
            raise unknown("ensemble.fusion", fusion, FUSIONS)
        if self.metrics.space != "native":
            raise SuiteError(
                f"metrics.space={self.metrics.space}: members of an ensemble meet on the native grid; use metrics.space=native"
            )
        groups = [[c] if isinstance(c, str) else list(c) for c in checkpoints]
        if weights is not None:
            if fusion == "staple":
                raise SuiteError("ensemble.weights: STAPLE estimates its own; use ensemble.fusion=mean or vote, or weights=null")
            if len(weights) != len(groups) or min(weights) <= 0:
                raise SuiteError(f"ensemble.weights={list(weights)}: expected {len(groups)} positive numbers, one per member")
        self.fusion, self.weights = fusion, [1.0] * len(groups) if weights is None else [float(w) for w in weights]
        self.keep_members, self.out_of_fold, self.postprocess_members = members, out_of_fold, postprocess_members
        self.staple_margin, self.tie, self.chosen_on, self.trust = staple_margin, tie, frozenset(chosen_on), tuple(trust)
        self._fusion()  # ties are refused before members are read
        self._over: Callable[[Inferer], Inferer] | None = None  # how every member predicts, see `average`
        self._tuned = False  # the threshold of a member was chosen on the case of the moment
        self._loaded: dict[str, tuple[Method, Mapping[str, Any]]] | None = {} if keep_loaded else None
        known = self._examined([path for group in groups for path in group])
        self.groups = [[known[path] for path in group] for group in groups]
        unknown_to = [(group, _untold(self.task, group)) for group in self.groups]
        hint = "put checkpoints that know all regions together into one group, as in ckpt=[[et.ckpt,tc.ckpt,wt.ckpt]]"
        _raise(
            [f"{', '.join(m.path for m in group)}: does not know {', '.join(regions)}" for group, regions in unknown_to if regions],
            f"model(s) of the ensemble lack a region; {hint}",
        )
        self.target = self._target()

    # before the first case

    def _examined(self, paths: Sequence[str]) -> dict[str, Member]:
        """Reads every member once; all that is wrong with them is one error."""
        members, problems = {}, []
        for path in dict.fromkeys(paths):
            if paths.count(path) > 1:
                problems.append(f"{path}: given {paths.count(path)} times")
            try:
                method, own = self._load(path)
                members[path] = _member(path, method, own)
                problems += [f"{path}: {p}" for p in _differences(method.task, self.task)]
            except SuiteError as error:
                problems.append(str(error) if str(error).startswith(path) else f"{path}: {error}")
        _raise(problems, f"problem(s) with the {len(paths)} member(s) of the ensemble")
        return members

    def _load(self, path: str) -> tuple[Method, Mapping[str, Any]]:
        """A member as a method and what its checkpoint says of its data."""
        if self._loaded is not None and path in self._loaded:
            return self._loaded[path]
        method, own = load_method(path, self.trust)
        if own.get("preprocessing") is None:
            raise SuiteError(f"{path}: does not say how its cases were preprocessed; it was not written by this program")
        if self._over is not None:
            method.average(self._over)
        if self._loaded is not None:
            self._loaded[path] = method, own
        return method, own

    def average(self, over: Callable[[Inferer], Inferer]) -> None:
        """From now on every member predicts so (see `Method.average`)."""
        self._over = over
        for method, _ in (self._loaded or {}).values():
            method.average(over)

    def _target(self) -> Target:
        """What makes labels of the fused probabilities."""
        members = [m for group in self.groups for m in group]
        decoder = common(self.task, members)
        if self.fusion == "mean" and decoder is not None:
            return decoder
        softmax = self.fusion == "mean" and all(isinstance(m.decoder, ClassSoftmax) for m in members)
        return ClassSoftmax(self.task) if softmax else RegionSigmoid(self.task)

    def on_test_start(self) -> None:
        super().on_test_start()
        data = self.trainer.datamodule
        self.admit(data.task, [c.patient for c in data.parts["test"]])

    def on_predict_start(self) -> None:
        data = self.trainer.datamodule
        if self.out_of_fold:
            self.admit(data.task, [c.patient for c in (data.cases() if data.predict_cases is None else data.predict_cases)])

    def _asked(self, patient: str) -> list[tuple[int, list[Member]]]:
        """Who answers for a patient: place and checkpoints of every model that has any."""
        asked = [[m for m in group if not (self.out_of_fold and patient in m.patients)] for group in self.groups]
        return [(place, group) for place, group in enumerate(asked) if group and not _untold(self.task, group)]

    def admit(self, task: Task, patients: Iterable[str]) -> None:
        """Refuses data of another task, and patients that members have seen in training.

        Raises:
            SuiteError: names the members, and how many patients they have seen.
        """
        problems = _differences(self.task, task)
        patients = set(patients)
        if self.out_of_fold:
            nobody = sorted(p for p in patients if not self._asked(p))
            if nobody:
                known = "every member was trained or selected on them"
                problems.append(f"nobody is left for {len(nobody)} of the patients ({', '.join(nobody[:5])}): {known}")
        else:
            for member in (m for group in self.groups for m in group):
                seen = sorted(patients & member.patients)
                if seen:
                    problems.append(f"{member.path}: was trained or selected on {len(seen)} of the test patients ({', '.join(seen[:5])})")
        hint = "" if self.out_of_fold else "; ensemble.out_of_fold=true tests every case with those that did not see it"
        _raise(problems, f"problem(s): these members may not answer for these cases{hint}")

    # a case

    def tuned_on(self, batch: Batch) -> bool:
        return self._tuned or batch["patient"][0] in self.chosen_on

    def predict_case(self, batch: Batch) -> Prediction:
        """What all members say together; on the native grid already."""
        fusion = self._fusion()
        answers: dict[str, Prediction] = {}
        self._tuned = False
        for place, group in self._asked(batch["patient"][0]):
            regions, labels = self._group(group, batch)
            fusion.add(regions, labels, self.weights[place], f"m{place + 1}")
            if self.keep_members:
                answers[f"m{place + 1}"] = Prediction(labels=labels)
            del regions  # before the next model makes its own
        return self._prediction(fusion.result(), answers)

    def _fusion(self) -> Mean | Staple:
        if self.fusion == "staple":
            return Staple(self.task, self.staple_margin)
        return LabelVote(self.task, self.tie) if self.fusion == "label_vote" else FUSIONS[self.fusion](self.task)

    def _prediction(self, fused: Fused, answers: dict[str, Prediction]) -> Prediction:
        labels = self.target.labels(fused.regions[None])[0]
        return Prediction(fused.regions, labels, uncertainty={"disagreement": fused.disagreement}, members=answers, table=fused.table)

    def _group(self, asked: Sequence[Member], batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean region probabilities (R, *spatial) of the checkpoints of one model, and their class indices (*spatial)."""
        if len(asked) == 1:
            regions, labels = self._answer(asked[0], batch)
        else:
            regions = self._mean(asked, batch)
            labels = (common(self.task, asked) or RegionSigmoid(self.task)).labels(regions[None])[0]
        if self.postprocessing is not None and self.postprocess_members:
            labels = self.postprocessing.labels(labels, self.task, regions)
        return regions, labels

    def _mean(self, asked: Sequence[Member], batch: Batch) -> torch.Tensor:
        """Mean region probabilities (R, *spatial), each region over the members that know it."""
        places = [[self.task.region_names.index(region) for region in member.task.regions] for member in asked]
        total: torch.Tensor | None = None
        for member, known in zip(asked, places, strict=True):
            regions, _ = self._answer(member, batch)
            if total is None:
                total = regions.new_zeros(len(self.task.regions), *regions.shape[1:], dtype=torch.float32)
            for place, region in zip(known, regions, strict=True):
                total[place].add_(region)
        assert total is not None  # a group has members
        for place, region in enumerate(total):
            region.div_(sum(place in known for known in places))
        return total

    def _answer(self, member: Member, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Region probabilities and class indices of one member, as it would give them alone."""
        method, own = self._load(member.path)
        method = method.to(self.device)
        view = self._view(member, own, batch)
        torch.manual_seed(key(method.seed, "case", batch["case"][0]))
        with torch.no_grad():
            said = method.to_native(method.predict_case(view), view["geometry"][0])
        self._tuned |= method.tuned_on(view)
        if said.labels is None and said.regions is None:
            raise SuiteError(f"{member.path}: gives neither probabilities nor masks of the regions, which an ensemble could fuse")
        regions = said.regions if said.regions is not None else member.task.region_masks(said.labels).float()
        labels = said.labels if said.labels is not None else RegionSigmoid(member.task).labels(regions[None])[0]
        return regions, labels

    def _view(self, member: Member, own: Mapping[str, Any], batch: Batch) -> Batch:
        """The case as this member wants it: as it is where the data module prepares cases in just this way."""
        data = self.trainer.datamodule
        preprocessing = type(data.preprocessing).from_dict(own["preprocessing"])
        ours = (data.task.channels, data.task.inputs, data.preprocessing, data.statistics)
        if ours == (member.task.channels, member.task.inputs, preprocessing, own["statistics"]):
            return batch
        view = data.case_batch(batch["case"][0], member.task, preprocessing, own["statistics"])
        return data.transfer_batch_to_device(view, self.device, 0)

    def to_native(self, prediction: Prediction, geometry: Any) -> Prediction:
        """The members have met there."""
        return prediction


def common_task(paths: Sequence[str], trust: Sequence[str] = ()) -> Task:
    """The task of several checkpoints: that of the first that can be read, with the channels of all, and with their regions where these differ."""
    tasks = []
    for path in paths:
        try:
            tasks.append(load_method(path, trust)[0].task)
        except SuiteError:
            continue  # the ensemble itself says what is wrong, of all of them at once
    if not tasks:
        raise SuiteError("no member of the ensemble can be read:\n" + "\n".join(f"  {_reason(path, trust)}" for path in paths))
    channels = dict.fromkeys(c for task in tasks for c in task.channels)
    most = max(tasks, key=lambda task: len(task.regions))  # the first of equals
    whole = most
    if not all(set(task.regions) <= set(most.regions) for task in tasks):
        with suppress(SuiteError):  # of regions that do not go together the ensemble itself tells
            whole = joined(tasks)
    return Task(**{**whole.to_dict(), "channels": tuple(channels), "inputs": ()})  # every member has its own inputs


def _reason(path: str, trust: Sequence[str]) -> str:
    try:
        load_method(path, trust)
    except SuiteError as error:
        return str(error)
    return f"{path}: can be read"


def _member(path: str, method: Method, own: Mapping[str, Any]) -> Member:
    return Member(path, method.task, getattr(method, "target", None), frozenset(own.get("patients") or ()))


def common(task: Task, members: Sequence[Member]) -> Target | None:
    """What makes labels of the regions of `task` as the target of every member does; None where they differ or have none."""
    decoders = [m.decoder for m in members]
    first = decoders[0]
    if all(len(m.task.regions) == len(task.regions) for m in members):
        return first if first is not None and all(d is not None and d.labeling == first.labeling for d in decoders) else None
    thresholds: dict[str, float] = {}
    for member, decoder in zip(members, decoders, strict=True):
        if not isinstance(decoder, RegionSigmoid) or not isinstance(first, RegionSigmoid) or decoder.decoding != first.decoding:
            return None
        for region, threshold in zip(member.task.regions, decoder.thresholds, strict=True):
            if thresholds.setdefault(region, threshold) != threshold:
                return None
    return RegionSigmoid(task, thresholds, first.decoding) if isinstance(first, RegionSigmoid) else None


def _untold(task: Task, members: Sequence[Member]) -> list[str]:
    """The regions that no member knows."""
    return [region for region in task.regions if not any(region in m.task.regions for m in members)]


def _differences(theirs: Task, ours: Task) -> list[str]:
    """How a member's task does not fit that of the ensemble or of the data. One of fewer regions has other classes, and fits by values on disk."""
    problems = []
    if set(theirs.regions) < set(ours.regions):
        values = ours.region_values()
        for region, own in theirs.region_values().items():
            if own != values[region]:
                problems.append(f"its region {region} holds the values {sorted(own)}, not {sorted(values[region])}")
    else:
        for name in ("classes", "regions"):
            first, second = list(getattr(theirs, name).items()), list(getattr(ours, name).items())
            if first != second:
                problems.append(f"its {name} {_plain(first)} are not {_plain(second)}")
    lacking = [c for c in theirs.channels if c not in ours.channels]
    if lacking:
        problems.append(f"needs the channel(s) {', '.join(lacking)}; there are {', '.join(ours.channels)}")
    return problems


def _plain(items: Sequence[tuple[str, Sequence[Any]]]) -> str:
    return ", ".join(f"{name}: {'+'.join(map(str, values))}" for name, values in items)


def _raise(problems: Sequence[str], title: str, most: int = 20) -> None:
    if problems:
        more = [f"  and {len(problems) - most} more"] if len(problems) > most else []
        raise SuiteError("\n".join([f"{len(problems)} {title}:", *(f"  {p}" for p in problems[:most]), *more]))
