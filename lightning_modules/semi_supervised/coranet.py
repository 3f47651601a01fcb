"""CoraNet: certain and uncertain regions of unlabeled images are learned from in different ways (Shi et al., IEEE TMI 2022)."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lesionbench.batch import Batch
from lesionbench.errors import SuiteError, unknown
from lesionbench.prediction import Prediction
from lesionbench.ranges import NotNegative, Share
from lesionbench.task import IGNORE, Task
from lightning_modules.losses.cost_sensitive import cost_cross_entropy, masked_consistency
from lightning_modules.networks.contract import Output, logits_of
from lightning_modules.semi_supervised.base import SemiSupervised
from lightning_modules.semi_supervised.certainty_masks import CertaintyMask, ConservativeRadical, DropoutMask, with_heads
from lightning_modules.semi_supervised.teachers import Teacher
from lightning_modules.uncertainty import active_dropout

CHOICES = {
    "certain": ("none", "all", "masked"),
    "uncertain": ("none", "all", "certain_only", "uncertain_only"),
    "certain_heads": ("main", "all"),
    "uncertain_heads": ("main", "all"),
    "pseudo_weights": ("same", "swapped"),
    "norm": ("all_pixels", "mask"),
    "cost_norm": ("voxels", "weights"),
    "update": ("joint", "alternating"),
}


class CoraNet(SemiSupervised):
    """L_crm + w_c L_csn + w_u L_cnt: self-training where labels are certain, agreement with a mean teacher where they are not.

    Shi et al., "Inconsistency-aware uncertainty estimation for semi-supervised medical image segmentation", IEEE TMI 2022. L_crm (Eq. 1) is
    the loss of the main head plus those of the two heads of the mask, on labels. After a warm start on labels alone (Algorithm 1), all
    unlabeled cases are labeled by the main head and divided by the mask (Eqs. 2-6), again and again. Certain pixels: the main
    head's loss against the stored label (Eq. 7). Uncertain pixels: squared difference to the teacher (Eq. 8), an exponential moving
    average (Eq. 9). The other heads answer in training only.

    With a softmax target of several classes, the costs are background against the rest; with a region target every region is a binary
    problem with its own mask, and exclusive classes go to the most probable region that is above 0.5.

    Args:
        mask: says what is uncertain, see `certainty_masks`.
        certain: self-training: `none`, on `all` pixels, or `masked` to the certain ones.
        uncertain: consistency: `none`, on `all` pixels, on `certain_only` or `uncertain_only`.
        certain_heads: also train the conservative and the radical head on certain pixels (`all`), or the `main` one only.
        pseudo_weights: costs of these two there: `same` as on labels, or `swapped` (as in the code published with the paper).
        uncertain_heads: consistency of the `main` head, or the mean over `all` three.
        norm: of Eq. 8, by `all_pixels` or those of the `mask`; the latter only with a small weight.
        cost_norm: of the two heads' losses on labels: by the number of `voxels` (Eq. 1, whose weights are not divided by their sum), or by the
            sum of their `weights` (PyTorch's weighted mean), which makes the conservative head's loss almost alpha times smaller.
        supervised_weight: of L_crm.
        update: `joint`, one step on the sum; or `alternating`, one on each term in turn (Algorithm 1).
        decay: of the teacher's moving average.
        reset_teacher: start the teacher as a copy of the student at the end of the warm start, instead of averaging from the beginning.
        noise: standard deviation of noise on the teacher's images, clipped at twice that.

    Raises:
        SuiteError: an unknown option, a network without heads, all heads asked for where the mask has none, a mask of dropout for a network
            that has none, or alternating updates together with accumulation.
    """

    terms: Mapping[str, float] = {"certain": 1.0, "uncertain": 1.0}
    writes_maps = ("pseudo_label", "uncertain")

    def __init__(
        self,
        task: Task,
        *,
        network: Callable[..., nn.Module],
        mask: CertaintyMask,
        certain: str = "masked",
        uncertain: str = "uncertain_only",
        certain_heads: str = "main",
        pseudo_weights: str = "same",
        uncertain_heads: str = "main",
        norm: str = "all_pixels",
        cost_norm: str = "voxels",
        supervised_weight: NotNegative = 1.0,
        update: str = "joint",
        decay: Share = 0.99,
        reset_teacher: bool = True,
        noise: NotNegative = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(task, network=with_heads(network, 1 + len(mask.heads)), **options)
        for name, known in CHOICES.items():
            if locals()[name] not in known:
                raise unknown(f"model.{name}", locals()[name], known)
        if "all" in (certain_heads, uncertain_heads) and not isinstance(mask, ConservativeRadical):
            raise SuiteError("model.certain_heads=all and model.uncertain_heads=all need the heads of model/mask=xor")
        if isinstance(mask, DropoutMask) and not active_dropout(self.network):
            raise SuiteError("model/mask=mc_dropout needs dropout in the network: model.network.dropout=0.5")
        if update == "alternating" and self.accumulate > 1:
            raise SuiteError(f"model.update=alternating does not go with accumulate={self.accumulate}: use update=joint")
        self.mask, self.certain, self.uncertain, self.certain_heads = mask, certain, uncertain, certain_heads
        self.pseudo_weights, self.uncertain_heads, self.norm, self.update = pseudo_weights, uncertain_heads, norm, update
        self.cost_norm = cost_norm
        self.supervised_weight, self.reset_teacher, self.noise = supervised_weight, reset_teacher, noise
        self.automatic_optimization = update == "joint"
        self.teacher = Teacher(self.network, 1 - decay, warmup=False)
        self.teacher.network.branches.every = uncertain_heads == "all"

    def weight(self, name: str) -> float:
        return self.supervised_weight if name == "supervised" else super().weight(name)

    def on_warm_start_end(self) -> None:
        if self.reset_teacher:
            self.teacher.reset()

    # losses

    def supervised(self, output: Output, labeled: Batch) -> torch.Tensor:
        """L_crm (Eq. 1)."""
        return super().supervised(output, labeled) + self.mask.head_loss(self, output, self.training_target(labeled))

    def losses(self, labeled: Batch, unlabeled: Batch) -> dict[str, torch.Tensor]:
        wanted = self._wanted(unlabeled)
        if not wanted:
            return self.warm_losses(labeled)
        mine, others = self.together(self.network, labeled["image"], unlabeled["image"])
        return {"supervised": self.supervised(mine, labeled), **{name: self._term(name, others, unlabeled) for name in wanted}}

    def _wanted(self, unlabeled: Batch) -> list[str]:
        """The terms on unlabeled images that count in this batch; before the first labeling there is nothing to go by."""
        labeled = "pseudo_label" in unlabeled
        known = {
            "certain": self.certain != "none" and labeled,
            "uncertain": self.uncertain == "all" or (self.uncertain != "none" and labeled),
        }
        return [name for name, there in known.items() if there and self.weights[name]]

    def _term(self, name: str, output: Output, unlabeled: Batch) -> torch.Tensor:
        return self.self_training(output, unlabeled) if name == "certain" else self.consistency(output, unlabeled)

    def self_training(self, output: Output, unlabeled: Batch) -> torch.Tensor:
        """L_csn (Eq. 7): the loss against stored labels; where they are uncertain they are ignored."""
        target = self.target.encode(unlabeled["pseudo_label"])
        if self.certain == "masked":
            target = torch.where(unlabeled["uncertain"].bool(), IGNORE, target)
        loss = self.loss(output, target)
        if self.certain_heads == "all":
            costs = self.mask.costs(swapped=self.pseudo_weights == "swapped")
            for logits, cost in zip(output["heads"], costs, strict=True):
                loss = loss + cost_cross_entropy(logits, target, *cost, self.target.kind, by_weight=False)
        return loss

    def consistency(self, output: Output, unlabeled: Batch) -> torch.Tensor:
        """L_cnt (Eq. 8): squared difference to the teacher's probabilities, which have no gradient."""
        answer = self.teacher(self.noisy(unlabeled["image"], "teacher", self.noise, 2 * self.noise))
        mask = None
        if self.uncertain != "all":
            mask = unlabeled["uncertain"].bool() == (self.uncertain == "uncertain_only")
        pairs = [(logits_of(output), logits_of(answer))]
        if self.uncertain_heads == "all":
            pairs += zip(output["heads"], answer["heads"], strict=True)
        activate, kind = self.target.activate, self.target.kind
        return sum(masked_consistency(activate(s), activate(t), mask, kind, self.norm) for s, t in pairs) / len(pairs)

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor | None:
        if self.update == "joint":
            return super().training_step(batch, batch_idx)
        labeled, unlabeled = batch["labeled"], batch["unlabeled"]
        warm = self.iteration < self.warm_iterations
        terms = {}
        for name in [*([] if warm else self._wanted(unlabeled)), "supervised"]:  # the order of Algorithm 1
            with self.optimizing("main", advance=name == "supervised") as step:
                if name == "supervised":
                    terms |= self.warm_losses(labeled)
                else:
                    terms[name] = self._term(name, self.network(unlabeled["image"]), unlabeled)
                step(self.weight(name) * terms[name])
        self.log_terms(**terms, loss=self.total({name: term.detach() for name, term in terms.items()}))
        return None

    # pseudo labels

    def relabel(self) -> None:
        if self.certain != "none" or self.uncertain in ("certain_only", "uncertain_only"):
            super().relabel()

    def case_maps(self, batch: Batch) -> dict[str, torch.Tensor]:
        """`pseudo_label`: the main head's class indices; `uncertain`: bool, one map, or one for each region of a region target."""
        maps = self.infer(batch, lambda view: self.mask.maps(self, view))
        return {
            "pseudo_label": self.decode(maps["probabilities"]).labels[None].to(torch.int8),
            "uncertain": self.mask.uncertain(maps, self.target.kind)[0],
        }

    # prediction

    def predict_maps(self, view: torch.Tensor) -> dict[str, torch.Tensor]:
        """`probabilities` of the main head; with `predict_members` also those of the student, the teacher, and the conservative and radical head."""
        maps = super().predict_maps(view)
        if self.predict_members and isinstance(self.mask, ConservativeRadical):
            maps |= {name: m for name, m in self.mask.maps(self, view).items() if name != "probabilities"}
        return maps

    def predict_case(self, batch: Batch) -> Prediction:
        """With `predict_members` also `uncertainty`: `disagreement`, 1 where the conservative and the radical head decide differently."""
        prediction = super().predict_case(batch)
        if not {"conservative", "radical"} <= set(prediction.members):
            return prediction
        conservative, radical = (prediction.members[name].labels for name in ("conservative", "radical"))
        return replace(prediction, uncertainty={"disagreement": (conservative != radical).float()})
