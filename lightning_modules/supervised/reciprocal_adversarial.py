"""Reciprocal adversarial learning: supervised loss + virtual adversarial training + a critic of the masks (Peiris et al., BrainLes 2021)."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lesionbench.batch import Batch
from lesionbench.errors import SuiteError, unknown
from lesionbench.prediction import Prediction
from lesionbench.ranges import Count, NotNegative, Whole
from lesionbench.target import nesting
from lesionbench.task import Task
from lightning_modules.losses.adversarial import KINDS, critic_loss, fooling_loss, gradient_penalty
from lightning_modules.losses.vat import VAT
from lightning_modules.networks.contract import logits_of, with_own_loss
from lightning_modules.networks.stateless import stateless
from lightning_modules.segmentation import SegmentationMethod

WEIGHTS = ("vat", "critic")
VAT_TARGETS = ("truth", "prediction")
GRADIENTS = ("real", "published")
MEASURED_CASES = 100  # training cases that `image_sd` is measured on at most


class ReciprocalAdversarial(SegmentationMethod):
    """Trains a segmentation network on loss + w_v VAT + w_c adversarial, and in turn a critic that tells its masks from true ones.

    Peiris et al., "Reciprocal adversarial learning for brain tumor segmentation: a solution to BraTS challenge 2021 segmentation task",
    BrainLes 2021: VAT is eq. 4 and the two sides of the critic are eq. 5, whose printed label convention is inverted. One batch is one step
    of the network (the critic frozen), then `critic_steps` of the critic (the network frozen). A weight of 0 leaves its part out; with
    both 0 training is that of `Supervised`, to the last bit.

    Args:
        critic: called with (channels, image_channels, dimensions), returns the critic, see `networks.PixelCritic`.
        vat: called with `kind`, returns the `losses.VAT`; its sizes count in standard deviations of the brain voxels of the training
            images (`image_sd`), measured when training starts.
        weights: `vat` and `critic`: w_v and w_c.
        warmup: `vat` and `critic`: batches over which the weight rises linearly from 0.
        vat_target: `truth` (the labels, as in the paper) or `prediction` (the network's own on the clean image).
        vat_brain: change brain voxels only.
        adversary: loss between network and critic: `bce`, `lsgan` or `wgan_gp`.
        penalty: weight of the gradient penalty of `wgan_gp`.
        instance_noise: standard deviation of Gaussian noise on every mask the critic sees in training: true masks are binary, predicted
            ones never are, and without noise that alone gives them away.
        critic_steps: of the critic per batch.
        unlabeled: expects the streams `labeled` and `unlabeled`; unlabeled images join VAT (target `prediction`) and are judged by the critic.
        gradients: `real`, or `published`: as the code published with the paper computes them. There VAT is a constant (its value is wrapped
            in a new leaf, around a random direction), the critic never learns (its loss is detached), and the network lowers the critic's
            loss on its logits instead of fooling it. For comparison only.

    Raises:
        SuiteError: an unknown option or one out of range, or several critic steps per batch together with accumulation.
    """

    @classmethod
    def streams_of(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        return ("labeled", "unlabeled") if options.get("unlabeled") else cls.streams

    tables = ("nesting_violations",)

    def __init__(
        self,
        task: Task,
        *,
        critic: Callable[..., nn.Module],
        vat: Callable[..., VAT],
        weights: Mapping[str, NotNegative],
        warmup: Mapping[str, Whole] | None = None,
        vat_target: str = "truth",
        vat_brain: bool = True,
        adversary: str = "bce",
        penalty: NotNegative = 10.0,
        instance_noise: NotNegative = 0.15,
        critic_steps: Count = 1,
        unlabeled: bool = False,
        gradients: str = "real",
        **options: Any,
    ) -> None:
        super().__init__(task, **options)
        choices = {"vat_target": (vat_target, VAT_TARGETS), "adversary": (adversary, KINDS), "gradients": (gradients, GRADIENTS)}
        for name, (value, known) in choices.items():
            if value not in known:
                raise unknown(f"model.{name}", value, known)
        for name in (*weights, *(warmup or {})):
            if name not in WEIGHTS:
                raise unknown("model.weights or model.warmup", name, WEIGHTS)
        numbers = {
            f"{kind}.{name}": (value, 0)
            for kind, given in (("weights", weights), ("warmup", warmup or {}))
            for name, value in given.items()
        }
        numbers |= {"penalty": (penalty, 0), "instance_noise": (instance_noise, 0), "critic_steps": (critic_steps, 1)}
        for name, (value, least) in numbers.items():
            if value < least:
                raise SuiteError(f"model.{name}={value}: at least {least}")
        if critic_steps > 1 and self.accumulate > 1:
            raise SuiteError(f"model.critic_steps={critic_steps} does not go with accumulate={self.accumulate}: one of them must be 1")
        self.automatic_optimization = False
        self.streams = self.streams_of({"unlabeled": unlabeled})
        self.weights = {name: float(weights.get(name, 0)) for name in WEIGHTS}
        self.warmup = {name: int((warmup or {}).get(name, 0)) for name in WEIGHTS}
        dimensions = getattr(self.network, "dimensions", 3)
        self.critic = critic(channels=self.target.out_channels, image_channels=task.in_channels, dimensions=dimensions)
        self.vat = vat(kind=self.target.kind)
        self.vat_target, self.vat_brain, self.adversary, self.penalty = vat_target, vat_brain, adversary, penalty
        self.instance_noise, self.critic_steps, self.gradients = instance_noise, critic_steps, gradients
        self.register_buffer("image_sd", torch.tensor(1.0))

    def optimizer_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"network": list(self.network.parameters()), "critic": list(self.critic.parameters())}

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.weights["vat"] and hasattr(self.trainer.datamodule, "case_loader"):
            self.image_sd.fill_(self._measured_sd())
            measured = {"train/image_sd": float(self.image_sd), "train/vat_eps": float(self.vat.eps * self.image_sd)}
            for logger in self.loggers:
                logger.log_metrics({**measured, "iteration": float(self.iteration)}, step=self.iteration)

    def _measured_sd(self) -> float:
        """Root mean variance of the brain voxels of a channel, over channels and (up to `MEASURED_CASES`) training cases, as the network sees them."""
        data = self.trainer.datamodule
        cases = data.parts["train"]
        deviations = torch.zeros(2, dtype=torch.float64, device=self.device)  # sum of squares, count
        for batch in data.case_loader(cases[:: -(-len(cases) // MEASURED_CASES)]):
            if not batch["again"][0]:
                voxels = batch["image"][0, batch["channel_mask"][0]][:, batch["brain_mask"][0, 0]].double()
                centered = voxels - voxels.mean(dim=1, keepdim=True)
                deviations += torch.stack([centered.square().sum(), torch.tensor(float(voxels.numel()))]).to(deviations)
        squares, count = self.trainer.strategy.reduce(deviations, reduce_op="sum").tolist()
        if not squares > 0:
            raise SuiteError("the brain voxels of the training images are all alike: VAT has no scale to count its change in")
        return (squares / count) ** 0.5

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        labeled, unlabeled = (batch["labeled"], batch["unlabeled"]) if len(self.streams) == 2 else (batch, None)
        target = self.target.encode(labeled["label"])
        truth, valid = self.target.as_maps(target)
        with self.optimizing("network") as step:
            output = self(labeled["image"])
            terms = {"supervised": with_own_loss(self.loss(output, target), output)}
            judged = [(logits_of(output), labeled["image"], valid)]
            if unlabeled is not None and self.weights["critic"]:
                judged.append((logits_of(self(unlabeled["image"])), unlabeled["image"], torch.ones_like(valid[:1])))
            if self.weights["vat"]:
                terms["vat"] = self._vat(labeled, truth, valid, unlabeled)
            if self.weights["critic"]:
                terms["adversarial"] = self._adversarial(judged, truth)
            weights = {"supervised": 1.0, "vat": self._weight("vat"), "adversarial": self._weight("critic")}
            total = sum(weights[name] * term for name, term in terms.items())
            step(total)
        if self.weights["critic"] and self.gradients == "real":
            fake = [(self.target.activate(logits.detach()), image, valid) for logits, image, valid in judged]
            for number in range(self.critic_steps):
                with self.optimizing("critic", advance=number == 0) as step:
                    terms["critic"] = self._critic_loss(fake, truth, number)
                    step(terms["critic"])
        self.log_terms(**terms, loss=total)

    def _weight(self, name: str) -> float:
        """Weight of a term in this batch."""
        return self.weights[name] * self.warmup_factor(self.warmup[name])

    def _vat(self, labeled: Batch, truth: torch.Tensor, valid: torch.Tensor, unlabeled: Batch | None) -> torch.Tensor:
        """The VAT term (eq. 4): against the truth or the clean prediction, for unlabeled images always the latter."""
        if self.gradients == "published":
            noise = VAT(self.target.kind, self.vat.eps, self.vat.xi, iterations=0)
            with torch.no_grad():
                return noise(self.network, labeled["image"], truth, valid=valid, **self._vat_options(labeled))
        reference = truth if self.vat_target == "truth" else None
        loss = self.vat(self.network, labeled["image"], reference, valid=valid, **self._vat_options(labeled))
        if unlabeled is None:
            return loss
        more = self.vat(self.network, unlabeled["image"], **self._vat_options(unlabeled))
        return (len(labeled["image"]) * loss + len(unlabeled["image"]) * more) / (len(labeled["image"]) + len(unlabeled["image"]))

    def _vat_options(self, batch: Batch) -> dict[str, Any]:
        mask = None
        if "channel_mask" in batch:
            mask = batch["channel_mask"].reshape(*batch["channel_mask"].shape, *[1] * (batch["image"].dim() - 2))
        if self.vat_brain and "brain_mask" in batch:
            brain = batch["brain_mask"]
            brain = brain if brain.dim() == batch["image"].dim() else brain.unsqueeze(-1)  # the middle slice of a 2.5D slab
            mask = brain if mask is None else mask & brain
        return {"mask": mask, "unit": self.image_sd, "generator": self.generator("vat")}

    def _adversarial(self, judged: list[tuple[torch.Tensor, ...]], truth: torch.Tensor) -> torch.Tensor:
        """What the network does about the critic, which stays as it is, its statistics included."""
        generator = self.generator("noise on masks, network")
        if self.gradients == "published":
            (logits, image, valid), *_ = judged
            return critic_loss(stateless(self.critic, truth * valid, image), stateless(self.critic, logits * valid, image))
        answers = [stateless(self.critic, self._noisy(self.target.activate(z) * valid, generator), image) for z, image, valid in judged]
        return fooling_loss(torch.cat(answers), self.adversary)

    def _critic_loss(self, fake: list[tuple[torch.Tensor, ...]], truth: torch.Tensor, number: int) -> torch.Tensor:
        """What the critic learns from: true masks of the labeled images against predicted masks of all."""
        generator = self.generator(f"noise on masks, critic {number}")
        _, image, valid = fake[0]
        real = self._noisy(truth * valid, generator)
        noisy = [self._noisy(p * v, generator) for p, _, v in fake]
        answers = torch.cat([self.critic(p, i) for p, (_, i, _) in zip(noisy, fake, strict=True)])
        loss = critic_loss(self.critic(real, image), answers, self.adversary)
        if self.adversary == "wgan_gp":
            loss = loss + self.penalty * gradient_penalty(lambda masks: self.critic(masks, image), real, noisy[0], generator)
        return loss

    def _noisy(self, masks: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return masks + self.instance_noise * torch.randn(masks.shape, generator=generator, device=masks.device)

    # prediction

    def predict_maps(self, view: torch.Tensor) -> dict[str, torch.Tensor]:
        """`probabilities`, and where there is a trained critic `confidence` (B, 1, *spatial): its mean answer over the mask channels."""
        maps = super().predict_maps(view)
        if self.weights["critic"]:
            maps["confidence"] = self.critic(maps["probabilities"], view).float().sigmoid().mean(dim=1, keepdim=True)
        return maps

    def predict_case(self, batch: Batch) -> Prediction:
        """Regions and labels; `uncertainty`: `entropy` of the probabilities (bits, mean over mask channels) and `critic` (1 - confidence);
        `table`: `nesting_violations`, voxels per 1000 that are in a region but not in the one that holds it, on the network grid."""
        maps = self.infer(batch, self.predict_maps)
        uncertainty = {"entropy": self._entropy(maps["probabilities"])[0]}
        if "confidence" in maps:
            uncertainty["critic"] = 1 - maps["confidence"][0, 0]
        return replace(self.decode(maps["probabilities"]), uncertainty=uncertainty, table=dict(self._violations(maps["probabilities"])))

    def _entropy(self, maps: torch.Tensor) -> torch.Tensor:
        if self.target.kind == "softmax":
            return -torch.xlogy(maps, maps).sum(dim=1) / torch.log(torch.tensor(2.0))
        return -(torch.xlogy(maps, maps) + torch.xlogy(1 - maps, 1 - maps)).mean(dim=1) / torch.log(torch.tensor(2.0))

    def _violations(self, maps: torch.Tensor) -> Iterator[tuple[str, float]]:
        if self.target.kind == "sigmoid":
            reached = [region > threshold for region, threshold in zip(self.target.decode(maps)[0], self.target.thresholds, strict=True)]
            wrong = [(reached[r] & ~reached[parent]).sum() for r, parent, _ in nesting(self.task) if parent is not None]
            yield "nesting_violations", 1000 * float(sum(wrong)) / reached[0].numel()
