"""Parameters and multiply-adds of the networks in Table VII of Zhao et al. (IEEE JBHI 2023), beside the paper's figures.

For one patch of 96^3 voxels with four channels and four classes; the 2D network goes through its 96 slices, the 2.5D network through its 96 packs
of three. Nothing is computed: shapes are enough. `python benchmarks/umm_complexity.py [--rows unet_2d ...] [--out table.csv]`.
"""

import argparse
import csv
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch.utils.flop_counter import FlopCounterMode

from lesionbench.checkpoint import build_method
from lesionbench.jobs.command_line import CONF
from lesionbench.resolvers import register

# row -> parameters (M), FLOPs (G) in Table VII
PAPER = {
    "unet_2d": (0.496, 19.257),
    "unet_plus_plus": (6.438, 95.964),
    "attention_unet": (5.863, 147.517),
    "swin_unet": (6.303, 64.91),
    "unet_3d": (1.440, 35.496),
    "basic_unet": (5.752, 190.147),
    "dynunet": (None, None),
    "segresnet": (4.702, 62.788),
    "transbts": (31.775, 111.509),
    "unetr": (102.222, 85.757),
    "swin_unetr": (15.705, 84.399),
    "unet_2_5d": (1.323, 30.196),
    "umm": (3.259, 84.949),
}


def complexity(row: str) -> tuple[int, int]:
    """Parameters and multiply-adds of a row of `sweep=umm_rows`, all its branches together, in one forward pass."""
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=["experiment=umm/brats2020", "sweep=umm_rows", f"row={row}"])
    task = instantiate(cfg.data, _convert_="all").task
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        method = build_method(OmegaConf.to_container(cfg.model, resolve=True), task).eval()
        method(torch.empty(1, len(task.channels), *cfg.data.patch))
    return sum(p.numel() for p in method.parameters()), counter.get_total_flops() // 2


def main() -> None:
    """Prints the table, and writes it as CSV where `--out` says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", default=list(PAPER), choices=list(PAPER), metavar="ROW")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    table = []
    for row in arguments.rows:
        parameters, operations = complexity(row)
        millions, giga = PAPER[row]
        table.append([row, f"{parameters / 1e6:.4f}", millions or "", f"{operations / 1e9:.2f}", giga or ""])
        print("| " + " | ".join(map(str, table[-1])) + " |", flush=True)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        with arguments.out.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(
                [["row", "parameters_M", "paper_parameters_M", "multiply_adds_G", "paper_flops_G"], *table]
            )


if __name__ == "__main__":
    main()
