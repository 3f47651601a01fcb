"""The base of semi-supervised methods: labeled and unlabeled streams, joint passes, ramps, teachers, pseudo labels on disk, warm start."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn

from lesionbench.batch import Batch
from lesionbench.errors import SuiteError, unknown
from lesionbench.keyed import key
from lesionbench.prediction import Prediction
from lesionbench.ranges import Count, NotNegative
from lesionbench.task import Task
from lightning_modules.networks.contract import Output, logits_of
from lightning_modules.networks.stateless import stateless
from lightning_modules.ramps import Ramp, whole_batches
from lightning_modules.segmentation import SegmentationMethod
from lightning_modules.semi_supervised.teachers import Teacher


class SemiSupervised(SegmentationMethod):
    """A supervised loss on the labeled stream plus weighted, ramped terms that also use the unlabeled one.

    A method names its terms (`terms`), makes them in `losses`, and says which networks learn (`students`) and which answer (`predictors`).
    An attribute that is a `Teacher` is updated after every optimizer step and saved, without further ado. A method with `writes_maps`
    labels all unlabeled cases at ends of epochs (`case_maps`), and finds the maps, cut and augmented with the image, in the unlabeled
    batches of the following epochs. The data module gives unlabeled batches and cases without any label; analysis is for callbacks.

    Args:
        weights: term -> weight at the end of its ramp; those not named keep the value in `terms`. 0 leaves a term out.
        ramp: weight over time, called with (batches done, batches of all) since the warm start, or term -> such a call; None = constant.
        warm_start: batches on labeled samples alone before the other terms begin; below 1 a share of all. A method that writes maps goes
            on to the end of the epoch.
        predict_with: name out of `predictors`, or `mean` of the students' probabilities; None = the first of `predictors`.
        predict_members: also predict with every one of `predictors` alone (members of the prediction).
        relabel_every: epochs between two labelings of the unlabeled cases, for methods that write maps.

    Attributes:
        terms: name of each term besides `supervised` -> its default weight.

    Raises:
        SuiteError: an unknown term, network to predict with, or a number out of range; in training, a warm start that leaves nothing.
    """

    streams = ("labeled", "unlabeled")
    terms: ClassVar[Mapping[str, float]] = {}

    def __init__(
        self,
        task: Task,
        *,
        weights: Mapping[str, NotNegative] | None = None,
        ramp: Callable[[int, int], float] | Mapping[str, Callable[[int, int], float]] | None = None,
        warm_start: NotNegative = 0,
        predict_with: str | None = None,
        predict_members: bool = False,
        relabel_every: Count = 1,
        **options: Any,
    ) -> None:
        super().__init__(task, **options)
        ramps = ramp if isinstance(ramp, Mapping) else dict.fromkeys(self.terms, ramp)
        for option, names in (("weights", weights or {}), ("ramp", ramps)):
            for name in names:
                if name not in self.terms:
                    raise unknown(f"model.{option}", name, self.terms)
        if warm_start < 0 or relabel_every < 1:
            raise SuiteError(f"model.warm_start={warm_start} must be at least 0, model.relabel_every={relabel_every} at least 1")
        self.weights = {name: float(value) for name, value in {**self.terms, **(weights or {})}.items()}
        self.ramps = {name: ramps.get(name) or Ramp("none") for name in self.terms}
        self.warm_start, self.relabel_every = warm_start, relabel_every
        self.predict_with, self.predict_members = predict_with, predict_members
        self._stepped = False

    # what a method predictors

    def losses(self, labeled: Batch, unlabeled: Batch) -> dict[str, torch.Tensor]:
        """`supervised` and the method's own terms, unweighted; a term that is missing counts 0."""
        raise TypeError(f"{type(self).__name__} must define losses()")

    def students(self) -> dict[str, nn.Module]:
        """The networks that learn, by name."""
        return {"student": self.network}

    def trained_networks(self) -> dict[str, nn.Module]:
        return self.students()

    def resting_networks(self) -> list[nn.Module]:
        return [*self.students().values(), *(child.network for child in self.children() if isinstance(child, Teacher))]

    def on_initialized(self, loaded: Collection[str]) -> None:
        """A teacher that has no weights in the file starts as its students."""
        super().on_initialized(loaded)
        for name, child in self.named_children():
            if isinstance(child, Teacher) and not any(key.startswith(f"{name}.") for key in loaded):
                child.reset()

    def predictors(self) -> dict[str, nn.Module]:
        """The networks that can predict, by name, the default first: students, then teachers (attribute name)."""
        return {**self.students(), **{name: child for name, child in self.named_children() if isinstance(child, Teacher)}}

    def on_warm_start_end(self) -> None:
        """Called before the first batch with the method's own terms, also without a warm start; not again after a resume."""

    def case_maps(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Maps (C, X, Y, Z) of one whole unlabeled case for the map store, one for each of `writes_maps`; default `pseudo_label`."""
        labels = self.predict_case(batch).labels
        if labels is None:
            raise TypeError(f"{type(self).__name__} must define case_maps(): its predictions have no labels")
        return {"pseudo_label": labels[None].to(torch.int8)}

    # clock

    @property
    def warm_iterations(self) -> int:
        """Batches of the warm start: `warm_start`, for methods that write maps rounded up to whole epochs."""
        count = whole_batches(self.warm_start, self.total_iterations)
        epoch = int(self.trainer.num_training_batches) if self.writes_maps else 1
        return -(-count // epoch) * epoch

    def weight(self, name: str) -> float:
        """Weight of a term in this batch."""
        if name == "supervised":
            return 1.0
        warm = self.warm_iterations
        return self.weights[name] * self.ramps[name](self.iteration - warm, self.total_iterations - warm)

    # training

    def check(self, data: Any) -> None:
        super().check(data)
        known = [*self.predictors(), "mean"]
        if self.predict_with is not None and self.predict_with not in known:
            raise unknown("model.predict_with", self.predict_with, known)
        missing = [name for name in self.writes_maps if name not in getattr(data, "extra_maps", {})]
        if missing:
            maps = ", ".join(f"{name}: {self.map_interpolation}" for name in missing)
            raise SuiteError(f"{type(self).__name__} stores maps and reads them back: set data.extra_maps={{{maps}}}")

    def on_train_start(self) -> None:
        super().on_train_start()
        warm, total = self.warm_iterations, self.total_iterations
        if warm >= total and self.trainer.max_epochs > 1:  # a single epoch is a look at whether everything runs
            raise SuiteError(
                f"model.warm_start={self.warm_start} takes {warm} of the {total} batches of this training, so that {', '.join(self.terms)} would "
                "never begin; give a share below 1, or more epochs"
            )

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        if self.iteration < self.warm_iterations:
            terms = self.warm_losses(batch["labeled"])
        else:
            terms = self.losses(batch["labeled"], batch["unlabeled"])
        loss = self.total(terms)
        self.log_terms(**terms, loss=loss)
        return loss

    def warm_losses(self, labeled: Batch) -> dict[str, torch.Tensor]:
        """Terms of a batch of the warm start: the supervised loss of every student, summed."""
        return {"supervised": sum(self.supervised(student(labeled["image"]), labeled) for student in self.students().values())}

    def total(self, terms: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Weighted sum of the terms of this batch."""
        return sum(self.weight(name) * term for name, term in terms.items())

    def together(self, network: nn.Module, *images: torch.Tensor) -> list[Output]:
        """Outputs for several batches of images from one pass over all of them, as batch normalization needs it (and faster besides)."""
        return list(parted(network(torch.cat(images)), [len(image) for image in images]))

    def no_grad_logits(self, network: nn.Module, image: torch.Tensor, name: str) -> torch.Tensor:
        """Logits of a pass without gradient and without trace; its dropout belongs to (seed, name, iteration, rank)."""
        with torch.no_grad():
            network = network.network if isinstance(network, Teacher) else network
            return logits_of(stateless(network, image, seed=key(self.seed, name, self.iteration, self.global_rank)))

    def noisy(self, image: torch.Tensor, name: str, sigma: float = 0.1, bound: float = 0.2) -> torch.Tensor:
        """The image plus Gaussian noise of standard deviation `sigma`, clipped to +-`bound` (the noise of UA-MT, Yu et al., MICCAI 2019)."""
        if not sigma:
            return image
        noise = torch.randn(image.shape, generator=self.generator(name), device=image.device, dtype=image.dtype)
        return image + (sigma * noise).clamp(-bound, bound)

    def probabilities(self, output: Output) -> torch.Tensor:
        """Output -> probabilities (B, K, *spatial), float32: over classes or of each region, by the target."""
        return self.target.activate(logits_of(output))

    def hard(self, output: Output) -> torch.Tensor:
        """Output -> pseudo labels without gradient, in the form that the loss takes (see `Target.harden`)."""
        return self.target.harden(logits_of(output))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        if self.iteration == self.warm_iterations:
            self.on_warm_start_end()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        super().on_before_optimizer_step(optimizer)
        self._stepped = True

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        if self._stepped:
            for module in self.children():
                if isinstance(module, Teacher):
                    module.update()
        self._stepped = False

    # pseudo labels

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        if not self.writes_maps:
            return
        batches = int(self.trainer.num_training_batches)
        epochs, last = (self.iteration - self.warm_iterations) // batches, self.iteration >= self.total_iterations
        stored = self.trainer.datamodule.maps.state_dict()
        due = epochs % self.relabel_every == 0 or any(name not in stored for name in self.writes_maps)
        if epochs >= 0 and due and not last:
            self.relabel()

    def relabel(self) -> None:
        """Writes `case_maps` of every unlabeled case and makes them current; every rank takes its share."""
        data = self.trainer.datamodule
        with evaluating(self), torch.no_grad(), self.trainer.precision_plugin.forward_context():
            for batch in data.unlabeled_loader():
                batch = data.transfer_batch_to_device(batch, self.device, 0)
                torch.manual_seed(key(self.seed, "relabel", self.iteration, batch["case"][0]))
                maps = self.case_maps(batch)
                if set(maps) != set(self.writes_maps):
                    raise SuiteError(f"{type(self).__name__}.case_maps gave {sorted(maps)}, writes_maps has {sorted(self.writes_maps)}")
                if not batch["again"][0]:
                    for name, values in maps.items():
                        data.maps.write(name, batch["case"][0], values.cpu().numpy())
        self.trainer.strategy.barrier()
        if self.trainer.is_global_zero:
            for name in self.writes_maps:
                data.maps.commit(name)
        self.trainer.strategy.barrier()

    # prediction

    def predict_maps(self, view: torch.Tensor) -> dict[str, torch.Tensor]:
        """`probabilities` of what `predict_with` names and, with `predict_members`, those of every network by name."""
        predictors = self.predictors()
        main = self.predict_with or next(iter(predictors))
        used = list(self.students()) if main == "mean" else [main]
        maps = {name: self.probabilities(predictors[name](view)) for name in (predictors if self.predict_members else used)}
        return {"probabilities": sum(maps[name] for name in used) / len(used), **(maps if self.predict_members else {})}

    def predict_case(self, batch: Batch) -> Prediction:
        maps = self.infer(batch, self.predict_maps)
        return replace(self.decode(maps.pop("probabilities")), members={name: self.decode(m) for name, m in maps.items()})


def parted(output: Any, sizes: list[int]) -> Iterator[Any]:
    """The output of a joint pass -> one output for each of the batches that were joined, of the given sizes.

    Tensors are split along the batch; lists and mappings entry by entry. What has no batch (a scalar loss) stays with the first.
    """
    if torch.is_tensor(output) and output.dim():
        yield from output.split(sizes)
    elif isinstance(output, Mapping):
        whole = {k: v for k, v in output.items() if torch.is_tensor(v) and not v.dim()}
        parts = {k: list(parted(v, sizes)) for k, v in output.items() if k not in whole}
        for number in range(len(sizes)):
            yield {**{k: v[number] for k, v in parts.items()}, **(whole if number == 0 else {})}
    else:
        entries = [list(parted(v, sizes)) for v in output]
        yield from ([entry[number] for entry in entries] for number in range(len(sizes)))


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Inside, everything in `module` is in evaluation mode; afterwards each part is in its own mode again."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
