"""The rows of the paper's comparison tables: every one composes and builds, with the parameters of Table VII where its plan is known."""

from functools import cache

import pytest
import torch
from omegaconf import OmegaConf

from benchmarks.umm_complexity import PAPER, complexity
from lesionbench.checkpoint import build_method
from lesionbench.task import Task
from tests.fake_data import write_fake_ibsr
from tests.harness import composed, rows, run, run_folders

counted = cache(complexity)
ROWS = list(composed("experiment=umm/ibsr", "sweep=umm_rows").rows)
BRANCHES = {"umm": "spv", "umm_2d_2_5d": "sp", "umm_2d_3d": "sv", "umm_2_5d_3d": "pv", "unet_2_5d": "p"}
SLICES = ("unet_2d", "unet_plus_plus", "attention_unet", "swin_unet")


@pytest.mark.parametrize("row", ROWS)
def test_row_builds(row):
    cfg = composed("experiment=umm/ibsr", "sweep=umm_rows", f"row={row}")
    task = Task(("t1",), {"background": 0, "CSF": 1, "GM": 2, "WM": 3}, slice_axis=1)
    with torch.device("meta"):
        method = build_method(OmegaConf.to_container(cfg.model, resolve=True), task)
    names = BRANCHES.get(row, "s" if row in SLICES else "v")
    assert "".join(method.network) == names
    assert method.mutual == ("gated" if len(names) > 1 else "none")
    dimensions = {name: branch.network.dimensions for name, branch in method.network.items()}
    assert dimensions == {name: {"s": 2, "p": 2, "v": 3}[name] for name in names}


@pytest.mark.parametrize("row", ["unet_2d", "unet_3d", "basic_unet", "segresnet", "unetr", "swin_unetr"])
def test_parameters_of_table_vii(row):
    assert counted(row)[0] // 1000 == round(1000 * PAPER[row][0])  # in thousands, cut off


@pytest.mark.parametrize(("row", "rel"), [("unet_3d", 0.08), ("segresnet", 0.01), ("swin_unetr", 0.01), ("transbts", 0.09)])
def test_multiply_adds_of_table_vii(row, rel):
    assert counted(row)[1] / 1e9 == pytest.approx(PAPER[row][1], rel=rel)


def test_parameters_of_umm_are_the_sum_of_its_branches():
    parts = [counted(row) for row in ("unet_2d", "unet_2_5d", "unet_3d")]
    assert counted("umm") == tuple(map(sum, zip(*parts, strict=True)))


def test_swin_unet_the_pack_network_and_transbts_train_together(tmp_path):
    root = write_fake_ibsr(tmp_path / "ibsr")
    small = ["hidden_size=32", "mlp_size=32", "layers=1"]
    run(
        "experiment=umm/ibsr", "model=umm_cross", "debug=tiny", "trainer=cpu", f"data.root={root}", f"runs={tmp_path / 'runs'}", "threads=1",
        "patch_cap=16", "model.mc_samples=2", "callbacks.figures=null", *(f"model.branches.v.{option}" for option in small),
    )  # fmt: skip
    (folder,) = run_folders(tmp_path / "runs")
    found = rows(folder)
    assert {row["member"] for row in found} == {"", "s", "p", "v"}
    assert {"dice", "hd95_vox", "sensitivity", "vr70"} <= set(found[0])
