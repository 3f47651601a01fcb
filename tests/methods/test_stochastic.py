"""Repeated stochastic answers of a checkpoint: what is summed, what is drawn, and what is refused."""

import math

import pytest
import torch
from torch import nn

from lesionbench.errors import SuiteError
from lesionbench.prediction import Prediction
from lesionbench.target import ClassSoftmax
from lesionbench.task import Task
from lightning_modules import Stochastic
from lightning_modules.evaluation import checkpoint_test
from lightning_modules.inferers import GROUPS, Whole
from lightning_modules.uncertainty import RunningMoments
from tests.harness import rows, run, run_folders

TASK = Task(("t1", "t2"), {"background": 0, "core": 1, "edema": 2}, {"WT": ("core", "edema"), "TC": ("core",)})


def test_entropies_by_hand():
    moments = RunningMoments(mutual_information=True)
    for p in (0.9, 0.5, 0.1):
        moments.update(torch.tensor([p, 1 - p]).reshape(1, 2, 1))
    assert float(moments.entropy) == pytest.approx(0.6931, abs=1e-4)
    assert float(moments.expected_entropy) == pytest.approx(0.4478, abs=1e-4)
    assert float(moments.mutual_information) == pytest.approx(0.2454, abs=1e-4)


class Answers(nn.Module):
    """A method that answers with what `said` gives, one after the other, and keeps what it was shown."""

    oracles = ()

    def __init__(self, *said, p: float = 0.0):
        super().__init__()
        self.said, self.shown, self.drop, self.target = list(said), [], nn.Dropout(p), ClassSoftmax(TASK)
        self.inferer = Whole(1)

    def average(self, over):
        self.inferer = over(self.inferer)

    def predict_case(self, batch):
        self.shown.append(batch["image"])
        regions = self.inferer(batch["image"], lambda view: {"p": self.said[len(self.shown) - 1].expand(1, 2, *view.shape[2:])})["p"]
        return Prediction(regions=self.drop(regions[0]))


def asking(monkeypatch, method, **options):
    monkeypatch.setattr(checkpoint_test, "load_method", lambda *_: (method.eval(), {}))
    return Stochastic(TASK, checkpoint="x.ckpt", **{"dropout": False, **options})


def case(shape=(3, 4, 5)):
    image = torch.rand(1, 2, *shape, generator=torch.Generator().manual_seed(0))
    return {"image": image, "channel_mask": torch.ones(1, 2, dtype=torch.bool)}


def regions(wt, tc):
    return torch.tensor([wt, tc]).reshape(1, 2, 1, 1, 1)


def test_mean_labels_and_maps_of_the_passes(monkeypatch):
    plain, passes = regions(0.2, 0.1), [regions(0.9, 0.9), regions(0.5, 0.9), regions(0.1, 0.9)]
    said = asking(monkeypatch, Answers(plain, *passes), passes=3, noise=0.1).predict_case(case())
    voxel = (..., 1, 2, 3)
    assert said.regions[voxel].tolist() == pytest.approx([0.5, 0.9])
    assert said.labels.unique().tolist() == [1]  # core, as softmax over classes says
    one = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert float(said.uncertainty["entropy_WT"][voxel]) == pytest.approx(math.log(2))
    assert float(said.uncertainty["entropy_TC"][voxel]) == pytest.approx(one)
    assert float(said.uncertainty["entropy"][voxel]) == pytest.approx((math.log(2) + one) / 2)
    assert float(said.uncertainty["expected_entropy"][voxel]) == pytest.approx((0.4478 + one) / 2, abs=1e-4)
    assert float(said.uncertainty["mutual_information"][voxel]) == pytest.approx(0.2454 / 2, abs=1e-4)  # on TC the passes agree
    assert float(said.members["plain"].regions[voxel][0]) == pytest.approx(0.2)


def test_a_probability_that_rounds_to_more_than_one_is_certain(monkeypatch):
    said = asking(monkeypatch, Answers(*[regions(1 + 1e-6, 0.5)] * 3), passes=2, noise=0.1).predict_case(case())
    assert float(said.uncertainty["entropy_WT"].abs().max()) == 0
    assert all(torch.isfinite(u).all() for u in said.uncertainty.values())


def test_noise_is_drawn_for_every_pass_and_leaves_missing_channels_alone(monkeypatch):
    method = Answers(*[regions(0.5, 0.1)] * 4)
    batch = case() | {"channel_mask": torch.tensor([[True, False]])}
    asking(monkeypatch, method, passes=3, noise=0.3).predict_case(batch)
    plain, *noisy = method.shown
    assert torch.equal(plain, batch["image"])
    assert len({float(x.sum()) for x in noisy}) == 3
    assert all(torch.equal(x[:, 1], plain[:, 1]) for x in noisy)
    large = torch.cat([x[:, 0] - plain[:, 0] for x in noisy])
    assert 0.2 < float(large.std()) < 0.4


def test_a_pass_with_a_move_is_moved_back_and_the_inferer_stays(monkeypatch):
    method = Answers()
    seen = []

    def predict_case(batch):
        maps = method.inferer(batch["image"], lambda view: seen.append(view) or {"p": view})["p"]
        return Prediction(regions=maps[0])

    method.predict_case = predict_case
    own = method.inferer
    stochastic = asking(monkeypatch, method, passes=12, moves="dihedral")
    image = (case((4, 4, 4))["image"] * 1024).round() / 1024
    said = stochastic.predict_case(case() | {"image": image})
    assert torch.allclose(said.regions, image[0], atol=1e-6)  # what returns its input is not changed by moves
    assert method.inferer is own
    assert len({tuple(v.flatten().tolist()) for v in seen}) > 3  # and moves there were
    known = {tuple(m(image, 2).flatten().tolist()) for m in GROUPS["dihedral"](2)}
    assert {tuple(v.flatten().tolist()) for v in seen} <= known


def test_dropout_draws_and_normalization_stays(monkeypatch):
    method = Answers(*[regions(0.5, 0.0)] * 5, p=0.5)  # dropout makes 0 or 1 of it
    method.norm = nn.BatchNorm1d(2)
    torch.manual_seed(0)
    said = asking(monkeypatch, method, passes=4, dropout=True).predict_case(case())
    assert float(said.uncertainty["mutual_information"].max()) > 0
    assert not method.drop.training
    assert not method.norm.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"passes": 1, "noise": 0.1}, "model.passes=1"),
        ({"noise": -1}, "model.noise=-1"),
        ({"dropout": True}, "no dropout layer"),
        ({}, "all passes would be alike"),
        ({"moves": "flop"}, "moves.*'flop'"),
    ],
)
def test_what_is_refused(monkeypatch, options, message):
    with pytest.raises(SuiteError, match=message):
        asking(monkeypatch, Answers(), **options)


def test_moves_need_an_inferer(monkeypatch):
    method = Answers()
    del method.inferer
    with pytest.raises(SuiteError, match="no inferer"):
        asking(monkeypatch, method, moves="flips")


def test_trained_and_asked(tmp_path):
    run("experiment=stochastic/simulated", "debug=tiny", "trainer=cpu", "threads=1", f"runs={tmp_path}", f"data.root={tmp_path / 'data'}",
        "data.spacing=4", "model.network.features=[8,8,8,8,16,8]", "asked.passes=3", "asked.noise=0.1", "asked.moves=flips", "callbacks.figures=null")  # fmt: skip
    (folder,) = run_folders(tmp_path)
    found = rows(folder)
    assert {row["member"] for row in found} == {"", "plain"}
    assert any(row.get("auroc_entropy") not in (None, "") for row in found)
