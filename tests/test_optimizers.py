import io
from functools import partial

import pytest
import torch
from omegaconf import OmegaConf

from lesionbench.checkpoint import build_method, load_method
from lesionbench.errors import SuiteError
from lesionbench.task import Task
from lightning_modules.optimizers import Ranger
from tests.harness import composed


def trained(optimizer, steps, start=((1.0, -2.0), (0.5, 3.0))):
    """The weight after steps on sum(w^2 * c), whose gradient is not centered."""
    weight = torch.nn.Parameter(torch.tensor(start))
    opt = optimizer([weight])
    for _ in range(steps):
        opt.zero_grad()
        (weight**2 * torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum().backward()
        opt.step()
    return weight.detach(), opt


def test_without_its_two_parts_it_is_rectified_adam():
    plain = partial(torch.optim.RAdam, lr=0.1, betas=(0.95, 0.999), eps=1e-5)
    assert torch.equal(trained(partial(Ranger, lr=0.1, alpha=1, centralize=False), 9)[0], trained(plain, 9)[0])


def test_looks_ahead_after_every_k_steps():
    start = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    two = trained(partial(Ranger, lr=0.1, k=3, centralize=False), 2)[0]
    fast = partial(torch.optim.RAdam, lr=0.1, betas=(0.95, 0.999), eps=1e-5)
    assert torch.equal(two, trained(fast, 2)[0])
    three = trained(partial(Ranger, lr=0.1, k=3, centralize=False), 3)[0]
    assert torch.allclose(three, start + 0.5 * (trained(fast, 3)[0] - start))


def test_gradients_lose_their_mean_over_all_axes_but_the_first():
    weight, bias = torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(2))
    opt = Ranger([weight, bias], lr=0.1, weight_decay=0.0)
    weight.grad, bias.grad = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]]), torch.tensor([1.0, 2.0])
    opt.step()
    assert torch.equal(weight.grad, torch.tensor([[-2.0, -1.0, 3.0], [-1.0, -1.0, 2.0]]))
    assert torch.equal(bias.grad, torch.tensor([1.0, 2.0]))


def test_state_is_plain_and_resumes_bit_for_bit():
    maker = partial(Ranger, lr=0.1, k=4)
    whole, _ = trained(maker, 11)
    weight, opt = trained(maker, 6)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    again = torch.nn.Parameter(weight.clone())
    resumed = maker([again])
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(5):
        resumed.zero_grad()
        (again**2 * torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum().backward()
        resumed.step()
    assert torch.equal(again.detach(), whole)


def test_the_closure_runs_before_gradients_are_centralized():
    weight = torch.nn.Parameter(torch.ones(1, 2))
    opt = Ranger([weight], lr=0.1)

    def closure():
        loss = (weight * torch.tensor([[1.0, 3.0]])).sum()
        loss.backward()
        return loss

    assert opt.step(closure).item() == 4
    assert weight.grad.tolist() == [[-1, 1]]


@pytest.mark.parametrize("options", [{"k": 0}, {"k": 2.5}, {"alpha": 0}, {"alpha": 1.5}])
def test_options_out_of_range_are_refused(options):
    ((name, value),) = options.items()
    with pytest.raises(SuiteError, match=f"optimizer.{name}={value}"):
        Ranger([torch.nn.Parameter(torch.zeros(1))], **options)


def test_chosen_by_name_and_built_from_a_checkpoint(tmp_path):
    cfg = composed("model/optimizer=ranger", "model/scheduler=flat_cosine", "model.network.features=[4,4,4,4,4,4]")
    config = OmegaConf.to_container(cfg.model, resolve=True)
    task = Task(channels=("a",), classes={"background": 0, "lesion": 1}, regions={"L": ("lesion",)})
    method = build_method(config, task)
    checkpoint = {"state_dict": method.state_dict()}
    method.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "x.ckpt")
    assert load_method(tmp_path / "x.ckpt")[0].optimizer.func is Ranger  # a part of the suite: needs no word of the user
