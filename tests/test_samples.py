"""Training samples are cut from the right place, whole, aligned, and depend on (seed, stream, epoch, position) alone."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from datamodules.folder import Folder
from datamodules.preprocessing import Preprocessing
from datamodules.samples import KeyedSampler
from datamodules.sampling import Sampling
from datamodules.split import Split
from datamodules.transforms.augmentation import chain
from datamodules.whole_cases import WholeCaseSampler
from lesionbench.errors import SuiteError
from lesionbench.geometry import read_volume, write_volume
from lesionbench.maps import MapStore
from tests.fake_data import write_fake_folder

SHAPE = (14, 12, 10)
KEYS = {"image", "label", "case", "brain_mask", "channel_mask", "outside", "attributes"}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_fake_folder(tmp_path_factory.mktemp("data") / "plain", 7, shape=SHAPE)


@pytest.fixture(scope="module")
def rated(tmp_path_factory) -> Path:
    return write_fake_folder(tmp_path_factory.mktemp("data") / "rated", 6, raters=3, shape=SHAPE)


@pytest.fixture(scope="module")
def store(root, tmp_path_factory) -> MapStore:
    """Maps that tell where every voxel comes from: `place` = 1 + its index (0 = outside), as whole numbers and as floats; `twin` = the label."""
    store, data = MapStore(tmp_path_factory.mktemp("maps")), module(root)
    for case in data.cases():
        cached = data.store.open(case)
        place = 1 + np.arange(np.prod(cached.shape), dtype=np.int32).reshape(cached.shape)
        store.write("place", case.id, place + 70000)  # more than 16 bits
        store.write("soft", case.id, place.astype(np.float32) / 8)
        store.write("shares", case.id, np.stack([place, -place]).astype(np.float32))
        store.write("twin", case.id, cached.label())
    for name in ("place", "soft", "shares", "twin"):
        store.commit(name)
    return store


class At:
    """A sampling policy that always cuts at one place."""

    def __init__(self, *start: int) -> None:
        self.start = start

    def box(self, rng, shape, patch, foreground, classes, slice_axis):
        return tuple((a, a + n) for a, n in zip(self.start, patch, strict=True))


def module(root: Path, kind: type[Folder] = Folder, **options) -> Folder:
    """A prepared data module on small patches."""
    defaults = {
        "channels": ["t1", "flair"], "patch": (6, 5, 4), "split": Split(test=2, val=1), "samples_per_epoch": 8, "batch_size": 2, "check": False,
    }  # fmt: skip
    maps = options.pop("maps", None)
    data = kind(root, **{**defaults, **options})
    data.maps = maps
    data.prepare_data()
    data.setup("fit")
    return data


def flips():
    import torchio

    return chain(flip=torchio.RandomFlip(axes=(0, 1, 2)), noise=torchio.RandomNoise(std=0.1), nothing=None)


def dataset(data: Folder):
    return data.train_dataloader().dataset


def whole(data: Folder, case_id: str) -> dict:
    case = next(c for c in data.cases() if c.id == case_id)
    return data.case_loader([case]).dataset[(0, False)]


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]) if torch.is_tensor(value) else value == b[name], name


# what a sample depends on


def test_a_sample_is_a_function_of_epoch_and_position(root):
    first, again = dataset(module(root, augmentation=flips())), dataset(module(root, augmentation=flips()))
    wanted = [(epoch, position) for epoch in (0, 3) for position in (0, 5, 11)]
    samples = {where: first[where] for where in wanted}
    torch.manual_seed(9)
    np.random.seed(9)
    for where in reversed(wanted):  # another order, after other draws
        assert_same(again[where], samples[where])
    different = {tuple(s["image"].flatten().tolist()) for s in samples.values()}
    assert len(different) == len(wanted)


def test_a_sample_depends_on_the_seed_and_the_stream(root):
    base = dataset(module(root))
    seeded = dataset(module(root, seed=1))
    streamed = dataset(module(root, streams={"other": {"cases": "train"}}))
    for other in (seeded, streamed):
        assert any(not torch.equal(base[(0, p)]["image"], other[(0, p)]["image"]) for p in range(4))


def test_drawing_a_sample_leaves_the_global_generators_alone(root):
    samples = dataset(module(root, augmentation=flips()))
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    samples[(0, 0)]
    assert torch.equal(torch.rand(3), expected)


def test_workers_change_nothing(root):
    batches = {n: list(module(root, augmentation=flips(), num_workers=n).train_dataloader()) for n in (0, 2)}
    assert len(batches[0]) == 4
    for a, b in zip(batches[0], batches[2], strict=True):
        assert_same(a, b)


def test_two_processes_share_the_batch_of_one(root):
    class First(Folder):
        _rank_world = (0, 2)

    class Second(Folder):
        _rank_world = (1, 2)

    one = list(module(root, batch_size=4, augmentation=flips()).train_dataloader())
    first, second = (list(module(root, kind, batch_size=2, augmentation=flips()).train_dataloader()) for kind in (First, Second))
    assert len(one) == len(first) == len(second) == 2
    for a, b, c in zip(one, first, second, strict=True):
        for name in ("image", "label"):
            assert torch.equal(torch.stack([b[name], c[name]], dim=1).flatten(0, 1), a[name])
        assert [case for pair in zip(b["case"], c["case"], strict=True) for case in pair] == a["case"]


def test_every_case_comes_once_before_any_comes_twice(root):
    samples = dataset(module(root))
    n = len(samples.cases)
    orders = [[samples[(0, turn * n + p)]["case"] for p in range(n)] for turn in range(3)]
    assert all(sorted(order) == sorted(c.id for c in samples.cases) for order in orders)
    assert len({tuple(order) for order in orders}) > 1


@pytest.mark.parametrize("done", [0, 1, 3])
def test_a_resumed_epoch_goes_on_with_the_next_batch(done):
    whole_epoch = list(KeyedSampler(3, 2, rank=1, world=2, start=lambda: (4, 0)))
    assert whole_epoch == [(4, 1), (4, 3), (4, 5), (4, 7), (4, 9), (4, 11)]
    resumed = KeyedSampler(3, 2, rank=1, world=2, start=lambda: (4, done))
    assert list(resumed) == whole_epoch[2 * done :]
    assert len(resumed) == 6  # the length of an epoch, wherever it begins


def test_the_loader_starts_where_a_checkpoint_says(root):
    data = module(root)
    expected = list(data.train_dataloader())
    fitting = SimpleNamespace(state=SimpleNamespace(fn="fit"))
    later = module(root)
    later.trainer = fitting
    later.load_state_dict({"epoch": 0, "batch": 3, "maps": {}})
    later.trainer = None
    (last,) = list(later.train_dataloader())
    assert_same(last, expected[3])


def test_repeat_draws_the_same_few_samples_unaugmented(root):
    plain, repeated = dataset(module(root)), dataset(module(root, repeat=2, augmentation=flips()))
    for epoch in (0, 7):
        for position in range(5):
            assert_same(repeated[(epoch, position)], plain[(0, position % 2)])


@pytest.mark.parametrize("length", [1, 2, 5, 7, 8])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 9])
def test_every_case_is_counted_once_by_any_number_of_processes(length, world):
    samplers = [WholeCaseSampler(length, rank, world) for rank in range(world)]
    assert len({len(s) for s in samplers}) == 1
    items = [item for s in samplers for item in s]
    assert sorted(i for i, again in items if not again) == list(range(length))
    assert all(0 <= i < length for i, _ in items)
    assert len(items) - length < world
    assert list(WholeCaseSampler(0, 0, world)) == []


# where a sample comes from


def test_a_patch_is_that_box_of_the_case(root):
    data = module(root, sampling=At(2, 3, 1))
    sample = dataset(data)[(0, 0)]
    case = whole(data, sample["case"])
    assert set(sample) == KEYS
    assert sample["image"].shape == (2, 6, 5, 4)
    assert sample["image"].dtype == torch.float32
    assert sample["label"].dtype == torch.int8
    for name in ("image", "label", "brain_mask"):
        assert torch.equal(sample[name], case[name][:, 2:8, 3:8, 1:5]), name
    assert sample["attributes"] == case["attributes"] != {}


def test_beyond_the_borders_there_is_nothing(root, store):
    data = module(root, patch=(18, 5, 4), sampling=At(-2, -1, 0), extra_maps={"place": "nearest"}, maps=store)
    sample = dataset(data)[(0, 0)]
    size = whole(data, sample["case"])["image"].shape[1]
    for name in ("image", "label", "brain_mask", "place"):
        value = sample[name]
        assert value.shape[1:] == (18, 5, 4)
        assert not value[:, :2].any()
        assert not value[:, :, :1].any()
        assert not value[:, 2 + size :].any()
    assert sample["image"][:, 2 : 2 + size, 1:].any()


def test_whole_volumes_where_there_is_no_patch(root):
    data = module(root, patch=None, batch_size=1)
    batch = next(iter(data.train_dataloader()))
    assert torch.equal(batch["image"][0], whole(data, batch["case"][0])["image"])


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("patch", [None, (5, 6), (5, 6, 9)])
def test_slices_are_two_dimensional(root, patch, axis):
    data = module(root, view="slice", slice_axis=axis, patch=patch, sampling=At(1, 1, 1) if patch else None)
    sample = dataset(data)[(0, 0)]
    plane = [n for a, n in enumerate(whole(data, sample["case"])["image"].shape[1:]) if a != axis]
    if patch == (5, 6):
        plane = [5, 6]
    if patch == (5, 6, 9):
        plane = [n for a, n in enumerate(patch) if a != axis]
    assert list(sample["image"].shape) == [2, *plane]
    assert list(sample["label"].shape) == [1, *plane]
    if patch == (5, 6):
        case = whole(data, sample["case"])
        for name in ("image", "label"):
            assert torch.equal(sample[name], case[name].select(1 + axis, 1)[:, 1:6, 1:7])


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("slab", [3, 5])
def test_slabs_repeat_the_end_slices(root, store, slab, axis):
    half = slab // 2
    data = module(root, slice_axis=axis)
    size = min(data.store.open(c).shape[axis] for c in data.parts["train"])
    for middle in (0, 1, size - 1):
        start = [1, 1, 1]
        start[axis] = middle
        data = module(
            root,
            view="slab",
            slab=slab,
            slice_axis=axis,
            patch=(4, 5),
            sampling=At(*start),
            extra_maps={"place": "nearest"},
            maps=store,
        )
        sample = dataset(data)[(0, 0)]
        case = whole(data, sample["case"])
        length = case["image"].shape[1 + axis]
        assert sample["image"].shape == (2, 4, 5, slab)
        for j in range(slab):
            neighbor = min(max(middle - half + j, 0), length - 1)
            assert torch.equal(sample["image"][..., j], case["image"].select(1 + axis, neighbor)[:, 1:5, 1:6])
        for name in ("label", "brain_mask", "place"):
            assert torch.equal(sample[name], case[name].select(1 + axis, middle)[:, 1:5, 1:6]), name


def test_voxels_are_drawn_from_the_brain_with_everything_that_belongs_to_them(root, store):
    data = module(root, view="voxels", voxels=50, patch=(9, 9, 9), extra_maps={"place": "nearest", "shares": "linear"}, maps=store)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (100, 2)
    assert batch["label"].shape == batch["place"].shape == (100, 1)
    assert batch["shares"].shape == (100, 2)
    assert batch["channel_mask"].shape == (2, 2)
    assert batch["brain_mask"].all()
    assert batch["case_index"].tolist() == [0] * 50 + [1] * 50
    assert batch["place"].unique().numel() > 50
    for n, case_id in enumerate(batch["case"]):
        case = whole(data, case_id)
        mine = batch["case_index"] == n
        place = batch["place"][mine, 0].long() - 70001
        for name in ("image", "label"):
            assert torch.equal(batch[name][mine], case[name].flatten(1)[:, place].T)


# streams


def test_unlabeled_batches_know_no_answer(root, store):
    streams = {
        "labeled": {"cases": "labeled", "batch_size": 1},
        "unlabeled": {"cases": "unlabeled", "batch_size": 3, "sampling": {"name": "uniform"}},
    }
    data = module(
        root, split=Split(test=2, val=1, labeled=1), streams=streams, samples_per_epoch=4, extra_maps={"place": "nearest"}, maps=store
    )
    batches = [batch for batch, *_ in data.train_dataloader()]
    assert len(batches) == 4
    for batch in batches:
        assert set(batch) == {"labeled", "unlabeled"}
        assert set(batch["labeled"]) == KEYS | {"place"}
        assert set(batch["unlabeled"]) == {"image", "case", "brain_mask", "channel_mask", "outside", "place"}
        assert len(batch["labeled"]["image"]) == 1
        assert len(batch["unlabeled"]["image"]) == 3
        assert set(batch["labeled"]["case"]) <= {c.id for c in data.parts["labeled"]}
        assert set(batch["unlabeled"]["case"]) <= {c.id for c in data.parts["unlabeled"]}


def test_streams_draw_on_shares_of_the_patients(tmp_path):
    root = write_fake_folder(tmp_path, 12, shape=SHAPE)
    (root / "attributes.csv").write_text("case,patient\n" + "".join(f"case_{n:02d},p{n // 2}\n" for n in range(12)))

    def of(seed: int = 0, **shares) -> dict[str, set[str]]:
        streams = {name: {"cases": "train", "share": share} for name, share in shares.items()}
        data = module(root, split=Split(seed=seed, test=0, val=0), streams=streams, samples_per_epoch=24)
        loaders = data.train_dataloader()
        loaders = loaders.iterables if len(shares) > 1 else {next(iter(shares)): loaders}
        drawn = {name: {case for batch in loader for case in batch["case"]} for name, loader in loaders.items()}
        assert drawn == {name: {case.id for case in loader.dataset.cases} for name, loader in loaders.items()}
        return drawn

    everyone = {f"case_{n:02d}" for n in range(12)}
    halves = of(net=[0, 0.5], arch=[0.5, 1])
    assert halves["net"] | halves["arch"] == everyone
    assert not halves["net"] & halves["arch"]
    assert {len(h) for h in halves.values()} == {6}
    for half in halves.values():  # no patient is torn apart
        assert {f"case_{n:02d}" for case in half for n in (int(case[-2:]) // 2 * 2, int(case[-2:]) // 2 * 2 + 1)} == half
    assert of(net=[0, 0.5])["net"] == halves["net"]  # whoever else draws
    assert of(other=[0, 0.5], seed=0)["other"] == halves["net"]  # whatever it is called
    assert len({frozenset(of(net=[0, 0.5], seed=seed)["net"]) for seed in range(6)}) > 1
    thirds = of(a=[0, 0.3], b=[0.3, 0.55], c=[0.55, 1])
    assert sorted(case for third in thirds.values() for case in third) == sorted(everyone)


@pytest.mark.parametrize("share", [[0, 1.5], [-0.1, 0.5], [0.5, 0.5], [0.7, 0.2], [0.5], []])
def test_a_share_out_of_range_is_named(share, tmp_path):
    with pytest.raises(SuiteError, match=rf"data\.streams\.net\.share={re.escape(str(share))}: expected \[a, b\]"):
        Folder(tmp_path, channels=["t1"], streams={"net": {"share": share}})


def test_a_share_of_nobody_is_named_before_anything_is_cached(tmp_path):
    root = write_fake_folder(tmp_path / "data", 5, shape=SHAPE)
    with pytest.raises(SuiteError, match=r"stream 'net' has no cases: data\.streams\.net\.share=\[0, 0\.1\] of 2 train patient"):
        module(root, split=Split(test=2, val=1), streams={"net": {"share": [0, 0.1]}}, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_unlabeled_samples_do_not_look_at_the_label(tmp_path):
    root = write_fake_folder(tmp_path, 4, shape=SHAPE)
    options = {
        "split": Split(test=1, val=1, labeled=1), "streams": {"u": {"cases": "unlabeled"}}, "sampling": Sampling("foreground", share=1.0), "augmentation": flips()
    }  # fmt: skip
    before = dataset(module(root, **options))[(0, 0)]
    for path in (root / "labels").iterdir():
        array, affine, _ = read_volume(path)
        write_volume(path, np.roll(array, 3, axis=1)[::-1], affine)
    assert_same(dataset(module(root, **options))[(0, 0)], before)


def test_cases_without_label_join_the_unlabeled_stream_only(tmp_path):
    root = write_fake_folder(tmp_path, 5, shape=SHAPE)
    (root / "labels" / "case_04.nii.gz").unlink()
    streams = {"a": {"cases": "labeled"}, "b": {"cases": "unlabeled"}}
    data = module(root, split=Split(test=1, val=1, labeled=1), streams=streams)
    assert "case_04" in [c.id for c in data.parts["unlabeled"]]
    assert "case_04" not in [c.id for part in ("train", "val", "test", "labeled") for c in data.parts[part]]


def test_cases_without_label_of_patients_who_are_held_out_are_not_trained_on(tmp_path):
    """Second time points that nobody has drawn."""
    root = write_fake_folder(tmp_path, 8, shape=SHAPE)
    for number in range(4, 8):
        (root / "labels" / f"case_{number:02d}.nii.gz").unlink()
    table = root / "attributes.csv"
    for number in range(4, 8):
        table.write_text(table.read_text().replace(f"patient_0{number}", f"patient_0{number - 4}"))
    streams = {"a": {"cases": "labeled"}, "b": {"cases": "unlabeled"}}
    data = module(root, split=Split(test=1, val=1, labeled=1), streams=streams)
    held_out = {c.patient for part in ("val", "test") for c in data.parts[part]}
    assert len(held_out) == 2
    assert len(data.parts["unlabeled"]) == 3  # one with a label, and the second time points of both training patients
    assert not held_out & {c.patient for c in data.parts["unlabeled"]}
    half = module(root, split=Split(test=1, val=1, labeled=1, inner_folds=2, inner_fold=1), streams=streams)
    assert len(half.parts["unlabeled"]) == 1  # the second time point of the patient that is not left out
    assert not {c.patient for c in half.parts["left_out"]} & {c.patient for c in half.parts["unlabeled"]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"view": "pach"}, "did you mean 'patch'"),
        ({"view": "slab", "slab": 4}, "must be odd"),
        ({"streams": {"a": {"cases": "labelled"}}}, "did you mean 'labeled'"),
        ({"streams": {"a": {"cases": "unlabeled"}}}, "stream 'a' has no cases"),
        ({"split": Split(test=4, val=3)}, "too few cases"),
        ({"limit_cases": 2, "split": Split(test=1, val=1)}, "too few cases"),
    ],
)
def test_impossible_data_is_refused_before_training(root, options, message):
    with pytest.raises(SuiteError, match=message):
        module(root, **options)


def test_an_epoch_shorter_than_a_batch_is_refused(root):
    with pytest.raises(SuiteError, match="samples_per_epoch=8 is less than one batch of 9"):
        module(root, batch_size=9).train_dataloader()


# augmentation, maps, raters


def test_maps_are_cut_and_flipped_with_the_image(root, store):
    import torchio

    extra = {"place": "nearest", "soft": "nearest", "shares": "linear", "twin": "nearest"}
    data = module(root, extra_maps=extra, maps=store, augmentation=torchio.RandomFlip(axes=(0, 1, 2), flip_probability=0.6))
    flipped = 0
    for batch in data.train_dataloader():
        assert torch.equal(batch["twin"], batch["label"])
        assert batch["place"].dtype == torch.int32
        place = batch["place"] - 70000
        assert torch.equal(batch["soft"], place / 8)
        assert torch.equal(batch["shares"], torch.cat([place, -place], dim=1).float())
        for b, case_id in enumerate(batch["case"]):
            case = whole(data, case_id)
            index = place[b, 0].long() - 1
            for name in ("image", "label", "brain_mask"):
                assert torch.equal(batch[name][b], case[name].flatten(1)[:, index]), name
            flipped += int(index[0, 0, 0] != index.min())
    assert flipped > 2


def test_maps_follow_the_label_through_rotation_and_scaling(root, store):
    import torchio

    turn = torchio.RandomAffine(degrees=40, scales=(0.7, 1.3))
    data = module(root, patch=(12, 12, 10), extra_maps={"twin": "nearest", "soft": "linear"}, maps=store, augmentation=turn)
    plain = module(root, patch=(12, 12, 10))
    changed = 0
    for batch, still in zip(data.train_dataloader(), plain.train_dataloader(), strict=True):
        assert batch["case"] == still["case"]
        assert torch.equal(batch["twin"], batch["label"])
        assert batch["label"].unique().tolist() == [0, 1]
        changed += not torch.equal(batch["label"], still["label"])
    assert changed == 4


@pytest.mark.parametrize("view", ["patch", "slab", "voxels"])
def test_further_inputs_are_channels_behind_the_image_moved_with_it(root, store, view):
    import torchio

    form = {"patch": (6, 5, 4), "slab": (6, 5), "voxels": (9, 9, 9)}[view]
    options = {
        "view": view, "voxels": 50, "patch": form, "slab": 3, "extra_maps": {"soft": "nearest"}, "maps": store,
        "augmentation": chain(flip=torchio.RandomFlip(axes=(0, 1, 2)), noise=torchio.RandomNoise(std=(1, 1))), "channel_dropout": 0.5,
    }  # fmt: skip
    data = module(root, task={"inputs": ["brain_mask", "soft"]}, **options)
    assert (data.task.in_channels, data.task.channels, data.task.inputs) == (4, ("t1", "flair"), ("brain_mask", "soft"))
    for batch, plain in zip(data.train_dataloader(), module(root, **options).train_dataloader(), strict=True):
        assert torch.equal(batch["image"][:, :2], plain["image"])  # which has seen the noise, and lacks channels
        for place, name in [(2, "brain_mask"), (3, "soft")]:
            values = batch["image"][:, place, ..., 1] if view == "slab" else batch["image"][:, place]
            assert torch.equal(values, batch[name][:, 0].float())
        assert torch.equal(batch["channel_mask"][:, :2], plain["channel_mask"])
        assert not batch["channel_mask"][:, 2:].any()
    case = whole(data, data.parts["train"][0].id)
    assert torch.equal(case["image"][2:], torch.cat([case["brain_mask"], case["soft"]]).float())
    assert case["outside"][2:].tolist() == [0, 0]


def test_an_input_without_a_map_is_named(root, store, tmp_path):
    with pytest.raises(SuiteError, match=r"further input \(task\.inputs\).*'brainmask'.*did you mean 'brain_mask'"):
        module(root, task={"inputs": ["brainmask"]})
    with pytest.raises(SuiteError, match=r"a name stands twice in channels=\['t1', 'flair'\] and inputs=\['t1'\]"):
        module(root, task={"inputs": ["t1"]})
    options = {"maps": store}
    two = module(root, task={"inputs": ["shares"]}, extra_maps={"shares": "linear"}, **options)
    with pytest.raises(SuiteError, match=r"the map shares of task\.inputs has 2 channels"):
        dataset(two)[(0, 0)]
    nobody = module(root, task={"inputs": ["soft"]}, extra_maps={"soft": "linear"}, maps=MapStore(tmp_path))
    with pytest.raises(SuiteError, match=r"case .*: task\.inputs names soft, of which there is no map"):
        dataset(nobody)[(0, 0)]


def test_a_map_that_only_some_cases_have_is_left_out_of_the_batch(root, tmp_path):
    partial, data = MapStore(tmp_path), module(root)
    owner = data.parts["train"][0]
    partial.write("pseudo", owner.id, np.zeros(data.store.open(owner).shape, np.int8))
    partial.commit("pseudo")
    samples = module(root, extra_maps={"pseudo": "nearest"}, maps=partial)
    found = [dataset(samples)[(0, p)] for p in range(len(samples.parts["train"]))]
    assert [s["case"] for s in found if "pseudo" in s] == [owner.id]
    assert all(
        "pseudo" in batch
        for batch in module(root, batch_size=1, extra_maps={"pseudo": "nearest"}, maps=partial).train_dataloader()
        if batch["case"] == [owner.id]
    )
    assert all("pseudo" not in batch for batch in samples.train_dataloader() if len(set(batch["case"])) > 1)


def test_augmentation_keeps_types_and_alignment(tmp_path):
    """The label is where the image is, and stays there."""
    import torchio

    rng = np.random.default_rng(0)
    for n in range(4):
        image = np.where(rng.random(SHAPE) > 0.6, 500, 0).astype(np.int16)
        write_volume(tmp_path / "images" / f"c{n}_t1.nii.gz", image, np.eye(4))
        write_volume(tmp_path / "labels" / f"c{n}.nii.gz", (image > 0).astype(np.uint8), np.eye(4))
    settings = Preprocessing(normalize="none")
    for augmentation in (torchio.RandomFlip(axes=(0, 1, 2)), [torchio.RandomFlip(axes=(0,)), torchio.RandomGamma(p=1)]):
        data = module(tmp_path, channels=["t1"], preprocessing=settings, split=Split(test=1, val=1), augmentation=augmentation)
        for batch in data.train_dataloader():
            assert batch["image"].dtype == torch.float32
            assert batch["label"].dtype == torch.int8
            assert batch["brain_mask"].dtype == torch.bool
            assert torch.equal(batch["image"] > 0, batch["label"] == 1)
            assert torch.equal(batch["brain_mask"], batch["label"] == 1)


@pytest.mark.parametrize(("view", "patch"), [("slice", (6, 5)), ("patch", (6, 5, 1)), ("patch", (1, 5, 1))])
def test_thin_samples_can_be_flipped(root, store, view, patch):
    import torchio

    flip = torchio.RandomFlip(axes=(0, 1, 2), flip_probability=1)
    data = module(root, view=view, patch=patch, sampling=At(2, 2, 4), extra_maps={"place": "nearest"}, maps=store, augmentation=flip)
    plain = module(root, view=view, patch=patch, sampling=At(2, 2, 4), extra_maps={"place": "nearest"}, maps=store)
    flipped, still = dataset(data)[(0, 0)], dataset(plain)[(0, 0)]
    for name in ("image", "label", "brain_mask", "place"):
        assert torch.equal(flipped[name], still[name].flip(list(range(1, still[name].ndim)))), name


def test_an_augmentation_of_nothing_is_none():
    assert chain() is None
    assert chain(a=None) is None
    transform = chain(a=None, b=flips())
    assert callable(transform)


@pytest.mark.parametrize("view", ["patch", "slice", "slab"])
def test_raters_are_filled_up_and_told_apart(rated, view):
    data = module(rated, raters=3, view=view, batch_size=4, augmentation=flips())
    counts = {c.id: len(c.raters) for c in data.cases()}
    assert set(counts.values()) == {2, 3}
    for batch in data.train_dataloader():
        wanted = [counts[c] for c in batch["case"]]
        assert batch["rater_mask"].sum(dim=1).tolist() == wanted
        assert batch["raters"].shape == (4, max(wanted), *batch["label"].shape[2:])
        assert (batch["raters"][~batch["rater_mask"]] == -1).all()
        assert (batch["raters"][batch["rater_mask"]] >= 0).all()
        assert torch.equal(batch["raters"][:, :1], batch["label"])  # the first rater drew the label, and every map is flipped alike


def test_raters_of_voxels(rated):
    data = module(rated, raters=3, view="voxels", voxels=20, patch=(9, 9, 9), batch_size=4)
    counts = {c.id: len(c.raters) for c in data.cases()}
    for batch in data.train_dataloader():
        wanted = torch.tensor([counts[c] for c in batch["case"]])
        most = int(wanted.max())
        assert batch["raters"].shape == (80, most)
        assert batch["rater_mask"].shape == (4, most)
        assert torch.equal(batch["rater_mask"].sum(dim=1), wanted)
        assert torch.equal(batch["raters"] >= 0, batch["rater_mask"][batch["case_index"]])
        assert torch.equal(batch["raters"][:, :1], batch["label"])


# whole cases


def test_evaluation_gets_whole_cases_with_labels_on_both_grids(root):
    data = module(root, preprocessing=Preprocessing(spacing=(2, 2, 2)), view="slice", patch=(5, 5))
    batches = list(data.test_dataloader())
    assert sorted(b["case"][0] for b in batches) == sorted(c.id for c in data.parts["test"])
    for batch in batches:
        (geometry,) = batch["geometry"]
        file, _, _ = read_volume(root / "labels" / f"{batch['case'][0]}.nii.gz")
        assert np.array_equal(batch["native_label"][0].numpy(), file)
        assert batch["image"].shape[:2] == (1, 2)
        assert batch["label"].shape == (1, 1, *batch["image"].shape[2:])
        assert batch["image"].shape[2:] == tuple(b - a for a, b in geometry.crop)
        assert batch["again"] == [False]
        assert batch["site"][0] in ("north", "south")
        assert batch["patient"][0].startswith("patient_")
        assert "age" in batch["attributes"][0]


def test_a_missing_channel_is_zero_and_marked(tmp_path):
    root = write_fake_folder(tmp_path / "data", 5, shape=SHAPE)
    (root / "images" / "case_02_t1.nii.gz").unlink()
    with pytest.raises(SuiteError, match=r"case_02.*t1"):
        module(root)
    data = module(
        root, preprocessing=Preprocessing(allow_missing=True), split=Split(test=1, val=1, seed=1), batch_size=3, samples_per_epoch=6
    )
    assert "case_02" in [c.id for c in data.parts["train"]]
    for batch in data.train_dataloader():
        for case_id, mask, image in zip(batch["case"], batch["channel_mask"], batch["image"], strict=True):
            assert mask.tolist() == [case_id != "case_02", True]
            assert bool(image[0].any()) == (case_id != "case_02")


def test_dataset_statistics_come_from_training_cases_only(tmp_path):
    root, settings = write_fake_folder(tmp_path / "data", 6, shape=SHAPE), Preprocessing(normalize="dataset")
    before = module(root, preprocessing=settings)

    def brighten(part: str, name: str) -> Folder:
        copy = shutil.copytree(root, tmp_path / name, ignore=shutil.ignore_patterns(".cache"))
        for case in before.parts[part]:
            for channel in ("t1", "flair"):
                path = copy / "images" / f"{case.id}_{channel}.nii.gz"
                array, affine, _ = read_volume(path)
                write_volume(path, array * 3, affine)
        return module(copy, preprocessing=settings)

    for part in ("test", "val"):
        after = brighten(part, part)
        assert after.statistics == before.statistics
        case_id = before.parts["train"][0].id
        assert torch.equal(whole(after, case_id)["image"], whole(before, case_id)["image"])
    assert np.allclose(brighten("train", "train").statistics["mean"], 3 * np.array(before.statistics["mean"]))
    brain = torch.cat([whole(before, c.id)["image"][:, whole(before, c.id)["brain_mask"][0]] for c in before.parts["train"]], dim=1)
    assert torch.allclose(brain.mean(dim=1), torch.zeros(2), atol=1e-4)
    assert torch.allclose(brain.std(dim=1), torch.ones(2), atol=1e-2)
