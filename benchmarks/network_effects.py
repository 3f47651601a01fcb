"""Tables of methods that are a network with a loss, from run folders: context, horizontal blocks, residual blocks.

    python benchmarks/network_effects.py <table> <folder that holds runs> <CSV>

`context` (docs/methods/cmm_net_3d.md, hierarchical_global_modality_interaction.md): mean Dice of the two classes of the toy, Dice of the lesion whatever its class, both over the pixels of all test
images, and the training loss over the last tenth of the iterations.
`sizes` (docs/methods/emsvit.md): the same with the Dice of each class, the small and the large lesions.
`simulated`: Dice of every region, and the training loss.
`enhancing` (docs/methods/modified_unet_horizontal.md): the same, sensitivity for enhancing tumor where there is some, and the volume that is taken for it where
there is none.

Reads `config.yaml`, `test/cases.csv` and `metrics.csv` of every finished run below the folder. Runs are grouped by what their models differ in,
but for seeds; a row is a group and a measure, with mean and standard deviation over seeds. The last table is printed as Markdown.
"""

import csv
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pairing_effects import Measured, print_table, write_table

from lesionbench.results import read_rows

ALONE = ("seed", "metrics")  # what no arm is told by


def flat(config: Any, name: str = "") -> dict[str, str]:
    """Dotted key -> value as text, without `ALONE`."""
    if not isinstance(config, Mapping):
        return {name: str(config)}
    return {k: v for key, value in config.items() if key not in ALONE for k, v in flat(value, f"{name}.{key}".lstrip(".")).items()}


def arms(folders: Iterable[Path]) -> dict[str, dict[int, Path]]:
    """What a run differs in from the others -> seed -> folder."""
    configs = {folder: yaml.safe_load((folder / "config.yaml").read_text()) for folder in folders}
    models = {folder: flat({"model": config["model"]}) for folder, config in configs.items()}
    shared = set.intersection(*(set(model) for model in models.values())) if models else set()
    told = sorted(key for key in shared if len({model[key] for model in models.values()}) > 1)
    found: dict[str, dict[int, Path]] = defaultdict(dict)
    for folder, model in sorted(models.items()):
        name = ", ".join(f"{key.removeprefix('model.').removesuffix('._target_')}={model[key].rpartition('.')[2]}" for key in told)
        found[name][configs[folder]["seed"]] = folder
    return found


def final_loss(folder: Path) -> float:
    """Mean of the training loss over the last tenth of what was logged."""
    with (folder / "metrics.csv").open(newline="") as file:
        values = [float(row["value"]) for row in csv.DictReader(file) if row["name"] == "train/loss"]
    return statistics.mean(values[-max(len(values) // 10, 1) :])


def dice_by_region(rows: list[dict]) -> Measured:
    """Mean Dice of every region over the cases."""
    values: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        values[row["region"]].append(row["dice"])
    return {("", f"Dice {region}"): statistics.mean(found) for region, found in values.items() if region}


def context(folder: Path) -> Measured:
    """Of the toy of context, over the pixels of all test images: guessed classes have a Dice of 1/2."""
    dice = {region: values["dice"] for region, values in json.loads((folder / "test" / "dataset.json").read_text())[""].items()}
    measures = {"class Dice": (dice["A"] + dice["B"]) / 2, "lesion Dice": dice["LESION"], "training loss": final_loss(folder)}
    return {("", name): value for name, value in measures.items()}


def sizes(folder: Path) -> Measured:
    """Of the toy of context whose classes are two sizes."""
    dice = json.loads((folder / "test" / "dataset.json").read_text())[""]
    return context(folder) | {("", "small"): dice["A"]["dice"], ("", "large"): dice["B"]["dice"]}


def simulated(folder: Path) -> Measured:
    """Of simulated tumors."""
    return dice_by_region(read_rows(folder / "test" / "cases.csv")) | {("", "training loss"): final_loss(folder)}


def enhancing(folder: Path) -> Measured:
    """Of simulated tumors, some without enhancing tumor."""
    rows = read_rows(folder / "test" / "cases.csv")
    there, absent = ([row for row in rows if row["region"] == "ET" and (row["truth_volume_ml"] > 0) == some] for some in (True, False))
    return dice_by_region(rows) | {
        ("", "ET sensitivity"): statistics.mean(row["sensitivity"] for row in there),
        ("", "Dice ET where there is some"): statistics.mean(row["dice"] for row in there),
        ("", "false ET, ml"): statistics.mean(row["volume_ml"] for row in absent),
        ("", "cases without ET"): float(len(absent)),
    }


TABLES: dict[str, Callable[[Path], Measured]] = {"context": context, "sizes": sizes, "simulated": simulated, "enhancing": enhancing}


def main(table: str, root: str, out: str) -> None:
    """Writes the table and prints it."""
    summaries = [path for path in sorted(Path(root).rglob("summary.json")) if json.loads(path.read_text()).get("status") == "finished"]
    found = {
        name: {seed: TABLES[table](f) for seed, f in sorted(seeds.items())} for name, seeds in arms(p.parent for p in summaries).items()
    }
    write_table(Path(out), found)
    print_table(found)


if __name__ == "__main__":
    main(*sys.argv[1:])
