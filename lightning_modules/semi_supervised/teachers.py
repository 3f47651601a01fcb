"""Teachers: networks whose weights are a moving average of the weights of one or several students (Tarvainen & Valpola, NeurIPS 2017)."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from lesionbench.errors import SuiteError
from lightning_modules.networks.stateless import stateless


class Teacher(nn.Module):
    """theta_t <- (1 - sum a_k) theta_t + sum a_k theta_k over the students k, once per `update()`; never trained itself.

    With one student and a = 1 - decay this is the mean teacher (Tarvainen & Valpola, NeurIPS 2017, Eq. 2). Its weights and the number of
    updates are in the state; the students are referred to, not owned. A pass has no gradient and leaves no trace: in train mode dropout
    draws and batch normalization uses the statistics of the batch, without recording them.

    Parameters meet by name and shape. One that only some of the students have follows those with the whole rate, shared in proportion.
    Buffers (running statistics) are copied from a single student; of several students, the floating-point ones are averaged with weights
    a_k / sum a, which is exact for none of them: prefer networks without batch normalization there.

    Args:
        students: the network or networks that are averaged.
        rates: a_k > 0 of each student, or one for all; sum at most 1.
        warmup: at update t = 0, 1, ... the sum of the rates is at least 1 / (t + 1), shares unchanged, so that a short run does not drag
            its random start along (the rule of UA-MT, Yu et al., MICCAI 2019).
        layout: a network whose layout the teacher takes; default that of the first student.

    Raises:
        SuiteError: rates out of range, or a parameter of the teacher that no student has.
    """

    def __init__(
        self,
        students: nn.Module | Sequence[nn.Module],
        rates: float | Sequence[float] = 0.01,
        warmup: bool = True,
        layout: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self._students = (students,) if isinstance(students, nn.Module) else tuple(students)  # in a tuple: not part of the state
        rates = [rates] * len(self._students) if isinstance(rates, float | int) else list(rates)
        if len(rates) != len(self._students) or min(rates) <= 0 or sum(rates) > 1:
            raise SuiteError(f"teacher: rates {rates} for {len(self._students)} student(s): each above 0, together at most 1")
        self.rates, self.warmup = [float(rate) for rate in rates], warmup
        self.network = deepcopy(self._students[0] if layout is None else layout).requires_grad_(False)
        self.register_buffer("updates", torch.tensor(0))
        self._done: int | None = 0  # the same number, known without asking the device
        self._groups = self._grouped()
        self.reset()

    def forward(self, image: torch.Tensor, seed: int | None = None) -> torch.Tensor | dict[str, Any]:
        """What the network answers, without gradient; `seed` is of its dropout."""
        with torch.no_grad():
            return stateless(self.network, image, seed=seed) if self.training else self.network(image)

    def reset(self) -> None:
        """Makes the teacher the (weighted) mean of the students as they are now, and counts updates from 0 again."""
        self._average(1.0)
        self.updates.zero_()
        self._done = 0

    def update(self) -> None:
        """One step of the moving average; call it after every optimizer step."""
        if self._done is None:
            self._done = int(self.updates)
        total = sum(self.rates)
        self._average(max(total, 1 / (self._done + 1)) if self.warmup else total)
        self.updates += 1
        self._done += 1

    @torch.no_grad()
    def _average(self, total: float) -> None:
        for names, owners in self._groups.items():
            weights = [self.rates[k] / sum(self.rates[o] for o in owners) * total for k in owners]
            sources = [dict(self._students[k].named_parameters()) for k in owners]
            mine = dict(self.network.named_parameters())
            targets = [mine[name] for name in names]
            if total < 1:
                torch._foreach_mul_(targets, 1 - sum(weights))
            for number, (source, weight) in enumerate(zip(sources, weights, strict=True)):
                values = [source[name].detach() for name in names]
                if total < 1 or number:
                    torch._foreach_add_(targets, values, alpha=weight)
                else:  # the first of a plain mean: whatever was there does not count, not even when it is not finite
                    for target, value in zip(targets, values, strict=True):
                        target.copy_(value).mul_(weight)
        buffers = [dict(student.named_buffers()) for student in self._students]
        for name, buffer in self.network.named_buffers():
            found = [(b[name], rate) for b, rate in zip(buffers, self.rates, strict=True) if name in b and b[name].shape == buffer.shape]
            if len(found) > 1 and buffer.is_floating_point():
                buffer.copy_(sum(value * rate for value, rate in found) / sum(rate for _, rate in found))
            elif found:
                buffer.copy_(found[0][0])

    def _grouped(self) -> dict[tuple[str, ...], tuple[int, ...]]:
        """Names of parameters -> the students that have them."""
        shapes = [{name: p.shape for name, p in student.named_parameters()} for student in self._students]
        by_owners: dict[tuple[int, ...], list[str]] = {}
        for name, parameter in self.network.named_parameters():
            owners = tuple(k for k, known in enumerate(shapes) if known.get(name) == parameter.shape)
            if not owners:
                raise SuiteError(f"teacher: no student has a parameter {name} of shape {tuple(parameter.shape)}")
            by_owners.setdefault(owners, []).append(name)
        return {tuple(names): owners for owners, names in by_owners.items()}

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._done = None
