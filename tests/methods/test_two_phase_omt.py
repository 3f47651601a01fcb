"""The maps of two-phase mass transport against numbers worked out by hand, and the method that stands on them."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from torch import nn

import lightning_modules.transport.mesh as mesh_module
from lesionbench.errors import SuiteError
from lesionbench.progress import tracked
from lesionbench.target import RegionSigmoid
from lesionbench.task import Task
from lightning_modules import TwoPhaseOMT
from lightning_modules.inferers import Whole
from lightning_modules.losses import RegionBCEDice
from lightning_modules.networks import OnePerOutput, unet
from lightning_modules.transport.density import Transport, at_vertices, averaged, bounding_box, grown, unit_gray
from lightning_modules.transport.knothe import boxes
from lightning_modules.transport.knothe import nodes as rearranged
from lightning_modules.transport.mesh import SLACK, Mesh, normals
from lightning_modules.transport.stages import conversion
from lightning_modules.transport.warp import EXACT, Warp

TASK = Task(("flair", "t1"), {"background": 0, "ed": 2, "et": 4}, {"WT": ("ed", "et"), "ET": ("et",)})
SMALL = partial(OnePerOutput, network=partial(unet, channels=[4, 8], residual_units=0))


def ball(shape, center, radius):
    """Where a ball lies in the unit cube, at the vertices of a grid."""
    lines = np.meshgrid(*(np.linspace(0, 1, n) for n in shape), indexing="ij")
    return sum((x - c) ** 2 for x, c in zip(lines, center, strict=True)) < radius**2


def bump(n=12, height=6.0):
    density = np.ones((n, n, n))
    density[ball((n, n, n), (0.4, 0.5, 0.55), 0.22)] = height
    return density


# the mesh and its energy


def test_stiffness_of_a_regular_tetrahedron():
    corners = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], float) / (2 * np.sqrt(2))  # edges of 1
    assert np.linalg.norm(corners[0] - corners[1]) == pytest.approx(1)
    n = normals(corners[:, :, None])[..., 0]
    stiffness = n @ n.T / (36 * (1 / (6 * np.sqrt(2))))
    off = -np.sqrt(2) / 24  # -1/9 A^2 cos(theta) / V with A = sqrt(3)/4, cos(theta) = 1/3, V = 1 / (6 sqrt(2))
    assert stiffness == pytest.approx(np.where(np.eye(4, dtype=bool), -3 * off, off))
    assert stiffness.sum(axis=1) == pytest.approx(0, abs=1e-12)


def test_tetrahedra_fill_the_cube_and_are_oriented():
    mesh = Mesh((3, 4, 5))
    volumes = mesh.volumes(mesh.vertices)
    assert len(volumes) == 6 * 2 * 3 * 4
    assert volumes == pytest.approx(mesh.volume)
    assert volumes.sum() == pytest.approx(1)


def test_energy_of_the_identity_is_three_halves():
    mesh = Mesh((5, 6, 4))
    assert mesh.energy(mesh.vertices, mesh.masses(np.ones(mesh.shape))) == pytest.approx(1.5, abs=1e-12)


def test_energy_by_volumes_and_by_the_laplacian_agree():
    mesh, rng = Mesh((4, 5, 6)), np.random.default_rng(0)
    f = mesh.vertices + 0.02 * rng.normal(size=mesh.vertices.shape)
    mu = mesh.masses(rng.uniform(0.5, 2, mesh.shape))
    laplacian = mesh.laplacian(f, mu)
    assert np.trace(f.T @ (laplacian @ f)) / 2 == pytest.approx(mesh.energy(f, mu))
    assert mesh.energy(f, mu) > 1.5
    assert laplacian @ np.ones(len(f)) == pytest.approx(0, abs=1e-9)
    assert abs(laplacian - laplacian.T).max() < 1e-12


def test_laplacian_is_that_of_linear_elements():
    mesh, rng = Mesh((3, 3, 3)), np.random.default_rng(1)
    f, mu = mesh.vertices + 0.05 * rng.normal(size=mesh.vertices.shape), mesh.masses(rng.uniform(1, 3, mesh.shape))
    expected = np.zeros((27, 27))
    for corners, mass in zip(mesh.tetrahedra, mu, strict=True):
        gradients = np.linalg.inv(np.column_stack([np.ones(4), f[corners]]))[1:].T  # of the barycentric coordinates
        volume = np.linalg.det(np.column_stack([np.ones(4), f[corners]])) / 6
        expected[np.ix_(corners, corners)] += abs(volume) / mass * abs(volume) * gradients @ gradients.T
    assert mesh.laplacian(f, mu).toarray() == pytest.approx(expected)


def test_masses_by_hand():
    mesh, density = Mesh((2, 2, 2)), np.ones((2, 2, 2))
    density[0, 0, 0] = 5  # every tetrahedron holds this corner: means of 2, and 6 of 8 shares of vertices
    assert mesh.masses(density) == pytest.approx(np.full(6, 1 / 6))
    around = np.bincount(mesh.tetrahedra.ravel())
    assert mesh.vertex_masses(density)[0] == pytest.approx(5 * around[0] / (5 * around[0] + around[1:].sum()))


def test_uniform_density_leaves_everything_in_place():
    mesh = Mesh((6, 5, 7))
    assert mesh.transport(np.ones(mesh.shape), 10, 2) == pytest.approx(mesh.vertices, abs=1e-9)


def test_stretch_energy_falls_and_faces_stay_faces():
    mesh = Mesh((12, 12, 12))
    mu, f = mesh.masses(bump()), mesh.vertices
    energies = [mesh.energy(f, mu)]
    for _ in range(6):
        f = mesh.minimize(f, mu, 1)
        energies.append(mesh.energy(f, mu))
    assert energies == sorted(energies, reverse=True)
    assert energies[0] > 1.6
    assert energies[-1] < 1.51
    assert mesh.volumes(f).min() > 0
    v = mesh.vertices
    for value in (0.0, 1.0):
        assert (f[v == value] == value).all()  # a coordinate on a face stays there, and so corners do
    slid = (v[:, 0] == 0) & (v[:, 1] > 0) & (v[:, 1] < 1)
    assert np.abs(f[slid, 1] - v[slid, 1]).max() > 0.01


def test_share_of_the_cube_is_the_share_of_mass():
    mesh = Mesh((16, 16, 16))
    density = bump(16)
    f, mu = mesh.transport(density, 30, 3), mesh.masses(density)
    inside = ball((16, 16, 16), (0.4, 0.5, 0.55), 0.22).reshape(-1)[mesh.tetrahedra].all(axis=1)
    assert mesh.volumes(f)[inside].sum() == pytest.approx(mu[inside].sum(), rel=0.03)
    assert mu[inside].sum() > 4 * inside.mean()


def test_projected_gradients_lower_the_cost_and_keep_the_mass():
    mesh = Mesh((10, 10, 10))
    density = bump(10)
    mu, mass = mesh.masses(density), mesh.vertex_masses(density)
    v = mesh.vertices
    bell = np.prod(np.sin(np.pi * v), axis=1)
    angle = 0.8 * bell
    swirled = v.copy()
    x, y = v[:, 0] - 0.5, v[:, 1] - 0.5
    swirled[:, 0] = 0.5 + x * np.cos(angle) - y * np.sin(angle)
    swirled[:, 1] = 0.5 + x * np.sin(angle) + y * np.cos(angle)
    swirled = np.where(mesh.free, swirled, v)
    assert mesh.volumes(swirled).min() > 0
    start = mesh.minimize(swirled, mu, 20)
    costs, energies = [mesh.cost(start, mass)], [mesh.energy(start, mu)]
    for steps in (1, 2, 4):
        f = mesh.transport(density, 20, steps, swirled)
        costs.append(mesh.cost(f, mass))
        energies.append(mesh.energy(f, mu))
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < 0.6 * costs[0]
    assert max(energies) <= SLACK * energies[0]


def test_cost_by_hand():
    mesh = Mesh((2, 2, 2))
    mass = mesh.vertex_masses(np.ones((2, 2, 2)))
    assert mesh.cost(mesh.vertices, mass) == 0
    assert mesh.cost(mesh.vertices + np.array([0.1, 0.2, 0]), mass) == pytest.approx(0.05)


# the Knothe-Rosenblatt rearrangement


def test_knothe_boxes_have_the_volume_of_their_mass():
    mass = np.random.default_rng(0).uniform(0.1, 5, (6, 5, 4))
    x, y, z = boxes(mass)
    volumes = np.diff(x)[:, None, None] * np.diff(y)[:, :, None] * np.diff(z)
    assert np.abs(volumes - mass / mass.sum()).max() < 1e-14
    assert volumes.sum() == pytest.approx(1)


def test_knothe_by_hand():
    mass = np.array([[[1.0, 3.0]], [[2.0, 2.0]]])  # two slabs of one column of two cells
    x, _, z = boxes(mass)
    assert x.tolist() == [0, 0.5, 1]
    assert z.tolist() == [[[0, 0.25, 1]], [[0, 0.5, 1]]]
    assert rearranged(mass)[:, 0, 1, 2].tolist() == [0.25, 0.375, 0.5]  # between both slabs the mean


def test_knothe_grows_along_every_axis_and_keeps_mass_within_the_grid():
    density = averaged(at_vertices(bump(20), (20, 20, 20)), (19, 19, 19))
    place = rearranged(density)
    for axis in range(3):
        assert (np.diff(place[..., axis], axis=axis) > 0).all()
    warp = Warp(torch.from_numpy(np.moveaxis(place, -1, 0).astype(np.float32)), ((0, 38),) * 3, (38,) * 3, torch.ones(20, 20, 20))
    inside = torch.from_numpy(np.kron(ball((19,) * 3, (0.4, 0.5, 0.55), 0.22), np.ones((2, 2, 2))) > 0)
    share = warp.pull_labels(inside.long(), warp.inverse((48,) * 3)).double().mean()
    expected = density[ball((19,) * 3, (0.4, 0.5, 0.55), 0.22)].sum() / density.sum()
    assert share == pytest.approx(expected, rel=0.1)


# densities


def test_density_by_hand():
    brain = np.zeros((3, 3, 3), bool)
    brain[1] = True
    gray = np.zeros((3, 3, 3))
    gray[1, 1, 1] = 9.0  # mean 1, deviation sqrt(8): values of -1 / sqrt(8) and 8 / sqrt(8)
    unit = {False: (2.5 - 1 / np.sqrt(8)) / 5, True: 1.0}  # the second is cut at 2.5
    made = Transport(gain=2.0, background=0.05)
    density = made.density(gray, brain)
    assert density[0, 0, 0] == 0.05
    assert density[1, 1, 1] == pytest.approx(np.exp(2 * unit[True]))
    assert density[1, 0, 0] == pytest.approx(np.exp(2 * unit[False]))
    tumor = np.zeros_like(brain)
    tumor[1, 1, 1] = True
    second = Transport(gain=1.0, dilation=1).density(gray, brain, tumor)
    assert second[1, 1, 1] == pytest.approx(np.e)
    assert second[1, 0, 1] == pytest.approx(np.exp(unit[False]))  # a voxel away
    assert second[1, 0, 0] == 1  # not grown over the corner
    assert second[0, 1, 1] == 0.1  # outside of the brain however near
    assert (Transport().density(gray, np.zeros_like(brain)) == 0.1).all()


def test_gray_values_by_rank_and_without_contrast():
    gray = np.array([[[4.0, 1.0, 3.0, 2.0, 100.0]]])
    brain = gray < 50
    assert unit_gray(gray, brain, equalize=True)[brain].tolist() == [1, 0.25, 0.75, 0.5]
    assert (unit_gray(np.ones((1, 1, 5)), brain) == 0.5).all()


def test_growing_and_boxes():
    mask = np.zeros((9, 9, 9), bool)
    mask[4, 4, 4] = True
    assert grown(mask, 2).sum() == 33  # lattice points at most 2 away
    assert grown(~mask & mask, 2).sum() == 0
    assert bounding_box(mask[:, :, :5]) == ((4, 6), (4, 6), (3, 5))  # two voxels at least
    assert bounding_box(mask & ~mask) == ((0, 9),) * 3


@pytest.mark.parametrize("reduce", [at_vertices, averaged])
def test_averages_keep_what_is_constant_and_the_center_of_mass(reduce):
    assert reduce(np.full((9, 8, 7), 3.0), (4, 5, 3)) == pytest.approx(np.full((4, 5, 3), 3.0))
    peak = np.zeros((8, 8, 8))
    peak[2, 5, 3] = 1
    small = reduce(peak, (4, 4, 4))
    assert np.unravel_index(small.argmax(), small.shape) in [(1, 2, 1), (1, 3, 1), (1, 2, 2)]


# carrying images and labels


@pytest.fixture(scope="module")
def brain():
    """A ball of brain in a larger volume with a tumor in it: flair, brain, labels."""
    grid = torch.stack(torch.meshgrid(*(torch.arange(40.0),) * 3, indexing="ij"))
    inside = (((grid - 19.5) / torch.tensor([17.0, 15.0, 16.0])[:, None, None, None]) ** 2).sum(dim=0) < 1
    distance = ((grid - torch.tensor([14.0, 18.0, 22.0])[:, None, None, None]) ** 2).sum(dim=0).sqrt()
    label = (distance < 5).long() + (distance < 3).long()
    flair = inside * (1 + 0.3 * torch.sin(grid[0] / 3) + 2.0 * (label > 0))
    return flair, inside, label


@pytest.fixture(scope="module")
def warp(brain):
    flair, inside, label = brain
    return Transport(grid=14, dilation=3).warp(flair, inside, label > 0)


def centers(size):
    return torch.stack(torch.meshgrid(*((torch.arange(n) + 0.5) / n for n in size), indexing="ij"))


def test_the_inverse_is_one(warp):
    y = centers((32, 30, 28))
    psi = warp.inverse((32, 30, 28))
    assert psi.min() >= 0
    assert psi.max() <= 1
    assert (warp.at(psi.flatten(1)) - y.flatten(1)).abs().max() <= 2 * EXACT < 1e-4
    x = centers((9, 9, 9)).flatten(1)
    there = warp.at(x)
    back = warp._walked(there, x.clone() * 0.9 + 0.05)
    assert (back - x).abs().max() < 1e-3


def test_places_are_mapped_by_barycentric_coordinates(warp):
    """A vertex goes where it is said to, and the middle of a tetrahedron to the mean of its corners' images."""
    mesh = Mesh(warp.nodes.shape[1:])
    f = warp.nodes.flatten(1).T
    vertices = torch.from_numpy(mesh.vertices.astype(np.float32))
    assert warp.at(vertices.T).T.numpy() == pytest.approx(f.numpy(), abs=1e-5)
    tetrahedra = torch.from_numpy(mesh.tetrahedra)
    assert warp.at(vertices[tetrahedra].mean(dim=1).T).T.numpy() == pytest.approx(f[tetrahedra].mean(dim=1).numpy(), abs=1e-5)


def test_places_that_go_around_in_circles_are_found(warp, monkeypatch):
    monkeypatch.setattr("lightning_modules.transport.warp.WALKS", 1)
    y = centers((10, 10, 10))
    psi = warp.inverse((10, 10, 10))
    assert (warp.at(psi.flatten(1)) - y.flatten(1)).abs().max() < 1e-4


def test_pulling_and_pushing_is_what_scipy_does(brain, warp):
    flair, _, label = brain
    psi = warp.inverse((24, 24, 24))
    where = [p.numpy() * n - 0.5 for p, n in zip(psi, warp.sides, strict=True)]
    expected = map_coordinates(flair[warp.inside].numpy(), where, order=1, mode="nearest")
    assert warp.pull(flair[None], psi)[0].numpy() == pytest.approx(expected, abs=1e-3)
    labels = map_coordinates(label[warp.inside].numpy(), where, order=0, mode="nearest")
    assert (warp.pull_labels(label, psi).numpy() != labels).mean() < 1e-3  # ties
    cube = torch.arange(24.0**3).reshape(1, 24, 24, 24)
    f = warp.forward().numpy()
    expected = map_coordinates(cube[0].numpy(), [c * 24 - 0.5 for c in f], order=0, mode="nearest")
    pushed = warp.push(cube)[0]
    assert (pushed[warp.inside].numpy() != expected).mean() < 1e-3
    pushed[warp.inside] = 0
    assert (pushed == 0).all()
    assert warp.sides == (34, 30, 32)  # the box of the brain


def test_mass_of_voxels_is_that_of_their_tetrahedra(brain, warp):
    mesh = Mesh(warp.nodes.shape[1:])
    everything = torch.ones(1, *warp.shape)
    assert warp.mass(everything).item() == pytest.approx(1)
    ramp = Warp(warp.nodes, ((0, 40),) * 3, warp.shape, torch.from_numpy(mesh.vertices[:, 0].reshape(mesh.shape).astype(np.float32)))
    assert ramp.mass(everything * (torch.arange(40) < 20)[:, None, None]).item() == pytest.approx(0.25, abs=0.03)


def test_the_tumor_is_magnified_by_its_mass(brain, warp):
    tumor = brain[2] > 0
    share = (warp.pull_labels(brain[2], warp.inverse((64,) * 3)) > 0).double().mean()
    assert float(share) == pytest.approx(float(warp.mass(tumor[None])), rel=0.03)
    assert share > 3 * tumor.sum() / brain[1].sum()


def lost(brain, transport, size):
    flair, inside, label = brain
    warp = transport.warp(flair, inside, label > 0)
    return conversion(TASK, label, warp.pull_labels(label, warp.inverse((size,) * 3)), warp, inside)


def test_conversion_loses_less_than_resizing_and_less_in_larger_cubes(brain):
    made, resized = Transport(grid=14, dilation=3), Transport(backend="resize")
    found = {size: lost(brain, made, size) for size in (16, 24, 48)}
    for name in ("WT_loss", "ET_loss"):
        losses = [found[size][name] for size in (16, 24, 48)]
        assert losses == sorted(losses, reverse=True)
        for size in (16, 24):
            assert found[size][name] < lost(brain, resized, size)[name]
    assert found[24]["WT_brain"] == pytest.approx(float((brain[2] > 0).sum() / brain[1].sum()))


def test_conversion_by_hand():
    warp = Transport(backend="resize").warp(torch.ones(4, 4, 4), torch.ones(4, 4, 4, dtype=torch.bool))
    label = torch.zeros(4, 4, 4, dtype=torch.long)
    label[0, 0, 0] = 2
    label[2:, 2:, 2:] = 1
    cube = torch.zeros(2, 2, 2, dtype=torch.long)
    cube[1, 1, 1] = 1
    row = conversion(TASK, label, cube, warp, torch.ones(4, 4, 4, dtype=torch.bool))
    assert row["WT_brain"] == 9 / 64
    assert row["WT_mass"] == pytest.approx(9 / 64)
    assert row["WT_cube"] == 1 / 8
    assert row["WT_loss"] == pytest.approx(1 - 16 / 17)  # 8 of 9 come back
    assert row["ET_loss"] == 1
    nothing = conversion(TASK, label * 0, cube * 0, warp, torch.ones(4, 4, 4, dtype=torch.bool))
    assert nothing["WT_loss"] == 0


def test_a_map_that_turns_over_is_refused():
    nodes = np.moveaxis(Mesh((3, 3, 3)).vertices.reshape(3, 3, 3, 3), -1, 0).astype(np.float32)
    nodes[:, 1, 1, 1] = 1.0
    with pytest.raises(SuiteError, match=r"turns .* tetrahedra over"):
        Warp(torch.from_numpy(nodes), ((0, 4),) * 3, (4,) * 3, torch.ones(3, 3, 3))


@pytest.mark.parametrize("backend", ["vsem", "knothe"])
def test_settings_reach_the_map(brain, backend):
    flair, inside, label = brain
    plain = Transport(backend, grid=8, iterations=3).warp(flair, inside, label > 0).nodes
    for change in ({"gain": 1.0}, {"background": 0.3}, {"dilation": 1}, {"equalize": True}, {"grid": 6}):
        other = Transport(backend, **{"grid": 8, "iterations": 3, **change}).warp(flair, inside, label > 0).nodes
        assert other.shape != plain.shape or not torch.equal(other, plain), change
        assert Transport(backend, **{"grid": 8, "iterations": 3, **change}).key != Transport(backend, grid=8, iterations=3).key
    assert not torch.equal(Transport(backend, grid=8, iterations=3).warp(flair, inside).nodes, plain)


# the method


def method(network=SMALL, first=SMALL, size=16, **options):
    made = {"loss": RegionBCEDice(), "target": partial(RegionSigmoid, decoding="paint"), "inferer": Whole(), "cube": (size,) * 3}
    transport = Transport(grid=8, iterations=3, steps=0, dilation=2)
    return TwoPhaseOMT(TASK, **{"network": network, "first": first, "transport": transport, **made, **options})


def case(brain, **attributes):
    flair, inside, label = brain
    batch = {"image": torch.stack([flair, inside.float()])[None], "brain_mask": inside[None, None], "label": label[None, None]}
    return {**batch, "attributes": [attributes]}


def bright(level):
    """A network that finds flair above a level, in every output."""

    class Bright(nn.Module):
        divisor = min_size = (1, 1, 1)

        def __init__(self, in_channels, out_channels):
            super().__init__()
            self.channels, self.calls = out_channels, []
            self.scale = nn.Parameter(torch.tensor(50.0))

        def forward(self, image):
            self.calls.append(image)
            return self.scale * (image[:, :1] - level).expand(-1, self.channels, *image.shape[2:])

    return Bright


def test_one_network_for_every_output():
    network = SMALL(2, 3)
    single = SMALL(2, 1)
    count = sum(p.numel() for p in single.parameters())
    assert sum(p.numel() for p in network.parameters()) == 3 * count
    network(torch.randn(1, 2, 8, 8, 8))[:, 1].sum().backward()
    reached = {name.split(".")[1] for name, p in network.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {"1"}
    assert network.divisor == (2, 2, 2)
    assert network.parts["bottleneck"][2].startswith("networks.2.")


def test_training_together_is_training_alone():
    """The gradient of every network is, up to the number of them, that of its own loss, and Adam does not mind a factor."""
    torch.manual_seed(0)
    both, alone, image = SMALL(2, 2), SMALL(2, 1), torch.randn(2, 2, 8, 8, 8)
    target = (torch.rand(2, 2, 8, 8, 8) > 0.5).float()
    alone.networks[0].load_state_dict(both.networks[1].state_dict())
    RegionBCEDice()(both(image), target).backward()
    RegionBCEDice()(alone(image), target[:, 1:]).backward()
    for a, b in zip(both.networks[1].parameters(), alone.networks[0].parameters(), strict=True):
        assert 2 * a.grad.numpy() == pytest.approx(b.grad.numpy(), rel=1e-4, abs=1e-7)


def test_the_networks_learn_and_the_first_one_rests(brain):
    made = method()
    made.train()
    assert made.network.training
    assert not made.first.training
    batch = {"image": torch.randn(1, 2, 16, 16, 16), "label": torch.randint(0, 3, (1, 1, 16, 16, 16))}
    made.compute_loss(batch).backward()
    assert all(p.grad is not None for p in made.network.parameters())
    assert all(p.grad is None and not p.requires_grad for p in made.first.parameters())
    assert made.optimizer_groups()["main"] == list(made.network.parameters())


def dice(a, b):
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def test_answers_come_back_where_they_belong(brain):
    made = method(bright(2.0), bright(2.0), size=40).eval()
    with torch.no_grad():
        prediction = made.predict_case(case(brain))
    assert prediction.labels.shape == brain[1].shape
    assert dice(prediction.labels > 0, brain[0] > 2) > 0.9
    assert (prediction.regions[:, ~brain[1]] == 0).all()


def test_phase_two_magnifies_what_the_first_network_finds(brain):
    made = method(bright(2.0), bright(2.0), size=32).eval()
    with torch.no_grad():
        found, oracle = made.found(case(brain)), made.warp(case(brain), brain[2] > 0)
        made.predict_case(case(brain))
        (first, second), phases = (made.first.calls[-1], made.network.calls[-1]), made._warp(case(brain), None)
    assert dice(found, brain[2] > 0) > 0.9
    assert (second[0, 0] > 2).sum() > 1.3 * (first[0, 0] > 2).sum()
    again = made.warp(case(brain))
    assert (again.forward() - oracle.forward()).abs().max() < 0.05
    assert (phases.forward() - oracle.forward()).abs().max() > 0.05


def test_one_phase_takes_the_density_of_the_image(brain):
    made = method(first=None)
    assert made.first is None
    expected = made.transport.warp(brain[0], brain[1])
    assert torch.equal(made.warp(case(brain), brain[2] > 0).nodes, expected.nodes)
    assert not [name for name in made.state_dict() if name.startswith("first")]


def test_another_channel_guides(brain):
    made = method(first=None, channel="t1")
    assert not torch.equal(made.warp(case(brain)).nodes, method(first=None).warp(case(brain)).nodes)


def test_a_cube_is_not_mapped_again(brain):
    made = method(bright(2.0), bright(2.0)).eval()
    cube = torch.randn(1, 2, 16, 16, 16)
    with torch.no_grad():
        prediction = made.predict_case({"image": cube, "attributes": [{"cube": 1}]})
    assert torch.equal(made.network.calls[-1], cube)
    assert prediction.labels.shape == (16, 16, 16)
    assert not made.first.calls


def test_a_brain_without_signal_is_background(brain):
    made = method(bright(2.0), bright(2.0)).eval()
    empty = tuple(torch.zeros_like(x) for x in brain)
    with torch.no_grad():
        assert (made.predict_case(case(empty)).labels == 0).all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"channel": "t2"}, "model.channel"),
        ({"region": "TC"}, "model.region"),
        ({"cube": (15, 16, 16)}, r"model.cube=\[15, 16, 16\]"),
        ({"cube": (16, 16)}, "three sides"),
    ],
)
def test_refusals(options, said):
    with pytest.raises(SuiteError, match=said):
        method(**options)


def test_further_inputs_are_refused():
    task = Task(TASK.channels, TASK.classes, TASK.regions, inputs=("brain_mask",))
    with pytest.raises(SuiteError, match=r"task\.inputs"):
        TwoPhaseOMT(task, network=SMALL, loss=RegionBCEDice(), target=RegionSigmoid, inferer=Whole(), cube=(16,) * 3, transport=Transport())


def test_progress_in_a_log_file(capsys, monkeypatch):
    """A line for each tenth, with the time that is left as cases took so far."""
    clock = itertools.chain([0, 0], itertools.count(2, 2))  # 2 s for a case
    monkeypatch.setattr("lesionbench.progress.time.monotonic", lambda: next(clock))
    assert list(tracked(range(40), 40, "cubes")) == list(range(40))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11
    assert lines[0] == "cubes  6 of 40 cases (15 %)  ETA 0:01:08"  # the first that is waited for
    assert lines[-2:] == ["cubes  40 of 40 cases (100 %)  ETA 0:00:00", "cubes  40 cases  82.0 s"]
    assert list(tracked([], 0, "nothing")) == []
    assert list(tracked(range(40), 40, "cubes", shown=False)) == list(range(40))
    monkeypatch.setattr("lesionbench.progress.time.monotonic", lambda: 0)  # quick ones say nothing
    assert list(tracked(range(40), 40, "cubes")) == list(range(40))
    assert capsys.readouterr() == ("", "")


def test_a_step_that_raises_the_energy_is_halved(monkeypatch):
    solve = mesh_module._solve
    monkeypatch.setattr(mesh_module, "_solve", lambda *system: 3 * solve(*system))  # far beyond the lowest energy
    mesh = Mesh((8, 8, 8))
    mu = mesh.masses(bump(8, 1.5))
    moved = mesh.minimize(mesh.vertices, mu, 1)
    assert not np.array_equal(moved, mesh.vertices)
    assert mesh.energy(moved, mu) < mesh.energy(mesh.vertices, mu)


def test_a_gradient_step_is_taken_where_the_cost_falls_and_the_energy_does_not_rise():
    mesh = Mesh((8, 8, 8))
    mu, mass = mesh.masses(np.ones(mesh.shape)), mesh.vertex_masses(np.ones(mesh.shape))
    assert mesh._descended(mesh.vertices, mu, mass, 1.5) is None  # there is no lower cost than 0
    away = np.where(mesh.free, mesh.vertices + 0.05 * np.sin(np.pi * mesh.vertices).prod(axis=1, keepdims=True), mesh.vertices)
    moved = mesh._descended(away, mu, mass, 10.0)
    assert mesh.cost(moved, mass) < mesh.cost(away, mass)
    assert mesh._descended(away, mu, mass, 1.0) is None  # no map has so low an energy


def test_no_more_vertices_than_borders_of_voxels():
    inside = torch.ones(4, 6, 9, dtype=torch.bool)
    for backend in ("vsem", "knothe"):
        assert Transport(backend, grid=8, iterations=1, steps=0).warp(torch.rand(4, 6, 9), inside).nodes.shape == (3, 5, 7, 8)


def test_the_image_goes_on_at_the_border_of_the_box():
    made = Transport(backend="resize").warp(torch.ones(4, 4, 4), torch.ones(4, 4, 4, dtype=torch.bool))
    assert (made.pull(torch.ones(1, 4, 4, 4), torch.zeros(3, 2, 2, 2)) == 1).all()


def test_what_comes_back_outside_of_the_brain_is_lost():
    inside = torch.ones(4, 4, 4, dtype=torch.bool)
    made = Transport(backend="resize").warp(torch.ones(4, 4, 4), inside)
    label = torch.zeros(4, 4, 4, dtype=torch.long)
    label[0] = 1
    holes = inside.clone()
    holes[0, :2] = False
    assert conversion(TASK, label, label, made, inside)["WT_loss"] == 0
    assert conversion(TASK, label, label, made, holes)["WT_loss"] == pytest.approx(1 - 16 / 24)


def test_what_is_less_likely_than_not_is_not_found(brain):
    made = method(bright(2.0), bright(2.0)).eval()
    made.first.forward = lambda image: torch.full_like(image[:, :1], -1.0)  # a probability of 0.27
    with torch.no_grad():
        assert not made.found(case(brain)).any()
        assert (made.warp(case(brain)).density <= 1.01).all()  # nothing is raised
        made.first.forward = lambda image: torch.ones_like(image[:, :1])
        assert torch.equal(made.found(case(brain)), brain[1])
