"""Calling a network without leaving a trace in it."""

import torch
from torch import nn
from torch.func import functional_call


def stateless(network: nn.Module, *inputs: torch.Tensor, seed: int | None = None) -> torch.Tensor | dict:
    """`network(*inputs)` with its gradients, but without its memory: extra passes of a loss must not change what training has learned.

    Buffers (running statistics of batch normalization, vectors of spectral normalization) are worked on as copies, so a network in
    training mode normalizes by the statistics of `inputs` and records none. With `seed`, dropout draws the same mask in every call with
    that seed, and the global generators stay as they were.

    Args:
        inputs: the network's positional arguments; the first says which device draws.
        seed: of all random draws of the call; None draws from the global generators as usual.
    """
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    if seed is None:
        return functional_call(network, buffers, inputs)
    with torch.random.fork_rng([inputs[0].device] if inputs[0].is_cuda else []):
        torch.manual_seed(seed)
        return functional_call(network, buffers, inputs)
