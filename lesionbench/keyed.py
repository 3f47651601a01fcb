"""Keyed randomness: a draw depends on what it is for (seed, name, iteration, rank ...), never on what was drawn before.

So any number of workers, a kill in mid-epoch, or a term switched off leave every other draw as it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # the comparison draws too, and does without the second that the import takes
    import torch


def key(*parts: object) -> int:
    """A 63-bit seed from any printable parts; the same on every machine and in every process."""
    digest = hashlib.blake2b("\x1f".join(str(p) for p in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def numpy_generator(*parts: object) -> np.random.Generator:
    """A NumPy generator that belongs to `parts`."""
    return np.random.default_rng(key(*parts))


def torch_generator(*parts: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator on `device` that belongs to `parts`."""
    import torch

    return torch.Generator(device=device).manual_seed(key(*parts))


@contextmanager
def torch_seeded(*parts: object) -> Iterator[None]:
    """Seeds torch's global CPU generator with `parts` for libraries that only draw from it (TorchIO), and restores it after."""
    import torch

    state = torch.get_rng_state()
    torch.random.default_generator.manual_seed(key(*parts))
    try:
        yield
    finally:
        torch.set_rng_state(state)
