"""Views go there and back exactly, and inferers put a volume together so that it cannot be told how it was cut."""

import math

import pytest
import torch

from lesionbench.errors import SuiteError
from lesionbench.views import from_slices, from_voxels, to_slabs, to_slices, to_voxels
from lightning_modules.inferers import SlabWise, SliceWise, Whole, Window

AXES = (0, 1, 2)
SHAPES = [(5, 7, 3), (8, 8, 8), (9, 4, 6), (1, 5, 2), (17, 11, 13)]


def volume(shape=(4, 5, 6), batch: int = 2, channels: int = 3) -> torch.Tensor:
    return torch.randn(batch, channels, *shape, generator=torch.Generator().manual_seed(0))


# views


@pytest.mark.parametrize("axis", AXES)
def test_slices_are_the_slices_in_order_and_lead_back(axis):
    image = volume()
    slices = to_slices(image, axis)
    n = image.shape[2 + axis]
    assert len(slices) == 2 * n
    for b in range(2):
        for s in range(n):
            assert torch.equal(slices[b * n + s], image[b].select(1 + axis, s))
    assert torch.equal(from_slices(slices, axis, 2), image)


@pytest.mark.parametrize("k", [1, 3, 5, 9])
@pytest.mark.parametrize("axis", AXES)
def test_windows_hold_the_neighbors_and_repeat_the_ends(axis, k):
    image = volume()
    n, half = image.shape[2 + axis], k // 2
    windows = to_slabs(image, axis, k)
    assert windows.shape[-1] == k
    for b in range(2):
        for s in range(n):
            for j in range(k):
                neighbor = min(max(s + j - half, 0), n - 1)
                assert torch.equal(windows[b * n + s, ..., j], image[b].select(1 + axis, neighbor))
    assert torch.equal(from_slices(windows[..., half], axis, 2), image)


def test_windows_keep_the_type_of_labels():
    label = torch.arange(24, dtype=torch.int8).reshape(1, 1, 2, 3, 4)
    assert to_slabs(label, 2, 3).dtype == torch.int8
    assert torch.equal(to_slabs(label, 2, 1)[..., 0], to_slices(label, 2))


def test_voxels_lead_back_with_the_case_they_came_from():
    image = volume()
    mask = torch.rand(2, 1, 4, 5, 6, generator=torch.Generator().manual_seed(1)) > 0.7
    mask[0, 0, 0] = True
    vectors, case = to_voxels(image, mask)
    assert vectors.shape == (int(mask.sum()), 3)
    assert case.bincount().tolist() == mask.flatten(1).sum(dim=1).tolist()
    where = mask[:, 0].nonzero()
    assert all(torch.equal(vectors[i], image[(b, slice(None), x, y, z)]) for i, (b, x, y, z) in enumerate(where.tolist()))
    back = from_voxels(vectors, mask, fill=-7)
    assert torch.equal(back, torch.where(mask, image, torch.tensor(-7.0)))
    empty, index = to_voxels(image, torch.zeros_like(mask))
    assert empty.shape == (0, 3)
    assert len(index) == 0
    assert (from_voxels(empty, torch.zeros_like(mask)) == 0).all()


# windows


def windows(overlap: float = 0.5, blending: str = "gaussian", batch: int = 1, patch=(4, 6, 5)) -> Window:
    return Window(patch, overlap, blending, batch)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("blending", ["gaussian", "constant"])
@pytest.mark.parametrize("overlap", [0, 0.25, 0.5, 0.9])
def test_blending_neither_changes_constants_nor_moves_voxels(overlap, blending, shape):
    image = volume(shape, batch=1, channels=2)
    sizes = set()

    def predict(view: torch.Tensor) -> dict[str, torch.Tensor]:
        sizes.add(tuple(view.shape[2:]))
        return {"same": view, "constant": torch.full_like(view[:, :1], 0.3)}

    out = windows(overlap, blending)(image, predict)
    assert sizes == {(4, 6, 5)}  # what the network sees never depends on the case
    assert torch.allclose(out["same"], image, atol=1e-6)
    assert out["constant"].shape == (1, 1, *shape)
    assert torch.allclose(out["constant"], torch.tensor(0.3), atol=1e-6)


def test_gaussian_blending_by_hand():
    """Two windows of four on a line of six, each answering with the place inside the window."""
    image = torch.zeros(1, 1, 6, 1, 1)

    def place(view: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"place": torch.arange(4.0).reshape(1, 1, 4, 1, 1).expand(len(view), 1, 4, 1, 1)}

    inner, outer = (math.exp(-0.5 * (d / 0.5) ** 2) for d in (0.5, 1.5))  # sigma = 4 / 8
    third, fourth = (2 * inner + 0 * outer) / (inner + outer), (3 * outer + 1 * inner) / (inner + outer)
    blended = Window((4, 1, 1), 0.5)(image, place)["place"].flatten()
    assert blended.tolist() == pytest.approx([0, 1, third, fourth, 2, 3])
    plain = Window((4, 1, 1), 0.5, "constant")(image, place)["place"].flatten()
    assert plain.tolist() == pytest.approx([0, 1, 1, 2, 2, 3])


def test_number_of_windows_follows_from_the_overlap():
    counts = {}
    for overlap in (0, 0.5, 0.75):
        seen = []
        Window((4, 4, 4), overlap)(torch.zeros(1, 1, 8, 4, 10), lambda view, seen=seen: seen.append(len(view)) or {"x": view})
        counts[overlap] = sum(seen)
    assert counts == {0: 2 * 3, 0.5: 3 * 4, 0.75: 5 * 7}


def test_a_small_volume_lies_in_the_middle_of_zeros():
    views = []
    Window((4, 6, 5))(torch.ones(1, 1, 2, 3, 5), lambda view: views.append(view) or {"x": view})
    (view,) = views
    assert view.sum() == 2 * 3 * 5
    assert (view[0, 0, 1:3, 1:4] == 1).all()


@pytest.mark.parametrize("batch", [2, 3, 100])
def test_several_windows_at_once_change_nothing(batch):
    image = volume((9, 7, 8))
    network = torch.nn.Conv3d(3, 4, 3, padding=1)
    seen = []

    def predict(view: torch.Tensor) -> dict[str, torch.Tensor]:
        seen.append(len(view))
        return {"probabilities": network(view).softmax(1), "features": network(view)[:, :1]}

    with torch.no_grad():
        one, many = windows()(image, predict), windows(batch=batch)(image, predict)
    assert max(seen) == min(batch, sum(seen) // 4) * 2  # two cases in every window; half of all views were seen one by one
    for name in ("probabilities", "features"):
        assert torch.allclose(one[name], many[name], atol=1e-6)
    assert torch.allclose(one["probabilities"].sum(dim=1), torch.tensor(1.0), atol=1e-5)  # averages of probabilities are probabilities


def test_half_precision_maps_are_blended_in_float32():
    out = windows()(volume(), lambda view: {"x": torch.full_like(view, 0.1).half()})
    assert out["x"].dtype == torch.float32
    assert torch.allclose(out["x"], torch.tensor(0.1).half().float(), atol=1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap": 1.0}, "overlap=1.0"),
        ({"overlap": -0.1}, "overlap"),
        ({"blending": "mean"}, "blending=mean"),
        ({"patch": None}, "inferer=whole"),
    ],
)
def test_impossible_windows_are_refused(options, message):
    with pytest.raises(SuiteError, match=message):
        Window(**{"patch": (4, 4, 4), **options})


# whole volumes, slices, packs


def recorded(predict, sizes: set):
    """The predictor, with the spatial shape of every view it gets put into `sizes`."""

    def call(view: torch.Tensor) -> dict[str, torch.Tensor]:
        sizes.add(tuple(view.shape[2:]))
        return predict(view)

    return call


@pytest.mark.parametrize(("divisor", "padded"), [(None, (5, 7, 3)), (1, (5, 7, 3)), (4, (8, 8, 4)), ((2, 7, 5), (6, 7, 5))])
def test_whole_volumes_are_padded_at_the_far_end_and_cut_back(divisor, padded):
    image, sizes = volume((5, 7, 3)), set()
    views = []
    out = Whole(divisor)(image, recorded(lambda v: views.append(v) or {"x": v, "first": v[:, :1] * 2}, sizes))
    assert sizes == {padded}
    assert torch.equal(views[0][:, :, :5, :7, :3], image)
    assert views[0].abs().sum() == pytest.approx(image.abs().sum().item(), rel=1e-5)
    assert torch.equal(out["x"], image)
    assert torch.equal(out["first"], image[:, :1] * 2)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("batch", [1, 4, 100])
@pytest.mark.parametrize(("divisor", "multiple"), [(None, (1, 1)), (4, (4, 4)), ((3, 8), (3, 8))])
def test_slices_are_whole_padded_and_put_back(divisor, multiple, batch, axis):
    image, sizes = volume((5, 7, 3)), set()
    out = SliceWise(divisor, batch)(image, recorded(lambda v: {"x": v, "sum": v.sum(1, keepdim=True)}, sizes), axis)
    plane = [n for a, n in enumerate((5, 7, 3)) if a != axis]
    assert sizes == {tuple(-(-n // m) * m for n, m in zip(plane, multiple, strict=True))}
    assert torch.equal(out["x"], image)
    assert torch.allclose(out["sum"], image.sum(1, keepdim=True))


@pytest.mark.parametrize("axis", AXES)
def test_packs_answer_for_the_middle_slice(axis):
    image, sizes = volume((5, 7, 3)), set()
    out = SlabWise(3, divisor=4, batch=4)(image, recorded(lambda v: {"x": v[..., 1]}, sizes), axis)
    plane = [n for a, n in enumerate((5, 7, 3)) if a != axis]
    assert sizes == {(*(-(-n // 4) * 4 for n in plane), 3)}  # the window itself is never padded
    assert torch.equal(out["x"], image)


@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("axis", AXES)
def test_a_slice_of_a_pack_depends_on_its_neighbors_only(axis, k):
    image = volume((8, 7, 9)).requires_grad_()
    weights = torch.arange(1.0, k + 1)
    out = SlabWise(k, batch=3)(image, lambda v: {"x": (v * weights).sum(-1)}, axis)["x"]
    n, half = image.shape[2 + axis], k // 2
    for s in range(n):
        (gradient,) = torch.autograd.grad(out.select(2 + axis, s).sum(), image, retain_graph=True)
        used = gradient.movedim(2 + axis, 0).flatten(1).abs().sum(dim=1) > 0
        assert used.nonzero().flatten().tolist() == list(range(max(s - half, 0), min(s + half, n - 1) + 1))
    slices = image.movedim(2 + axis, 0)
    expected = sum(w * slices[min(max(j - half, 0), n - 1)] for j, w in enumerate(weights))  # the first slice: ends are repeated
    assert torch.allclose(out.select(2 + axis, 0), expected, atol=1e-5)
