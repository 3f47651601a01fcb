"""Cost of a round of the cascade: `python benchmarks/cascade_step.py [rounds]`.

A training step of a round that is shown maps against a step of its network alone and one forward pass of each forerunner, and its whole answer for a
case against one forward pass of every network, itself included. Median of each over the rounds, which take turns (`interleaved`).
"""

import sys
from collections.abc import Callable
from functools import partial

import torch
from cascade_effect import TASK
from interleaved import machine, medians, seconds

from lesionbench.target import RegionSigmoid
from lightning_modules import CascadedUNet3D
from lightning_modules.inferers import Whole
from lightning_modules.losses import RegionDice
from lightning_modules.networks import RReLUUNet

SIDE, FEATURES = 32, (16, 32, 64)


def rounds() -> dict[str, CascadedUNet3D]:
    """The three rounds, each with those before it."""
    options = {
        "network": partial(RReLUUNet, features=FEATURES),
        "loss": RegionDice(squared=True, smooth=1e-6),
        "inferer": Whole(4),
        "target": RegionSigmoid,
    }
    made: dict[str, CascadedUNet3D] = {}
    carried: dict[str, dict] = {}
    for region in ("WT", "TC", "ET"):
        made[region] = CascadedUNet3D(TASK, region=region, forerunners=dict(carried), **options)
        origin = {"task": TASK.to_dict(), "patients": []}
        carried[region.lower()] = {"method": partial(CascadedUNet3D, region=region, forerunners=dict(carried), **options), **origin}
    return made


def timed(method: CascadedUNet3D) -> tuple[dict[str, Callable[[], float]], dict[str, Callable[[], float]]]:
    """Ways of a training step, and of an answer."""
    label = torch.randint(0, 4, (1, 1, *(SIDE,) * 3))
    image = torch.randn(1, 4, *(SIDE,) * 3)
    stored = {name: torch.rand(1, 1, *(SIDE,) * 3).half() for name in method.forerunners}
    batch = {"image": image, "label": label, "case": ["a"], **stored}
    seen, target = method.shown(image, batch), method.training_target(batch)
    optimizer = torch.optim.Adam(method.network.parameters())
    before = {name: (forerunner, torch.randn(1, 4 + n, *(SIDE,) * 3)) for n, (name, forerunner) in enumerate(method.forerunners.items())}

    def stepped(loss: Callable[[], torch.Tensor]) -> float:
        def step() -> None:
            method.train()
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

        return seconds(step)

    def passed(network: torch.nn.Module, view: torch.Tensor) -> float:
        def forward() -> None:
            with torch.no_grad():
                network.eval()(view)

        return seconds(forward)

    def answered() -> float:
        with torch.no_grad():
            return seconds(method.eval().predict_case, {"image": image, "case": ["a"]})

    forward = {f"forward {name}": partial(passed, forerunner.network, view) for name, (forerunner, view) in before.items()}
    step = {
        "step": lambda: stepped(lambda: method.compute_loss(batch)),
        "own": lambda: stepped(lambda: method.loss(method.network(seen), target)),
    }
    return {**step, **forward}, {"answer": answered, "forward itself": partial(passed, method.network, seen), **forward}


def main(count: int = 15) -> None:
    """Prints both ratios of the second and the third round."""
    torch.set_num_threads(1)
    print(machine())
    for region, method in rounds().items():
        if region == "WT":
            continue
        training, prediction = timed(method)
        found, asked = medians(training, count), medians(prediction, count)
        allowed = sum(value for name, value in found.items() if name != "step")
        passes = sum(value for name, value in asked.items() if name != "answer")
        print(
            f"round of {region}: step {found['step']:.3f} s, its network's and the forward passes {allowed:.3f} s: {found['step'] / allowed:.2f}"
        )
        print(f"    against its network's step alone, {found['own']:.3f} s: {found['step'] / found['own']:.2f}")
        print(f"    answer {asked['answer']:.3f} s, forward passes of all networks {passes:.3f} s: {asked['answer'] / passes:.2f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
