"""Where a region is false as a whole: a small tree on predicted volumes, learned from held-out predictions (Jabareen & Lukassen, BrainLes 2021)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lesionbench.errors import unknown
from lesionbench.results import write_json
from lightning_modules.evaluation.tuning import METRICS, HeldOut, gathered, held_out
from lightning_modules.postprocessing import PostProcessing, inside

Boxes = list[dict[str, list[float | None]]]


@dataclass(frozen=True)
class Suppression:
    """A chosen rule and what it does.

    Attributes:
        region, metric: what was tuned.
        suppress: region -> boxes of class volumes in which it goes, see `PostProcessing`.
        before, after: mean score of the cases that the rule was learned from, without and with it.
        held_out: mean score where the cases of each run are judged by the rule learned from the other runs; None for one run.
        dropped, wrongly: cases that lose the region by it, and those of them that have it in truth.
        patients: whom it was learned from.
        runs: run folders.
    """

    region: str
    metric: str
    suppress: dict[str, Boxes]
    before: float
    after: float
    held_out: float | None
    dropped: int
    wrongly: int
    patients: list[str]
    runs: list[str]

    def report(self) -> str:
        """What was found, in words."""
        other = "" if self.held_out is None else f"; with rules learned from the other runs {self.held_out:.4f}"
        boxes = " or ".join(" and ".join(_bounds(name, *bounds) for name, bounds in box.items()) for box in self.suppress[self.region])
        return (
            f"{self.region} goes where {boxes or '(nowhere)'}, learned from {len(self.patients)} held-out patient(s) of {len(self.runs)} run(s): "
            f"{self.dropped} case(s) lose it, {self.wrongly} of which have it; mean {self.metric} {self.before:.4f} -> {self.after:.4f} on these{other}"
        )

    def write(self, path: Path | str) -> Path:
        """Writes what `postprocessing.thresholds` reads."""
        return write_json(path, vars(self))


def tune(
    runs: Path | str | Sequence[Path | str],
    *,
    region: str = "ET",
    metric: str = "dice",
    depth: int = 2,
    rules: PostProcessing | None = None,
    data_root: str | None = None,
    trust: Sequence[str] = (),
) -> Suppression:
    """Learns from predicted volumes of the classes, on the cases that have any of `region` predicted, whether the truth has it.

    Args:
        runs, region, metric, rules, data_root, trust: see `tuning.tune`; thresholds of probability among the rules are applied first.
        depth: of the tree.

    Raises:
        SuiteError: see `tuning.tune`.
    """
    if metric not in METRICS:
        raise unknown("tune.metric", metric, METRICS)
    folders, cases = gathered(runs, lambda folder: held_out(folder, region, metric, rules or PostProcessing(), data_root, trust))
    boxes = learned(cases, depth)
    judged = [(c, gone(c, boxes)) for c in cases]
    others = []
    for folder in folders if len(folders) > 1 else ():
        found = learned([c for c in cases if c.run != folder], depth)
        others += [c.dropped if gone(c, found) else c.kept for c in cases if c.run == folder]
    return Suppression(
        region,
        metric,
        {region: boxes},
        float(np.mean([c.kept for c in cases])),
        float(np.mean([c.dropped if out else c.kept for c, out in judged])),
        float(np.mean(others)) if others else None,
        sum(out for _, out in judged),
        sum(out and c.present for c, out in judged),
        sorted({c.patient for c in cases}),
        folders,
    )


def gone(case: HeldOut, boxes: Boxes) -> bool:
    """Whether a case that has the region loses it."""
    return case.volume > 0 and any(inside(box, case.classes) for box in boxes)


def learned(cases: Sequence[HeldOut], depth: int = 2) -> Boxes:
    """The leaves of a tree in which most cases lack the region in truth; none where all cases are alike."""
    from sklearn.tree import DecisionTreeClassifier

    told = [c for c in cases if c.volume > 0]
    if len({c.present for c in told}) < 2:
        return []
    names = list(told[0].classes)
    volumes = np.array([[c.classes[name] for name in names] for c in told], dtype=float)
    tree = DecisionTreeClassifier(max_depth=depth, random_state=0).fit(volumes, [c.present for c in told]).tree_
    return list(_leaves(tree, names, 0, {}))


def _leaves(tree: Any, names: Sequence[str], node: int, box: dict[str, list[float | None]]) -> Iterator[dict[str, list[float | None]]]:
    """The boxes of the leaves below a node that say the region is absent (the first of the two classes)."""
    if tree.children_left[node] == -1:
        absent, present = tree.value[node][0]
        if absent > present:
            yield box
        return
    name, bound = names[tree.feature[node]], float(tree.threshold[node])
    low, high = box.get(name, [None, None])
    yield from _leaves(tree, names, tree.children_left[node], {**box, name: [low, bound if high is None else min(high, bound)]})
    yield from _leaves(tree, names, tree.children_right[node], {**box, name: [bound if low is None else max(low, bound), high]})


def _bounds(name: str, low: float | None, high: float | None) -> str:
    return " and ".join([*([f"{name} > {low:g}"] if low is not None else []), *([f"{name} <= {high:g}"] if high is not None else [])])
