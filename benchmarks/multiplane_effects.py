"""What the vote of three planes is worth, and what is left of it when planes collapse.

    python run.py -m experiment=multiplane_unetpp/simulated seed=0,1,2 runs=runs/multiplane
    python benchmarks/multiplane_effects.py docs/results/multiplane_unetpp_simulated.csv runs/multiplane

For every run below the folder and every test case: Dice of each plane, of their vote and of their mean; then of the vote where the answer
of one plane, and of two, is replaced by that of a network whose first class has swallowed the background.
"""

import csv
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from lesionbench.checkpoint import load_method
from lesionbench.task import Task
from lightning_modules.metrics.overlap import overlap_metrics
from lightning_modules.raters.fusion import LabelVote, Mean

PLANES = {"axial": "", "coronal": "coronal", "sagittal": "sagittal"}
Answer = tuple[torch.Tensor, torch.Tensor]


def fused(fusion, answers: list[Answer], target) -> torch.Tensor:
    for regions, labels in answers:
        fusion.add(regions, labels)
    return target.labels(fusion.result().regions[None])[0]


def collapsed(task: Task, shape: torch.Size) -> Answer:
    labels = torch.ones(shape, dtype=torch.int8)
    return task.region_masks(labels).float(), labels


def of_run(folder: Path) -> list[dict[str, object]]:
    cfg = OmegaConf.load(folder / "config.yaml")
    data = instantiate(cfg.data, _convert_="all")
    data.prepare_data()
    data.setup("test")
    paths = [folder / place / "checkpoints" for place in PLANES.values()]
    methods = [load_method(str(path / ("best.ckpt" if (path / "best.ckpt").exists() else "last.ckpt")))[0].eval() for path in paths]
    target, task = methods[0].target, data.task
    rows = []
    for batch in data.test_dataloader():
        with torch.no_grad():
            found = [method.predict_case(batch) for method in methods]
        answers = [(p.regions, p.labels) for p in found]
        swallowed = collapsed(task, answers[0][1].shape)
        labels = {name: said for name, (_, said) in zip(PLANES, answers, strict=True)}
        labels["vote"] = fused(LabelVote(task), answers, target)
        labels["mean"] = fused(Mean(task), answers, target)
        for count in (1, 2):
            for gone in combinations(range(3), count):
                names = "_".join(list(PLANES)[g] for g in gone)
                some = [swallowed if place in gone else answer for place, answer in enumerate(answers)]
                labels[f"vote_without_{names}"] = fused(LabelVote(task), some, target)
        truth = task.region_masks(batch["label"][0, 0]).numpy()
        for name, said in labels.items():
            for region, ours, theirs in zip(task.region_names, task.region_masks(said).numpy(), truth, strict=True):
                dice = round(overlap_metrics(ours, theirs)["dice"], 4)
                rows.append({"seed": cfg.seed, "case": batch["case"][0], "member": name, "region": region, "dice": dice})
    return rows


def main() -> None:
    torch.set_num_threads(1)
    out, root = Path(sys.argv[1]), Path(sys.argv[2])
    rows = [row for path in sorted(root.rglob("config.yaml")) if (path.parent / "coronal").is_dir() for row in of_run(path.parent)]
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    members, regions = list(dict.fromkeys(r["member"] for r in rows)), list(dict.fromkeys(r["region"] for r in rows))
    seeds = list(dict.fromkeys(r["seed"] for r in rows))
    for member in members:
        for region in regions:
            means = [
                float(np.mean([r["dice"] for r in rows if (r["member"], r["region"], r["seed"]) == (member, region, seed)]))
                for seed in seeds
            ]
            each = ", ".join(f"{mean:.3f}" for mean in means)
            print(f"{member:28} {region}  {np.mean(means):.3f} +- {np.std(means, ddof=1) if len(means) > 1 else 0:.3f}  ({each})")


if __name__ == "__main__":
    main()
