"""Views of a volume: 3D patches, 2D slices, 2.5D slabs and voxel vectors, and back again.

Everything works on (B, C, X, Y, Z); `axis` is the spatial axis (0, 1, 2) that is cut.
"""

import torch
from torch.nn.functional import pad


def to_slices(volume: torch.Tensor, axis: int) -> torch.Tensor:
    """(B, C, X, Y, Z) -> slices (B * N, C, H, W); slice n of case b is item b * N + n."""
    return volume.movedim(2 + axis, 1).flatten(0, 1)


def from_slices(slices: torch.Tensor, axis: int, batch: int) -> torch.Tensor:
    """The inverse of `to_slices`: (B * N, C, H, W) -> (B, C, X, Y, Z)."""
    return slices.unflatten(0, (batch, -1)).movedim(1, 2 + axis)


def to_slabs(volume: torch.Tensor, axis: int, k: int) -> torch.Tensor:
    """(B, C, X, Y, Z) -> slabs (B * N, C, H, W, k) of k neighbouring slices around every slice; end slices are repeated. `k` is odd.

    Back to a volume goes through `from_slices`: a network answers with the middle slice.
    """
    moved = volume.movedim(2 + axis, -1)  # (B, C, H, W, N)
    half = k // 2
    b, c, h, w, n = moved.shape
    padded = pad(moved.reshape(b * c, h * w, n).float(), (half, half), mode="replicate").to(volume.dtype).reshape(b, c, h, w, n + 2 * half)
    return padded.unfold(-1, k, 1).movedim(4, 1).flatten(0, 1)


def to_voxels(volume: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Voxels inside `mask` (B, 1, *spatial), bool, as vectors (N, C) with the index (N,) of the case each came from."""
    inside = mask[:, 0]
    return volume.movedim(1, -1)[inside], inside.nonzero()[:, 0]


def from_voxels(vectors: torch.Tensor, mask: torch.Tensor, fill: float = 0) -> torch.Tensor:
    """The inverse of `to_voxels`: (N, C) -> (B, C, *spatial), `fill` outside the mask."""
    volume = vectors.new_full((*mask[:, 0].shape, vectors.shape[1]), fill)
    volume[mask[:, 0]] = vectors
    return volume.movedim(-1, 1)
