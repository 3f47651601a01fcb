"""The moving average of students: its formula, its limits, what it is part of and what not."""

import pytest
import torch
from torch import nn

from lesionbench.errors import SuiteError
from lightning_modules.semi_supervised.teachers import Teacher


def constant(value: float, **more) -> nn.Module:
    """A 1x1 convolution whose parameters are all `value`."""
    network = nn.Conv2d(1, 1, 1, **more)
    for parameter in network.parameters():
        nn.init.constant_(parameter, value)
    return network


def values(module: nn.Module) -> set[float]:
    return {round(float(v), 6) for p in module.parameters() for v in p.flatten()}


def set_to(module: nn.Module, value: float) -> None:
    for parameter in module.parameters():
        nn.init.constant_(parameter, value)


def test_two_students_by_hand():
    first, second = constant(0), constant(0)
    teacher = Teacher([first, second], (0.1, 0.2), warmup=False)
    set_to(first, 1)
    set_to(second, 3)
    teacher.update()
    assert values(teacher) == {0.7}  # 0.7 * 0 + 0.1 * 1 + 0.2 * 3


def test_one_student_by_hand():
    student = constant(0)
    teacher = Teacher(student, 0.01, warmup=False)
    set_to(student, 1)
    teacher.update()
    assert values(teacher) == {0.01}
    teacher.update()
    assert values(teacher) == {0.0199}


def test_a_fixed_point_where_all_are_equal():
    teacher = Teacher([constant(0.3), constant(0.3)], 0.1)
    for _ in range(5):
        teacher.update()
    assert values(teacher) == {0.3}


def test_rates_that_sum_to_one_give_the_plain_mean():
    first, second = constant(1), constant(3)
    teacher = Teacher([first, second], 0.5, warmup=False)
    set_to(teacher.network, float("nan"))  # whatever was there is gone
    teacher.update()
    assert values(teacher) == {2}


def test_warm_up_is_the_mean_of_all_updates_until_the_rate_takes_over():
    student = constant(5)
    teacher = Teacher(student, 0.25)
    seen = []
    for number, value in enumerate([1.0, 2.0, 6.0, 3.0, 8.0]):
        set_to(student, value)
        teacher.update()
        seen.append(value)
        mean = sum(seen) / len(seen)
        if number < 4:  # 1, 1/2, 1/3, 1/4
            assert values(teacher) == {round(mean, 6)}
    assert values(teacher) == {0.75 * 3 + 0.25 * 8}


def test_warm_up_of_two_students_keeps_their_shares():
    first, second = constant(1), constant(4)
    teacher = Teacher([first, second], (0.01, 0.02))
    teacher.update()
    assert values(teacher) == {3}  # (1 * 1 + 2 * 4) / 3


def test_never_trained_and_not_owned():
    student = constant(0)
    teacher = Teacher(student)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert len(list(teacher.parameters())) == 2  # the student's are not among them
    assert set(teacher.state_dict()) == {"updates", "network.weight", "network.bias"}
    assert not teacher(torch.ones(1, 1, 2, 2)).requires_grad


def test_state_brings_back_the_warm_up():
    student = constant(0)
    teacher, other = Teacher(student, 0.01), Teacher(constant(0), 0.01)
    for _ in range(3):
        teacher.update()
    other.load_state_dict(teacher.state_dict())
    set_to(other._students[0], 4)
    other.update()
    assert values(other) == {1}  # the fourth update: 1 / 4


def test_reset_copies_and_starts_again():
    student = constant(0)
    teacher = Teacher(student, 0.01)
    teacher.update()
    set_to(student, 2)
    teacher.reset()
    assert values(teacher) == {2}
    set_to(student, 8)
    teacher.update()
    assert values(teacher) == {8}


def test_buffers_are_copied_or_averaged():
    first, second = nn.BatchNorm2d(1), nn.BatchNorm2d(1)
    alone, both = Teacher(first, 0.1), Teacher([first, second], (0.1, 0.3))
    first.running_mean.fill_(1)
    second.running_mean.fill_(5)
    first.num_batches_tracked.fill_(7)
    alone.update()
    both.update()
    assert float(alone.network.running_mean) == 1
    assert int(alone.network.num_batches_tracked) == 7
    assert float(both.network.running_mean) == pytest.approx(4)  # (0.1 * 1 + 0.3 * 5) / 0.4


def test_a_pass_in_train_mode_leaves_no_trace():
    teacher = Teacher(nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(0.5)))
    teacher.train()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    image = torch.randn(4, 1, 3, 3)
    state = torch.get_rng_state()
    once, again, other = teacher(image, seed=1), teacher(image, seed=1), teacher(image, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_students_of_different_layout_share_what_they_have_in_common():
    first = nn.ModuleDict({"shared": constant(2), "own": constant(2)})
    second = nn.ModuleDict({"shared": constant(6)})
    teacher = Teacher([first, second], (0.1, 0.1), warmup=False)
    assert values(teacher.network["shared"]) == {4}  # starts as their mean
    set_to(first["own"], 12)
    set_to(first["shared"], 4)
    teacher.update()
    assert values(teacher.network["shared"]) == {round(0.8 * 4 + 0.1 * 4 + 0.1 * 6, 6)}
    assert values(teacher.network["own"]) == {4}  # 0.8 * 2 + 0.2 * 12: the whole rate from the only one


@pytest.mark.parametrize("rates", [0.0, 1.5, (0.5, 0.6), (0.1,), (-0.1, 0.2)])
def test_refuses_rates_out_of_range(rates):
    with pytest.raises(SuiteError, match="rates"):
        Teacher([constant(0), constant(0)], rates)


def test_refuses_a_layout_that_no_student_has():
    with pytest.raises(SuiteError, match="no student has a parameter weight"):
        Teacher(constant(0), layout=nn.Conv2d(1, 1, 3))
