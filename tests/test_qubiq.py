"""QUBIQ in its true layout, its CT normalization and brightness augmentation, and the ellipse toy."""

import nibabel as nib
import numpy as np
import pytest
import torch

from datamodules import QUBIQ, Ellipses, Preprocessing, Split
from datamodules.preprocessing import labeled_statistics, normalize_patch
from datamodules.readers.qubiq_files import SETS
from datamodules.simulated.ellipses import BIASES, ellipse
from lesionbench.errors import SuiteError
from lesionbench.keyed import numpy_generator, torch_seeded
from tests.fake_data import QUBIQ_SETS, write_fake_qubiq


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_fake_qubiq(tmp_path_factory.mktemp("qubiq"))


def ready(root, dataset, **options):
    options = {"split": Split(val=0), "check": False, "preprocessing": Preprocessing(crop="none"), **options}
    data = QUBIQ(root, dataset=dataset, **options)
    data.prepare_data()
    data.setup("fit")
    return data


@pytest.mark.parametrize("dataset", SETS)
def test_every_data_set_and_task_is_read_with_all_raters(root, dataset, tmp_path):
    channels, tasks, raters, shape = QUBIQ_SETS[dataset]
    home = root / dataset / "Training" / "case01"
    for number in range(1, tasks + 1):
        data = ready(root, dataset, number=number, cache=tmp_path)
        assert data.task.region_names == (f"TASK{number}",)
        assert (len(data.task.channels), data.task.raters, data.task.unit) == (channels, raters, "vox" if len(shape) == 2 else "mm")
        assert [len(data.parts[p]) for p in ("train", "val", "test")] == [3, 0, 2]
        assert all(c.id.startswith("validation") for c in data.parts["test"])
        (item,) = [i for i in data.case_loader(data.parts["train"]) if i["case"] == ["training_case01"]]
        assert item["image"].shape == (1, channels, *(*shape, 1)[:3])
        masks = [np.squeeze(nib.load(home / f"task{number:02d}_seg{r + 1:02d}.nii.gz").get_fdata()) for r in range(raters)]
        assert np.array_equal(np.squeeze(item["raters"][0].numpy()), np.stack(masks))
        assert np.array_equal(np.squeeze(item["native_raters"][0].numpy()), np.stack(masks))


def test_channels_keep_their_order_and_pixels_their_place(root, tmp_path):
    source = nib.load(root / "brain-tumor" / "Training" / "case02" / "image.nii.gz").get_fdata()
    data = ready(root, "brain-tumor", cache=tmp_path, preprocessing=Preprocessing(crop="none", normalize="none"))
    (item,) = [i for i in data.case_loader(data.parts["train"]) if i["case"] == ["training_case02"]]
    assert np.array_equal(item["image"][0, ..., 0].numpy(), source)
    narrowed = ready(root, "brain-tumor", cache=tmp_path, task={"channels": ["mr3"]}, preprocessing=Preprocessing(normalize="none"))
    assert narrowed.case_loader(narrowed.parts["test"]).dataset[(0, False)]["image"].shape[0] == 1


def test_a_case_with_five_of_six_raters_is_padded_in_its_batch(root, tmp_path):
    data = ready(root, "prostate", cache=tmp_path, view="slice", patch=(16, 16), batch_size=3, samples_per_epoch=3)
    batch = next(iter(data.train_dataloader()))
    counts = dict(zip(batch["case"], batch["rater_mask"].sum(dim=1).tolist(), strict=True))
    assert counts == {"training_case01": 6, "training_case02": 5, "training_case03": 6}
    assert batch["raters"].shape == (3, 6, 16, 16)
    assert (batch["raters"][~batch["rater_mask"]] == -1).all()


def test_the_official_split_is_the_default_and_the_other_divides_everything(root, tmp_path):
    data = ready(root, "kidney", cache=tmp_path, split=Split(val=1))
    assert [len(data.parts[p]) for p in ("train", "val", "test")] == [2, 1, 2]
    other = ready(root, "kidney", cache=tmp_path, official=False, split=Split(folds=5, fold=2, val=0))
    assert [len(other.parts[p]) for p in ("train", "val", "test")] == [4, 0, 1]
    few = QUBIQ(root, dataset="kidney", cache=tmp_path, limit_cases=3)
    assert [c.id[:2] for c in few.cases()] == ["tr", "va", "tr"]


def test_a_changed_source_is_converted_again(root, tmp_path):
    import os
    import shutil

    own = shutil.copytree(root / "brain-growth", tmp_path / "brain-growth")
    data = QUBIQ(own, dataset="brain-growth", cache=tmp_path / "cache")  # the folder of the data set itself is a root, too
    data.materialize()
    case = data.find_cases()[0]
    stamp = case.raters[0].stat().st_mtime_ns
    data.materialize()
    assert case.raters[0].stat().st_mtime_ns == stamp
    source = own / "Training" / "case01" / "task01_seg01.nii.gz"
    nib.Nifti1Image(np.full((40, 40), 255, np.uint8), np.eye(4)).to_filename(source)
    os.utime(source, ns=(stamp + 10**9, stamp + 10**9))
    data.materialize()
    assert np.array_equal(nib.load(case.raters[0]).get_fdata(), np.ones((40, 40, 1)))


def test_errors_name_the_file_and_the_fix(root, tmp_path):
    with pytest.raises(SuiteError, match="prostat"):
        QUBIQ(root, dataset="prostat")
    with pytest.raises(SuiteError, match="tasks 1 to 2"):
        QUBIQ(root, dataset="prostate", number=3)
    with pytest.raises(SuiteError, match="no such folder"):
        QUBIQ(tmp_path / "nowhere", dataset="kidney").cases()
    with pytest.raises(SuiteError, match="kidney/Training"):
        QUBIQ(tmp_path, dataset="kidney").cases()
    folder = tmp_path / "kidney" / "Training" / "case01"
    folder.mkdir(parents=True)
    with pytest.raises(SuiteError, match=r"no image.nii.gz in 1 case.*training_case01"):
        QUBIQ(tmp_path, dataset="kidney").cases()
    nib.Nifti1Image(np.zeros((4, 8, 8), np.int16), np.eye(4)).to_filename(folder / "image.nii.gz")
    with pytest.raises(SuiteError, match=r"case01/image.nii.gz: expected a 2D image with 1 channel.*\(4, 8, 8\)"):
        QUBIQ(tmp_path, dataset="kidney").materialize()
    for rater in range(1, 5):
        nib.Nifti1Image(np.zeros((8, 8), np.uint8), np.eye(4)).to_filename(folder / f"task01_seg{rater:02d}.nii.gz")
    with pytest.raises(SuiteError, match="4 raters of task 1; kidney has at most 3"):
        QUBIQ(tmp_path, dataset="kidney").cases()


# CT normalization, brightness


def test_ct_statistics_are_those_of_labeled_voxels_and_clip_before_the_z_score():
    values = [np.arange(0, 600.0)[None], np.arange(600, 1001.0)[None]]
    found = labeled_statistics(values)
    assert (found["low"], found["high"]) == ([5], [995])
    assert found["mean"] == [500]
    assert found["std"] == pytest.approx([np.arange(1001).std()])
    with pytest.raises(SuiteError, match="nothing is labeled"):
        labeled_statistics([np.zeros((1, 0))])
    patch = np.array([-1000, 0, 500, 3000], np.int16).reshape(1, 4, 1, 1)
    out = normalize_patch(patch, {"count": [4]}, Preprocessing(normalize="ct"), {"mean": [500], "std": [100], "low": [5], "high": [995]})
    assert out.ravel().tolist() == pytest.approx([-4.95, -4.95, 0, 4.95])
    with pytest.raises(SuiteError, match="normalize=ct needs"):
        normalize_patch(patch, {"count": [4]}, Preprocessing(normalize="ct"))


def test_ct_statistics_come_from_the_training_cases(root, tmp_path):
    data = ready(root, "pancreas", cache=tmp_path, preprocessing=Preprocessing(normalize="ct", crop="none"))
    values = []
    for case in data.parts["train"]:
        image, masks = (nib.load(case.images["ct"]).get_fdata(), [nib.load(r).get_fdata() > 0 for r in case.raters])
        values.append(image[np.any(masks, axis=0)])
    assert data.statistics["mean"] == pytest.approx([np.concatenate(values).mean()])
    item = data.case_loader(data.parts["test"]).dataset[(0, False)]
    assert float(item["image"].min()) == pytest.approx((data.statistics["low"][0] - data.statistics["mean"][0]) / data.statistics["std"][0])


def test_brightness_is_affine_per_channel_and_leaves_masks_alone():
    import torchio

    from datamodules.transforms.brightness import RandomBrightness

    image, mask = torch.randn(2, 5, 5, 2), torch.ones(1, 5, 5, 2)
    subject = torchio.Subject(image=torchio.ScalarImage(tensor=image), mask=torchio.LabelMap(tensor=mask))
    with torch_seeded(0):
        scaled = RandomBrightness(factor=(0.75, 1.25))(subject)
    factors = (scaled["image"].data / image).flatten(1)
    assert torch.allclose(factors, factors[:, :1].expand_as(factors), atol=1e-5)
    assert 0.75 <= float(factors.min()) < float(factors.max()) <= 1.25
    with torch_seeded(0):
        moved = RandomBrightness(shift=0.1)(subject)["image"].data - image
    assert torch.allclose(moved.flatten(1), moved.flatten(1)[:, :1].expand(-1, 50), atol=1e-5)
    assert 0 < float(moved.abs().max()) < 0.6
    assert torch.equal(scaled["mask"].data, mask)
    assert torch.equal(subject["image"].data, image)


@pytest.mark.parametrize(("name", "shape"), [("agreement", (12, 10, 8)), ("agreement_2d", (12, 10, 2))])
def test_every_transform_of_the_paper_s_augmentation_runs(name, shape):
    import torchio
    from hydra.utils import instantiate

    from tests.harness import composed

    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, *shape, generator=generator)
    mask = torch.zeros(3, *shape)
    mask[:, 4:8, 3:7] = 1
    transforms = {k: v for k, v in composed(f"augmentation={name}").augmentation.items() if k != "_target_"}
    assert len(transforms) == 7
    for part, config in transforms.items():
        subject = torchio.Subject(image=torchio.ScalarImage(tensor=image), mask=torchio.LabelMap(tensor=mask))
        with torch_seeded(part):
            changed = instantiate({**config, "p": 1, **({"flip_probability": 1} if part == "flip" else {})})(subject)
        assert changed["image"].data.shape == image.shape
        assert not torch.equal(changed["image"].data, image), part
        assert set(changed["mask"].data.unique().tolist()) <= {0, 1}
        assert part in ("rotation", "scaling", "flip") or torch.equal(changed["mask"].data, mask)
        if name == "agreement_2d" and part in ("rotation", "scaling"):  # slices do not mix
            assert torch.allclose(changed["image"].data[..., 0], _alone(instantiate({**config, "p": 1}), image, part), atol=1e-4)


def _alone(transform, image: torch.Tensor, part: str) -> torch.Tensor:
    """The first slice of what a transform makes of a volume whose slices are all the first."""
    import torchio

    with torch_seeded(part):
        return transform(torchio.Subject(image=torchio.ScalarImage(tensor=image[..., :1].expand_as(image).clone())))["image"].data[..., 0]


# ellipses


def test_ellipse_raters_are_nested_bands_that_narrow_with_the_blur():
    def areas(blur):
        return np.mean([ellipse(numpy_generator(n), 64, (blur, blur))[1].sum(axis=(1, 2)) for n in range(20)], axis=0)

    wide, narrow = areas(5.0), areas(0.3)
    assert (np.diff(wide) < 0).all()  # who waits for a brighter border draws less
    radius = np.sqrt(wide / np.pi)
    assert radius[0] - radius[-1] == pytest.approx(5 * 2 * np.log(4), rel=0.15)  # logit(0.8) - logit(0.2), times the width
    assert narrow[0] / narrow[-1] < 1.25
    image, raters = ellipse(numpy_generator(3), 64, (2, 3))
    assert image.dtype == np.float32
    assert len(raters) == len(BIASES) == 5
    assert image[raters[4]].mean() > 0.8
    assert abs(float(image[~raters[0]].mean())) < 0.15


def test_ellipses_are_made_once_and_by_their_number(tmp_path):
    data = Ellipses(tmp_path, count=3, size=32)
    data.materialize()
    first = {p.name: p.read_bytes() for p in data.root.rglob("*.nii.gz")}
    assert [len(c.raters) for c in data.cases()] == [5, 5, 5]
    more = Ellipses(tmp_path, count=4, size=32)
    more.materialize()
    assert more.root == data.root
    assert first.items() <= {p.name: p.read_bytes() for p in data.root.rglob("*.nii.gz")}.items()
    assert len(data.cases()) == 3
    assert Ellipses(tmp_path, count=3, size=32, simulation_seed=1).root != data.root
