"""Attacks: sizes, projections, what they reach, and the method that tests a checkpoint with them."""

import csv
import statistics

import pytest
import torch

from lesionbench.errors import SuiteError
from lightning_modules.evaluation.attacks import perturb
from tests.harness import composed, rows, run, run_folders

MASK = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
MASK[..., 2:6, :] = True
WEIGHT = torch.linspace(-1, 1, 128).reshape(1, 2, 8, 8) + 0.01


def linear(images: torch.Tensor) -> torch.Tensor:
    return (images * WEIGHT).sum((1, 2, 3))


def rms(r: torch.Tensor) -> float:
    return float(r[MASK.expand_as(r)].square().mean().sqrt())


@pytest.mark.parametrize("steps", [0, 5, 20])
def test_size_and_mask(steps):
    image = torch.randn(1, 2, 8, 8)
    generator = torch.Generator().manual_seed(0)
    for norm in ("l2", "linf"):
        r = perturb(linear, image, norm=norm, eps=0.3, steps=steps, restarts=3, mask=MASK, generator=generator)
        assert r.shape == image.shape
        assert not r.requires_grad
        assert (r[~MASK.expand_as(r)] == 0).all()
        assert r.abs().max() == pytest.approx(0.3) if norm == "linf" else rms(r) == pytest.approx(0.3, rel=1e-5)


def test_best_change_of_a_linear_loss():
    image, inside = torch.randn(1, 2, 8, 8), WEIGHT * MASK
    r = perturb(linear, image, norm="l2", eps=0.3, steps=20, mask=MASK)
    assert linear(r) > 0.95 * linear(0.3 * inside / rms(inside))
    assert torch.allclose(perturb(linear, image, norm="linf", eps=0.3, steps=20, mask=MASK), 0.3 * inside.sign(), atol=1e-6)


def test_more_restarts_never_find_less_and_no_point_visited_is_lost():
    torch.manual_seed(0)
    image = torch.zeros(1, 2, 8, 8)

    def bumpy(images):
        return torch.sin(20 * images * WEIGHT).sum((1, 2, 3))

    found = [
        bumpy(perturb(bumpy, image, norm="linf", eps=0.5, steps=5, restarts=n, generator=torch.Generator().manual_seed(1))).item()
        for n in (1, 16)
    ]
    assert found[1] >= found[0]
    visited = []

    def watched(images):
        visited.append(bumpy(images).detach().max().item())
        return bumpy(images)

    r = perturb(watched, image, norm="l2", eps=0.5, steps=10, restarts=4)
    assert bumpy(r).item() == pytest.approx(max(visited), rel=1e-6)


def test_wrong_options_are_named():
    image = torch.zeros(1, 2, 8, 8)
    with pytest.raises(SuiteError, match="norm of an attack"):
        perturb(linear, image, norm="l1", eps=0.1, steps=1)
    with pytest.raises(SuiteError, match="steps=-1"):
        perturb(linear, image, norm="l2", eps=0.1, steps=-1)


TWIN = [
    "experiment=reciprocal_adversarial/toy2d_robustness", "threads=1", "epochs=2", "data.samples_per_epoch=8", "data.count=4", "data.split.test=1", "data.split.val=1", "model.network.width=4",
    "attacked.attacks=[{norm:l2,eps:0.315,steps:0},{norm:l2,eps:0.315,steps:3,restarts:2},{norm:linf,eps:0.315,steps:3,transfer:true}]",
]  # fmt: skip


def test_fast_twin_of_the_effect(tmp_path):
    """The code path of the slow test, at no size: attacks, noise, transfer, violations."""
    run(*TWIN, f"data.root={tmp_path / 'data'}", f"runs={tmp_path / 'runs'}")
    (found,) = [f for f in run_folders(tmp_path / "runs") if (f / "test").exists()]
    dice = {r["member"]: float(r["dice"]) for r in rows(found) if r["region"] == "WT"}
    assert set(dice) == {"", "l2-0-0.315", "l2-3-0.315", "linf-3-0.315-transfer"}
    assert dice["l2-3-0.315"] < dice[""]
    assert len(violations(found)) == 2


def test_transfer_needs_a_source_and_attacks_a_network(tmp_path):
    common = [*TWIN, f"data.root={tmp_path / 'data'}", f"runs={tmp_path / 'runs'}"]
    with pytest.raises(SuiteError, match=r"transfer_from is null"):
        run(*common, "stages=[{name:fit,run:fit},{name:test,run:test,override:{attacked:{checkpoint:'artefact:fit'},model:'${attacked}'}}]")


def violations(folder) -> list[float]:
    """Nesting violations per 1000 voxels at every validation."""
    with (folder / "metrics.csv").open() as file:
        return [float(r["value"]) for r in csv.DictReader(file) if r["name"] == "val/nesting_violations"]


def test_toy_preset_is_frozen():
    cfg = composed("experiment=reciprocal_adversarial/toy2d")
    assert (cfg.data.count, cfg.data.slices, cfg.data.simulation_seed, cfg.epochs, cfg.data.samples_per_epoch) == (12, 4, 0, 20, 40)
    assert (cfg.model.vat.eps, cfg.model.vat.xi, cfg.model.vat.iterations, cfg.model.instance_noise) == (0.315, 1e-3, 1, 0.15)
    assert (cfg.model.weights.vat, cfg.model.weights.critic) == (0.2, 0.3)


@pytest.mark.slow
def test_effect_on_the_toy(tmp_path):
    """Five seeds: VAT withstands attacks and noise at no cost in clean Dice; a critic leaves fewer nesting violations than none."""
    variants = {
        "plain": ["model.weights.vat=0", "model.weights.critic=0"],
        "vat": ["model.weights.critic=0"],
        "critic": ["model.weights.vat=0"],
        "both": [],
    }
    dice, broken = {}, {}
    for name, options in variants.items():
        for seed in range(5):
            common = ["experiment=reciprocal_adversarial/toy2d", "threads=1", f"seed={seed}", f"data.root={tmp_path / 'data'}"]
            run(*common, f"runs={tmp_path / name}", *options)
        found = run_folders(tmp_path / name)
        assert len(found) == 5
        for row in (r for folder in found for r in rows(folder) if r["region"]):
            dice.setdefault((name, row["member"]), []).append(float(row["dice"]))
        broken[name] = statistics.mean(statistics.mean(violations(folder)[-10:]) for folder in found)
    mean = {key: statistics.mean(values) for key, values in dice.items()}
    for attack in ("l2-5-0.315", "l2-20-0.315"):
        assert mean["vat", attack] > mean["plain", attack] + 0.05
    assert mean["vat", "l2-0-2.1"] > mean["plain", "l2-0-2.1"] + 0.02
    assert mean["vat", ""] > mean["plain", ""] - 0.02
    for name in ("critic", "both"):
        assert broken[name] < broken["plain"], broken
