"""What training a network takes at least, counted from shapes before anything is allocated."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call

from lightning_modules.segmentation import SegmentationMethod


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that training holds at once, without the workspace of kernels and what the loss keeps.

    Attributes:
        weights: weights and gradients.
        optimizer: state of the optimizers, such as the two moments of Adam.
        activations: what one forward pass of a batch keeps for the backward pass, in 32 bits; None where that cannot be counted from shapes.
    """

    weights: int
    optimizer: int
    activations: int | None

    @property
    def total(self) -> int:
        """All of it, as far as it is known."""
        return self.weights + self.optimizer + (self.activations or 0)


def training_memory(method: SegmentationMethod, shape: tuple[int, ...]) -> TrainingMemory:
    """Of `method` for batches (B, M, *spatial) of this shape; of several networks, activations are those of `method.network` alone."""
    weights = sum(_bytes(p) * (2 if p.requires_grad else 1) for p in method.parameters())
    return TrainingMemory(weights, _optimizer_state(method), _activations(method.network, shape))


def _optimizer_state(method: SegmentationMethod) -> int:
    """Measured on one small parameter for each optimizer: how many numbers it keeps for one of a weight's."""
    groups = {name: [p for p in params if p.requires_grad] for name, params in method.optimizer_groups().items()}
    total = 0.0
    for name, params in groups.items():
        maker = method.optimizer[name] if isinstance(method.optimizer, Mapping) else method.optimizer
        if maker is None or not params:
            continue
        probe = nn.Parameter(torch.zeros(16, 16))
        probe.grad = torch.ones_like(probe)
        optimizer = maker([probe])
        optimizer.step()
        kept = sum(v.numel() for v in optimizer.state[probe].values() if torch.is_tensor(v) and v.numel() > 1)
        total += kept / probe.numel() * sum(map(_bytes, params))
    return int(total)


def _activations(network: nn.Module, shape: tuple[int, ...]) -> int | None:
    """Bytes that autograd keeps of one training pass, each storage once; weights are no part of it. None of a network that does more than
    shapes can tell, such as making tensors of its own.
    """
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    shapes = {name: torch.empty_like(t, device="meta").requires_grad_(t.requires_grad) for name, t in tensors.items()}
    own = {t.untyped_storage()._cdata for t in shapes.values()}
    kept: dict[int, tuple[torch.UntypedStorage, int]] = {}  # holding a storage keeps its address from being given to another

    def pack(saved: torch.Tensor) -> torch.Tensor:
        storage = saved.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage, storage.nbytes()
        return saved

    was_training = network.training
    network.train()
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            functional_call(network, shapes, (torch.empty(shape, device="meta"),))
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        return None
    finally:
        network.train(was_training)
    return sum(size for _, size in kept.values())


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
