"""What lies beyond the border of a case is the same air in training samples and at inference, for every normalization."""

from itertools import product

import nibabel as nib
import numpy as np
import pytest
import torch
import torchio
from hydra.utils import instantiate
from omegaconf import OmegaConf

from datamodules import Folder, Sampling
from datamodules.cache import CaseCache
from datamodules.preprocessing import Preprocessing, dataset_statistics, histogram_statistics, labeled_statistics
from datamodules.samples import TrainingSamples, collate
from datamodules.transforms.augmentation import Gate, chain, one_of
from datamodules.transforms.elastic import RandomElastic
from datamodules.transforms.intensity import MaskBackground
from datamodules.transforms.positive_mining import PositiveMining
from datamodules.whole_cases import WholeCases
from lesionbench.case import Case
from lesionbench.jobs.command_line import CONF, options
from lesionbench.task import Task
from lightning_modules import Supervised
from lightning_modules.evaluation.robustness import _cross_entropy
from lightning_modules.inferers import Mirrored, SlabWise, SliceWise, Whole, Window
from lightning_modules.losses import DiceCE
from lightning_modules.supervised.umm import Branches
from tests.fake_data import write_fake_folder
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
    return Supervised(TASK, network=small_net, loss=DiceCE(), inferer=inferer)


def spatial(transform):
    """The transforms inside of an augmentation that move or fill voxels, to be applied for certain."""
    inner = [*getattr(transform, "transforms_dict", ())] or getattr(getattr(transform, "transforms", None), "transforms", None)
    if isinstance(transform, Gate):
        inner = [transform.transform]
    if inner:
        return [one for t in inner for one in spatial(t)]
    if isinstance(transform, torchio.SpatialTransform | MaskBackground | PositiveMining):
        transform.probability = 1
        return [transform]
    return []


PRESETS = {
    name: spatial(found) for name in options("augmentation") if (found := instantiate(OmegaConf.load(CONF / f"augmentation/{name}.yaml")))
}


@pytest.mark.filterwarnings("ignore:The maximum displacement")  # of patches smaller than the preset is for
@pytest.mark.parametrize("preset", [name for name, found in PRESETS.items() if found])
def test_what_an_augmentation_fills_is_air(preset):
    """A sample of nothing but air stays that, whatever is moved, masked or deformed."""
    air = torch.tensor([-1.5, 0.7])
    torch.manual_seed(0)
    image = air[:, None, None, None].expand(2, 12, 12, 12)
    for transform in PRESETS[preset]:
        for _ in range(3):
            label = torch.zeros(1, 12, 12, 12, dtype=torch.int16)
            label[0, 4:7, 4:7, 4:7] = 1
            masks = {"brain_mask": torchio.LabelMap(tensor=label.clone()), "label": torchio.LabelMap(tensor=label)}
            image = image.clone()
            image[0, 5, 5, 5] = -9.0  # what is least in a channel is not what lies beyond it
            found = transform(torchio.Subject(image=torchio.ScalarImage(tensor=image.clone()), **masks, outside=air, epoch=0))
            edges = torch.ones(12, 12, 12, dtype=torch.bool)
            edges[1:11, 1:11, 1:11] = False
            torch.testing.assert_close(found["image"].data[:, edges], image[:, edges], atol=1e-5, rtol=0)


TURNED = {
    "affine": lambda: torchio.RandomAffine(scales=0, degrees=(40, 50), default_pad_value=0),
    "elastic": lambda: RandomElastic(points=3, std=4.0),
    "bspline": lambda: torchio.RandomElasticDeformation(4, max_displacement=4, locked_borders=0),
    "one of them": lambda: one_of([torchio.RandomAffine(scales=(0.5, 0.6), degrees=0, default_pad_value=0)]),
    "mask": lambda: MaskBackground(),
    "mining": lambda: PositiveMining(p=1.0),
}


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("patch", [(20, 18, 16), (28, 18, 16), (28, 26, 16), (28, 26, 24)])
def test_augmented_samples_end_in_the_air_of_the_case(store, normalize, patch):
    case, cache, preprocessing, statistics = made = store(normalize=normalize, **NORMALIZATIONS[normalize])
    air = whole_case(*made)["outside"][0]
    for make in TURNED.values():
        samples = TrainingSamples(
            "default",
            [case],
            cache,
            TASK,
            preprocessing,
            Sampling("uniform"),
            patch=patch,
            statistics=statistics,
            seed=0,
            augmentation=chain(it=make()),
        )
        sample = samples[0, 0]
        torch.testing.assert_close(sample["outside"], air)
        for corner in product((0, -1), repeat=3):
            torch.testing.assert_close(sample["image"][(slice(None), *corner)], air, atol=1e-4, rtol=1e-4)
        if air.all():
            assert not (sample["image"] == 0).all(dim=0).any()


def test_a_missing_channel_is_missing_beyond_the_border_too(store):
    case, cache, preprocessing, statistics = store(normalize="zscore_all")
    dropped = TrainingSamples(
        "default", [case], cache, TASK, preprocessing, Sampling("uniform"), patch=SHAPE, statistics=statistics, seed=0, channel_dropout=0.9
    )[0, 0]
    assert (dropped["outside"] != 0).tolist() == dropped["channel_mask"].tolist()
    assert not dropped["channel_mask"].all()


class Watching(torch.nn.Module):
    """A network that needs multiples of 16 and remembers what it was given."""

    dimensions, slab, fixed_size = 3, None, None

    def __init__(self, channels: int = 2, dimensions: int = 3):
        super().__init__()
        self.dimensions, self.divisor, self.min_size = dimensions, (16,) * dimensions, (16,) * dimensions
        self.layer = torch.nn.Conv3d(channels, 2, 1) if dimensions == 3 else torch.nn.Conv2d(channels, 2, 1)
        self.seen = []

    def forward(self, view):
        self.seen.append(view.detach())
        return self.layer(view)


@pytest.mark.parametrize("normalize", ["zscore", "zscore_all", "none", "ct"])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_attacks_and_branches_see_the_air_of_the_case(store, normalize, dimensions):
    """Both pad by themselves: an attack takes a whole case at once, a branch what its own network needs."""
    batch = whole_case(*store(normalize=normalize, **NORMALIZATIONS[normalize]))
    air = batch["outside"][0]
    method = Supervised(TASK, network=lambda **_: Watching(dimensions=dimensions), loss=DiceCE(), inferer=Whole())
    _cross_entropy(method, batch["image"].repeat(2, 1, 1, 1, 1), method.target.encode(batch["label"]), batch["outside"])
    branches = Branches(2, 2, factories={"a": lambda *_: Watching(dimensions=dimensions)}, axis=2, seed=0)
    branches.beyond(batch)
    branches(batch["image"].repeat(2, 1, 1, 1, 1))
    for network in (method.network, branches["a"].network):
        (seen,) = network.seen
        assert seen.shape[2:4] == (32, 32)
        torch.testing.assert_close(
            seen[:, :, -1, -1].reshape(len(seen), 2, -1), air[None, :, None].expand(len(seen), 2, seen[0, 0, 0, 0].numel())
        )


def test_a_member_of_an_ensemble_sees_its_own_air(tmp_path):
    """A case that is prepared again, in the way of a member, has the background of that member."""
    data = Folder(write_fake_folder(tmp_path, 1, shape=(12, 12, 12)), channels=["t1", "flair"], preprocessing=Preprocessing(crop="none"))
    for normalize in ("zscore", "zscore_all"):
        batch = data.case_batch("case_00", data.task, Preprocessing(crop="none", normalize=normalize))
        torch.testing.assert_close(batch["outside"][0], batch["image"][0, :, 0, 0, 0])
        assert bool(batch["outside"].any()) == (normalize == "zscore_all")
