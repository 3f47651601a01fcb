"""`task.slice_axis` from the command line: a checkpoint keeps the axis it was trained with, and data of another one are refused."""

import pytest
from omegaconf import open_dict

from lesionbench.checkpoint import read_checkpoint
from lesionbench.errors import SuiteError
from lesionbench.jobs.run_folder import config_hash
from tests.fake_data import write_fake_folder
from tests.harness import SMALL, composed, run, run_folders


def test_the_axis_goes_into_the_checkpoint_and_must_be_that_of_the_data(tmp_path):
    root = write_fake_folder(tmp_path / "data", 6, shape=(10, 9, 8))
    common = [*SMALL, f"data.root={root}", f"runs={tmp_path / 'runs'}", "epochs=1"]
    run(*common, "task.slice_axis=0", "stages=[{name: fit, run: fit}]")
    (folder,) = run_folders(tmp_path / "runs")
    last = folder / "checkpoints" / "last.ckpt"
    assert read_checkpoint(last)["lesionbench"]["task"]["slice_axis"] == 0
    with pytest.raises(SuiteError, match=r"another task .*slice_axis: 0 -> 2"):
        run(*common, "job=test", f"ckpt={last}")
    run(*common, "job=test", f"ckpt={last}", "task.slice_axis=0")
    with pytest.raises(SuiteError, match=r"slice_axis.*at least 0 and at most 2"):
        run(*common, "task.slice_axis=4")


def test_runs_that_leave_the_axis_alone_are_still_the_same_runs():
    plain, cut = composed("data=simulated"), composed("data=simulated", "task.slice_axis=1")
    assert config_hash(plain) != config_hash(cut)
    with open_dict(plain):
        del plain.task["slice_axis"]  # data.task refers to it
    assert config_hash(plain) == config_hash(composed("data=simulated"))
