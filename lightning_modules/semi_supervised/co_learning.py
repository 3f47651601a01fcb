"""Two students and a teacher that averages both, with mixed inputs and targets (multi-model co-learning, left-atrium segmentation)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lesionbench.batch import Batch
from lesionbench.errors import SuiteError, unknown
from lesionbench.ranges import PositiveShare, Share
from lesionbench.task import Task
from lightning_modules.losses.gated_consistency import squared_error
from lightning_modules.semi_supervised.base import SemiSupervised
from lightning_modules.semi_supervised.mixing import box_mask, halves, mix
from lightning_modules.semi_supervised.teachers import Teacher

MIXES = ("off", "in", "both")
MIX_TARGETS = ("teacher", "students")
TEACHER_INPUTS = ("full", "crop")
INITS = ("same", "different")


class CoLearning(SemiSupervised):
    """L_lab + lambda (L_cps + L_teacher) + mu L_mix (multi-model co-learning for left-atrium segmentation, Eq. 2-18).

    Two students learn from the labels (Eq. 3), from each other's hard answers for unlabeled images (`cps`, Eq. 4-6) and from those of
    the teacher (`teacher`, Eq. 7-9), whose weights average those of both students (Eq. 1). INDMIX (Eq. 11-12) pastes a box of an
    unlabeled image into a labeled one for student 1, and the other way round for student 2; OUTDMIX mixes truth and pseudo label in the
    same way, and a mean squared error compares (`mix`, Eq. 13-17; the printed Eq. 13 contradicts Eq. 11, here both pairs are consistent).
    All other losses are `loss` (in the paper Dice on the foreground). Without `teacher` and `mix` this is cross pseudo supervision on
    unlabeled images.

    A network that answers well when averaged needs students that stay close: they have one layout, start from the same weights, and
    differ by options without parameters (`variants`), by dropout, and by what they see mixed.

    Args:
        variants: options of `network` for each student (the teacher takes the first), such as `{upsampling: nearest}`.
        init: students that start from the `same` or from `different` weights.
        rates: a and b of Eq. 1, above 0, together at most 1.
        ema_warmup: see `Teacher`.
        mix: `off`, `both`, or `in`: mixed images without mixed targets, so that only their labeled voxels count.
        mix_target: pseudo labels of mixed images from the `teacher` or from the other of the `students`; None = the teacher where the
            weight of `teacher` is above 0.
        soft_target: probabilities instead of hard pseudo labels in mixed targets.
        box: side of the box over side of the patch, in (0, 1).
        box_in_brain: draw the middle of a box inside the brain mask.
        teacher_input: for mixed targets the teacher sees the `full` unlabeled patch, or only what is used of it, the rest 0 (`crop`).

    Raises:
        SuiteError: an unknown option, a number out of range.
    """

    terms: Mapping[str, float] = {"cps": 1.0, "teacher": 1.0, "mix": 1.0}

    def __init__(
        self,
        task: Task,
        *,
        network: Callable[..., nn.Module],
        variants: Sequence[Mapping[str, Any]] = ({}, {}),
        init: str = "same",
        rates: Sequence[Share] = (0.005, 0.005),
        ema_warmup: bool = True,
        mix: str = "both",
        mix_target: str | None = None,
        soft_target: bool = False,
        box: PositiveShare = 0.5,
        box_in_brain: bool = False,
        teacher_input: str = "full",
        **options: Any,
    ) -> None:
        choices = {"init": (init, INITS), "mix": (mix, MIXES), "teacher_input": (teacher_input, TEACHER_INPUTS)}
        if mix_target is not None:
            choices["mix_target"] = (mix_target, MIX_TARGETS)
        for name, (value, known) in choices.items():
            if value not in known:
                raise unknown(f"model.{name}", value, known)
        if not 0 < box < 1:
            raise SuiteError(f"model.box={box}: above 0 and below 1")
        if len(variants) != 2:
            raise SuiteError(f"model.variants has {len(variants)} entries: one mapping of network options for each of the two students")
        super().__init__(task, network=lambda **sizes: network(**sizes, **variants[0]), **options)
        self.second = network(in_channels=task.in_channels, out_channels=self.target.out_channels, **variants[1])
        if init == "same":
            first, second = self.network.state_dict(), self.second.state_dict()
            self.second.load_state_dict({**second, **{k: v for k, v in first.items() if k in second and second[k].shape == v.shape}})
        self.teacher = Teacher([self.network, self.second], rates, ema_warmup)
        self.mix, self.soft_target, self.box, self.box_in_brain = mix, soft_target, box, box_in_brain
        self.mix_target = mix_target or ("teacher" if self.weights["teacher"] else "students")
        self.teacher_input = teacher_input

    def students(self) -> dict[str, nn.Module]:
        return {"student1": self.network, "student2": self.second}

    def losses(self, labeled: Batch, unlabeled: Batch) -> dict[str, torch.Tensor]:
        mixing = self.mix != "off" and self.weights["mix"] > 0
        count = len(halves(labeled["image"], unlabeled["image"])[0][0])
        mask = self._masks(labeled, count) if mixing else None
        outputs = []
        for number, student in enumerate(self.students().values()):
            images = [labeled["image"], unlabeled["image"]]
            outputs.append(self.together(student, *images, *([self.mixed(*images, mask)[number]] if mixing else [])))
        terms = {"supervised": sum(self.supervised(mine, labeled) for mine, *_ in outputs)}
        others = [output[1] for output in outputs]
        if self.weights["cps"]:
            terms["cps"] = self.loss(others[0], self.hard(others[1])) + self.loss(others[1], self.hard(others[0]))
        asked = mixing and self.mix == "both" and self.mix_target == "teacher" and self.teacher_input == "full"
        teacher = self.no_grad_logits(self.teacher, unlabeled["image"], "teacher") if self.weights["teacher"] or asked else None
        if self.weights["teacher"]:
            terms["teacher"] = sum(self.loss(output, self.hard(teacher)) for output in others)
        if mixing:
            truth, valid = self.target.as_maps(self.training_target(labeled))
            pseudo = self._pseudo_maps(unlabeled, teacher, others, mask)
            targets = [self.mixed(truth, maps, mask)[number] for number, maps in enumerate(pseudo)]
            known = torch.full((len(unlabeled["image"]), *valid.shape[1:]), float(self.mix == "both"), device=valid.device)
            weights = self.mixed(valid, known, mask)
            answers = [self.probabilities(output[2]) for output in outputs]
            terms["mix"] = sum(squared_error(p, y, w) for p, y, w in zip(answers, targets, weights, strict=True))
        return terms

    def mixed(self, labeled: torch.Tensor, unlabeled: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Student 1's and student 2's mixed images (Eq. 11-12), or maps or weights mixed in the same way (Eq. 13-14).

        Unlabeled boxes in the first half of the labeled batch; labeled boxes in the second half of the unlabeled one.
        """
        (labeled1, unlabeled1), (labeled2, unlabeled2) = halves(labeled, unlabeled)
        return mix(labeled1, unlabeled1, mask), mix(unlabeled2, labeled2, mask)

    def _pseudo_maps(
        self, unlabeled: Batch, teacher: torch.Tensor | None, others: list, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Maps (B, K, *spatial) of the unlabeled images, for the mixed target of student 1 and of student 2."""
        image = unlabeled["image"]
        if self.mix_target == "students":
            return self._answer(others[1]), self._answer(others[0])
        if self.teacher_input == "full" and teacher is not None:
            return (self._answer(teacher),) * 2
        if self.mix == "in":
            nothing = torch.zeros((len(image), self.target.out_channels, *image.shape[2:]), device=image.device)
            return nothing, nothing
        half = len(mask)
        outside = unlabeled.get("outside", image.new_zeros(image.shape[:2]))
        nothing = outside.to(image).reshape(*image.shape[:2], *[1] * (image.ndim - 2)).expand_as(image)
        used = [
            mix(nothing[:half], image[:half], mask),
            mix(image[-half:], nothing[-half:], mask),
        ]  # the boxes of mix 1, the surroundings of mix 2
        logits = self.no_grad_logits(self.teacher, torch.cat(used), "teacher, crops")
        whole = self._answer(logits)
        first, second = (torch.zeros((len(image), *whole.shape[1:]), device=image.device) for _ in range(2))
        first[:half], second[-half:] = whole[:half], whole[half:]
        return first, second

    def _answer(self, output: Any) -> torch.Tensor:
        return self.probabilities(output).detach() if self.soft_target else self.target.as_maps(self.hard(output))[0]

    def _masks(self, labeled: Batch, count: int) -> torch.Tensor:
        brain = labeled["brain_mask"][:count].bool() if self.box_in_brain and "brain_mask" in labeled else None
        return box_mask(count, labeled["image"].shape[2:], self.box, self.generator("box"), brain)
