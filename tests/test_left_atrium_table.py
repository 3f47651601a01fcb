"""The left-atrium table of semi-supervised papers: its sweep composes, every row runs on the data's true layout, `job=compare` prints it."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf

from lesionbench.checkpoint import build_method
from lesionbench.jobs.command_line import CONF, options, runs_of
from tests.fake_data import write_fake_left_atrium
from tests.harness import composed, run, run_folders

ROOT = Path(__file__).parent.parent
PARAMETERS = yaml.safe_load((CONF / "sweep" / "left_atrium_table.yaml").read_text())["hydra"]["sweeper"]["params"]
ROWS = [*PARAMETERS["model"].split(","), "coranet"]


def named(row: str) -> list[str]:
    """How a row is run."""
    return ["experiment=coranet/left_atrium"] if row == "coranet" else ["benchmark=left_atrium", f"model={row}"]


def test_every_method_that_runs_on_the_left_atrium_is_a_row():
    found = {model for model in options("model") if any(" ".join(named(model)) == run for run in runs_of(model))}
    assert set(ROWS) == found
    assert (PARAMETERS["benchmark"], PARAMETERS["data.split.labeled"], PARAMETERS["seed"]) == ("left_atrium", "4,8", "0,1,2")


@pytest.mark.parametrize("row", ROWS)
def test_rows_share_data_protocol_and_number_of_iterations(row):
    cfg = composed("sweep=left_atrium_table", *named(row), "data.split.labeled=4")
    plain = composed("sweep=left_atrium_table", *named(ROWS[0]), "data.split.labeled=4")
    for key in ("patch", "metrics", "select", "objective", "augmentation", "data.split", "data.preprocessing", "data.named_split"):
        assert OmegaConf.select(cfg, key) == OmegaConf.select(plain, key), key
    streams = {name: dict(spec) for name, spec in cfg.data.streams.items() if spec is not None}
    labeled = next(iter(streams.values()))
    assert labeled["cases"] == "labeled"
    batch = labeled.get("batch_size", cfg.data.batch_size)
    assert batch == 2
    assert cfg.epochs * (cfg.data.samples_per_epoch // batch) == pytest.approx(6000, abs=30)
    data = instantiate(cfg.data, _convert_="all")
    with torch.device("meta"):
        method = build_method(OmegaConf.to_container(cfg.model, resolve=True), data.task)
    assert {*streams} == ({"default"} if row.startswith("supervised") else set(method.streams))


@pytest.mark.parametrize("sweep", ["left_atrium_table", "left_atrium_small"])
def test_the_bound_uses_all_labels_and_the_other_row_the_labeled_alone(sweep, tmp_path):
    root = write_fake_left_atrium(tmp_path)
    seen = {}
    for row in ("left_atrium supervised", "left_atrium_full supervised", "left_atrium mean_teacher"):
        benchmark, model = row.split()
        cfg = composed(f"sweep={sweep}", f"benchmark={benchmark}", f"model={model}", f"data.root={root}", "data.split.labeled=2")
        data = instantiate(cfg.data, _convert_="all")
        parts = data.divided(data.cases())
        seen[row] = {name: [c.id for c in parts[spec["cases"]]] for name, spec in data.streams.items()}
        seen[row]["test"] = [c.id for c in parts["test"]]
    alone, bound, semi = seen.values()
    assert len(alone["default"]) == 2
    assert alone["default"] == semi["labeled"]
    assert sorted(bound["default"]) == sorted(semi["labeled"] + semi["unlabeled"])
    assert alone["test"] == bound["test"] == semi["test"]
    assert not {*alone["test"]} & {*bound["default"]}


def test_the_table_is_printed(tmp_path):
    root = write_fake_left_atrium(tmp_path / "data")
    common = ["sweep=left_atrium_table", f"runs={tmp_path / 'runs'}"]
    for labeled in (2, 4):
        for row in ("supervised", "mean_teacher"):
            arguments = ["debug=tiny", "trainer=cpu", "threads=1", f"data.root={root}", f"data.split.labeled={labeled}", "data.split.val=0"]
            small = ["model.network.features=[4,4,8]", "model.network.convolutions=[1,1,1]"]
            run(*common, *named(row), *arguments, *small, "callbacks.figures=null", "writer.on_test=false", "patch_cap=16")
    assert len(run_folders(tmp_path / "runs")) == 4
    printed = subprocess.run(
        [sys.executable, "run.py", "job=compare", *common, "hydra.mode=RUN", f"out={tmp_path / 'out'}"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    assert printed.returncode == 0, printed.stderr
    for text in (
        "mean_teacher/left_atrium, data.split.labeled=2",
        "supervised/left_atrium, data.split.labeled=4",
        "dice",
        "jaccard",
        "hd95_pooled_vox",
        "asd_directed_vox",
    ):
        assert text in printed.stdout
    table = (tmp_path / "out" / "comparison.csv").read_text()
    assert len(re.findall("^", table, flags=re.MULTILINE)) >= 4 * 4


def test_the_page_shows_the_commands():
    page = (ROOT / "docs" / "left_atrium.md").read_text()
    assert "sweep=left_atrium_table hydra.mode=RUN" in page
    assert all(shlex.split(line) for line in page.splitlines() if line.startswith("python run.py"))
