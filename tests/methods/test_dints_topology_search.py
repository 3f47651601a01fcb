"""DiNTS: what is chosen from and how likely, the losses of the architecture, the two steps, decoding, and the stages up to the retrained checkpoint."""

import csv
import json
import math
import os
import shutil
import signal
from contextlib import contextmanager
from functools import partial
from itertools import pairwise, product

import numpy as np
import pytest
import torch
import torchio
from hydra.utils import instantiate
from monai.networks.nets.dints import DiNTS, TopologySearch
from omegaconf import OmegaConf
from torch import nn

from benchmarks.dints_effects import discretized
from lesionbench.checkpoint import load_method, read_checkpoint
from lesionbench.errors import SuiteError
from lesionbench.jobs.assembled import Assembled
from lesionbench.jobs.stages import _overridden
from lesionbench.target import RegionSigmoid
from lesionbench.task import Task
from lightning_modules import DiNTSTopologySearch
from lightning_modules.inferers import Window
from lightning_modules.losses import RegionBCEDice
from lightning_modules.networks import dints, dints_search
from lightning_modules.networks.topology import PRUNED, Children, dead_end, likeliest, parsed, paths, rows
from lightning_modules.supervised.dints_topology_search import decode, entropy, topology_loss
from tests.fake_data import write_fake_folder
from tests.harness import assert_same, composed, run, run_folders, run_killed, weights
from tests.harness import rows as results

TASK = Task(channels=("t1", "flair"), classes={"background": [0], "lesion": [1]}, regions={"lesion": ["lesion"]})
U_NET = ["0.1.......", "0..0.1....", "0..0..0.1.", "0..0..01..", "0..01.....", "01........"]


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def tiny_search(blocks=3, depths=2, width=4, dimensions=3, **options):
    return lambda in_channels, out_channels: dints_search(
        in_channels, out_channels, blocks=blocks, depths=depths, width=width, dimensions=dimensions, downsample=False, **options
    )


def searching(network=None, **options) -> DiNTSTopologySearch:
    options = {"weights": {"topology": 1e-3, "operations": 1.0, "paths": 1.0}, **options}
    return DiNTSTopologySearch(
        TASK, network=network or tiny_search(), loss=RegionBCEDice(), inferer=Window((8, 8, 8)), target=RegionSigmoid, **options
    )


def drawn(shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def monai_space(logits, depths):
    """MONAI's own search space with these logits of paths."""
    space = TopologySearch(channel_mul=0.125, num_blocks=len(logits), num_depths=depths, use_downsample=False)
    space.log_alpha_a.data = logits.clone()
    return space


# the search space


def test_paths_lead_to_the_same_scale_and_its_neighbors():
    found = paths(4)
    assert [source for source, _ in found] == [0, 1, 0, 1, 2, 1, 2, 3, 2, 3]
    assert [to for _, to in found] == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3]
    space = monai_space(drawn((2, 7)), depths=3)
    assert paths(3) == list(zip(space.arch_code2in, space.arch_code2out, strict=True))


def test_parameters_of_the_paper_s_search_space():
    with torch.device("meta"):
        network = dints_search(5, 3)
        assert parameters(network) == 150_638_387
        assert parameters(dints_search(5, 3, width=32)) > 3.9 * 150_638_387
        assert network.dints_space.filter_nums == [16, 32, 64, 128, 256]
        assert parameters(dints(5, 3, architecture=U_NET)) == 12_104_579
    assert network.dints_space.log_alpha_a.shape == (12, 10)
    assert network.dints_space.log_alpha_c.shape == (12, 10, 5)
    assert network.divisor == (16, 16, 16)


def test_it_is_monai_s(capsys):
    """The same weights give the same, and nothing is printed."""
    torch.manual_seed(0)
    own = dints_search(2, 1, blocks=2, depths=2, width=4, downsample=True)
    assert capsys.readouterr().out == ""
    theirs = DiNTS(TopologySearch(channel_mul=0.125, num_blocks=2, num_depths=2), 2, 1)
    theirs.load_state_dict(own.state_dict())
    image = torch.randn(1, 2, 8, 8, 8)
    assert torch.equal(own(image), theirs(image))


@pytest.mark.parametrize(("downsample", "side"), [(True, 8), (False, 4), (False, 12)])
def test_the_search_space_takes_the_sizes_it_says(downsample, side):
    network = dints_search(2, 3, blocks=2, depths=2, width=4, downsample=downsample)
    assert side >= network.min_size[0]
    assert side % network.divisor[0] == 0
    assert network(torch.randn(1, 2, side, side, side)).shape == (1, 3, side, side, side)


def test_every_parameter_of_the_search_space_and_of_an_architecture_learns():
    torch.manual_seed(0)
    for network in (dints_search(2, 1, blocks=2, depths=2, width=4), dints(2, 1, architecture=["..1.", "...2", ".3.."], width=4)):
        network(torch.randn(1, 2, 16, 16, 16)).square().mean().backward()
        assert [name for name, p in network.named_parameters() if p.grad is None] == []


def test_two_dimensions():
    network = dints_search(2, 1, blocks=2, depths=2, width=4, dimensions=2, downsample=False)
    assert network.dints_space.num_cell_ops == 2
    assert network(torch.randn(1, 2, 12, 8)).shape == (1, 1, 12, 8)
    assert dints(2, 1, architecture=["1.1.", "01.."], width=4, dimensions=2)(torch.randn(1, 2, 16, 16)).shape == (1, 1, 16, 16)
    with pytest.raises(SuiteError, match=r"row 1 \('2\.1\.'\) may hold 0, 1 for an operation"):
        dints(2, 1, architecture=["2.1.", "01.."], dimensions=2)


# probabilities


@pytest.mark.parametrize("depths", [2, 3, 4])
@pytest.mark.parametrize("scale", [0.01, 3.0, 30.0])
def test_children_s_probabilities_sum_to_one_and_paths_are_their_marginals(depths, scale):
    logits, children = drawn((3, 3 * depths - 2), scale=scale), Children(depths)
    probabilities = children.log_probabilities(logits).exp()
    assert probabilities.shape == (3, 2 ** (3 * depths - 2) - 1)
    assert torch.allclose(probabilities.sum(dim=1), torch.ones(3, dtype=torch.float64))
    any_path = 1 - (1 - logits.sigmoid()).prod(dim=1, keepdim=True)
    assert torch.allclose(probabilities @ children.members.double(), logits.sigmoid() / any_path)


def test_child_s_probability_by_hand():
    """Four paths of probability 1/2: 15 children of 1/15 each. Path 1 certain: those without it are impossible."""
    children = Children(2)
    assert torch.allclose(children.log_probabilities(torch.zeros(1, 4)).exp(), torch.full((1, 15), 1 / 15))
    sure = children.log_probabilities(torch.tensor([[60.0, 0.0, 0.0, 0.0]])).exp()[0]
    assert torch.allclose(sure[7:], torch.full((8,), 1 / 8))
    assert torch.allclose(sure[:7], torch.zeros(7))


def test_children_are_monai_s():
    logits, children = drawn((3, 7)).float(), Children(3)
    space = monai_space(logits, depths=3)
    probabilities, path = space.get_prob_a(child=True)
    assert np.array_equal(children.members.numpy(), space.child_list)
    assert torch.allclose(children.log_probabilities(logits).exp(), probabilities, atol=1e-7)
    assert torch.allclose(probabilities.detach() @ children.members.float(), path.detach(), atol=1e-6)


# losses of the architecture


def one_hot(*numbers: int) -> torch.Tensor:
    return nn.functional.one_hot(torch.tensor(numbers) - 1, 15).double()


def test_topology_loss_by_hand():
    """Two blocks of two scales. Path bits 0-0, 1-0, 0-1, 1-1: child 0b1000 stays at scale 0, 0b0001 at scale 1, 0b0010 goes from 0 to 1."""
    children = Children(2)
    fits, misses = one_hot(0b1000, 0b1000), one_hot(0b1000, 0b0001)
    assert topology_loss(fits, children).item() == pytest.approx(-3 * math.log(1 + 1e-5), abs=1e-9)
    assert topology_loss(misses, children).item() == pytest.approx(-2 * math.log(1e-5) - math.log(1 + 1e-5), abs=1e-6)
    assert topology_loss(one_hot(0b0010, 0b0001), children) < 1e-3 < 20 < topology_loss(one_hot(0b0001, 0b0010), children)
    uneven = torch.zeros(2, 15, dtype=torch.float64)
    uneven[0, 0b1000 - 1], uneven[0, 0b0001 - 1], uneven[1, 0b1000 - 1], uneven[1, 0b0001 - 1] = 0.75, 0.25, 0.5, 0.5
    assert topology_loss(uneven, children).item() == pytest.approx(2 * math.log(2), abs=1e-4)  # 0.75 ln 2 + 0.25 ln 2, twice


@pytest.mark.parametrize("depths", [2, 3])
def test_topology_loss_is_monai_s(depths):
    logits = drawn((4, 3 * depths - 2)).float()
    probabilities = Children(depths).log_probabilities(logits).exp()
    assert topology_loss(probabilities, Children(depths)).item() == pytest.approx(
        monai_space(logits, depths).get_topology_entropy(probabilities).item(), rel=1e-5
    )


def test_entropies_by_hand():
    method = searching()
    method.space.log_alpha_a.data.zero_()
    method.space.log_alpha_c.data.fill_(1.0)
    found = method.terms((1, 2, 8, 8, 8))
    assert set(found) == {"topology", "operations", "paths"}  # memory has no weight
    assert found["operations"].item() == pytest.approx(math.log(5) / 5, rel=1e-5)
    assert found["paths"].item() == pytest.approx(math.log(15) / 15, rel=1e-5)
    assert method.entropies()["entropy_paths"].item() == pytest.approx(math.log(15), rel=1e-5)
    assert method.entropies()["entropy_operations"].item() == pytest.approx(math.log(5), rel=1e-5)
    assert entropy(torch.tensor([0.5, 0.25, 0.25]).log()).item() == pytest.approx(1.5 * math.log(2))


def test_memory_by_hand():
    """One block of two scales, 4 and 8 channels, patches of 8^3: with every path of probability p, and one path and operation at a time."""
    method = searching(tiny_search(blocks=1), weights={"memory": 1.0}, memory_target=0.25)
    space, shape = method.space, (1, 2, 8, 8, 8)
    space.log_alpha_c.data.zero_()
    sizes = torch.tensor([4 * 8**3, 4 * 8**3, 8 * 4**3, 8 * 4**3])  # by where a path leads: 0-0, 1-0, 0-1, 1-1
    # of one feature map: skip 0, convolution 3, each P3D 4; to stay 0, from 8 channels up 2 * 8 / 4 + 2, from 4 down 4 / 8 * 8 + 3
    each = torch.tensor([0.0, 6.0, 7.0, 0.0]) + torch.tensor([0.0, 3.0, 4.0, 4.0, 4.0]).mean() + 1
    full = (sizes * each).sum()
    for logit in (0.0, 1.5):
        space.log_alpha_a.data.fill_(logit)
        p = 1 / (1 + math.exp(-logit))
        share = p / (1 - (1 - p) ** 4)
        assert method.memory(shape).item() == pytest.approx(share, rel=1e-5)
        assert method.terms(shape)["memory"].item() == pytest.approx(abs(0.25 - share), rel=1e-4)
    space.log_alpha_a.data = torch.tensor([[-40.0, 40.0, -40.0, -40.0]])
    assert method.memory(shape).item() == pytest.approx(float(sizes[1] * each[1] / full), rel=1e-5)
    method.terms(shape)["memory"].backward()
    assert space.log_alpha_a.grad.abs().sum() > 0
    method.memory_target = 1.0  # too little is as wrong as too much
    assert method.terms(shape)["memory"].item() == pytest.approx(1 - method.memory(shape).item())


def test_the_smallest_memory_is_asked_for():
    method = searching(weights={"memory": 1.0}, memory_target=0.0)
    before = method.memory((1, 2, 8, 8, 8)).item()
    optimizer = torch.optim.Adam([method.space.log_alpha_a, method.space.log_alpha_c], lr=0.1)
    for _ in range(30):
        optimizer.zero_grad()
        method.terms((1, 2, 8, 8, 8))["memory"].backward()
        optimizer.step()
    assert method.memory((1, 2, 8, 8, 8)).item() < 0.6 * before


def test_a_warm_up_is_counted_in_batches():
    options = {"accumulate": 2, "optimizer": partial(torch.optim.Adam, lr=1e-3)}
    searching(warmup=19, **options).check_schedules(10)
    with pytest.raises(SuiteError, match="of 20 batches leaves none to search in"):
        searching(warmup=20, **options).check_schedules(10)


def test_unknown_terms_and_networks_are_named():
    with pytest.raises(SuiteError, match=r"model\.weights.*'topologie'.*did you mean 'topology'"):
        searching(weights={"topologie": 1.0})
    with pytest.raises(SuiteError, match=r"DiNTSNet has no paths to choose from; use model/network=dints_search"):
        searching(lambda in_channels, out_channels: dints(in_channels, out_channels, architecture=["1...", "1..."], width=4))
    with pytest.raises(SuiteError, match=r"model\.warmup=12 of 12 batches leaves none to search in"):
        searching(warmup=12, optimizer=lambda params: torch.optim.Adam(params)).check_schedules(12)


# decoding


def brute_force(log_probabilities: torch.Tensor, children: Children) -> list[int]:
    fits = [[a for a in range(len(children.writes)) if children.writes[a] == children.reads[b]] for b in range(len(children.reads))]
    best, chosen = -math.inf, []
    for sequence in product(range(len(children.reads)), repeat=len(log_probabilities)):
        if all(a in fits[b] for a, b in pairwise(sequence)):
            score = sum(float(log_probabilities[n, c]) for n, c in enumerate(sequence))
            if score > best:
                best, chosen = score, list(sequence)
    return chosen


@pytest.mark.parametrize("seed", [0, 5, 8, 10, 11])  # in the last four the likeliest last block is not that of the likeliest sequence
def test_the_likeliest_feasible_sequence_by_brute_force(seed):
    children = Children(2)
    log_probabilities = children.log_probabilities(drawn((3, 4), seed, scale=2.0))
    assert likeliest(log_probabilities, children) == brute_force(log_probabilities, children)


@pytest.mark.parametrize(("depths", "blocks"), [(2, 5), (3, 4)])
def test_it_is_what_monai_decodes(depths, blocks):
    """Where 1e-5, which MONAI adds to probabilities, makes no difference."""
    for seed in range(4):
        logits = drawn((blocks, 3 * depths - 2), seed, scale=3.0).float()
        space = monai_space(logits, depths)
        _, chosen, operations, _ = space.decode()
        children = Children(depths)
        found = children.members[likeliest(children.log_probabilities(logits), children)].numpy()
        assert rows(found, operations) == rows(chosen.astype(int), operations)


def test_decoded_architectures_are_feasible_and_independent_ones_not_always():
    children, infeasible = Children(4), 0
    for seed in range(20):
        log_probabilities = children.log_probabilities(drawn((12, 10), seed))  # of the size of the paper
        operations = np.zeros((12, 10), dtype=int)
        assert dead_end(rows(children.members[likeliest(log_probabilities, children)].numpy(), operations)) is None
        infeasible += dead_end(rows(children.members[log_probabilities.argmax(dim=1)].numpy(), operations)) is not None
    assert infeasible >= 15


def test_a_search_decodes_a_feasible_architecture_where_the_likeliest_paths_are_none():
    method, infeasible = searching(tiny_search(blocks=4, depths=3)), 0
    for seed in range(20):
        method.space.log_alpha_a.data = drawn(method.space.log_alpha_a.shape, seed, 3.0).float()
        assert dead_end(method.decoded()) is None
        infeasible += dead_end(method.independent()) is not None
    assert infeasible >= 5


def test_where_the_likeliest_children_fit_they_are_decoded():
    logits = torch.full((2, 4), -9.0)
    logits[0, [0, 2]] = 9.0  # 0-0 and 0-1
    logits[1, [0, 1]] = 9.0  # 0-0 and 1-0
    assert likeliest(Children(2).log_probabilities(logits), Children(2)) == [0b1010 - 1, 0b1100 - 1]


def test_dead_ends_are_found():
    assert dead_end(U_NET) is None
    assert dead_end(["1...", "1.1."]) is None  # the last block may lead to any scale
    assert dead_end(["1.1.", "1..."]) == "block 1 leads to scale 1, from which block 2 does not go on"
    assert dead_end(["1...", "11.."]) == "block 2 goes on from scale 1, to which block 1 does not lead"
    assert dead_end(["1...", "...."]) == "block 2 has no path"


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("contents:decode", r"network\.architecture=contents:decode: expected a list of rows"),
        ([], r"network\.architecture=\[\]: expected a list of rows"),
        ([["1"]], "expected a list of rows"),
        (["1...", "1.1.1.."], r"row 2 \('1\.1\.1\.\.'\) has 7 characters"),
        (["1....", "1...."], "has 5 characters"),
        (["1...", "5..."], r"row 2 \('5\.\.\.'\) may hold 0, 1, 2, 3, 4 for an operation and '\.' for no path"),
        (["1.1.", "1..."], "block 1 leads to scale 1"),
    ],
)
def test_what_is_no_architecture_is_named(architecture, message):
    with pytest.raises(SuiteError, match=message):
        dints(2, 1, architecture=architecture)


def test_a_row_is_read_as_it_was_written():
    chosen, operations = parsed(U_NET, 3)
    assert rows(chosen, operations) == U_NET
    assert chosen.sum() == sum(c != PRUNED for row in U_NET for c in row) == 18


# an architecture as a network


@pytest.mark.parametrize("downsample", [True, False])
def test_a_decided_search_space_is_its_architecture(downsample):
    """With logits of +-30 for one feasible set of paths and one-hot operations both compute the same, weights being equal."""
    torch.manual_seed(0)
    network = dints_search(2, 1, blocks=4, depths=3, width=4, downsample=downsample)
    method = searching(lambda in_channels, out_channels: network)
    architecture = ["0.1....", "2..0.3.", "1..4.10", "31..2.."]
    chosen, operations = parsed(architecture, 3)
    method.space.log_alpha_a.data = torch.where(torch.from_numpy(chosen) > 0, 30.0, -30.0)
    method.space.log_alpha_c.data = 60.0 * nn.functional.one_hot(torch.from_numpy(operations), 5).float()
    assert method.decoded() == architecture
    instance = discretized(network, architecture)
    image = torch.randn(1, 2, 16, 16, 16)
    with torch.no_grad():
        assert torch.allclose(instance(image), network(image), atol=1e-4)
    assert (network.entered, instance.entered, network.coarsest, instance.coarsest) == ([0, 1, 2], [0], 2, 1)
    assert instance(image).shape == (1, 1, 16, 16, 16)


# steps


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_fake_folder(tmp_path_factory.mktemp("data"), 8, shape=(14, 12, 10))


def settings(folder, runs):
    return [
        "experiment=dints_topology_search/simulated", "data=folder", f"data.root={folder}", f"runs={runs}", "data.channels=[t1,flair]", "data.check=false", "patch=[8,8,8]",
        "data.samples_per_epoch=6", "data.batch_size=2", "data.num_workers=0", "data.split.test=2", "data.split.val=1", "epochs=3", "trainer.check_val_every_n_epoch=3", "threads=1",
        "model.network.blocks=2", "model.network.depths=2", "model.network.width=4", "retrained.network.width=4", "search.share=0.6666666667", "callbacks.figures=null", "writer.on_test=false",
        "~data.count", "~data.spacing", "~data.difficulty",
    ]  # fmt: skip


def parts(folder, tmp_path, *more):
    """Module and data of the search, on the trainer's own loop."""
    cfg = composed(*settings(folder, tmp_path), "search.share=1.0", *more)
    cfg = _overridden(cfg, cfg.stages[0])
    cfg.run_folder = str(tmp_path / "run")
    made = Assembled(cfg)
    made.prepare()
    return made


class Watch:
    """Weights, architecture and losses before and after every step of an optimizer."""

    def __init__(self, method):
        self.method, self.seen = method, []
        inner = method.optimizing

        def optimizing(name, advance=True):
            @contextmanager
            def watched():
                before = {k: v.clone() for k, v in method.state_dict().items()}
                with inner(name, advance) as step:
                    losses = []
                    yield lambda loss: (losses.append(float(loss.detach())), step(loss))
                changed = {k for k, v in method.state_dict().items() if not torch.equal(v, before[k])}
                self.seen.append((method.iteration, name, changed, losses[0]))

            return watched()

        method.optimizing = optimizing


@pytest.mark.parametrize("accumulate", [1, 2])
def test_each_step_changes_its_own_parameters_alone(accumulate, folder, tmp_path):
    made = parts(folder, tmp_path, "epochs=2", "data.samples_per_epoch=12", f"accumulate={accumulate}", "model.warmup=4")
    method, watch = made.method, Watch(made.method)
    names = {name for name, _ in method.named_parameters()}
    architecture = {"network.dints_space.log_alpha_a", "network.dints_space.log_alpha_c"}
    made.trainer.fit(method, datamodule=made.data)
    assert [(iteration, name) for iteration, name, *_ in watch.seen] == [
        (i, name) for i in range(12) for name in (["weights", "architecture"] if i >= 4 else ["weights"])
    ]
    for iteration, name, changed, _ in watch.seen:
        expected = architecture if name == "architecture" else names - architecture
        if iteration % 6 % accumulate == accumulate - 1:
            assert changed <= expected
            assert len(changed) > 0.9 * len(expected), name  # but biases before a normalization
        else:
            assert changed == set()


def test_halves_of_the_patients(folder, tmp_path):
    made = parts(folder, tmp_path, "epochs=1")
    seen = {"net": set(), "arch": set()}
    made.data.setup("fit")
    loaders = {name: made.data.stream_loader(name, spec) for name, spec in made.data.streams.items()}
    for name, loader in loaders.items():
        seen[name] = {case.id for case in loader.dataset.cases}
    assert not seen["net"] & seen["arch"]
    assert seen["net"] | seen["arch"] == {case.id for case in made.data.parts["train"]}
    assert made.data.task.in_channels == 3  # two images and the mask of the brain


def test_the_loss_of_the_architecture_begins_with_that_of_the_segmentation(folder, tmp_path):
    """t = 0 in the first step after the warm-up, then a share of the terms that would be 1 after the last."""
    made = parts(
        folder,
        tmp_path,
        "epochs=2",
        "model.warmup=2",
        "model.weights={topology:2.0,operations:3.0,paths:5.0,memory:7.0}",
        "model.memory_target=0.1",
    )
    method, watch, logged, asked = made.method, Watch(made.method), [], []
    method.log_terms = lambda **terms: logged.append({k: float(v.detach()) for k, v in terms.items()})
    compute_loss = method.compute_loss
    method.compute_loss = lambda batch: (asked.append(set(batch["case"])), compute_loss(batch))[1]
    made.trainer.fit(method, datamodule=made.data)
    halves = {name: {c.id for c in made.data.stream_loader(name, spec).dataset.cases} for name, spec in made.data.streams.items()}
    assert all(cases <= halves[name] for cases, (_, name) in zip(asked, [(i, n) for i in range(6) for n in ("net", "arch")[: 1 + (i >= 2)]], strict=True))  # fmt: skip
    totals = [loss for _, name, _, loss in watch.seen if name == "architecture"]
    assert all("architecture" not in terms for terms in logged[:2])
    assert [set(terms) for terms in logged[2:]] == [{"loss", "architecture", "topology", "operations", "paths", "memory", "entropy_paths", "entropy_operations"}] * 4  # fmt: skip
    assert totals[0] == pytest.approx(logged[2]["architecture"])
    for share, terms, total in zip((0, 0.25, 0.5, 0.75), logged[2:], totals, strict=True):
        added = 2 * terms["topology"] + 3 * terms["operations"] + 5 * terms["paths"] + 7 * terms["memory"]
        assert total == pytest.approx(terms["architecture"] + share * added, rel=1e-5)


def test_the_search_decides(folder, tmp_path):
    """Entropies fall when the terms are strong, and hardly without them."""
    fallen = {}
    for name, weight in (("with", 30.0), ("without", 0.0)):
        made = parts(
            folder,
            tmp_path / name,
            "epochs=8",
            "model.warmup=0",
            f"model.weights={{topology:{weight / 100},operations:{weight},paths:{weight}}}",
        )
        before = made.method.entropies()
        made.trainer.fit(made.method, datamodule=made.data)
        fallen[name] = {k: float(before[k] - v) for k, v in made.method.entropies().items()}
    assert fallen["with"]["entropy_paths"] > 3 * abs(fallen["without"]["entropy_paths"])
    assert fallen["with"]["entropy_operations"] > 0.05
    assert fallen["with"]["entropy_operations"] > 3 * abs(fallen["without"]["entropy_operations"])


# the stages


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """A whole run."""
    runs = tmp_path_factory.mktemp("runs")
    run(*settings(folder, runs))
    (found,) = run_folders(runs)
    return found


def test_the_stages_of_a_run(finished):
    assert sorted(p.stem for p in (finished / "stages").glob("*.json")) == ["decode", "fit", "search", "test"]
    rows_found = json.loads((finished / "decode" / "architecture.json").read_text())
    assert len(rows_found) == 2
    assert dead_end(rows_found) is None
    assert (finished / "figures" / "architecture.png").stat().st_size > 1000
    assert {row["region"] for row in results(finished)} >= {"lesion"}
    with (finished / "search" / "metrics.csv").open(newline="") as file:
        names = {row["name"] for row in csv.DictReader(file)}
    assert {"train/entropy_paths", "train/entropy_operations", "train/topology"} <= names


def test_the_architecture_stands_in_the_checkpoint_which_predicts_alone(finished, folder, tmp_path):
    moved = tmp_path / "elsewhere" / "model.ckpt"
    moved.parent.mkdir()
    shutil.copy(finished / "checkpoints" / "last.ckpt", moved)
    network = read_checkpoint(moved)["lesionbench"]["model"]["network"]
    assert network["architecture"] == json.loads((finished / "decode" / "architecture.json").read_text())
    assert str(finished) not in str(read_checkpoint(moved)["lesionbench"]["model"])
    hidden = finished.with_name("hidden")
    finished.rename(hidden)  # nothing of the run is there any more
    try:
        method, _ = load_method(moved)
        run("job=predict", f"ckpt={moved}", f"input={folder / 'images'}", f"out={tmp_path / 'out'}", "threads=1")
    finally:
        hidden.rename(finished)
    assert method.network(torch.randn(1, 3, 8, 8, 8)).shape == (1, 1, 8, 8, 8)
    assert len(list((tmp_path / "out" / "predictions").glob("*.nii.gz"))) == 8


@pytest.mark.parametrize("stage", ["search", "decode", "fit", "test"])
def test_killed_in_any_stage_it_ends_the_same(stage, finished, folder, tmp_path, monkeypatch):
    options, kill = [*settings(folder, tmp_path), "callbacks.checkpoint.every_n_batches=2"], []
    with monkeypatch.context() as patched:
        if stage in ("search", "fit"):  # of 6 and 9 batches
            at = 5 if stage == "search" else 8
            kill = ["callbacks.progress._target_=tests.toys.KillAt", f"+callbacks.progress.iteration={at}"]
        else:
            place = {
                "decode": "lightning_modules.supervised.dints_topology_search.write_json",
                "test": "lightning_modules.Supervised.on_test_start",
            }
            patched.setattr(place[stage], lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        assert run_killed(*options, *kill) == -signal.SIGKILL
    (killed,) = run_folders(tmp_path)
    done = ["search", "decode", "fit", "test"]
    assert {p.stem for p in (killed / "stages").glob("*.json")} == set(done[: done.index(stage)])
    run(*options, "resume=true")
    assert run_folders(tmp_path) == [killed]
    assert_same(weights(killed / "search"), weights(finished / "search"))
    assert (killed / "decode" / "architecture.json").read_text() == (finished / "decode" / "architecture.json").read_text()
    assert_same(weights(killed), weights(finished))
    assert results(killed) == results(finished)


def test_what_is_no_search_is_not_decoded(finished, tmp_path):
    cfg = composed("experiment=dints_topology_search/simulated", f"ckpt={finished / 'checkpoints' / 'last.ckpt'}")
    with pytest.raises(SuiteError, match=r"last\.ckpt: holds Supervised, which searches no architecture"):
        decode(cfg, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["retrained.network.downsample=true", "patch=[6,6,6]"],
            r"patch=\[6, 6, 6\] does not fit DiNTSNet, which needs at least \(8, 8, 8\)",
        ),
        (["retrained.network.dimensions=2"], r"retrained\.network\.dimensions=2\): the search space has 3 dimensions"),
    ],
)
def test_what_would_stop_the_retraining_is_said_before_the_search(options, message, folder, tmp_path):
    with pytest.raises(SuiteError, match=message):
        run(*settings(folder, tmp_path), *options)
    assert not run_folders(tmp_path)


# the preset


def test_the_settings_of_the_paper():
    cfg = composed("experiment=dints_topology_search/brats2021")
    search, found = cfg.model, cfg.retrained
    assert (search.optimizer.weights.lr, search.optimizer.weights.weight_decay, list(search.optimizer.weights.betas)) == (
        8e-4,
        4e-5,
        [0.9, 0.999],
    )
    assert (search.optimizer.architecture.lr, search.optimizer.architecture.weight_decay, list(search.optimizer.architecture.betas)) == (1e-3, 0, [0.5, 0.999])  # fmt: skip
    assert (search.loss.bce_weight, search.loss.dice_weight, found.loss.bce_weight, found.loss.dice_weight) == (0.5,) * 4
    steps = cfg.data.samples_per_epoch // (8 * cfg.data.batch_size)
    assert steps * cfg.epochs == 31_000
    epochs = cfg.stages[0].override.trainer.max_epochs
    assert (steps * epochs, round(search.warmup * steps * epochs)) == (30_000, 10_000)
    schedule = instantiate(found.scheduler)(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0), total_iterations=31_000)
    factor = schedule.lr_lambdas[0]
    assert factor(999) < 1 == factor(1000)
    assert [factor(1000 + int(30_000 * share)) for share in (0.19, 0.21, 0.41, 0.61, 0.81)] == [1, 0.5, 0.25, 0.125, 0.0625]
    assert (search.network.width, search.network.blocks, search.network.depths, found.network.width) == (16, 12, 4, 32)
    assert (list(cfg.patch), list(cfg.mirror), cfg.data.split.folds, list(cfg.task.inputs)) == ([128] * 3, [0, 1, 2], 5, ["brain_mask"])
    assert OmegaConf.to_container(cfg.data.streams) == {"net": {"share": [0, 0.5]}, "arch": {"share": [0.5, 1]}}


def test_intensities_change_in_the_brain_alone():
    torch.manual_seed(0)
    image, brain = torch.randn(2, 6, 6, 6), torch.zeros(1, 6, 6, 6)
    brain[:, 2:4, 1:5, 2:5] = 1
    image = image * brain
    chain = instantiate(composed("experiment=dints_topology_search/brats2021").augmentation)
    chain.transforms.transforms.pop(0)  # mirroring
    for _ in range(5):
        subject = torchio.Subject(image=torchio.ScalarImage(tensor=image.clone()), brain_mask=torchio.LabelMap(tensor=brain))
        changed = chain(subject).image.data
        assert (changed[:, brain[0] == 0] == 0).all()
        assert (changed[:, brain[0] == 1] != image[:, brain[0] == 1]).float().mean() > 0.9
