"""What several raters say together: most of them, and how many of them."""

import torch

from lesionbench.task import IGNORE, Task


def majority(raters: torch.Tensor) -> torch.Tensor:
    """The class that most raters chose, class indices (R, *spatial) -> (*spatial), int8; of equal counts the lower class (background first).

    A rater's -1 counts for nothing; a voxel of which all raters say -1 stays -1.
    """
    classes = max(int(raters.max()), 0) + 1
    votes = torch.stack([(raters == c).sum(dim=0) for c in range(classes)])
    return torch.where((raters == IGNORE).all(dim=0), IGNORE, votes.argmax(dim=0)).to(torch.int8)


def agreement(raters: torch.Tensor, task: Task) -> torch.Tensor:
    """Share of the raters who marked a voxel as a region: class indices (N, *spatial) -> (R, *spatial), float32 in [0, 1].

    A rater who is -1 throughout is absent; elsewhere -1 is no mark.
    """
    present = (raters != IGNORE).flatten(1).any(dim=1)
    return task.region_masks(raters[present]).float().mean(dim=1)
