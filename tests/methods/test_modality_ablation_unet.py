"""The modality ablation: presets of its U-Net, histogram standardization, augmentation, which sequences are read, regions and classes, grids."""

import numpy as np
import pytest
import torch
import torchio
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from datamodules import BraTS
from datamodules.preprocessing import LANDMARK_PERCENTILES, Preprocessing, histogram_statistics, normalize_patch
from datamodules.split import Split
from datamodules.transforms.augmentation import one_of
from lesionbench.checkpoint import build_method, read_checkpoint
from lesionbench.errors import SuiteError
from lesionbench.task import Task
from lightning_modules.inferers import Whole, Window
from lightning_modules.networks import LightUNet
from lightning_modules.schedules import step_decay
from tests.fake_data import write_fake_brats
from tests.harness import composed, rows, run, run_folders
from tests.test_preprocessing import make_case

PRESETS = {
    "light_unet": (61_748, 61_856, 62_072),
    "light_unet_3": (1_030_406, 1_030_514, 1_030_730),
    "light_unet_4": (16_464_964, 16_465_396, 16_466_260),
    "light_unet_5": (1_031_246, 1_031_354, 1_031_570),
    "light_unet_6": (16_473_206, 16_473_638, 16_474_502),
}
PATCHES = {1: 64, 2: 128, 3: 128, 4: 128, 5: 128, 6: 128}
TUMOR = Task(("t1",), {"background": 0, "ncr": 1, "ed": 2, "et": 4}, {"WT": ("ncr", "ed", "et"), "TC": ("ncr", "et"), "ET": ("et",)})


def row(number: int):
    return composed("experiment=modality_ablation_unet/brats2021", "sweep=modality_ablation_rows", f"row=row_{number}")


# the network


@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_of_the_presets(preset):
    config = composed(f"model/network={preset}").model.network
    with torch.device("meta"):
        counts = [sum(p.numel() for p in instantiate(config)(channels, 4).parameters()) for channels in (1, 2, 4)]
    assert tuple(counts) == PRESETS[preset]


def test_presets_differ_in_what_the_paper_says():
    options = {preset: OmegaConf.to_container(composed(f"model/network={preset}").model.network) for preset in PRESETS}

    def changes(first: str, second: str) -> dict:
        return {k: v for k, v in options[second].items() if v != options[first][k]}

    assert changes("light_unet", "light_unet_3") == {"blocks": 5, "activation": "prelu"}
    assert changes("light_unet_3", "light_unet_4") == {"features": 16, "norm": "instance", "activation": "leaky_relu"}
    assert changes("light_unet_3", "light_unet_5") == {"preactivation": True}
    assert changes("light_unet_5", "light_unet_6") == {"features": 16}


def test_order_of_layers():
    def kinds(block: nn.Module) -> list[str]:
        return [type(layer).__name__.removesuffix("3d") for layer in block]

    after, before = LightUNet(1, 2, activation="prelu"), LightUNet(1, 2, activation="prelu", preactivation=True)
    assert kinds(after.encoder[0]) == ["Conv", "PReLU", "Conv", "BatchNorm", "PReLU"]
    assert kinds(before.encoder[0]) == ["Conv", "PReLU", "BatchNorm", "PReLU", "Conv"]
    assert kinds(after.decoder[1]) == ["Conv", "BatchNorm", "PReLU"] * 2
    assert kinds(before.decoder[1]) == ["BatchNorm", "PReLU", "Conv"] * 2
    biased = [[m.bias is not None for m in n.modules() if isinstance(m, nn.Conv3d)] for n in (after, before)]
    assert biased == [[True] + [False] * 9 + [True], [True] * 11]


def test_what_cannot_be_built_is_named():
    with pytest.raises(SuiteError, match="did you mean 'instance'"):
        LightUNet(1, 2, norm="instanse")
    with pytest.raises(SuiteError, match="did you mean 'prelu'"):
        LightUNet(1, 2, activation="prelo")
    with pytest.raises(SuiteError, match="blocks=1: at least 2"):
        LightUNet(1, 2, blocks=1)


# the table of the paper


@pytest.mark.parametrize("number", range(1, 21))
def test_row_of_the_table_builds(number):
    cfg = row(number)
    chosen, model = cfg.chosen, int(cfg.chosen.model[1])
    assert list(cfg.data.patch) == [PATCHES[model]] * 3
    assert cfg.model.optimizer._target_ == f"torch.optim.{ {'sgd': 'SGD', 'adam': 'Adam', 'adamw': 'AdamW'}[chosen.optimizer] }"
    assert (cfg.epochs, cfg.model.scheduler.epochs) == (chosen.epochs, chosen.epochs)
    assert (instantiate(cfg.augmentation) is None) == (chosen.augmentation == "none")
    with torch.device("meta"):
        method = build_method(OmegaConf.to_container(cfg.model, resolve=True), instantiate(cfg.data, _convert_="all").task)
    preset = "light_unet" if model < 3 else f"light_unet_{model}"
    assert sum(p.numel() for p in method.network.parameters()) == PRESETS[preset][{1: 0, 2: 1, 4: 2}[len(chosen.channels)]]


def test_settings_of_rows_by_hand():
    first, twelfth, last = row(1), row(12), row(20)
    assert (list(first.task.channels), first.model.optimizer.lr, first.model.optimizer.weight_decay) == (["t1"], 1e-3, 1e-2)
    assert (list(twelfth.task.channels), twelfth.epochs, twelfth.model.network.blocks) == (["t1", "t1ce", "t2", "flair"], 40, 3)
    sgd = {k: v for k, v in last.model.optimizer.items() if not k.startswith("_")}
    assert sgd == {"lr": 0.01, "momentum": 0.9, "nesterov": False, "weight_decay": 1e-4}
    assert (list(last.task.channels), last.epochs, last.model.network.features) == (["t1ce", "flair"], 30, 16)
    assert (last.model.loss.batch, last.data.split.test, last.data.samples_per_epoch) == (True, 312, 8 * 939)


def test_step_decay():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1)
    factor = step_decay(optimizer, total_iterations=90, epochs=9, every=3, factor=0.7).lr_lambdas[0]
    assert [factor(t) for t in (0, 29, 30, 59, 60, 89)] == pytest.approx([1, 1, 0.7, 0.7, 0.49, 0.49])
    with pytest.raises(SuiteError, match="every=0"):
        step_decay(optimizer, 90, epochs=9, every=0)


# histogram standardization


def cases(tmp_path, count: int = 3) -> list:
    """Cases whose intensities differ in scale and shape, prepared for histogram standardization."""
    from datamodules.preprocessing import preprocess

    task, found = Task(("t1", "t2"), {"background": 0, "lesion": 1}), []
    for number in range(count):
        rng = np.random.default_rng(number)
        images = {c: (200 * (number + 1) * rng.gamma(2 + number, 1, (12, 11, 10)) + 1).astype(np.int16) for c in task.channels}
        for image in images.values():
            image[:2] = 0
        folder = tmp_path / str(number)
        folder.mkdir()
        found.append(preprocess(make_case(folder, images), task, Preprocessing(normalize="histogram")))
    return found


def test_landmarks_and_the_way_to_them_are_torchio_s(tmp_path):
    """Trained and applied with the foreground as mask, less the quartiles, which TorchIO measures and does not use."""
    from torchio.transforms.preprocessing.intensity import histogram_standardization as theirs

    prepared = cases(tmp_path)
    scale = histogram_statistics([p.stats for p in prepared])
    every = np.sort([*LANDMARK_PERCENTILES, 25, 75])
    used = np.isin(every, LANDMARK_PERCENTILES)
    for channel in range(2):
        foregrounds = [p.image[channel][p.image[channel] != 0] for p in prepared]
        landmarks = theirs._get_average_mapping(np.array([np.percentile(f, every) for f in foregrounds]))
        np.testing.assert_allclose(scale["landmarks"][channel], landmarks[used], rtol=1e-6)
        for p in prepared:
            image = torch.from_numpy(p.image[channel].astype(np.float32))
            expected = theirs._normalize(image, landmarks, (image != 0).numpy()).numpy()
            inside = p.image[channel] != 0
            expected = (expected - expected[inside].mean()) / expected[inside].std() * inside
            found = normalize_patch(p.image, p.stats, Preprocessing(normalize="histogram"), scale)[channel]
            np.testing.assert_allclose(found, expected, atol=2e-3)


def test_quantiles_of_a_case_become_the_landmarks(tmp_path):
    prepared = cases(tmp_path)
    scale = histogram_statistics([p.stats for p in prepared])
    for p in prepared:
        out = normalize_patch(p.image, p.stats, Preprocessing(normalize="histogram"), scale)
        for channel in range(2):
            inside = p.image[channel] != 0
            assert out[channel][inside].mean() == pytest.approx(0, abs=1e-4)
            assert out[channel][inside].std() == pytest.approx(1, abs=1e-4)
            assert not out[channel][~inside].any()
            reached, wanted = np.percentile(out[channel][inside], LANDMARK_PERCENTILES), np.array(scale["landmarks"][channel])
            stretch = np.polyfit(wanted, reached, 1)  # the z-score on top is one line for all of them
            np.testing.assert_allclose(np.polyval(stretch, wanted), reached, atol=0.02)
    part = (slice(None), slice(2, 7), slice(1, 4), slice(3, 9))
    whole = normalize_patch(prepared[0].image, prepared[0].stats, Preprocessing(normalize="histogram"), scale)
    patch = normalize_patch(prepared[0].image[part], prepared[0].stats, Preprocessing(normalize="histogram"), scale)
    np.testing.assert_array_equal(patch, whole[part])


def test_degenerate_channels_become_zero(tmp_path):
    (prepared,) = cases(tmp_path, 1)
    scale = histogram_statistics([prepared.stats])
    flat = prepared.image.copy()
    flat[0][flat[0] != 0] = 7
    from datamodules.preprocessing import _statistics

    settings = Preprocessing(normalize="histogram")
    stats = _statistics(flat, flat[0] != 0, (True, False), settings)
    assert not normalize_patch(flat, stats, settings, scale).any()
    both = histogram_statistics([prepared.stats, stats])  # neither counts for the scale
    np.testing.assert_allclose(both["landmarks"], scale["landmarks"])
    with pytest.raises(SuiteError, match="at least one training case"):
        histogram_statistics([])
    with pytest.raises(SuiteError, match="normalize=histogram needs"):
        normalize_patch(flat, stats, settings)


# data


@pytest.fixture(scope="module")
def brats(tmp_path_factory):
    return write_fake_brats(tmp_path_factory.mktemp("data") / "brats", "2021")


def data_module(root, **options) -> BraTS:
    settings = {"preprocessing": Preprocessing(crop="none", normalize="histogram"), "split": Split(test=2, val=1), "check": False}
    data = BraTS(root, layout="2021", patch=(16, 16, 16), **{**settings, **options})
    data.prepare_data()
    data.setup()
    return data


def test_the_standard_scale_is_that_of_the_training_cases(brats):
    data = data_module(brats)
    assert len(data.parts["train"]) == 3
    of_train = histogram_statistics([data.store.open(c).stats for c in data.parts["train"]])
    everybody = histogram_statistics([data.store.open(c).stats for c in data.cases()])
    assert data.statistics == of_train != everybody


def test_other_normalizations_keep_their_cache(brats):
    def folder(normalize: str):
        return data_module(brats, preprocessing=Preprocessing(normalize=normalize)).store.folder

    assert folder("zscore") == folder("dataset") != folder("histogram")


def test_just_the_chosen_sequences_are_read_in_the_order_that_is_told(tmp_path):
    root = write_fake_brats(tmp_path / "brats", "2021")
    plain = {"preprocessing": Preprocessing(crop="none", normalize="zscore")}
    everything = data_module(root, **plain)
    case = everything.cases()[0]
    whole = everything.store.open(case).read()
    for path in (case.images["t1"], case.images["t2"]):  # the sequences that are not chosen are exchanged, then spoiled
        path.write_bytes(b"no image")
    chosen = data_module(root, task={"channels": ["flair", "t1ce"]}, limit_cases=4, split=Split(test=1, val=1), **plain)
    assert chosen.task.channels == ("flair", "t1ce")
    np.testing.assert_array_equal(chosen.store.open(case).read(), whole[[3, 1]])


def test_classes_in_place_of_regions():
    """The columns of Table 2 are classes; a case on which ET and the class it is made of differ from TC and WT."""
    classes = TUMOR.narrowed(regions={"NCR": ["ncr"], "ED": ["ed"], "ET": ["et"]})
    assert dict(classes.classes) == dict(TUMOR.classes)
    label, drawn = torch.tensor([0, 1, 1, 2, 2, 3, 3]), torch.tensor([0, 1, 3, 2, 3, 3, 3])

    def dice(task: Task) -> dict[str, float]:
        a, b = (task.region_masks(x) for x in (label, drawn))
        return {name: 2 * float((m & n).sum()) / float(m.sum() + n.sum()) for name, m, n in zip(task.regions, a, b, strict=True)}

    assert dice(TUMOR) == pytest.approx({"WT": 1, "TC": 8 / 9, "ET": 4 / 6})
    assert dice(classes) == pytest.approx({"NCR": 2 / 3, "ED": 2 / 3, "ET": 4 / 6})
    assert TUMOR.narrowed(regions={"A": ["et"]}).class_names == ("background", "et")
    with pytest.raises(SuiteError, match="did you mean 'et'"):
        TUMOR.narrowed(regions={"A": ["ett"]})
    cfg = composed("experiment=modality_ablation_unet/brats2021", "task.regions={NCR:[ncr],ED:[ed],ET:[et]}")
    assert instantiate(cfg.data, _convert_="all").task.regions == {"NCR": ("ncr",), "ED": ("ed",), "ET": ("et",)}


def test_a_grid_without_overlap_is_the_whole_volume():
    torch.manual_seed(0)
    network, image = nn.Conv3d(2, 3, 1), torch.randn(1, 2, 21, 16, 10)
    window = instantiate(composed("experiment=modality_ablation_unet/brats2021", "patch=[8,8,8]").model.inferer)
    assert (window.overlap, window.blending, window.starts) == (0, "constant", "clamped")
    assert isinstance(window, Window)

    def predict(view: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"x": network(view)}

    assert torch.allclose(window(image, predict)["x"], Whole()(image, predict)["x"], atol=1e-6)


# augmentation


def subject(side: int = 64) -> torchio.Subject:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(2, side, side, side, generator=generator)
    label = torch.randint(0, 4, (1, side, side, side), generator=generator)
    return torchio.Subject(image=torchio.ScalarImage(tensor=image), label=torchio.LabelMap(tensor=label.short()))


@pytest.mark.parametrize("name", ["restricted", "extensive"])
def test_labels_stay_what_they_are(name):
    chain, changed, moved = instantiate(composed(f"augmentation={name}").augmentation), 0, 0
    for seed in range(6):
        before = subject()
        torch.manual_seed(seed)
        after = chain(subject())
        assert set(after.label.data.unique().tolist()) <= {0, 1, 2, 3}
        changed += not torch.equal(after.image.data, before.image.data)
        moved += not torch.equal(after.label.data, before.label.data)
        assert after.image.data.shape == before.image.data.shape
    assert changed > 2
    assert (moved > 0) == (name == "extensive")


def test_probabilities_of_the_paper():
    chain = instantiate(composed("augmentation=extensive").augmentation).transforms.transforms
    assert [type(t).__name__ for t in chain] == [
        *("RandomAnisotropy", "RandomBlur", "RandomNoise", "RandomBiasField"),
        *("OneOf", "OneOf"),
    ]
    assert [t.probability for t in chain] == [0.25, 0.25, 0.25, 0.3, 0.8, 0.5]
    shares = [{type(t).__name__: round(p, 4) for t, p in t.transforms_dict.items()} for t in chain[4:]]
    assert shares[0] == {"RandomAffine": 0.8, "RandomElasticDeformation": 0.2}
    assert shares[1] == {"RandomMotion": 0.3333, "RandomSpike": 0.3333, "RandomGhosting": 0.3333}
    assert {t.include[0] for t in (*chain[:4], *chain[5].transforms_dict)} == {"image"}


def test_one_of_draws_by_weight():
    marks = [torchio.Lambda(lambda x, n=n: torch.full_like(x, n), types_to_apply=[torchio.INTENSITY]) for n in (1.0, 2.0)]
    torch.manual_seed(0)
    drawn = [float(one_of(marks, [3, 1], p=0.5)(subject(4)).image.data.mean()) for _ in range(200)]
    assert drawn.count(1.0) / 200 == pytest.approx(0.375, abs=0.09)
    assert drawn.count(2.0) / 200 == pytest.approx(0.125, abs=0.06)
    for weights in ([1], [0, 0], [1, -1]):
        with pytest.raises(SuiteError, match="one for each"):
            one_of(marks, weights)


# as a part of the suite


def test_a_checkpoint_holds_the_standard_scale_and_predicts_without_the_training_data(brats, tmp_path):
    common = [
        "experiment=modality_ablation_unet/brats2021",
        "task.channels=[t1ce,flair]",
        "debug=tiny",
        "trainer=cpu",
        f"runs={tmp_path}",
        "threads=1",
    ]
    run(*common, f"data.root={brats}", "augmentation=none")
    (folder,) = run_folders(tmp_path)
    assert rows(folder)
    checkpoint = folder / "checkpoints" / "last.ckpt"
    landmarks = np.array(read_checkpoint(checkpoint)["lesionbench"]["statistics"]["landmarks"])
    assert landmarks.shape == (2, 11)
    assert landmarks[:, 0] == pytest.approx(0)
    assert landmarks[:, -1] == pytest.approx(100)
    other = write_fake_brats(tmp_path / "others", "2021", count=1, seed=5)
    run(
        "job=predict",
        f"ckpt={checkpoint}",
        f"input={next(p for p in other.iterdir() if p.is_dir())}",
        f"out={tmp_path / 'out'}",
        "trainer=cpu",
    )
    assert list((tmp_path / "out").rglob("*.nii.gz"))


def test_another_method_takes_the_network(tmp_path):
    network = [
        "~model.network",
        "+model.network={_target_:lightning_modules.networks.LightUNet,_partial_:true,dimensions:2,preactivation:true}",
    ]
    run("benchmark=blobs", "model=mean_teacher", *network, "debug=tiny", "trainer=cpu", f"data.root={tmp_path / 'blobs'}", f"runs={tmp_path / 'runs'}", "threads=1")  # fmt: skip
    (folder,) = run_folders(tmp_path / "runs")
    assert rows(folder)
