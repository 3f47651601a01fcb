import io
import math
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from lesionbench.errors import SuiteError
from lightning_modules import schedules

CONF = Path(__file__).parent.parent / "conf" / "model"


def optimizer(lr=0.5):
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def rates(schedule, iterations, lr=0.5, **options):
    """Learning rates of the first iterations, as shares of `lr`."""
    opt = optimizer(lr)
    scheduler = schedule(opt, **options)
    result = []
    for _ in range(iterations):
        result.append(opt.param_groups[0]["lr"] / lr)
        opt.step()
        scheduler.step()
    return result


def test_poly_by_hand():
    got = rates(schedules.poly, 6, total_iterations=4, power=2)
    assert got == pytest.approx([1, 0.5625, 0.25, 0.0625, 0, 0])
    assert rates(schedules.poly, 6, total_iterations=10)[5] == pytest.approx(0.5**0.9)


def test_poly_after_warmup():
    # W = 3: 1/4, 2/4, 3/4, then (1 - t / 4)
    expected = [0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25, 0]
    assert rates(schedules.poly, 8, total_iterations=7, power=1, warmup_iterations=3) == pytest.approx(expected)


def test_cosine_by_hand():
    half = (1 + math.cos(math.pi / 4)) / 2
    assert rates(schedules.cosine, 6, total_iterations=4) == pytest.approx([1, half, 0.5, 1 - half, 0, 0])
    got = rates(schedules.cosine, 5, total_iterations=4, final=0.2)
    assert got == pytest.approx([1, 0.2 + 0.8 * half, 0.6, 0.2 + 0.8 * (1 - half), 0.2])
    assert rates(schedules.cosine, 4, total_iterations=3, warmup_iterations=1) == pytest.approx([0.5, 1, 0.5, 0])


def test_warmup_is_a_count_or_a_share():
    expected = [1 / 3, 2 / 3, 1, 1, 1, 1]
    assert rates(schedules.warmup, 6, total_iterations=8, warmup_iterations=2) == pytest.approx(expected)
    assert rates(schedules.warmup, 6, total_iterations=8, warmup_iterations=0.25) == pytest.approx(expected)


def test_cosine_cycles_by_hand():
    """Two cycles of four iterations: half a cosine of four, and the first three quarters of one that is longer."""
    half = (1 + math.cos(math.pi / 4)) / 2
    assert rates(schedules.cosine_cycles, 8, total_iterations=8, cycles=2, stretch=1) == pytest.approx([1, half, 0.5, 1 - half] * 2)
    got = rates(schedules.cosine_cycles, 150, total_iterations=150)
    assert got[0] == got[30] == got[120] == 1
    assert got[149] == pytest.approx((1 + math.cos(math.pi * 29 / 40)) / 2)
    for options in ({"cycles": 0}, {"stretch": 0.5}):
        with pytest.raises(SuiteError, match="at least 1"):
            schedules.cosine_cycles(optimizer(), 10, **options)


def test_constant():
    assert rates(schedules.constant, 4, total_iterations=3) == [1, 1, 1, 1]


def test_steps_after_a_warmup():
    stairs = [[0.5, 0.5], [0.75, 0.25]]
    assert rates(schedules.steps, 5, total_iterations=4, stairs=stairs) == [1, 1, 0.5, 0.25, 0.25]
    assert rates(schedules.steps, 6, total_iterations=6, stairs=stairs, warmup_iterations=2) == pytest.approx(
        [1 / 3, 2 / 3, 1, 1, 0.5, 0.25]
    )


@pytest.mark.parametrize(("total", "count"), [(0, 0), (5, 5), (5, -1), (5, 20)])
def test_a_warmup_that_leaves_nothing_is_an_error(total, count):
    with pytest.raises(SuiteError, match=f"total_iterations={total}"):
        schedules.poly(optimizer(), total, warmup_iterations=count)


def test_plateau_lowers_the_rate_when_the_metric_stalls():
    opt = optimizer(1.0)
    scheduler = schedules.plateau(opt, 100, factor=0.1, patience=1, min_lr=0.05)
    seen = []
    for dice in (0.5, 0.6, 0.6, 0.6, 0.6, 0.6):
        scheduler.step(dice)
        seen.append(opt.param_groups[0]["lr"])
    assert seen == pytest.approx([1, 1, 1, 0.1, 0.1, 0.05])
    assert schedules.plateau(optimizer(), 100, mode="min").mode == "min"


def test_flat_cosine_by_hand():
    half = (1 + math.cos(math.pi / 4)) / 2
    assert rates(schedules.flat_cosine, 9, total_iterations=8) == pytest.approx([1, 1, 1, 1, 1, half, 0.5, 1 - half, 0])
    assert rates(schedules.flat_cosine, 6, total_iterations=4, flat=0, final=0.2) == pytest.approx(
        rates(schedules.cosine, 6, total_iterations=4, final=0.2)
    )
    with pytest.raises(SuiteError, match="flat=1"):
        schedules.flat_cosine(optimizer(), 4, flat=1)


def test_one_cycle_begins_peaks_and_ends_where_it_says():
    options = {"total_iterations": 9, "pct_start": 0.4, "div_factor": 5, "final_div_factor": 10}
    got = rates(schedules.one_cycle, 10, **options)  # as many steps as iterations: the last is not refused
    assert [got[0], got[3], got[9]] == pytest.approx([1 / 5, 1, 1 / 50], abs=1e-6)
    assert got == [*sorted(got[:3]), *sorted(got[3:], reverse=True)]
    adam = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=0.5, betas=(0.9, 0.99))
    schedules.one_cycle(adam, 10, cycle_momentum=False)
    assert adam.param_groups[0]["betas"] == (0.9, 0.99)
    schedules.one_cycle(adam, 10)
    assert adam.param_groups[0]["betas"] == (0.95, 0.99)


def test_plateau_does_not_count_while_it_cools_down():
    seen = []
    opt = optimizer(1.0)
    scheduler = schedules.plateau(opt, 100, factor=0.5, patience=0, cooldown=2)
    for _ in range(6):
        scheduler.step(0.5)
        seen.append(opt.param_groups[0]["lr"])
    assert seen == [1, 0.5, 0.5, 0.5, 0.25, 0.25]


@pytest.mark.parametrize("name", ["poly", "cosine", "flat_cosine", "one_cycle", "warmup", "constant", "plateau"])
def test_state_is_plain_data_and_resumes(name):
    def build():
        opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5, momentum=0.9)
        return opt, getattr(schedules, name)(opt, total_iterations=10)

    def run(opt, scheduler, steps):
        for metric in steps:
            opt.step()
            scheduler.step(*([torch.tensor(metric)] if name == "plateau" else []))

    opt, scheduler = build()
    run(opt, scheduler, [0.5, 0.4, 0.4])
    file = io.BytesIO()
    torch.save({"optimizer": opt.state_dict(), "scheduler": scheduler.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    again, resumed = build()
    again.load_state_dict(state["optimizer"])
    resumed.load_state_dict(state["scheduler"])
    for pair in ((opt, scheduler), (again, resumed)):
        run(*pair, [0.3] * 5)
    assert again.param_groups[0]["lr"] == opt.param_groups[0]["lr"]
    assert resumed.state_dict() == scheduler.state_dict()


def configured(group):
    names = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    with initialize_config_dir(str(CONF), version_base=None):
        return {name: compose(overrides=[f"+{group}={name}"])[group] for name in names}


def test_configured_optimizers_and_schedulers_train():
    schedulers = configured("scheduler")
    names = "poly cosine warmup constant plateau steps step_decay warmup_poly flat_cosine one_cycle cosine_cycles held"
    assert set(schedulers) == set(names.split())
    schedulers["plateau"].mode = "max"  # otherwise that of the training, as the epochs
    schedulers["warmup_poly"].epochs = schedulers["step_decay"].epochs = 10
    for name, config in configured("optimizer").items():
        for scheduler in schedulers.values():
            weight = torch.nn.Parameter(torch.ones(1))
            opt = instantiate(config)([weight])
            instantiate(scheduler)(opt, 100)
            (weight**2).sum().backward()
            opt.step()
            assert weight < 1, name
