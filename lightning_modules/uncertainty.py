"""Monte-Carlo dropout (Gal & Ghahramani, ICML 2016) and what repeated stochastic passes say about uncertainty."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd


def active_dropout(module: nn.Module) -> list[nn.Module]:
    """The dropout layers of `module` that can drop anything (rate above 0); without any, stochastic passes are all alike."""
    return [layer for layer in module.modules() if isinstance(layer, _DropoutNd) and layer.p > 0]


@contextmanager
def mc_dropout(module: nn.Module) -> Iterator[None]:
    """Inside, the dropout layers of `module` draw, whatever its mode; everything else stays in the mode it is in.

    Repeated passes leave no trace: a batch normalization in train mode goes on normalizing with the statistics of the batch, but does
    not move its running ones. The modes are restored at the end.
    """
    dropout = [(layer, layer.training) for layer in active_dropout(module)]
    norms = [layer for layer in module.modules() if isinstance(layer, _BatchNorm) and layer.training and layer.track_running_stats]
    try:
        for layer, _ in dropout:
            layer.train()
        for layer in norms:
            layer.track_running_stats = False
        yield
    finally:
        for layer, mode in dropout:
            layer.train(mode)
        for layer in norms:
            layer.track_running_stats = True


def entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """-sum_c p_c ln p_c, with 0 ln 0 = 0: (B, C, *spatial) -> (B, 1, *spatial), in [0, ln C]."""
    return torch.special.entr(probabilities).sum(dim=1, keepdim=True)


class RunningMoments:
    """Sums over stochastic passes instead of the passes themselves: memory does not grow with their number.

    `update` takes the probabilities (B, C, *spatial) of one pass. With `mutual_information` the entropy of every pass is summed as well.

    Raises:
        ValueError: something is asked for that has not been summed.
    """

    def __init__(self, mutual_information: bool = False) -> None:
        self.count = 0
        self._sum: torch.Tensor | None = None
        self._entropies: torch.Tensor | None = None
        self._informed = mutual_information

    def update(self, probabilities: torch.Tensor) -> None:
        """Adds one pass; what is kept has no gradient."""
        probabilities = probabilities.detach()
        self._sum = probabilities.clone() if self._sum is None else self._sum.add_(probabilities)
        if self._informed:
            one = entropy(probabilities)
            self._entropies = one if self._entropies is None else self._entropies.add_(one)
        self.count += 1

    @property
    def mean(self) -> torch.Tensor:
        """Mean probabilities A (B, C, *spatial) (Zhao et al., JBHI 2023, Eq. 3)."""
        if self._sum is None:
            raise ValueError("no pass has been added yet")
        return self._sum / self.count

    @property
    def entropy(self) -> torch.Tensor:
        """Predictive entropy of the mean, (B, 1, *spatial), in [0, ln C]: all uncertainty (Zhao et al., JBHI 2023, Eq. 3)."""
        return entropy(self.mean)

    @property
    def expected_entropy(self) -> torch.Tensor:
        """Mean entropy of the passes, (B, 1, *spatial), in [0, ln C]: what stays uncertain in every one of them."""
        if self._entropies is None:
            raise ValueError("the entropies of the passes were not summed: RunningMoments(mutual_information=True)")
        return self._entropies / self.count

    @property
    def mutual_information(self) -> torch.Tensor:
        """Entropy of the mean minus mean entropy, (B, 1, *spatial), >= 0: the part that the passes disagree on (Houlsby et al., 2011)."""
        return (self.entropy - self.expected_entropy).clamp_min(0)
