"""What lies beyond the border of a case is the same air in training samples and at inference, for every normalization."""

import nibabel as nib
import numpy as np
import pytest
import torch

from datamodules import Sampling
from datamodules.cache import CaseCache
from datamodules.preprocessing import Preprocessing, dataset_statistics, histogram_statistics, labeled_statistics
from datamodules.samples import TrainingSamples, collate
from datamodules.whole_cases import WholeCases
from lesionbench.case import Case
from lesionbench.task import Task
from lightning_modules.inferers import Mirrored, SlabWise, SliceWise, Whole, Window
from tests.toys import small_net

TASK = Task(("t1", "t2"), {"background": 0, "lesion": 1})
SHAPE = (20, 18, 16)
NORMALIZATIONS = {
    "zscore": {}, "zscore_all": {}, "minmax": {}, "percentile": {}, "dataset": {}, "histogram": {}, "none": {"clip": (-1000, 400)}, "ct": {"clip": (-1000, 400)},
}  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A body in air, in two channels of different air: the corner voxel is air in both."""
    folder = tmp_path_factory.mktemp("data")

    def make(**settings):
        air = settings.get("clip", (0, 0))[0]
        images = {}
        for number, channel in enumerate(TASK.channels):
            array = np.full(SHAPE, air, np.int16)
            array[3:16, 3:15, 3:13] = np.random.default_rng(number).integers(20, 300, (13, 12, 10)) * (number + 1)
            images[channel] = folder / f"{air}_{channel}.nii.gz"
            nib.Nifti1Image(array, np.eye(4)).to_filename(images[channel])
        label = np.zeros(SHAPE, np.uint8)
        label[6:9, 6:9, 6:9] = 1
        nib.Nifti1Image(label, np.eye(4)).to_filename(folder / "label.nii.gz")
        case, preprocessing = Case("a", images, folder / "label.nii.gz"), Preprocessing(crop="none", **settings)
        cache = CaseCache(folder / str(sorted(settings.items())), TASK, preprocessing)
        cache.prepare([case])
        opened = cache.open(case)
        made = {
            "dataset": lambda: dataset_statistics([opened.stats]),
            "histogram": lambda: histogram_statistics([opened.stats]),
            "ct": lambda: labeled_statistics([opened.labeled_values()]),
        }
        return case, cache, preprocessing, made.get(preprocessing.normalize, lambda: None)()

    return make


def whole_case(case, cache, preprocessing, statistics):
    return collate([WholeCases([case], cache, TASK, preprocessing, statistics=statistics)[0, False]])


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("patch", [(28, 18, 16), (28, 26, 16), (28, 26, 24), (8, 8, 24)])
def test_training_and_every_inferer_see_the_air_of_the_case(store, normalize, patch):
    made = store(normalize=normalize, **NORMALIZATIONS[normalize])
    case, cache, preprocessing, statistics = made
    batch = whole_case(*made)
    air = batch["image"][0, :, 0, 0, 0]  # of each channel
    torch.testing.assert_close(batch["outside"][0], air)
    assert (air.abs() > 0.1).any() == (normalize in ("zscore_all", "none", "ct"))

    samples = TrainingSamples(
        "default", [case], cache, TASK, preprocessing, Sampling("uniform"), patch=patch, statistics=statistics, seed=0
    )
    corners = samples[0, 0]["image"]
    if any(p > s for p, s in zip(patch, SHAPE, strict=True)):
        far = [(0 if p <= s else -1) for p, s in zip(patch, SHAPE, strict=True)]
        outermost = corners[(slice(None), *(slice(-1, None) if f else slice(None) for f in far))]
        torch.testing.assert_close(outermost, air[:, None, None, None].expand_as(outermost))

    for inferer in (Window(patch), Window(patch, batch=3), Whole(32), SliceWise(32), SlabWise(3, 32), Mirrored(Window(patch), [0, 2])):
        method = composed_method(inferer)
        seen = []

        def predictor(view, seen=seen):
            seen.append(view)
            return {"image": view if view.ndim == 5 and view.shape[-1] != 3 else view[..., 1] if view.ndim == 5 else view}

        maps = method.infer(batch, predictor)["image"]
        torch.testing.assert_close(maps, batch["image"].float(), atol=1e-4, rtol=1e-4)  # what lies inside is untouched
        assert sum(view[:, 0].numel() for view in seen) > batch["image"][:, 0].numel()  # something was padded, or seen twice
        if air.all():  # no voxel of the case is 0 in both channels
            assert not any((view == 0).all(dim=1).any() for view in seen)


def composed_method(inferer):
    from lightning_modules import Supervised
    from lightning_modules.losses import DiceCE

    return Supervised(TASK, network=small_net, loss=DiceCE(), inferer=inferer)
