"""Architectures between feature maps of several resolutions: their paths, which of them fit together, the likeliest that do (He et al., CVPR 2021).

Scales count from 0, the finest; each halves the resolution. A block leads from every scale to itself and its neighbors. An architecture is
written as a row for each block with a character for each path, in the order of `paths`: the number of its operation, or `.` where the path
is left out.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from lesionbench.errors import SuiteError

OPERATIONS = {2: ("skip", "3x3"), 3: ("skip", "3x3x3", "3x3x1 P3D", "3x1x3 P3D", "1x3x3 P3D")}  # by dimensions; their numbers in a row
PRUNED = "."


def paths(depths: int) -> list[tuple[int, int]]:
    """(from scale, to scale) of every path of a block: 3 * depths - 2 of them."""
    return [(source, to) for to in range(depths) for source in range(max(0, to - 1), min(depths, to + 2))]


class Children:
    """The children of a block: every set of its paths but the empty one, and the scales that they read and write.

    Attributes:
        members: (K, P) 1 where the child has the path, K = 2^P - 1; the first path is the highest binary digit of the child's number.
        reads, writes: (K,) number of the pattern of scales that the child has an input, an output at, below N = 2^depths - 1.
    """

    def __init__(self, depths: int) -> None:
        found = np.array(paths(depths))
        members = np.arange(1, 2 ** len(found))[:, None] >> np.arange(len(found) - 1, -1, -1) & 1  # of numpy: numbers, also on `meta`
        digits = 1 << np.arange(depths - 1, -1, -1)
        active = [np.stack([members[:, found[:, end] == scale].any(axis=1) for scale in range(depths)], axis=1) for end in (0, 1)]
        self.members, self.patterns = torch.from_numpy(members), 2**depths - 1
        self.reads, self.writes = (torch.from_numpy(scales @ digits - 1) for scales in active)

    def log_probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """log P (B, K) of every child where each path is there with probability sigmoid(logits) (B, P), given that one is at all."""
        members = self.members.to(logits)
        there, away = F.logsigmoid(logits), F.logsigmoid(-logits)
        any_path = torch.log(-torch.expm1(away.sum(dim=1, keepdim=True)))
        return there @ members.T + away @ (1 - members).T - any_path

    def activations(self, probabilities: torch.Tensor, patterns: torch.Tensor) -> torch.Tensor:
        """(B, K) of children -> (B, N) of the patterns of scales that they read, or write."""
        out = probabilities.new_zeros(len(probabilities), self.patterns)
        return out.index_add(1, patterns.to(out.device), probabilities)


def likeliest(log_probabilities: torch.Tensor, children: Children) -> list[int]:
    """The sequence of children, one for each block, of the highest probability among those in which every block reads just the scales that
    the one before it writes: the shortest path through a layered graph whose edges cost -log P.

    The graph has N = 2^depths - 1 different states between two blocks, so neither it nor a matrix of all pairs of children is ever built.

    Args:
        log_probabilities: (B, K).
    """
    scores, reads, writes = log_probabilities.detach().cpu().double().numpy(), children.reads.numpy(), children.writes.numpy()
    of_pattern = [np.flatnonzero(writes == pattern) for pattern in range(children.patterns)]
    best, chosen = np.zeros(children.patterns), []
    for block in scores:
        total = best[reads] + block
        chosen.append([among[np.argmax(total[among])] for among in of_pattern])
        best = total[chosen[-1]]
    sequence = [chosen[-1][int(np.argmax(best))]]
    for block in reversed(chosen[:-1]):
        sequence.insert(0, block[reads[sequence[0]]])
    return [int(child) for child in sequence]


def dead_end(architecture: Sequence[str]) -> str | None:
    """What keeps a written architecture from being feasible; None where all that a block leads to is led on, and nothing else is."""
    found = paths((len(architecture[0]) + 2) // 3)
    used = [[path for path, character in zip(found, row, strict=True) if character != PRUNED] for row in architecture]
    for number, (before, after) in enumerate(zip(used, [*used[1:], None], strict=True), 1):
        if not before:
            return f"block {number} has no path"
        written, read = {to for _, to in before}, {source for source, _ in after} if after else set()
        if after and written - read:
            return f"block {number} leads to scale {min(written - read)}, from which block {number + 1} does not go on"
        if after and read - written:
            return f"block {number + 1} goes on from scale {min(read - written)}, to which block {number} does not lead"
    return None


def rows(chosen: np.ndarray, operations: np.ndarray) -> list[str]:
    """The architecture of paths (B, P) and numbers of operations (B, P), written."""
    return ["".join(str(o) if there else PRUNED for there, o in zip(*block, strict=True)) for block in zip(chosen, operations, strict=True)]


def parsed(architecture: Sequence[str], dimensions: int) -> tuple[np.ndarray, np.ndarray]:
    """A written architecture -> its paths (B, P) and numbers of operations (B, P), 0 where there is no path.

    Raises:
        SuiteError: no rows of 4, 7, 10 ... characters, all alike; operations that there are not; an infeasible one.
    """
    asked = f"network.architecture={architecture if isinstance(architecture, str) else list(architecture)}"
    if isinstance(architecture, str) or not architecture or not all(isinstance(row, str) for row in architecture):
        raise SuiteError(f"{asked}: expected a list of rows, one for each block, such as ['0.1.......', ...]")
    known = [str(number) for number in range(len(OPERATIONS[dimensions]))]
    for number, row in enumerate(architecture, 1):
        if len(row) != len(architecture[0]) or len(row) < 4 or len(row) % 3 != 1:
            raise SuiteError(
                f"{asked}: row {number} ('{row}') has {len(row)} characters; all must have 4 for two scales, 7 for three, 10 for four"
            )
        if set(row) - {*known, PRUNED}:
            raise SuiteError(f"{asked}: row {number} ('{row}') may hold {', '.join(known)} for an operation and '{PRUNED}' for no path")
    found = dead_end(architecture)
    if found:
        raise SuiteError(f"{asked}: {found}")
    return np.array([[int(c != PRUNED) for c in row] for row in architecture]), np.array(
        [[0 if c == PRUNED else int(c) for c in row] for row in architecture]
    )
