"""Search for the architecture of a network by gradient descent: DiNTS on brain tumors (Milesi et al., BrainLes 2021), and the stage that decodes it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import nn

from lesionbench.batch import Batch
from lesionbench.checkpoint import load_method
from lesionbench.errors import SuiteError, unknown
from lesionbench.ranges import NotNegative, Share
from lesionbench.results import write_json
from lesionbench.task import Task
from lesionbench.written import whole
from lightning_modules.networks.topology import PRUNED, Children, dead_end, likeliest, rows
from lightning_modules.ramps import batches, linear_ramp
from lightning_modules.segmentation import SegmentationMethod
from lightning_modules.supervised.architecture_figure import architecture_figure

TERMS = ("topology", "operations", "paths", "memory")


class DiNTSTopologySearch(SegmentationMethod):
    """Learns which paths of a search space are used and which operation each applies, beside the weights of all of them.

    Milesi et al., "Brain Tumor Segmentation Using Neural Network Topology Search", BrainLes 2021, after He et al., "DiNTS", CVPR 2021. One
    batch is one step of the weights on the stream `net` (the architecture held), then, once the warm-up is over, one step of the
    architecture on the stream `arch` (the weights held), whose loss is

        L_arch = L_seg + t / t_all (w_tp L_tp + w_alpha L_alpha + w_eta L_eta + w_m L_m), t counted from the end of the warm-up.

    Args:
        network: with a search space, `networks.dints_search`.
        warmup: batches, or below 1 the share of all of them, in which the weights alone are trained.
        weights: `topology`, `operations`, `paths` and `memory`: w_tp, w_alpha, w_eta and w_m; 0 leaves a term out.
        memory_target: share of the memory of the whole search space that `memory` asks for.
        retrained: factory of the network that what is found will be, `networks.dints`; asked for one with all paths before the search, so that
            one that cannot be trained on these patches is said by then.

    Raises:
        SuiteError: a network without search space, or an unknown term.
    """

    streams = ("net", "arch")

    def __init__(
        self,
        task: Task,
        *,
        weights: Mapping[str, NotNegative],
        warmup: NotNegative = 1 / 3,
        memory_target: Share = 0.5,
        retrained: Callable[..., nn.Module] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(task, **options)
        if not hasattr(getattr(self.network, "dints_space", None), "log_alpha_a"):
            raise SuiteError(f"model.network: {type(self.network).__name__} has no paths to choose from; use model/network=dints_search")
        for name in weights:
            if name not in TERMS:
                raise unknown("model.weights", name, TERMS)
        self.automatic_optimization = False
        self.weights = {name: float(weights.get(name, 0)) for name in TERMS}
        self.warmup, self.memory_target, self.retrained = warmup, memory_target, retrained
        self.children_of_block = Children(self.space.num_depths)

    @property
    def space(self) -> Any:
        """The search space, with the logits of paths and operations."""
        return self.network.dints_space

    def check(self, data: Any) -> None:
        super().check(data)
        if self.retrained is not None:
            every = rows(*np.ones((2, *self.space.log_alpha_a.shape), dtype=int))
            with torch.device("meta"):
                network = self.retrained(in_channels=self.task.in_channels, out_channels=self.target.out_channels, architecture=every)
            if network.dimensions != self.network.dimensions:
                raise SuiteError(
                    f"model.retrained (retrained.network.dimensions={network.dimensions}): the search space has {self.network.dimensions} "
                    "dimensions, and so must the network of what is found in it"
                )
            self.check_patch(data, network)

    def check_schedules(self, total_iterations: int) -> None:
        super().check_schedules(total_iterations)
        total = total_iterations * self.accumulate
        if batches(self.warmup, total) >= total:
            raise SuiteError(f"model.warmup={self.warmup} of {total} batches leaves none to search in; shorten it, or train longer")

    def optimizer_groups(self) -> dict[str, list[nn.Parameter]]:
        architecture = [self.space.log_alpha_a, self.space.log_alpha_c]
        known = {id(p) for p in architecture}
        return {"weights": [p for p in self.network.parameters() if id(p) not in known], "architecture": architecture}

    def training_step(self, batch: Mapping[str, Batch], batch_idx: int) -> None:
        with self.optimizing("weights") as step:
            terms = {"loss": self.compute_loss(batch["net"])}
            step(terms["loss"])
        done, warmup = self.iteration, batches(self.warmup, self.total_iterations)
        if done >= warmup:
            with self.optimizing("architecture") as step:
                terms["architecture"] = self.compute_loss(batch["arch"])
                found = self.terms(batch["arch"]["image"].shape)
                share = linear_ramp((done - warmup) / (self.total_iterations - warmup))
                step(terms["architecture"] + share * sum(self.weights[name] * term for name, term in found.items()))
                terms |= found
        self.log_terms(**terms, **self.entropies())

    def terms(self, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """The terms of the architecture's loss that have a weight, for batches (B, M, *spatial) of this shape; scalars."""
        log_children = self.children_of_block.log_probabilities(self.space.log_alpha_a)
        computed = {
            "topology": lambda: topology_loss(log_children.exp(), self.children_of_block),
            "operations": lambda: entropy(self.space.log_alpha_c.log_softmax(dim=-1)).mean() / self.space.num_cell_ops,
            "paths": lambda: entropy(log_children).mean() / log_children.shape[1],
            "memory": lambda: (self.memory_target - self.memory(shape)).abs(),
        }
        return {name: compute() for name, compute in computed.items() if self.weights[name]}

    def memory(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Estimated memory of the feature maps of the paths and operations as they are weighted now, as a share of that with all paths."""
        with torch.no_grad():
            full = self.space.get_ram_cost_usage(shape, full=True)
        return self.space.get_ram_cost_usage(shape) / full

    @torch.no_grad()
    def entropies(self) -> dict[str, torch.Tensor]:
        """Mean entropy in nats, over blocks of what paths there are, and over paths of the operation: 0 = decided."""
        log_children = self.children_of_block.log_probabilities(self.space.log_alpha_a)
        return {"entropy_paths": entropy(log_children).mean(), "entropy_operations": entropy(self.space.log_alpha_c.log_softmax(-1)).mean()}

    @torch.no_grad()
    def decoded(self) -> list[str]:
        """The likeliest feasible architecture with the likeliest operation on each of its paths, written as `networks.dints` takes it."""
        children = self.children_of_block
        chosen = likeliest(children.log_probabilities(self.space.log_alpha_a.double()), children)
        return self._rows(chosen)

    @torch.no_grad()
    def independent(self) -> list[str]:
        """The likeliest paths of every block by itself, written likewise; they may lead nowhere (`networks.topology.dead_end`)."""
        return self._rows(self.children_of_block.log_probabilities(self.space.log_alpha_a.double()).argmax(dim=1).tolist())

    def _rows(self, chosen: list[int]) -> list[str]:
        return rows(self.children_of_block.members[chosen].numpy(), self.space.log_alpha_c.argmax(dim=-1).cpu().numpy())


def entropy(log_probabilities: torch.Tensor) -> torch.Tensor:
    """-sum p log p over the last dimension, in nats."""
    return -(log_probabilities.exp() * log_probabilities).sum(dim=-1)


def topology_loss(probabilities: torch.Tensor, children: Children) -> torch.Tensor:
    """L_tp of DiNTS: how badly the scales that a block leads to predict those from which the next one goes on.

    -sum_b sum_n [p_in log p_out + (1 - p_in) log(1 - p_out)] over all but the last block b and all patterns n of scales, with p_in the
    probability that block b leads to just these and p_out that block b + 1 goes on from them. 1e-5 is added inside of the logarithms.

    Args:
        probabilities: (B, K) of the children of every block.
    """
    led_to = children.activations(probabilities[:-1], children.writes)
    goes_on = children.activations(probabilities[1:], children.reads)
    return -(led_to * (goes_on + 1e-5).log() + (1 - led_to) * (1 - goes_on + 1e-5).log()).sum()


def decode(cfg: DictConfig, folder: Path) -> Path:
    """Stage: the architecture that the search in `cfg.ckpt` found, as `architecture.json`, and drawn in `figures/architecture.png` of the run."""
    method, _ = load_method(cfg.ckpt, trust=list(cfg.trust))
    if not isinstance(method, DiNTSTopologySearch):
        raise SuiteError(f"{cfg.ckpt}: holds {type(method).__name__}, which searches no architecture; decode the checkpoint of a search")
    found = method.decoded()
    figure = architecture_figure(found, method.network.dimensions)
    with whole(folder.parent / "figures" / "architecture.png") as path:
        figure.savefig(path, dpi=100, format="png")
    kept, alone = sum(c != PRUNED for row in found for c in row), dead_end(method.independent())
    print(
        f"{kept} of {len(found) * len(found[0])} paths are kept; the likeliest paths of each block by itself "
        + (f"would be no network: {alone}" if alone else "are a network as well")
    )
    return write_json(folder / "architecture.json", found)
