"""`DistanceSupervised`: segmentation whose loss weighs probabilities by distance; the base of methods that need distance maps."""

from collections.abc import Mapping
from typing import Any

import torch

from lesionbench.batch import Batch
from lesionbench.errors import SuiteError
from lesionbench.task import Task
from lightning_modules.segmentation import SegmentationMethod


class DistanceSupervised(SegmentationMethod):
    """A segmentation method that finds a distance map in every training batch; see `lightning_modules.distances`.

    The maps are made by a stage before the training (`lesionbench.jobs.distance_maps.write_distance_maps`). Only training needs them.

    Args:
        distance: name of the map.
    """

    def __init__(self, task: Task, *, distance: str = "distance", **options: Any) -> None:
        super().__init__(task, **options)
        self.distance, self.reads_maps = distance, (distance,)

    @classmethod
    def maps_of(cls, options: Mapping[str, Any]) -> dict[str, str]:
        return {options.get("distance", "distance"): "linear"}

    def check(self, data: Any) -> None:
        store = getattr(data, "maps", None)
        made = self.distance in getattr(data, "extra_maps", self.reads_maps) and (store is None or store.version(self.distance) > 0)
        if not made:
            raise SuiteError(
                f"{type(self).__name__} needs the distance map '{self.distance}': a stage before the training that calls "
                f"lesionbench.jobs.distance_maps.write_distance_maps, and data.extra_maps={{{self.distance}: linear}}"
            )
        super().check(data)

    def distances(self, batch: Batch, channels: int) -> torch.Tensor:
        """The distance map of a batch (B, channels, *spatial), float32.

        Raises:
            SuiteError: a case without map, or a map of another number of channels.
        """
        if self.distance not in batch:
            raise SuiteError(
                f"no distance map '{self.distance}' for some of the cases {', '.join(batch['case'])}; run the stage that makes it"
            )
        found = batch[self.distance]
        if found.shape[1] != channels:
            raise SuiteError(
                f"the distance map '{self.distance}' has {found.shape[1]} channel(s), {type(self).__name__} needs {channels}; "
                "see distance.of and distance.background"
            )
        return found.float()
