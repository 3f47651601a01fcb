"""Data sets that are the folder layout with settings of their own: the steps of docs/data.md, on fake data under the true names."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from datamodules import Folder
from lesionbench.geometry import write_volume
from tests.fake_data import fake_case
from tests.harness import composed, rows, run, run_folders
from tests.test_docs import blocks, commands

PAGE = Path(__file__).parent.parent / "docs" / "data.md"
RAS = np.diag([1.0, 1, 1, 1])


def command(name: str, root: Path) -> list[str]:
    """The page's call for this data set, on these data and as small as it goes."""
    (call,) = [c for c in commands(PAGE) if f"data={name}" in c]
    small = ["debug=tiny", "trainer=cpu", "threads=1", "data.split.labeled=2", "model/network=small_unet"]
    return [*(f"data.root={root}" if word.startswith("data.root=") else word for word in call), *small]


@pytest.fixture
def pancreas(tmp_path):
    """CT (-1000 around the body) of the first, some middle and the last numbers of the series; 25 and 70 do not exist there."""
    root = tmp_path / "pancreas"
    for number in (1, 2, 3, 62, 63, 64, 82):
        images, label = fake_case(("ct",), (1,), (30, 28, 24), (number,))
        ct = np.where(images["ct"] > 0, images["ct"].astype(int) - 500, -1000).astype(np.int16)
        write_volume(root / "images" / f"{number:04d}_ct.nii.gz", ct, np.diag([1.0, 1.0, 2.0, 1]))
        write_volume(root / "labels" / f"{number:04d}.nii.gz", label.astype(np.uint8), np.diag([1.0, 1.0, 2.0, 1]))
    (snippet,) = [b for b in blocks(PAGE, "python") if "split.json" in b]
    exec(snippet.replace("/data/pancreas", str(root)), {})
    return root


def test_pancreas(pancreas, tmp_path):
    assert json.loads((pancreas / "split.json").read_text()) == {
        "train": ["0001", "0002", "0003", "0062", "0063"],
        "test": ["0064", "0082"],
    }
    arguments = command("pancreas", pancreas)
    cfg = composed(*arguments)
    settings = cfg.data.preprocessing
    assert (list(settings.clip), settings.crop, settings.margin, list(settings.spacing)) == ([-125, 275], "label", 25, [1, 1, 1])
    assert cfg.data.streams.default.cases == "labeled"
    run(*arguments, "data.limit_cases=null", f"runs={tmp_path / 'runs'}", "data.preprocessing.margin=2")
    (folder,) = run_folders(tmp_path / "runs")
    assert {row["case"] for row in rows(folder)} <= {"0064", "0082"}


def test_the_full_pancreas_series_is_divided_into_12_50_and_18(tmp_path):
    ids = [f"{n:04d}" for n in range(1, 83) if n not in (25, 70)]
    for name in ids:
        for path in (tmp_path / "images" / f"{name}_ct.nii.gz", tmp_path / "labels" / f"{name}.nii.gz"):
            path.parent.mkdir(exist_ok=True)
            path.touch()
    (snippet,) = [b for b in blocks(PAGE, "python") if "split.json" in b]
    exec(snippet.replace("/data/pancreas", str(tmp_path)), {})
    cfg = composed("experiment=supervised/folder", "data=pancreas", f"data.root={tmp_path}")
    from hydra.utils import instantiate

    data = instantiate(cfg.data, _convert_="all")
    assert isinstance(data, Folder)
    parts = data.divided(data.cases())
    assert [len(parts[p]) for p in ("labeled", "unlabeled", "val", "test")] == [12, 50, 0, 18]
    assert (parts["labeled"][-1].id, parts["unlabeled"][0].id, parts["test"][0].id) == ("0012", "0013", "0064")


def test_endocardium(tmp_path):
    root = tmp_path / "york"
    table = [["case", "patient"]]
    for subject in range(1, 6):
        for frame in range(2):
            name = f"pat{subject:02d}_{frame:02d}"
            images, label = fake_case(("mr",), (1,), (20, 20, 3), (subject, frame))
            write_volume(root / "images" / f"{name}_mr.nii.gz", images["mr"], RAS)
            write_volume(root / "labels" / f"{name}.nii.gz", label.astype(np.uint8), RAS)
            table.append([name, f"pat{subject:02d}"])
    with (root / "attributes.csv").open("w", newline="") as file:
        csv.writer(file).writerows(table)
    run(*command("endocardium", root), "data.limit_cases=null", f"runs={tmp_path / 'runs'}", "data.preprocessing.size=[32,32,null]")
    (folder,) = run_folders(tmp_path / "runs")
    assert rows(folder)
