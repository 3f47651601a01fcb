"""Optimizers that torch does not have."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from lesionbench.errors import SuiteError
from lesionbench.ranges import BelowOne, Count, NotNegative, Positive, PositiveShare


class Ranger(torch.optim.RAdam):
    """Rectified Adam with centralized gradients, looked ahead from slow weights.

    The parts are those of Liu et al., ICLR 2020 (rectified Adam, torch's own), Yong et al., ECCV 2020 (every gradient of a weight with more
    than one axis loses its mean over all axes but the first) and Zhang et al., NeurIPS 2019 (after every `k` steps the slow weights move
    by `alpha` of the way to the fast ones, which start again from there). The defaults are those under which the three became known
    together (L. Wright, 2019).

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        betas, eps, weight_decay: of Adam; the decay is added to the gradient.
        k: steps between two looks ahead.
        alpha: share of the way, 0 < alpha <= 1; 1 leaves the fast weights as they are.
        centralize: whether gradients are centralized.

    Raises:
        SuiteError: `k` or `alpha` out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: NotNegative = 1e-3,
        betas: tuple[BelowOne, BelowOne] = (0.95, 0.999),
        eps: Positive = 1e-5,
        weight_decay: NotNegative = 0.0,
        k: Count = 6,
        alpha: PositiveShare = 0.5,
        centralize: bool = True,
    ) -> None:
        if not isinstance(k, int) or isinstance(k, bool) or k < 1:
            raise SuiteError(f"optimizer.k={k}: expected a whole number of steps from 1 on")
        if not 0 < alpha <= 1:
            raise SuiteError(f"optimizer.alpha={alpha}: expected 0 < alpha <= 1")
        super().__init__(params, lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay)
        self.k, self.alpha, self.centralize = k, alpha, centralize

    def step(self, closure: Callable | None = None) -> Any:
        """One step; gradients are centralized after the closure, and so after clipping."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            moving = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
            if self.centralize:
                for p in moving:
                    if p.ndim > 1:
                        p.grad -= p.grad.mean(dim=tuple(range(1, p.ndim)), keepdim=True)
            slow = {p: self.state[p]["slow"] if "slow" in self.state[p] else p.clone() for p in moving}
            super().step()
            for p in moving:
                state = self.state[p]
                state["slow"] = slow[p]  # not before the step: rectified Adam takes an empty state for a new parameter
                if int(state["step"]) % self.k == 0:
                    slow[p].lerp_(p, self.alpha)
                    p.copy_(slow[p])
        return loss
