"""`CheckpointTest`: the base of methods that ask a trained one in a way of their own."""

from collections.abc import Callable, Sequence
from typing import Any

from lesionbench.checkpoint import load_method
from lesionbench.task import Task
from lightning_modules.base import Method
from lightning_modules.inferers import Inferer


class CheckpointTest(Method):
    """Holds the method of a checkpoint, frozen; measures and moves to the native grid as that one does. Nothing to train.

    Args:
        checkpoint: of the method that is tested.
        trust: further packages whose classes a checkpoint may build.
    """

    takes_inputs = True

    def __init__(self, task: Task, *, checkpoint: str, trust: Sequence[str] = (), **options: Any) -> None:
        super().__init__(task, **options)
        self.method = load_method(checkpoint, trust)[0].requires_grad_(False)
        self.oracles = self.method.oracles

    def average(self, over: Callable[[Inferer], Inferer]) -> None:
        """From now on the method under test predicts so (see `Method.average`)."""
        self.method.average(over)

    def measure(self, *args: Any, **options: Any) -> list[dict]:
        return self.method.measure(*args, **options)

    def to_native(self, prediction: Any, geometry: Any) -> Any:
        return self.method.to_native(prediction, geometry)
