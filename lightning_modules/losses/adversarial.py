"""Losses of a segmentation network and a critic that judges its masks voxel by voxel. Critics return logits; reals are the true masks."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from lesionbench.errors import unknown

KINDS = ("bce", "lsgan", "wgan_gp")


def critic_loss(real: torch.Tensor, fake: torch.Tensor, kind: str = "bce") -> torch.Tensor:
    """What the critic minimizes: to answer 1 on true masks and 0 on predicted ones. Scalar, float32.

    Args:
        real, fake: the critic's logits on true and on predicted masks, (B, C, *spatial); batches may differ.
        kind: `bce` 1/2 [BCE(real, 1) + BCE(fake, 0)] (ln 2 for an undecided critic), `lsgan` the same with squares of the logits
            (Mao et al., ICCV 2017), `wgan_gp` mean fake - mean real (Gulrajani et al., NeurIPS 2017; its penalty is `gradient_penalty`).
    """
    real, fake = real.float(), fake.float()
    if kind == "bce":
        return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2
    if kind == "lsgan":
        return ((real - 1).square().mean() + fake.square().mean()) / 2
    if kind == "wgan_gp":
        return fake.mean() - real.mean()
    raise unknown("critic loss", kind, KINDS)


def fooling_loss(fake: torch.Tensor, kind: str = "bce") -> torch.Tensor:
    """What the segmentation network minimizes: that the critic answers 1 on its masks (non-saturating). Arguments as `critic_loss`."""
    fake = fake.float()
    if kind == "bce":
        return F.softplus(-fake).mean()
    if kind == "lsgan":
        return (fake - 1).square().mean() / 2
    if kind == "wgan_gp":
        return -fake.mean()
    raise unknown("critic loss", kind, KINDS)


def gradient_penalty(
    critic: Callable[[torch.Tensor], torch.Tensor], real: torch.Tensor, fake: torch.Tensor, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Mean of (|gradient| - 1)^2 at random points between true and predicted masks (Gulrajani et al., NeurIPS 2017, eq. 3).

    The critic judges voxels, so every voxel is a sample: the gradient of its answers has its norm taken over the mask channels.

    Args:
        real, fake: masks (B, K, *spatial).
    """
    share = torch.rand((len(real), *[1] * (real.dim() - 1)), generator=generator, device=real.device)
    with torch.autocast(real.device.type, enabled=False):
        mix = torch.lerp(fake.detach().float(), real.float(), share).requires_grad_()
        (gradient,) = torch.autograd.grad(critic(mix).sum(), mix, create_graph=True)
        return ((gradient.square().sum(dim=1) + 1e-12).sqrt() - 1).square().mean()
