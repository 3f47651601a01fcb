"""Table of docs/methods/dints_topology_search.md, from run folders.

    python benchmarks/dints_effects.py <folder that holds runs> <CSV>

Of every search below the folder (`experiment=dints_topology_search/simulated`): entropies before and after, mean test Dice over cases and
regions of the search space as it was trained and of the decoded architecture with the same weights, and whether the likeliest paths of every
block by itself would be a network. Of every network trained from its beginning, searched or not: mean test Dice, parameters and
multiply-adds for a patch. One row for each run; runs are told apart by whether the architecture had terms of its own.
"""

import csv
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lesionbench.checkpoint import load_method
from lesionbench.jobs.assembled import quiet
from lesionbench.resolvers import register
from lesionbench.results import read_rows
from lightning_modules.networks import dints
from lightning_modules.networks.topology import PRUNED, dead_end

KIND = {(True, True): "searched", (True, False): "searched without terms", (False, True): "fixed", (False, False): "fixed"}


def discretized(network: nn.Module, architecture: list[str]) -> nn.Module:
    """The network of an architecture with the weights that its paths and operations have in a search space."""
    space = network.dints_space
    made = dints(
        next(network.stem_down["0"].parameters()).shape[1],
        network.stem_finals[-1].out_channels,
        architecture=architecture,
        dimensions=network.dimensions,
        width=space.filter_nums[0],
        downsample=space.use_downsample,
    )
    theirs, own = network.state_dict(), {}
    for name in made.state_dict():
        source = name
        if ".op.ops.0." in name:
            block, path = (int(n) for n in name.split("(")[1].split(")")[0].split(","))
            source = name.replace(".op.ops.0.", f".op.ops.{architecture[block][path]}.")
        own[name] = theirs[source]
    made.load_state_dict(own)
    return made


def tested(method: Any, data: Any) -> float:
    """Mean Dice over test cases and regions."""
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False, use_distributed_sampler=False)  # fmt: skip
    trainer.test(method, datamodule=data, verbose=False)
    return statistics.mean(row["dice"] for row in method.test_results.compute() if row["region"])


def of_search(run: Path, config: dict[str, Any]) -> dict[str, Any]:
    """What a search came to."""
    method, _ = load_method(run / "search" / "checkpoints" / "last.ckpt")
    with (run / "search" / "metrics.csv").open(newline="") as file:
        first = {row["name"]: float(row["value"]) for row in reversed(list(csv.DictReader(file)))}
    data = instantiate(OmegaConf.create(config["data"]), _convert_="all")
    data.prepare_data()
    architecture, after = method.decoded(), method.entropies()
    alone = dead_end(method.independent())
    searched = tested(method, data)
    method.network, method.test_results = discretized(method.network, architecture), type(method.test_results)()
    decoded = tested(method, data)
    return {
        **{f"{name} before": first[f"train/{name}"] for name in after},
        **{f"{name} after": float(value) for name, value in after.items()},
        "dice searched": searched,
        "dice decoded": decoded,
        "gap": searched - decoded,
        "kept": sum(c != PRUNED for row in architecture for c in row),
        "independent": "infeasible" if alone else "feasible",
        "architecture": " ".join(architecture),
    }


def of_network(run: Path, config: dict[str, Any]) -> dict[str, Any]:
    """What a trained network came to, and what it costs."""
    method, _ = load_method(run / "checkpoints" / "last.ckpt")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        method.network(torch.zeros(1, method.task.in_channels, *config["patch"]))
    return {
        "dice trained": statistics.mean(
            row["dice"] for row in read_rows(run / "test" / "cases.csv") if row["region"] and not row["member"]
        ),
        "parameters": sum(p.numel() for p in method.network.parameters()),
        "million multiply-adds": counter.get_total_flops() / 2e6,
    }


def main(root: str, out: str) -> None:
    """Writes the rows and prints mean and standard deviation of each kind."""
    quiet()
    register()
    found = []
    for path in sorted(Path(root).rglob("summary.json")):
        run = path.parent
        if json.loads(path.read_text()).get("status") != "finished":
            continue
        config = yaml.safe_load((run / "config.yaml").read_text())
        search = (run / "search").is_dir()
        row = {"network": KIND[search, any(config["model"]["weights"].values())], "seed": config["seed"]}
        row |= of_search(run, config) if search else {}
        row |= of_network(run, config) if (run / "checkpoints" / "last.ckpt").exists() else {}
        found.append(row)
    found.sort(key=lambda row: (row["network"], row["seed"]))
    columns = list(dict.fromkeys(name for row in found for name in row))
    with Path(out).open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()} for row in found)
    for kind in dict.fromkeys(row["network"] for row in found):
        print(kind)
        for name in columns[2:]:
            values = [row[name] for row in found if row["network"] == kind and isinstance(row.get(name), float | int)]
            if values:
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                print(f"  {name}: {statistics.mean(values):.3f} ± {spread:.3f}  ({', '.join(f'{v:.3f}' for v in values)})")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
