"""Modality pairing: the loss by hand, what it moves, the schedule, and what the method does on a toy of conflicting contrasts."""

import csv
import math
from functools import partial
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

import pytest
import torch
from hydra.utils import instantiate
from torchmetrics.functional import pearson_corrcoef

from lesionbench.errors import SuiteError
from lesionbench.task import Task
from lightning_modules import ModalityPairing, Supervised
from lightning_modules.inferers import Whole
from lightning_modules.losses import DiceCE, PairingLoss
from lightning_modules.networks import PairedUNet, basic_unet
from lightning_modules.schedules import warmup_poly
from tests.harness import composed, rows, run, run_folders

TASK = Task(("t1", "t1ce", "t2", "flair"), {"background": 0, "ed": 2, "et": 4}, {"WT": ("ed", "et"), "ET": ("et",)})


def maps(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).reshape(1, 1, 1, -1)


# the loss


def test_loss_by_hand():
    loss, a = PairingLoss(), maps([1, 2, 3, 4])
    assert loss([a, maps([1, 3, 2, 4])]).item() == pytest.approx(-0.8)
    assert loss([a, a]).item() == pytest.approx(-1)
    assert loss([a, 2 * a + 3]).item() == pytest.approx(-1)
    assert loss([a, -a]).item() == pytest.approx(1)
    noise = [torch.randn(2, 4, 40, 40, generator=torch.Generator().manual_seed(n)) for n in (0, 1)]
    assert abs(loss(noise).item()) < 0.02


@pytest.mark.parametrize("mode", ["flat", "per_channel"])
def test_loss_is_the_negative_pearson_correlation(mode):
    torch.manual_seed(0)
    a, b = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6)
    b = b + torch.arange(1.0, 5)[:, None, None] * a + 10 * torch.arange(4)[:, None, None]
    if mode == "flat":
        expected = mean(pearson_corrcoef(x.flatten(), y.flatten()).item() for x, y in zip(a, b, strict=True))
    else:
        expected = mean(pearson_corrcoef(x.flatten(), y.flatten()).item() for x, y in zip(a.flatten(0, 1), b.flatten(0, 1), strict=True))
    assert PairingLoss(mode)([a, b]).item() == pytest.approx(-expected, abs=1e-5)
    assert PairingLoss(mode)([3 * a + 2, 0.5 * b - 1]).item() == pytest.approx(-expected, abs=1e-5)


def test_three_branches_are_three_pairs_and_one_is_none():
    loss, a, b = PairingLoss(), maps([1, 2, 3, 4]), maps([1, 3, 2, 4])
    assert loss([a, b, -a]).item() == pytest.approx((-0.8 + 1 + 0.8) / 3)
    assert loss([a]).item() == 0


def test_constant_maps_have_no_correlation_and_a_finite_gradient():
    for constant in (maps([5, 5, 5, 5]), maps([0, 0, 0, 0])):
        for other in (maps([1, 2, 3, 4]), maps([7, 7, 7, 7])):
            a, b = constant.clone().requires_grad_(), other.clone().requires_grad_()
            loss = PairingLoss()([a, b])
            loss.backward()
            assert loss.item() == 0
            assert torch.isfinite(a.grad).all()
            assert torch.isfinite(b.grad).all()


def test_half_precision_does_not_overflow():
    torch.manual_seed(0)
    a = 100 * torch.randn(1, 8, 64, 64)
    b = a + 100 * torch.randn(1, 8, 64, 64)
    exact = PairingLoss()([a, b]).item()
    with torch.autocast("cpu", torch.bfloat16):
        half = PairingLoss()([a.half(), b.half()])
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(exact, abs=1e-3)


def test_unknown_mode():
    with pytest.raises(SuiteError, match=r"model\.mp\.mode"):
        PairingLoss("channel")


# the schedule


def rates(total: int, **options) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    scheduler, found = warmup_poly(optimizer, total, **options), []
    for _ in range(total):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_schedule_of_the_paper():
    lr = rates(1000)
    assert [lr[e] for e in (0, 9, 19, 20)] == pytest.approx([0.0005, 0.005, 0.01, 0.01 * 0.98**0.9])
    assert lr[20] == pytest.approx(0.009820, abs=1e-6)
    assert lr[999] == pytest.approx(2.0e-5, rel=0.01)


def test_schedule_holds_within_an_epoch():
    lr = rates(3000, epochs=1000)
    assert lr[::3] == pytest.approx(rates(1000))
    assert lr[1::3] == lr[::3] == lr[2::3]
    assert rates(10, epochs=10, warmup_epochs=0.2)[:3] == pytest.approx([0.005, 0.01, 0.01 * 0.8**0.9])
    assert rates(10, epochs=10, warmup_epochs=0)[0] == 0.01


@pytest.mark.parametrize("options", [{"epochs": 20}, {"epochs": 11, "warmup_epochs": 0}, {"epochs": 10, "warmup_epochs": -1}])
def test_schedules_that_do_not_fit_are_refused(options):
    with pytest.raises(SuiteError, match="warmup_epochs"):
        warmup_poly(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1), 10, **options)


def test_configured_schedule_follows_the_epochs(tmp_path):
    cfg = composed("experiment=modality_pairing/brats2020", f"run_folder={tmp_path}")
    scheduler = instantiate(cfg.model.scheduler)(
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.model.optimizer.lr), total_iterations=250_000
    )
    factor = scheduler.lr_lambdas[0]
    assert [0.01 * factor(250 * e + 100) for e in (0, 9, 19, 20)] == pytest.approx([0.0005, 0.005, 0.01, 0.01 * 0.98**0.9])


# the method


def method(kind=ModalityPairing, network=None, task=TASK, **options) -> ModalityPairing:
    torch.manual_seed(0)
    network = network or partial(PairedUNet, widths=[4, 6, 8], dimensions=2)
    made = kind(task, network=network, loss=DiceCE(), inferer=Whole(), **options)
    made.logged = {}
    made.log_terms = lambda **terms: made.logged.update({k: v.item() for k, v in terms.items()})
    return made.train()


def batch(side: int = 16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "image": torch.randn(2, 4, side, side, generator=generator),
        "label": torch.randint(0, 3, (2, 1, side, side), generator=generator),
    }


def test_total_is_segmentation_plus_weight_times_pairing():
    made, given = method(mp_weight=0.3), batch()
    total = made.training_step(given, 0).item()
    output = made(given["image"])
    supervised = DiceCE()(output["logits"], given["label"]).item()
    pairing = PairingLoss()(output["features"]).item()
    assert total == pytest.approx(supervised + 0.3 * pairing, abs=1e-6)
    assert made.logged == pytest.approx({"loss": total, "supervised": supervised, "mp": pairing, "correlation": -pairing}, abs=1e-6)


def test_heads_are_supervised_and_the_pairing_is_at_full_resolution():
    made, given = method(mp_weight=0.5, network=partial(PairedUNet, widths=[4, 4, 4, 4, 4], dimensions=2, deep_supervision=True)), batch(32)
    total = made.training_step(given, 0).item()
    output = made(given["image"])
    heads = [output["logits"], *output["deep"]]
    labels = [
        given["label"],
        *(torch.nn.functional.interpolate(given["label"].float(), h.shape[2:], mode="nearest-exact").long() for h in output["deep"]),
    ]
    losses = [DiceCE()(h, label).item() for h, label in zip(heads, labels, strict=True)]
    assert len(losses) == 3
    expected = (losses[0] + losses[1] / 2 + losses[2] / 4) / 1.75 + 0.5 * PairingLoss()(output["features"]).item()
    assert total == pytest.approx(expected, abs=1e-5)


def test_pairing_moves_both_branches_but_not_the_head():
    made = method()
    made.mp(made(batch()["image"])["features"]).backward()
    without = {name for name, p in made.network.named_parameters() if p.grad is None}
    assert without == {"head.weight", "head.bias"}
    assert all(made.network.decoders[b][0][1][0].weight.grad.abs().sum() > 0 for b in (0, 1))


def test_step_adds_the_gradient_of_the_pairing():
    """Of the whole step, not of the loss alone: with the term less without it is weight times the term's own gradient."""
    found = []
    for weight in (0.5, 0.0):
        made = method(mp_weight=weight)
        made.training_step(batch(), 0).backward()
        found.append({name: p.grad.clone() for name, p in made.network.named_parameters()})
    made = method()
    made.mp(made(batch()["image"])["features"]).backward()
    for name, p in made.network.named_parameters():
        alone = torch.zeros_like(p) if p.grad is None else p.grad
        assert torch.allclose(found[0][name] - found[1][name], 0.5 * alone, atol=1e-5), name


def test_weight_rises_over_the_warm_up():
    made = method(mp_weight=0.5, mp_warmup=4)
    weights = []
    for made.iteration in range(6):
        weights.append(made.weight())
    assert weights == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5, 0.5])
    made = method(mp_weight=0.5, mp_warmup=0.1)
    made._trainer = SimpleNamespace(num_training_batches=10, max_epochs=4)
    assert made.weight() == pytest.approx(0.125)
    assert method(mp_weight=0.5).weight() == 0.5


def test_without_weight_it_only_measures():
    made, given = method(mp_weight=0), batch()
    total = made.training_step(given, 0).item()
    assert total == pytest.approx(DiceCE()(made(given["image"])["logits"], given["label"]).item())
    assert set(made.logged) == {"loss", "supervised", "correlation"}


def test_one_branch_is_plain_supervision():
    early = partial(PairedUNet, widths=[4, 6, 8], dimensions=2, fusion="early")
    made, plain = method(network=early), method(Supervised, partial(early, channels=TASK.channels))
    assert made.training_step(batch(), 0).item() == plain.training_step(batch(), 0).item()
    assert set(made.logged) == {"loss", "supervised"}


def test_names_come_from_the_task():
    narrowed = TASK.narrowed(channels=["flair", "t1ce", "t2"])
    assert method(task=narrowed).network.groups == [[0, 2], [1]]


def test_wrong_options_are_refused():
    with pytest.raises(SuiteError, match="mp_weight=-1"):
        method(mp_weight=-1)
    made = method(network=lambda channels, **sizes: basic_unet(**sizes, dimensions=2, features=(4,) * 6))
    with pytest.raises(SuiteError, match="BasicUNet"):
        made.training_step(batch(32), 0)


# the effect

ARMS = {  # frozen
    "late": ["model.network.fusion=late", "model.mp_weight=0"],
    "paired": ["model.mp_weight=0"],
    "paired, 0.05": ["model.mp_weight=0.05"],
    "paired, 0.5": [],
}
FAST = [
    "epochs=1",
    "data.samples_per_epoch=8",
    "data.count=5",
    "data.split.test=2",
    "model.network.widths=[4,4,4]",
    "model.scheduler.warmup_epochs=0",
]


def trained(folder: Path, arm: str, seed: int, *more: str) -> dict[str, float]:
    """Mean Dice of the regions over the test images, and the correlation over the last tenth of the training."""
    runs = folder / f"{arm.replace(', ', '-')}-{seed}"
    run("experiment=modality_pairing/toy", *ARMS[arm], f"seed={seed}", f"data.root={folder / 'data'}", f"runs={runs}", "threads=1", *more)
    (found,) = run_folders(runs)
    dice = {region: mean(float(r["dice"]) for r in rows(found) if r["region"] == region) for region in ("WT", "ET")}
    with (found / "metrics.csv").open(newline="") as file:
        curve = [float(r["value"]) for r in csv.DictReader(file) if r["name"] == "train/correlation"]
    return {**dice, "correlation": mean(curve[-max(len(curve) // 10, 1) :])}


def test_code_path_of_the_effect(tmp_path):
    found = {arm: trained(tmp_path, arm, 0, *FAST) for arm in ("late", "paired, 0.5")}
    assert all(math.isfinite(value) for f in found.values() for value in f.values())
    assert found["late"] != found["paired, 0.5"]


def test_toy_preset_is_frozen():
    cfg = composed("experiment=modality_pairing/toy", "seed=3")
    assert (cfg.epochs, cfg.data.samples_per_epoch, cfg.data.batch_size, cfg.data.count, cfg.data.split.test) == (40, 40, 4, 84, 60)
    assert (cfg.data.simulation_seed, cfg.model.optimizer.lr, list(cfg.model.network.widths)) == (3, 2e-3, [8, 16, 32])
    assert (cfg.model.mp_weight, cfg.model.mp.mode, cfg.model.mp_warmup) == (0.5, "flat", 0)


@pytest.mark.slow
def test_crossed_branches_beat_late_fusion_and_the_loss_makes_them_agree(tmp_path):
    found = {arm: [trained(tmp_path, arm, seed) for seed in range(3)] for arm in ARMS}
    gains = [pair["ET"] - late["ET"] for pair, late in zip(found["paired, 0.5"], found["late"], strict=True)]
    assert min(gains) > 0.03, found
    correlation = {arm: [f["correlation"] for f in seeds] for arm, seeds in found.items()}
    assert min(correlation["paired, 0.5"]) > 0.9, found
    assert all(0.15 < c < 0.6 for c in correlation["paired, 0.05"]), found
    assert all(abs(c) < 0.4 for c in correlation["paired"]), found
    for region in ("WT", "ET"):  # at little cost, if any
        assert mean(f[region] for f in found["paired, 0.5"]) > mean(f[region] for f in found["paired"]) - 0.02, found
