"""What a benchmark gives a method: the streams that it takes, the maps that it writes, a name; and how much the files repeat each other."""

import pytest

from benchmarks.config_repetition import here, lines, repetition
from tests.harness import composed

BOTH = {"labeled": {"cases": "labeled"}, "unlabeled": {"cases": "unlabeled"}}


@pytest.mark.parametrize("benchmark", ["acdc", "blobs", "left_atrium", "simulated_few_labels"])
def test_a_method_gets_the_streams_that_it_takes(benchmark):
    assert composed(f"benchmark={benchmark}", "model=supervised").data.streams == {"default": {"cases": "labeled"}}
    assert composed(f"benchmark={benchmark}", "model=mean_teacher").data.streams == BOTH
    full = composed(f"benchmark={benchmark}_full", "model=supervised").data.streams
    assert full is None or full == {"default": {"cases": "train"}}
    assert composed(f"benchmark={benchmark}", "model=supervised", "data.streams.default.cases=train").data.streams.default.cases == "train"


def test_a_method_that_takes_unlabeled_cases_by_an_option():
    common = [
        "experiment=reciprocal_adversarial/simulated",
        "data.streams={default:{},labeled:{cases:labeled},unlabeled:{cases:unlabeled}}",
    ]
    assert set(composed(*common).data.streams) == {"default"}
    assert set(composed(*common, "model.unlabeled=true").data.streams) == {"labeled", "unlabeled"}


def test_streams_of_ones_own_stay():
    own = "data.streams={default:{cases:labeled}}"
    assert composed(own).data.streams == {"default": {"cases": "labeled"}}
    assert composed(own, "model=mean_teacher").data.streams == {"default": {"cases": "labeled"}}  # refused when it is built


def test_a_method_gets_the_maps_that_it_writes():
    assert composed("benchmark=blobs", "model=temporal_ensembling").data.extra_maps == {"ensemble": "linear"}
    assert composed("benchmark=blobs", "model=coranet").data.extra_maps == {"pseudo_label": "nearest", "uncertain": "nearest"}
    assert composed("benchmark=blobs", "model=pseudo_label").data.extra_maps is None
    assert composed("benchmark=blobs", "model=pseudo_label", "model.labels=stored").data.extra_maps == {"pseudo_label": "nearest"}
    given = composed("benchmark=blobs", "model=temporal_ensembling", "data.extra_maps={ensemble:nearest}")
    assert given.data.extra_maps == {"ensemble": "nearest"}


def test_what_a_benchmark_sets_for_methods_with_unlabeled_cases_alone():
    assert composed("benchmark=left_atrium", "model=ua_mt").model.network.dropout == 0.5
    assert composed("benchmark=left_atrium", "model=supervised").model.network.dropout == 0.0
    assert composed("benchmark=blobs", "model=ua_mt").model.warm_start == 0.4167
    assert composed("benchmark=acdc", "model=ua_mt").model.warm_start == 0
    assert composed("benchmark=acdc", "model=copy_paste").model.warm_start == 0.25
    assert "warm_start" not in composed("benchmark=blobs", "model=supervised").model
    assert composed("benchmark=acdc", "model=co_learning").model.network.norm == "group"  # conf/settings


def test_the_experiment_wins_over_the_benchmark_and_the_command_line_over_both():
    ours = "experiment=nnunet_region_loss_ensemble/brats2021"
    plain, cfg = composed("benchmark=brats2021"), composed(ours)
    assert (plain.epochs, cfg.epochs) == (200, 1000)
    assert plain.model.network._target_ != cfg.model.network._target_
    assert (cfg.patch, cfg.data.layout) == (plain.patch, "2021")
    assert composed(ours, "epochs=3").epochs == 3
    assert composed(ours, "benchmark=brats2020").data.layout == "2020"


def test_names_of_runs():
    assert composed().experiment_name == "supervised/simulated"
    assert composed("benchmark=acdc", "model=mean_teacher").experiment_name == "mean_teacher/acdc"
    assert composed("experiment=umm/ibsr").experiment_name == "umm/ibsr"
    assert composed("benchmark=none", "data=ibsr").experiment_name == "supervised/ibsr"
    assert composed("experiment_name=mine").experiment_name == "mine"


def test_at_most_a_quarter_of_the_experiment_files_stands_in_another():
    _, total, repeated = repetition(here(["experiment"]).values())
    assert repeated <= 0.25 * total


def test_lines_that_count():
    assert lines("# @package _global_\n\na:   1  # why\n  b: {c:  2}\n") == ["a: 1", "b: {c: 2}"]
    assert repetition(["a: 1\nb: 2\n", "  a:  1\nc: 3\nc: 3\n"]) == (2, 5, 2)
