"""Uncertainty-aware multi-dimensional mutual learning: networks of several dimensions that teach each other where they are certain.

Zhao, Xing, Chen, Wan, Han, Fu, Zhu, "Uncertainty-aware multi-dimensional mutual learning for brain and brain tumor segmentation", IEEE
Journal of Biomedical and Health Informatics, 2023. Equation numbers below are the paper's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from lesionbench.batch import Batch
from lesionbench.errors import SuiteError, unknown
from lesionbench.keyed import key, torch_seeded
from lesionbench.prediction import Prediction
from lesionbench.ranges import Count, NotNegative, Whole
from lesionbench.task import Task
from lesionbench.views import from_slices, to_slabs, to_slices
from lightning_modules.inferers import padded
from lightning_modules.losses.gated_consistency import RelativeMax, gated_consistency
from lightning_modules.networks.contract import describe, parts_of, within
from lightning_modules.ramps import gaussian_ramp
from lightning_modules.segmentation import SegmentationMethod
from lightning_modules.uncertainty import RunningMoments, active_dropout, entropy, mc_dropout

MUTUAL = ("none", "plain", "gated")
FUSIONS = ("softmin", "mean")


class UMM(SegmentationMethod):
    """Branches of different dimensions, trained together on the same voxels and fused by their uncertainty.

    Each branch j minimizes L_s^j + w L_c^j (Eq. 6): the supervised `loss`, and the squared difference of its probabilities to those of
    every other branch i (detached), at the voxels where i is certain (Eqs. 4-5). How uncertain a branch is, is the entropy of the mean of
    `mc_samples` passes with dropout (Eq. 3). The prediction is the voxel-wise mean of the branches with weights softmin(uncertainty)
    (Eq. 7); every branch is also a member of it.

    Args:
        branches: name -> network factory, called with (channels, classes). Its dimension follows from the network: 2D, 2.5D (a network
            with a `slab`) or 3D. Without dropout layers the uncertainty is the plain entropy. None leaves a branch out.
        mutual: `gated`; `plain`, every voxel of every teacher counts (Eq. 2, in the class-summed form of Eq. 5); `none`, branches that
            are trained separately.
        gate: called with (uncertainty, classes, share of the ramp done), returns where a teacher counts; for `gated`.
        mc_samples: passes T, at least 1; in training the one with gradient is the first of them.
        passes_at_once: how many passes without gradient are one forward pass of a larger batch; more memory, faster for small networks.
        fusion: `softmin`, `mean`, or `single:<branch>`, which takes that branch as the prediction.
        extra_fusions: `softmin` or `mean`, beside `fusion`: members of the prediction, to be measured with it.
        predict_mc_mean: predict with the mean of the passes instead of a pass without dropout.
        max_weight: of the consistency term, reached at the end of its ramp w = max_weight exp(-5 (1 - m)^2).
        ramp_epochs: length of the ramp; None = the whole training.
        detach_teacher: False lets the consistency term also move the teacher towards the student.

    The paper uses the probabilities of the first pass in both losses, and initializes all weights by Xavier's uniform rule.

    Raises:
        SuiteError: no branch, an unknown `mutual` or `fusion`, a number out of range, a target that is no softmax over classes.
    """

    tables = ("mean_entropy",)

    def __init__(
        self,
        task: Task,
        *,
        branches: Mapping[str, Callable[..., nn.Module] | None],
        mutual: str = "gated",
        gate: Callable[[torch.Tensor, int, float], torch.Tensor] | None = None,
        mc_samples: Count = 8,
        passes_at_once: Count = 1,
        fusion: str = "softmin",
        extra_fusions: Sequence[str] = (),
        predict_mc_mean: bool = False,
        max_weight: NotNegative = 1.0,
        ramp_epochs: Count | None = None,
        detach_teacher: bool = True,
        seed: Whole = 0,
        **options: Any,
    ) -> None:
        factories = {name: factory for name, factory in branches.items() if factory is not None}
        if not factories:
            raise SuiteError("model.branches is empty: give two or three networks, e.g. {s: 2D, p: 2.5D, v: 3D}")
        if mutual not in MUTUAL:
            raise unknown("model.mutual", mutual, MUTUAL)
        known = [*FUSIONS, *(f"single:{name}" for name in factories)]
        if fusion not in known:
            raise unknown("model.fusion", fusion, known)
        for name in extra_fusions:
            if name not in FUSIONS:
                raise unknown("model.extra_fusions", name, FUSIONS)
        if taken := {"probabilities", *FUSIONS} & set(factories):
            raise SuiteError(f"model.branches: {', '.join(sorted(taken))} cannot be the name of a branch")
        if mc_samples < 1 or passes_at_once < 1:
            raise SuiteError(f"model.mc_samples={mc_samples} model.passes_at_once={passes_at_once}: both are at least 1")
        if max_weight < 0 or (ramp_epochs is not None and ramp_epochs < 1):
            raise SuiteError(f"model.max_weight={max_weight} is at least 0, model.ramp_epochs={ramp_epochs} at least 1 (null = all epochs)")
        super().__init__(task, network=partial(Branches, factories=factories, axis=task.slice_axis, seed=seed), seed=seed, **options)
        if self.target.kind != "softmax":
            raise SuiteError(f"UMM needs a softmax over classes (model/target=softmax); got {type(self.target).__name__}")
        self.mutual, self.gate = mutual, gate or RelativeMax()
        self.mc_samples, self.passes_at_once = mc_samples, passes_at_once
        self.fusion, self.extra_fusions, self.predict_mc_mean = fusion, tuple(extra_fusions), predict_mc_mean
        self.max_weight, self.ramp_epochs, self.detach_teacher = max_weight, ramp_epochs, detach_teacher

    # training

    def check(self, data: Any) -> None:
        super().check(data)
        view, patch = (getattr(data, name, None) for name in ("view", "patch"))
        if view not in (None, "patch"):
            raise SuiteError(f"data.view={view}: UMM makes the views of its branches itself and needs data.view=patch")
        for name, branch in self.network.items():
            if patch is not None and not branch.takes(patch):
                raise SuiteError(f"patch={list(patch)} is too small for model.branches.{name}, which needs {branch.needs}")

    def ramp_progress(self) -> float:
        """Share of the ramp that is behind, m / Gamma of Eq. 6 in batches."""
        return self.progress(None if self.ramp_epochs is None else self.ramp_epochs * self.trainer.num_training_batches)

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        image, target = batch["image"], self.target.encode(batch["label"])
        self.network.beyond(batch)
        # passes without gradient come first: their memory is free again when the graphs are built
        moments = {n: self._passes(n, image, self.mc_samples - 1) for n in self.network} if self.mutual == "gated" else {}
        logits = {name: self._drawn(name, "pass 0")(image) for name in self.network}
        probabilities = {name: self.target.activate(x) for name, x in logits.items()}
        supervised = {name: self.loss(x, target) for name, x in logits.items()}
        terms = {f"supervised_{name}": loss for name, loss in supervised.items()}
        total = sum(supervised.values())
        if self.mutual != "none":
            progress = self.ramp_progress()
            uncertainty = {name: self._uncertainty(m, probabilities[name]) for name, m in moments.items()}
            certain = {name: self.gate(u, self.target.out_channels, progress) for name, u in uncertainty.items()}
            consistency = {name: self._consistency(name, probabilities, certain) for name in probabilities}
            weight = self.max_weight * gaussian_ramp(progress)
            total = total + weight * sum(consistency.values())
            terms |= {f"consistency_{name}": loss for name, loss in consistency.items()} | {"weight": torch.tensor(weight)}
            terms |= {f"certain_{name}": mask.float().mean() for name, mask in certain.items()}
            terms |= {f"uncertainty_{name}": u.mean() for name, u in uncertainty.items()}
        self.log_terms(loss=total, **terms)
        return total

    def _drawn(self, name: str, purpose: str) -> nn.Module:
        """The branch, with the global generator set to what belongs to this purpose: its dropout does not depend on other terms."""
        torch.manual_seed(key(self.seed, "dropout", name, purpose, self.iteration, self.global_rank))
        return self.network[name]

    @torch.no_grad()
    def _passes(self, name: str, image: torch.Tensor, count: int) -> RunningMoments:
        """`count` further stochastic passes of a branch; none where they would all be like the one with gradient."""
        branch = self._drawn(name, "further passes")
        return self._add_passes(RunningMoments(), branch, image, count if active_dropout(branch) else 0)

    def _add_passes(self, moments: RunningMoments, branch: nn.Module, image: torch.Tensor, count: int) -> RunningMoments:
        with mc_dropout(branch):
            for done in range(0, count, self.passes_at_once):
                together = min(self.passes_at_once, count - done)
                probabilities = self.target.activate(branch(image.repeat(together, *[1] * (image.ndim - 1))))
                for one in probabilities.chunk(together):
                    moments.update(one)
        return moments

    def _uncertainty(self, moments: RunningMoments, first: torch.Tensor) -> torch.Tensor:
        """U of all T passes: the further ones and the first."""
        moments.update(first)
        return moments.entropy

    def _consistency(self, learner: str, probabilities: Mapping[str, torch.Tensor], certain: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """L_c of one learner: the sum over all other branches as teachers (Eqs. 2 and 4)."""
        own, terms = probabilities[learner], []
        for name, teacher in probabilities.items():
            if name != learner:
                terms.append(gated_consistency(own, teacher.detach() if self.detach_teacher else teacher, certain.get(name)))
        return sum(terms, own.new_zeros(()))

    # inference

    def predict_maps(self, view: torch.Tensor) -> dict[str, torch.Tensor]:
        """Probabilities of every branch under its name and fused as `probabilities`; `<name>/entropy` (B, 1, x, y, z) is the uncertainty of each.

        That of the fusion is the entropy of the branches' mean passes, mixed by the same weights.
        """
        own, moments = {}, {}
        for name, branch in self.network.items():
            draws = bool(active_dropout(branch))  # without dropout one pass is all passes
            moments[name] = self._add_passes(RunningMoments(), branch, view, self.mc_samples if draws else 1)
            own[name] = self.target.activate(branch(view)) if draws and not self.predict_mc_mean else moments[name].mean
        uncertainty = {name: m.entropy for name, m in moments.items()}
        maps = {**own, **{f"{name}/entropy": u for name, u in uncertainty.items()}}
        for name, fusion in [("probabilities", self.fusion), *((f, f) for f in self.extra_fusions)]:
            weights = fusion_weights(uncertainty, fusion)
            maps[name] = sum(weights[branch] * o for branch, o in own.items())
            maps[f"{name}/entropy"] = entropy(sum(weights[branch] * m.mean for branch, m in moments.items()))
        return maps

    def predict_case(self, batch: Batch) -> Prediction:
        """Fused prediction with the branches as members; each has its `entropy` map and that map's mean over the case in its table."""
        self.network.beyond(batch)
        maps = self.infer(batch, self.predict_maps)

        def part(name: str) -> Prediction:
            uncertainty = maps[f"{name}/entropy"][0, 0]
            table = {"mean_entropy": float(uncertainty.mean())}
            return replace(self.decode(maps[name]), uncertainty={"entropy": uncertainty}, table=table)

        return replace(part("probabilities"), members={name: part(name) for name in (*self.network, *self.extra_fusions)})


def fusion_weights(uncertainty: Mapping[str, torch.Tensor], fusion: str = "softmin") -> dict[str, torch.Tensor]:
    """Branch -> its weight at every voxel, (B, 1, *spatial), from its uncertainty of that shape; weights sum to 1 over branches.

    `softmin` is exp(-U_i) / sum_j exp(-U_j) (Eq. 7, whose printed numerator lacks the minus sign that its text asks for); `mean` weighs
    all alike; `single:<branch>` is 1 for that branch.
    """
    stacked = torch.stack(list(uncertainty.values()))
    if fusion == "softmin":
        weights = stacked.neg().softmax(dim=0)
    elif fusion == "mean":
        weights = torch.full_like(stacked, 1 / len(stacked))
    else:
        weights = torch.zeros_like(stacked)
        weights[list(uncertainty).index(fusion.removeprefix("single:"))] = 1
    return dict(zip(uncertainty, weights, strict=True))


class Branches(nn.ModuleDict):
    """Networks of any dimension by name, each as a map from volumes (B, M, X, Y, Z) to logits (B, K, X, Y, Z).

    Every network is built and initialized with random numbers of its own, so that it starts the same whatever stands beside it.

    Args:
        in_channels, out_channels: M and K.
        factories: name -> network factory.
        axis: spatial axis along which 2D and 2.5D networks go through the volume.
        seed: of the weights.
    """

    def __init__(self, in_channels: int, out_channels: int, *, factories: Mapping[str, Callable[..., nn.Module]], axis: int, seed: int):
        super().__init__()
        for name, factory in factories.items():
            with torch_seeded(seed, "initialization", name):
                self[name] = VolumeWise(factory(in_channels, out_channels), axis).apply(xavier)
        parts: dict[str, tuple[str, ...]] = {name: (name,) for name in factories}  # a branch, or the encoders (...) of all of them
        for name, branch in self.items():
            for part, paths in within(parts_of(branch.network), f"{name}.network").items():
                parts[part] = parts.get(part, ()) + paths
        describe(self, 3, 1, parts=parts)  # branches pad to what they need by themselves

    def beyond(self, batch: Batch) -> None:
        """From now on what lies beyond the border of volumes is that of the cases of `batch`."""
        outside = batch.get("outside")
        for branch in self.values():
            branch.outside = None if outside is None or not outside.any() else outside

    def forward(self, volume: torch.Tensor) -> dict[str, torch.Tensor]:
        """Branch -> its logits."""
        return {name: branch(volume) for name, branch in self.items()}


class VolumeWise(nn.Module):
    """A network as a map from volumes to logits of volumes: slice by slice (2D), pack by pack (2.5D) or as it is (3D).

    Views are padded with `outside` at the far end to the multiple that the network needs, and its logits are cut again. The dimension comes from
    the network's attributes `dimensions` and `slab` (see `lightning_modules.networks.describe`).

    Args:
        network: returns logits, or a dict with nothing but `logits`.
        axis: spatial axis along which slices are cut.

    Attributes:
        outside: what lies beyond the border of the volumes (b, M), which are all of these b cases in turn; None = 0.
    """

    def __init__(self, network: nn.Module, axis: int) -> None:
        super().__init__()
        self.network, self.axis = network, axis
        self.outside: torch.Tensor | None = None

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        """(B, M, X, Y, Z) -> (B, K, X, Y, Z)."""
        net, axis = self.network, self.axis
        beyond = None if self.outside is None else self.outside.repeat(len(volume) // len(self.outside), 1)
        if net.dimensions == 3:
            return padded(volume, net.divisor, self._answer, outside=beyond)["logits"]
        views = to_slices(volume, axis) if net.slab is None else to_slabs(volume, axis, net.slab)
        beyond = None if beyond is None else beyond.repeat_interleave(len(views) // len(volume), dim=0)
        return from_slices(padded(views, net.divisor, self._answer, axes=2, outside=beyond)["logits"], axis, len(volume))

    def takes(self, patch: Sequence[int]) -> bool:
        """Whether volumes of this size, once padded, leave the network enough voxels at its coarsest level."""
        net = self.network
        sides = [s for axis, s in enumerate(patch) if net.dimensions == 3 or axis != self.axis]
        sides = tuple(-(-side // by) * by for side, by in zip(sides, net.divisor, strict=True))
        return any(s >= m for s, m in zip(sides, net.min_size, strict=True)) and net.fixed_size in (None, sides)

    @property
    def needs(self) -> str:
        """What `takes` asks for, in words."""
        net = self.network
        where = "" if net.dimensions == 3 else f" in the plane of its slices (all axes but {self.axis})"
        size = f"{net.fixed_size}" if net.fixed_size else f"one side to reach its part of {net.min_size}"
        return f"{size}{where}, padded to multiples of {net.divisor}"

    def _answer(self, view: torch.Tensor) -> dict[str, torch.Tensor]:
        output = self.network(view)
        output = output if isinstance(output, dict) else {"logits": output}
        if set(output) != {"logits"}:
            raise SuiteError(
                f"a branch must return logits only; {type(self.network).__name__} also returns {sorted(set(output) - {'logits'})} "
                "(switch its deep supervision or auxiliary outputs off)"
            )
        return output


def xavier(layer: nn.Module) -> None:
    """Xavier's uniform rule for the weights of convolutions and linear layers, 0 for their biases."""
    if isinstance(layer, nn.modules.conv._ConvNd | nn.Linear):
        nn.init.xavier_uniform_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
