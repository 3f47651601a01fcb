"""Effects of the BraTS recipe that need no training of their own; each prints a table and writes it as CSV.

    python benchmarks/recipe_effects.py raters staple_raters.csv
    python benchmarks/recipe_effects.py specks et_threshold_specks.csv
    python benchmarks/recipe_effects.py threshold et_threshold.csv RUN_FOLDER ...
    python benchmarks/recipe_effects.py ensembles ensemble_by_seed.csv RUN_FOLDER ...
    python benchmarks/recipe_effects.py hardest losses_hardest.csv RUN_FOLDER ...

`raters`: one good and two poor raters of a cube, whose errors are independent or partly the same, fused by vote and by STAPLE, five seeds.
`specks`: the smallest volume of enhancing tumor chosen on one half of 80 drawn cases and applied to the other, and the other way round, five
seeds. A quarter of the cases has no enhancing tumor, half of all have a false speck of it.
`threshold`: the smallest volume of enhancing tumor chosen on one half of the held-out cases of each run, applied to the other half, and the
other way round (cases of trained networks). The halves alternate in the order of case names.
`ensembles`: mean Dice over the regions and cases of tested ensembles (their run folders), a row for each seed, beside that of each member. Of STAPLE
also the sensitivities that it estimated, mean over regions and cases, beside the true ones.
`hardest`: cross-entropy of held-out cases, over the tenth of the voxels where it is largest and over all, for each loss and seed (runs on nested
regions tested with writer.on_test=true writer.probabilities=true, whose maps have two bytes for a value).
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import csv
import math
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

SEEDS = range(5)
SIDE, INNER = 24, slice(6, 18)
GOOD, POOR = (0.02, 0.005), {"35 %, 5 %": (0.35, 0.05), "45 %, 10 %": (0.45, 0.10)}  # share missed inside, share added outside
SHARED = (0.0, 0.25, 0.5, 1.0)  # of the errors of the second poor rater are those of the first


def raters() -> Iterator[dict]:
    """A row for each kind of errors: Dice of the three raters, of the vote and of STAPLE, and the estimated sensitivities."""
    import torch

    from lesionbench.task import Task
    from lightning_modules.raters.fusion import Staple, Vote

    task = Task(channels=("flair",), classes={"background": 0, "lesion": 1})
    truth = torch.zeros(SIDE, SIDE, SIDE, dtype=torch.bool)
    truth[INNER, INNER, INNER] = True

    def drawn(errors: tuple[float, float], noise: torch.Tensor) -> torch.Tensor:
        return torch.where(truth, noise >= errors[0], noise < errors[1])

    def dice(mask: torch.Tensor) -> float:
        return 2 * float((mask & truth).sum()) / float(mask.sum() + truth.sum())

    for name, errors in POOR.items():
        for shared in SHARED:
            found: dict[str, list[float]] = {}
            for seed in SEEDS:
                generator = torch.Generator().manual_seed(seed)
                noise = [torch.rand(truth.shape, generator=generator) for _ in range(4)]
                same = noise.pop() < shared
                masks = [drawn(GOOD, noise[0]), drawn(errors, noise[1]), drawn(errors, torch.where(same, noise[1], noise[2]))]
                fusions = {"vote": Vote(task), "staple": Staple(task, margin=None)}
                for fusion in fusions.values():
                    for place, mask in enumerate(masks):
                        fusion.add(mask[None].float(), mask.to(torch.int8), name=str(place))
                results = {f: fusion.result() for f, fusion in fusions.items()}
                values = {f"rater_{i}": dice(m) for i, m in enumerate(masks)} | {f: dice(r.regions[0] > 0.5) for f, r in results.items()}
                values |= {f"sensitivity_{i}": results["staple"].table[f"staple_sensitivity_lesion_{i}"] for i in range(3)}
                for key, value in values.items():
                    found.setdefault(key, []).append(value)
            means = {key: statistics.mean(values) for key, values in found.items()}
            spread = {f"{key}_sd": statistics.stdev(found[key]) for key in ("vote", "staple")}
            yield {"poor": name, "shared": shared, **means, **spread}


def specks() -> Iterator[dict]:
    """A row for each seed: mean ET Dice of both halves without and with the threshold of the other half."""
    import numpy as np
    import torch

    from datamodules.readers.brats_files import brats_task
    from lightning_modules.evaluation.tuning import HeldOut, best_threshold
    from lightning_modules.metrics.overlap import overlap_metrics
    from lightning_modules.postprocessing import PostProcessing

    task, et, body = brats_task("2020"), 3, 1
    grid = np.stack(np.meshgrid(*[np.arange(32)] * 3, indexing="ij"))

    def ball(center: Sequence[float], radius: float) -> np.ndarray:
        return ((grid - np.reshape(center, (3, 1, 1, 1))) ** 2).sum(0) < radius**2

    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        cases = []
        for number in range(80):
            center, radius = rng.uniform(12, 16, 3), rng.uniform(3, 7)
            truth = ball(center, radius) & (number % 4 > 0)
            drawn = ball(center + rng.uniform(-1, 1, 3), radius + rng.uniform(-0.5, 0.5)) & (number % 4 > 0)
            if rng.random() < 0.5:
                drawn |= ball(rng.uniform(24, 28, 3), rng.uniform(1, 3.5))
            labels = torch.from_numpy(np.where(drawn, et, body).astype(np.int8))  # the rest of the volume is core, for the sake of brevity
            kept, dropped = (overlap_metrics(mask, truth)["dice"] for mask in (drawn, np.zeros_like(truth)))
            cases.append((HeldOut("", str(number), str(number), int(drawn.sum()), kept, dropped), labels, truth))
        order = rng.permutation(len(cases))
        halves = [cases[i] for i in order[::2]], [cases[i] for i in order[1::2]]
        chosen = [best_threshold([case for case, _, _ in half])[0] for half in halves]
        after = []
        for half, volume in zip(halves, reversed(chosen), strict=True):
            rules = PostProcessing(min_volume={"ET": volume})
            after += [overlap_metrics((rules.labels(labels, task) == et).numpy(), truth)["dice"] for _, labels, truth in half]
        before = statistics.mean(case.kept for case, _, _ in cases)
        gain = statistics.mean(after) - before
        yield {
            "seed": seed,
            "threshold_a": chosen[0],
            "threshold_b": chosen[1],
            "before": before,
            "after": statistics.mean(after),
            "gain": gain,
        }


def threshold(folders: Sequence[str]) -> Iterator[dict]:
    """A row for each run: mean ET Dice of both halves without and with the threshold of the other half."""
    from lightning_modules.evaluation.tuning import best_threshold, held_out
    from lightning_modules.postprocessing import PostProcessing

    for folder in folders:
        cases = sorted(held_out(Path(folder), "ET", "dice", PostProcessing({"WT": 10}), None), key=lambda c: c.case)
        halves = cases[::2], cases[1::2]
        chosen = [best_threshold(half)[0] for half in halves]
        after = [c.dropped if c.volume < t else c.kept for half, t in zip(halves, reversed(chosen), strict=True) for c in half]
        before = [c.kept for half in halves for c in half]
        yield {
            "run": "/".join(Path(folder).parts[-4:]),
            "cases": len(cases),
            "without_et": sum(c.dropped == 1 for c in cases),
            "false_et": sum(c.dropped == 1 and c.volume > 0 for c in cases),
            "threshold_a": chosen[0],
            "threshold_b": chosen[1],
            "before": statistics.mean(before),
            "after": statistics.mean(after),
            "gain": statistics.mean(after) - statistics.mean(before),
        }


def defined(cells: Iterable[object]) -> float:
    """Mean of the cells that hold a number."""
    values = [float(cell) for cell in cells if cell not in ("", None)]
    return statistics.mean(v for v in values if not math.isnan(v))


def ensembles(folders: Sequence[str]) -> Iterator[dict]:
    """A row for each seed: mean Dice of every member alone and of each fusion of them."""
    import yaml

    from lesionbench.results import read_rows

    def mean(folder: Path, metric: str) -> float:
        rows = read_rows(folder / "test" / "cases.csv")
        return defined(r[metric] for r in rows if r["region"] and not r["member"])

    def estimated(folder: Path, number: int) -> float:
        rows = [r for r in read_rows(folder / "test" / "cases.csv") if not r["region"] and not r["member"]]
        names = [name for name in rows[0] if name.startswith("staple_sensitivity_") and name.endswith(f"_m{number}")]
        return defined(r[name] for r in rows for name in names)

    found: dict[int, dict[str, float]] = {}
    for folder in map(Path, folders):
        config = yaml.safe_load((folder / "config.yaml").read_text())
        row = found.setdefault(config["seed"], {"seed": config["seed"]})
        for number, path in enumerate(config["model"]["checkpoints"], start=1):
            row[f"member_{number}"] = mean(Path(path).parent.parent, "dice")
        row[config["model"]["fusion"]] = mean(folder, "dice")
        if config["model"]["fusion"] == "staple":
            for number, path in enumerate(config["model"]["checkpoints"], start=1):
                row[f"estimated_{number}"] = estimated(folder, number)
                row[f"true_{number}"] = mean(Path(path).parent.parent, "sensitivity")
    yield from (found[seed] for seed in sorted(found))


def hardest(folders: Sequence[str]) -> Iterator[dict]:
    """A row for each run: means over its test cases of the cross-entropy over a tenth of the voxels, of that over all, and of Dice."""
    import numpy as np
    import yaml

    from lesionbench.results import read_rows
    from lightning_modules.evaluation.tuning import tested_cases

    for folder in map(Path, folders):
        config, worst, every = yaml.safe_load((folder / "config.yaml").read_text()), [], []
        for case in tested_cases(folder, None, ()):
            regions = case.regions().double().numpy()  # nested, the largest first
            classes = -np.diff(np.concatenate([np.ones_like(regions[:1]), regions, np.zeros_like(regions[:1])]), axis=0)
            depth = case.task.region_matrix.sum(axis=0)  # of a class: in how many regions it lies
            said = np.take_along_axis(classes, depth[case.truth.numpy()][None], axis=0)[0]
            loss = np.sort(-np.log(said.clip(2**-11)).ravel())
            worst.append(loss[-(len(loss) // 10) :].mean())
            every.append(loss.mean())
        rows = [r for r in read_rows(folder / "test" / "cases.csv") if r["region"] and not r["member"]]
        yield {
            "loss": config["model"]["loss"]["_target_"].rsplit(".", 1)[-1],
            "seed": config["seed"],
            "hardest_tenth": float(np.mean(worst)),
            "all": float(np.mean(every)),
            "dice": statistics.mean(float(r["dice"]) for r in rows),
        }


def write(rows: Sequence[Mapping], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(rows[0])
        writer.writerows([f"{v:.4f}" if isinstance(v, float) else v for v in row.values()] for row in rows)
    print(path.read_text())


def main() -> None:
    kind, path, *folders = sys.argv[1:]
    drawn, of_runs = {"raters": raters, "specks": specks}, {"threshold": threshold, "ensembles": ensembles, "hardest": hardest}
    write(list(of_runs[kind](folders) if kind in of_runs else drawn[kind]()), Path(path))


if __name__ == "__main__":
    main()
