"""How a trained method answers to changed images: adversarial perturbations, transferred ones, and noise of the same size."""

from collections.abc import Sequence
from typing import Any

import torch

from lesionbench.batch import Batch
from lesionbench.checkpoint import load_method
from lesionbench.errors import SuiteError
from lesionbench.prediction import Prediction
from lesionbench.task import Task
from lesionbench.views import from_slices, to_slices
from lightning_modules.base import Method
from lightning_modules.evaluation.attacks import Attack, perturb
from lightning_modules.evaluation.checkpoint_test import CheckpointTest
from lightning_modules.inferers import padded
from lightning_modules.losses.vat import divergence
from lightning_modules.networks.contract import logits_of
from lightning_modules.segmentation import SegmentationMethod


class Robustness(CheckpointTest):
    """Tests a checkpoint on clean and on changed images: the clean prediction is the main one, each attack a member of it.

    An attack raises the mean voxel-wise (binary) cross-entropy of the whole case against its true labels; it is made on the whole volume
    or on all slices at once, and the changed case is then predicted as any other. So members have all metrics, and tables and paired
    tests of `job=compare` cover them. A member is called `<norm>-<steps>-<eps>`, with `-transfer` behind it where the change was made
    on another network, against which a network cannot hide its gradients; 0 steps are random noise.

    Args:
        checkpoint: of the method that is tested, a `SegmentationMethod` with one network.
        transfer_from: checkpoint of the network on which transferred attacks are made; needed if there are any.
        attacks: `{norm: l2 | linf, eps, steps, restarts, transfer}` each, see `attacks.perturb`. `eps` counts in standard deviations of
            the case's own brain voxels (pooled over channels).
        trust: further packages whose classes a checkpoint may build.

    Raises:
        SuiteError: a transferred attack without `transfer_from`, a checkpoint of another kind of method.
    """

    def __init__(
        self,
        task: Task,
        *,
        checkpoint: str,
        attacks: Sequence[Attack],
        transfer_from: str | None = None,
        trust: Sequence[str] = (),
        **options: Any,
    ) -> None:
        if transfer_from is None and any(a.get("transfer") for a in attacks):  # before a checkpoint is needed
            raise SuiteError("model.transfer_from is null, but there are attacks with transfer=true; name the checkpoint they are made on")
        super().__init__(task, checkpoint=checkpoint, trust=trust, **options)
        self.attacks = list(attacks)
        _require_network(self.method, checkpoint)
        self.source: SegmentationMethod = self.method
        if transfer_from is not None:
            self.source = load_method(transfer_from, trust)[0].requires_grad_(False)
            _require_network(self.source, transfer_from)

    def predict_case(self, batch: Batch) -> Prediction:
        prediction = self.method.predict_case(batch)
        if "label" not in batch:
            return prediction
        with torch.inference_mode(False):  # attacks need gradients, and tensors that may have some
            image, label = batch["image"].clone(), batch["label"].clone()
            mask = batch["brain_mask"].clone() & batch["channel_mask"].clone()[:, :, None, None, None]
            for attack in self.attacks:
                changed = image + self._change(attack, batch["case"][0], image, label, mask, batch.get("outside"))
                with torch.no_grad():
                    prediction.members[_name(attack)] = self.method.predict_case({**batch, "image": changed})
        return prediction

    def _change(
        self, attack: Attack, case: str, image: torch.Tensor, label: torch.Tensor, mask: torch.Tensor, outside: torch.Tensor | None
    ) -> torch.Tensor:
        """r (1, M, X, Y, Z) of one attack on one case."""
        method = self.source if attack.get("transfer") else self.method
        name, options = _name(attack), {k: v for k, v in attack.items() if k not in ("eps", "transfer")}
        target = method.target.encode(label)

        def loss(images: torch.Tensor) -> torch.Tensor:
            return _cross_entropy(method, images, target, outside)

        generator = self.generator(f"{name} {case}")
        return perturb(loss, image, mask=mask, eps=attack["eps"] * _deviation(image, mask), generator=generator, **options)


def _require_network(method: Method, checkpoint: str) -> None:
    if not isinstance(method, SegmentationMethod):
        raise SuiteError(f"{checkpoint}: holds a {type(method).__name__}; attacks need a method with one segmentation network")


def _name(attack: Attack) -> str:
    return f"{attack['norm']}-{attack['steps']}-{attack['eps']:g}" + ("-transfer" if attack.get("transfer") else "")


def _deviation(image: torch.Tensor, mask: torch.Tensor) -> float:
    """Root mean variance of the masked voxels of a channel."""
    inside = mask.to(image).expand_as(image).flatten(2)
    values, count = image.flatten(2), inside.sum(dim=2, keepdim=True).clamp_min(1)
    centered = (values - (values * inside).sum(dim=2, keepdim=True) / count) * inside
    return float((centered.square().sum() / inside.sum().clamp_min(1)).sqrt())


def _cross_entropy(method: SegmentationMethod, images: torch.Tensor, target: torch.Tensor, outside: torch.Tensor | None) -> torch.Tensor:
    """Mean voxel-wise (binary) cross-entropy (N,) of whole images (N, M, X, Y, Z) against one target, each in one pass or as its slices;
    beyond their border lies `outside` (1, M), None = 0."""
    axis, flat = method.task.slice_axis, getattr(method.network, "dimensions", 3) == 2

    def predictor(view: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": logits_of(method.network(view))}

    views = to_slices(images, axis) if flat else images
    logits = padded(views, getattr(method.network, "divisor", 1), predictor, axes=2 if flat else None, outside=outside)["logits"]
    logits = from_slices(logits, axis, len(images)) if flat else logits
    maps, valid = method.target.as_maps(target)
    values = divergence(logits, maps.expand_as(logits), method.target.kind)
    return (values * valid).flatten(1).sum(dim=1) / valid.expand_as(values[:1]).sum().clamp_min(1)
