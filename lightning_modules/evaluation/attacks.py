"""Adversarial perturbations of an image by projected gradient ascent, and random ones of the same size as their control."""

from collections.abc import Callable
from typing import Literal, TypedDict

import torch

from lesionbench.errors import SuiteError, unknown
from lesionbench.ranges import Count, NotNegative, Whole
from lightning_modules.losses.vat import unit_rms

NORMS = ("l2", "linf")


class _Needed(TypedDict):
    norm: Literal["l2", "linf"]
    eps: NotNegative
    steps: Whole


class Attack(_Needed, total=False):
    """One attack of a list: options of `perturb`, and whether it is made on another network."""

    restarts: Count
    transfer: bool


def perturb(
    loss: Callable[[torch.Tensor], torch.Tensor],
    image: torch.Tensor,
    *,
    norm: str,
    eps: float,
    steps: int,
    restarts: int = 1,
    mask: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """The change r of an image, of norm at most `eps`, that raises `loss` most among all points visited (PGD, Madry et al., ICLR 2018).

    Every restart begins at a random point of the ball; a step has the size 2.5 eps / steps, along the gradient scaled to unit size (`l2`)
    or its sign (`linf`), and is projected back. Restarts run as one batch.

    Args:
        loss: images (N, M, *spatial) -> what is to be raised, one value per image (N,).
        image: (1, M, *spatial).
        norm: `l2`: `eps` bounds the root mean square over masked voxels x channels; `linf`: the largest absolute value.
        eps: in units of the image.
        steps: of gradient ascent; 0 = random noise of exactly that norm: Gaussian (`l2`) or random signs (`linf`).
        restarts: random beginnings.
        mask: broadcasts to `image`; r is 0 outside of it. None is everywhere.

    Returns:
        r (1, M, *spatial), without graph.

    Raises:
        SuiteError: an unknown norm, or a size or count out of range.
    """
    if norm not in NORMS:
        raise unknown("norm of an attack", norm, NORMS)
    if eps < 0 or steps < 0 or restarts < 1 or len(image) != 1:
        raise SuiteError(f"attack: eps={eps} and steps={steps} must be at least 0, restarts={restarts} at least 1; one image at a time")
    image = image.detach()
    inside = torch.ones_like(image) if mask is None else mask.to(image).expand_as(image)
    noise = torch.randn((restarts, *image.shape[1:]), generator=generator, device=image.device)
    if steps == 0:
        return (eps * (unit_rms(noise, inside) if norm == "l2" else noise.sign() * inside))[:1]
    r = eps * (
        unit_rms(noise, inside) * _uniform(noise, generator) if norm == "l2" else inside * noise.uniform_(-1, 1, generator=generator)
    )
    best, highest = r.clone(), torch.full((restarts,), -torch.inf, device=image.device)
    for step in range(steps + 1):
        with torch.enable_grad():
            r.requires_grad_(step < steps)
            values = loss(image + r)
            gradient = torch.autograd.grad(values.sum(), r)[0] if step < steps else torch.zeros_like(r)
        r, values = r.detach(), values.detach()
        better = values > highest
        best[better], highest = r[better], torch.maximum(values, highest)
        r = _moved(r, gradient, inside, norm, eps, 2.5 * eps / steps)
    return best[highest.argmax()][None]


def _uniform(like: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    return torch.rand((len(like), *[1] * (like.dim() - 1)), generator=generator, device=like.device)


def _moved(r: torch.Tensor, gradient: torch.Tensor, inside: torch.Tensor, norm: str, eps: float, size: float) -> torch.Tensor:
    """One step of `size` up the gradient, and back into the ball of radius `eps`."""
    if norm == "linf":
        return (r + size * gradient.sign() * inside).clamp(-eps, eps)
    r = r + size * unit_rms(gradient, inside)
    axes = tuple(range(1, r.dim()))
    rms = (r.square().sum(axes, keepdim=True) / inside.sum().clamp_min(1)).sqrt()
    return r * (eps / rms.clamp_min(1e-12)).clamp_max(1)
