"""Elastic deformation by a coarse grid: what moves, by how much, and what does not."""

import pytest
import torch
import torchio

from datamodules.transforms.elastic import RandomElastic, _interpolation
from lesionbench.errors import SuiteError

SIZE = (20, 24, 16)


def subject(image: torch.Tensor, label: torch.Tensor) -> torchio.Subject:
    return torchio.Subject(image=torchio.ScalarImage(tensor=image), label=torchio.LabelMap(tensor=label))


def cubes() -> torchio.Subject:
    label = torch.zeros(1, *SIZE, dtype=torch.int16)
    label[:, 4:14, 6:18, 4:12] = 2
    label[:, 7:11, 9:15, 6:10] = 4
    return subject(label.float(), label)


def test_image_and_label_are_moved_by_the_same_field_and_labels_stay_labels():
    torch.manual_seed(0)
    moved = RandomElastic(std=2)(cubes())
    before = cubes()
    assert set(moved.label.data.unique().tolist()) == {0, 2, 4}
    assert moved.label.data.dtype == torch.int16
    assert (moved.label.data != before.label.data).float().mean() > 0.02
    # the image is a smoothed picture of the same label: they agree but for a voxel at borders
    assert (moved.image.data - moved.label.data).abs().max() <= 4
    assert ((moved.image.data - moved.label.data).abs() > 2).float().mean() < 0.01


def test_displacements_are_normal_with_the_deviation_that_is_asked_for():
    """A ramp along an axis shows how far every voxel was moved along it; at the middle point of the grid that is what was drawn."""
    ramp = torch.arange(21.0).reshape(1, 21, 1, 1).expand(1, 21, 21, 21).contiguous()
    torch.manual_seed(0)
    found = []
    for _ in range(400):
        sample = subject(ramp, torch.zeros(1, 21, 21, 21, dtype=torch.int16))
        found.append(RandomElastic(std=1.5)(sample).image.data[0, 10, 10, 10].item() - 10)
    values = torch.tensor(found)
    assert values.mean().abs() < 0.25
    assert values.std().item() == pytest.approx(1.5, rel=0.12)


def test_splines_go_through_their_points_and_are_smooth():
    matrix = torch.from_numpy(_interpolation(3, 21))
    torch.testing.assert_close(matrix[[0, 10, 20]], torch.eye(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(matrix.sum(dim=1), torch.ones(21), atol=1e-5, rtol=0)
    assert matrix[1, 0] > 0.97  # flat at the border, where a straight line has 0.9
    assert matrix.diff(dim=0).abs().max() < 0.15


def test_nothing_moves_without_probability_or_deviation():
    for transform in (RandomElastic(p=0), RandomElastic(std=0)):
        moved, before = transform(cubes()), cubes()
        torch.testing.assert_close(moved.image.data, before.image.data, atol=1e-4, rtol=0)
        assert torch.equal(moved.label.data, before.label.data)
    torch.manual_seed(0)
    applied = [not torch.equal(RandomElastic(p=0.75)(cubes()).label.data, cubes().label.data) for _ in range(60)]
    assert sum(applied) / 60 == pytest.approx(0.75, abs=0.15)


def test_slices_move_in_their_plane():
    """The sample of a slice is two equal slices."""
    torch.manual_seed(0)
    image = torch.rand(1, 20, 24, 1).expand(1, 20, 24, 2).contiguous()
    depth = torch.tensor([3.0, 5.0]).expand(1, 20, 24, 2).contiguous()
    moved = RandomElastic(std=0.3)(subject(torch.cat([image, depth]), torch.zeros(1, 20, 24, 2, dtype=torch.int16)))
    assert not torch.equal(moved.image.data[0], image[0])
    torch.testing.assert_close(moved.image.data[1, 3:-3, 3:-3], depth[0, 3:-3, 3:-3])


@pytest.mark.parametrize("options", [{"points": 1}, {"std": -1}])
def test_grids_that_cannot_be_are_refused(options):
    with pytest.raises(SuiteError, match="elastic deformation"):
        RandomElastic(**options)
