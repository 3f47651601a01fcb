"""Result rows of all cases, gathered from all ranks."""

from typing import Any

import torch.distributed as dist
from torchmetrics import Metric

Row = dict[str, Any]


class PerCaseResults(Metric):
    """Collects result rows (see `lesionbench.results`) and returns those of all ranks, each once.

    `update(rows)` takes the rows of one or more cases; they hold plain values (strings, numbers) and at least `case`. `compute()` is a
    collective call where `torch.distributed` runs: every rank must make it, also one that saw no case, and every rank gets all rows. A row
    that several ranks hold (a sampler that repeats cases to even out the ranks) is kept once, by case, member and region. Rows come
    sorted by case; within a case they keep their order.
    """

    full_state_update = False

    def __init__(self) -> None:
        # Rows are no tensors, so they are gathered in `compute` and not by torchmetrics; a value cached on one rank only would make
        # the others wait for it for ever.
        super().__init__(sync_on_compute=False, compute_with_cache=False)
        self.rows: list[Row] = []

    def update(self, rows: list[Row]) -> None:
        """Adds the rows of one or more cases."""
        self.rows.extend(rows)

    def compute(self) -> list[Row]:
        """All rows of all ranks."""
        gathered = [self.rows]
        if dist.is_available() and dist.is_initialized():
            gathered = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(gathered, self.rows)
        once: dict[tuple[str, str, str], Row] = {}
        for row in (row for rows in gathered for row in rows):
            once.setdefault((row["case"], row.get("member", ""), row.get("region", "")), row)
        return sorted(once.values(), key=lambda row: row["case"])

    def forward(self, rows: list[Row]) -> list[Row]:
        """Adds `rows` and returns them: the value of a batch is its own rows."""
        self.update(rows)
        return rows

    def reset(self) -> None:
        """Forgets all rows."""
        super().reset()
        self.rows = []
