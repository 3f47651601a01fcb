"""Virtual adversarial training (Miyato et al., IEEE TPAMI 41, 2019): the divergence under the image change that raises it most."""

import torch
import torch.nn.functional as F
from torch import nn

from lesionbench.errors import SuiteError, unknown
from lesionbench.ranges import NotNegative, Positive, Whole
from lightning_modules.losses.cross_entropy import weighted_mean
from lightning_modules.networks.contract import logits_of
from lightning_modules.networks.stateless import stateless

KINDS = ("sigmoid", "softmax")


def divergence(logits: torch.Tensor, reference: torch.Tensor, kind: str) -> torch.Tensor:
    """Kullback-Leibler divergence KL(reference || prediction) of every voxel in nats, >= 0, float32.

    With hard references it is the (binary) cross-entropy, since their entropy is 0.

    Args:
        logits: (B, K, *spatial).
        reference: probabilities, same shape, in [0, 1]; for `softmax` they sum to 1 over K.
        kind: `sigmoid` (K independent Bernoulli variables -> (B, K, *spatial)) or `softmax` (one of K classes -> (B, 1, *spatial)).
    """
    logits, reference = logits.float(), reference.float()
    if kind == "sigmoid":
        entropy = -torch.xlogy(reference, reference) - torch.xlogy(1 - reference, 1 - reference)
        return F.binary_cross_entropy_with_logits(logits, reference, reduction="none") - entropy
    return (torch.xlogy(reference, reference) - reference * logits.log_softmax(dim=1)).sum(dim=1, keepdim=True)


def unit_rms(x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Every sample of `x` (B, ...) scaled to a root mean square of 1 over the voxels x channels of `mask`, and 0 outside of it.

    `mask` broadcasts to `x`; None is everywhere. A sample that is 0 throughout stays 0.
    """
    axes = tuple(range(1, x.dim()))
    inside = torch.ones_like(x) if mask is None else mask.to(x).expand_as(x)
    x = x * inside
    x = x / x.abs().amax(axes, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)  # gradients may be too small to be squared
    count = inside.sum(axes, keepdim=True).clamp_min(1)
    return x / (x.square().sum(axes, keepdim=True) / count).sqrt().clamp_min(torch.finfo(x.dtype).tiny)


class VAT(nn.Module):
    """mean KL(reference || network(image + r)), r = the change of a given size that raises it most (Miyato et al., eq. 5-12).

    r is found by power iteration from a random direction d: d <- gradient of KL(reference || network(image + xi d)) with respect to d,
    scaled to unit size. The gradient of the loss flows through network(image + r) alone, never through r or the reference. All passes
    leave the network as it was (`networks.stateless`): batch normalization uses the statistics of each pass and records none, dropout has
    one mask for all passes, no parameter receives a `.grad` before the caller's backward. The search runs in float32 whatever the
    surrounding autocast, because a probe of size xi is lost in half precision; so does the divergence.

    Args:
        kind: `sigmoid` or `softmax`, see `divergence`.
        eps: size of r: root mean square over masked voxels x channels of every sample, in multiples of `unit`.
        xi: size of the probe, likewise. Far below 1e-4 its effect drowns in float32 rounding.
        iterations: of the power method; 0 leaves the random direction (the control that an adversarial one has to beat).

    Raises:
        SuiteError: an unknown kind, or a size or count out of range.
    """

    def __init__(self, kind: str, eps: NotNegative = 0.2, xi: Positive = 1e-3, iterations: Whole = 1) -> None:
        super().__init__()
        if kind not in KINDS:
            raise unknown("kind of divergence", kind, KINDS)
        if eps < 0 or xi <= 0 or iterations < 0:
            raise SuiteError(f"vat: eps={eps} and iterations={iterations} must be at least 0, xi={xi} above 0")
        self.kind, self.eps, self.xi, self.iterations = kind, eps, xi, iterations

    def forward(
        self,
        network: nn.Module,
        image: torch.Tensor,
        reference: torch.Tensor | None = None,
        *,
        valid: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        unit: float | torch.Tensor = 1.0,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """The loss, a scalar >= 0 in float32.

        Args:
            network: image -> logits (B, K, *spatial), or a dict with `logits`.
            image: (B, M, *spatial).
            reference: probabilities (B, K, *spatial); None = the network's own, on the clean image.
            valid: broadcasts to (B, K, *spatial); voxels of 0 do not count. None = all count.
            mask: broadcasts to (B, M, *spatial); where the image may change, such as the brain. None = everywhere.
            unit: what eps and xi are multiples of, such as the standard deviation of the image.
            generator: of the random direction and of the dropout mask; None = torch's own.
        """
        seed = int(torch.randint(2**62, ())) if generator is None else generator.initial_seed()
        if reference is None:
            with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
                logits = _logits(network, image.float(), seed)
                reference = logits.sigmoid() if self.kind == "sigmoid" else logits.softmax(dim=1)
        r = self.perturbation(network, image, reference, valid=valid, mask=mask, unit=unit, generator=generator, seed=seed)
        values = divergence(_logits(network, image + r, seed), reference, self.kind)
        return values.mean() if valid is None else weighted_mean(values, valid.to(values).expand_as(values))

    def perturbation(
        self,
        network: nn.Module,
        image: torch.Tensor,
        reference: torch.Tensor,
        *,
        valid: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        unit: float | torch.Tensor = 1.0,
        generator: torch.Generator | None = None,
        seed: int = 0,
    ) -> torch.Tensor:
        """The change r (B, M, *spatial), float32 and without graph; 0 for a sample whose prediction does not depend on the image.

        Arguments as in `forward`; `seed` is of the dropout mask.
        """
        image = image.detach().float()
        d = unit_rms(torch.randn(image.shape, generator=generator, device=image.device), mask)
        for _ in range(self.iterations):
            with torch.enable_grad(), torch.autocast(image.device.type, enabled=False):
                d.requires_grad_()
                values = divergence(_logits(network, image + self.xi * unit * d, seed), reference, self.kind)
                values = values if valid is None else values * valid.to(values)
                (gradient,) = torch.autograd.grad(values.sum(), d)
            d = unit_rms(gradient, mask)
        return self.eps * unit * d


def _logits(network: nn.Module, image: torch.Tensor, seed: int) -> torch.Tensor:
    return logits_of(stateless(network, image, seed=seed)).float()
