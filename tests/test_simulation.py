"""The simulated-case generator: reproducible to the last bit, anatomically sane, written in true layouts."""

import json
import multiprocessing
import os
import re
import shutil
import signal
from dataclasses import fields
from functools import lru_cache
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage

from datamodules.readers.brats_files import find_brats
from datamodules.readers.folder_files import find_folder
from datamodules.simulated import simulation
from datamodules.simulated.brats_layout import survival_text, write_brats
from datamodules.simulated.difficulty import PRESETS, Difficulty
from datamodules.simulated.simulation import VARIANTS, Simulation, simulate, task_of, write_folder
from datamodules.simulated.simulation_variants import Deformation, Smooth, draw_for, grid
from lesionbench.errors import SuiteError
from lesionbench.geometry import Geometry, read_volume
from lesionbench.keyed import numpy_generator
from lesionbench.score_counts import ScoreCounts
from lesionbench.score_counts import dice as dice_of
from lightning_modules.anomaly.flair_threshold import equalized
from tests.harness import held

COARSE = 4.0


@lru_cache(maxsize=64)
def case(variant="tumor", index=0, spacing=COARSE, seed=0, **difficulty):
    return simulate(Simulation(variant, seed, spacing, difficulty), index)


def arrays(found):
    """Every array of a case, by name."""
    named = {**found.images, **{f"rater{r}": a for r, a in enumerate(found.raters)}, "label": found.label, "habitats": found.habitats}
    return {name: array for name, array in named.items() if array is not None}


def bits(found):
    return {name: (array.dtype.str, array.shape, array.tobytes()) for name, array in arrays(found).items()}, found.site, found.attributes


def in_worker(variant):
    return bits(simulate(Simulation(variant, 0, 6.0), 3))


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


# the same case everywhere


def test_a_fresh_process_makes_the_same_bits():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(in_worker, ["habitats", "raters"]) == [in_worker("habitats"), in_worker("raters")]


def test_threads_global_seeds_and_earlier_cases_do_not_matter():
    expected = in_worker("tumor")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        torch.manual_seed(5)
        np.random.seed(5)
        simulate(Simulation("stroke", 9, 6.0), 1)
        assert in_worker("tumor") == expected
    finally:
        torch.set_num_threads(threads)


def test_seed_and_index_make_other_cases():
    found = [case(index=0), case(index=1), case(index=0, seed=1)]
    for a, b in [(0, 1), (0, 2), (1, 2)]:
        assert (found[a].label != found[b].label).any()
        assert (found[a].images["t1"] != found[b].images["t1"]).mean() > 0.1
    assert found[1].id == "sim_0001"


def test_settings_hold_the_values_so_that_a_key_of_them_changes_with_any():
    assert str(Simulation()) == str(Simulation(difficulty={})) == str(Simulation(difficulty=PRESETS["default"]))
    changed = [Simulation(seed=1), Simulation(spacing=1), Simulation(variant="stroke"), Simulation(difficulty={"noise": 0.2})]
    assert len({str(s) for s in [Simulation(), *changed]}) == 5
    assert f"generator={simulation.GENERATOR}" in str(Simulation())


def test_another_spacing_shows_the_same_subject():
    fine, coarse = case(spacing=2.0), case(spacing=4.0)
    volume = [(c.label > 0).sum() * s**3 for c, s in ((fine, 2), (coarse, 4))]
    assert volume[1] == pytest.approx(volume[0], rel=0.15)
    centers = [nib.affines.apply_affine(c.affine, np.argwhere(c.label > 0).mean(axis=0)) for c in (fine, coarse)]
    np.testing.assert_allclose(centers[0], centers[1], atol=2)
    assert fine.attributes["age"] == coarse.attributes["age"]


# what is in a case


@pytest.mark.parametrize("variant", VARIANTS)
def test_labels_lie_in_the_brain_and_hold_the_values_of_the_task(variant):
    task = task_of(variant)
    for index in range(3):
        found = case(variant, index)
        assert tuple(found.images) == task.channels
        brain = next(iter(found.images.values())) > 0
        assert 1.0e6 < brain.sum() * COARSE**3 < 2.4e6  # mm3
        assert ndimage.label(brain, np.ones((3, 3, 3)))[1] <= 3
        for image in found.images.values():
            assert image.dtype == np.int16
            assert ((image > 0) == brain).all()
            assert 100 < np.median(image[brain]) < 3000
        labels = [found.label, *found.raters] if variant != "raters" else found.raters
        for label in labels:
            assert label.dtype == np.uint8
            assert not label[~brain].any()
            task.from_disk(label)  # raises on a foreign value
        if variant != "raters":
            assert not found.raters
        if variant == "tissue":
            assert ((label > 0) == brain).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_class_of_the_task_occurs(variant):
    found = [case(variant, index) for index in range(4)]
    present = set(np.unique([label for c in found for label in (c.raters or [c.label])[:1]]).tolist())
    assert present == ({0} if variant == "healthy" else {v[0] for v in task_of(variant).classes.values()})


def test_tumors_are_nested_edema_around_rim_around_necrosis():
    for index in range(4):
        found = case(index=index, spacing=3.0, irregularity=0.0)
        center = np.argwhere(np.isin(found.label, (1, 4))).mean(axis=0)

        def distance(value, found=found, center=center):
            return np.sqrt(((np.argwhere(found.label == value) - center) ** 2).sum(axis=1)).mean()

        assert distance(2) > distance(1)
        if found.attributes["grade"] == "HGG":
            assert distance(2) > distance(4) > distance(1)
        parts, _ = ndimage.label(found.label > 0, np.ones((3, 3, 3)))
        assert np.bincount(parts[parts > 0]).max() > 0.9 * (parts > 0).sum()


def test_high_grade_tumors_have_every_class_and_some_low_grade_ones_do_not_enhance():
    grades = {i: case(index=i) for i in range(24)}
    high = [c for c in grades.values() if c.attributes["grade"] == "HGG"]
    low = [c for c in grades.values() if c.attributes["grade"] == "LGG"]
    assert high
    assert low
    assert all(set(np.unique(c.label)) == {0, 1, 2, 4} for c in high)
    enhancing = [(c.label == 4).sum() / np.isin(c.label, (1, 4)).sum() for c in low]
    assert min(enhancing) == 0
    assert np.mean(enhancing) < 0.5


def test_lesions_look_as_they_should():
    found = simulate(
        Simulation("tumor", 0, 2.0, {"noise": 0, "bias": 0, "contrast": 0, "site": 0, "lesion_contrast": [1, 1], "patches": 0}), 1
    )
    normal = (found.label == 0) & (found.images["t1"] > 0)

    def mean(channel, value):
        return np.median(found.images[channel][found.label == value]) / np.median(found.images[channel][normal])

    assert mean("flair", 2) > 1.2
    assert mean("t2", 2) > 1.2
    assert mean("t1ce", 4) > 1.3 > mean("t1", 4)
    assert mean("t1", 1) < 0.75
    scar = simulate(Simulation("stroke", 0, 2.0), 1)
    assert np.median(scar.images["t1"][scar.label == 1]) < 0.7 * np.median(scar.images["t1"][(scar.label == 0) & (scar.images["t1"] > 0)])
    spotted = simulate(Simulation("spots", 0, 2.0), 1)
    brain = spotted.images["t1"] > 0
    assert np.median(spotted.images["flair"][spotted.label == 1]) > np.percentile(spotted.images["flair"][brain & (spotted.label == 0)], 80)
    assert ndimage.label(spotted.label, np.ones((3, 3, 3)))[1] >= 3


def test_strokes_stay_in_one_hemisphere():
    for index in range(6):
        x = nib.affines.apply_affine(case("stroke", index).affine, np.argwhere(case("stroke", index).label == 1))[:, 0]
        assert max((x > 0).mean(), (x < 0).mean()) > 0.95


def test_raters_vary_in_number_and_differ_systematically():
    found = [case("raters", i) for i in range(10)]
    assert {len(c.raters) for c in found} == {2, 3, 4, 5}
    assert task_of("raters").raters == 5
    assert all(c.label is None for c in found)
    sizes = [[r.sum() for r in c.raters[:2]] for c in found]
    assert all(over > under > 0 for under, over in sizes)  # rater 1 draws inside, rater 2 outside
    agreement = [dice(c.raters[0] > 0, c.raters[1] > 0) for c in found]
    assert all(0.2 < a < 0.98 for a in agreement)


def test_healthy_is_the_same_subject_without_the_tumor():
    well, ill = case("healthy", mass_effect=0), case("tumor", mass_effect=0)
    assert not well.label.any()
    near = ndimage.binary_dilation(ill.label > 0, iterations=6)
    for channel in well.images:
        assert (well.images[channel][~near] != ill.images[channel][~near]).mean() < 1e-3
        assert (well.images[channel] != ill.images[channel])[ill.label > 0].mean() > 0.8
    assert "survival" not in well.attributes


def test_habitats_divide_the_tumor_and_decide_survival():
    found = [case("habitats", i, 6.0) for i in range(40)]
    assert {int(c.habitats.max()) for c in found} <= {2, 3, 4}
    assert all(((c.habitats > 0) == (c.label > 0)).all() for c in found)
    np.testing.assert_array_equal(found[0].label, case("tumor", 0, 6.0).label)
    died = [c for c in found if c.attributes["event"]]
    share = [(c.habitats == 2).sum() / (c.habitats > 0).sum() - (c.habitats == 1).sum() / (c.habitats > 0).sum() for c in died]
    days = [np.log(c.attributes["survival"]) for c in died]
    assert np.corrcoef(share, days)[0, 1] < -0.2


def test_habitats_differ_in_intensity():
    plain = {"noise": 0, "bias": 0, "contrast": 0, "site": 0}
    ratio = {}
    a, b = (simulate(Simulation(v, 0, COARSE, plain), 1) for v in ("habitats", "tumor"))
    for habitat in np.unique(a.habitats[a.habitats > 0]):
        where = a.habitats == habitat
        ratio[int(habitat)] = tuple(round(float(np.median(a.images[c][where] / b.images[c][where])), 1) for c in a.images)
    assert len(set(ratio.values())) == len(ratio) >= 2


def test_attributes_are_plausible_and_plain():
    found = [case(index=i, spacing=8.0).attributes for i in range(24)]
    assert all(18 <= a["age"] <= 90 and a["survival"] >= 5 and a["event"] in (0, 1) for a in found)
    assert 0 < np.mean([a["event"] for a in found]) < 1
    assert {a["grade"] for a in found} == {"HGG", "LGG"}
    assert json.loads(json.dumps(found)) == found
    assert {case(index=i, spacing=8.0).site for i in range(24)} == {"A", "B", "C"}


def test_sites_differ_in_contrast():
    settings = {"noise": 0, "bias": 0, "contrast": 0}

    def gray_to_white(site):
        ratios = []
        for index in [i for i in range(20) if case("tissue", i).site == site][:3]:
            image, label = (lambda c: (c.images["t1"], c.label))(
                simulate(Simulation("tissue", 0, COARSE, {**settings, "site": 0.2}), index)
            )
            ratios.append(np.median(image[label == 2]) / np.median(image[label == 3]))
        return ratios

    by_site = [gray_to_white(s) for s in ("A", "B", "C")]
    within, between = max(np.std(r) for r in by_site), np.std([np.mean(r) for r in by_site])
    assert between > 2 * within


# difficulty: every value changes what it names and nothing else


@pytest.mark.parametrize("name", ["noise", "bias", "contrast", "site", "caps", "spots", "lesion_contrast"])
def test_appearance_values_leave_the_anatomy(name):
    value = {"spots": 40, "lesion_contrast": (0.2, 0.3), "caps": 3.0}.get(name, 0)
    plain, changed = case("habitats"), case("habitats", **{name: value})
    np.testing.assert_array_equal(plain.label, changed.label)
    np.testing.assert_array_equal(plain.habitats, changed.habitats)
    assert plain.attributes == changed.attributes
    assert all((plain.images[c] != changed.images[c]).any() for c in plain.images)
    assert all(((plain.images[c] > 0) == (changed.images[c] > 0)).all() for c in plain.images)
    if name == "lesion_contrast":
        near = ndimage.binary_dilation(plain.label > 0, iterations=6)
        assert (plain.images["t2"][~near] != changed.images["t2"][~near]).mean() < 1e-4


def test_patches_are_bright_on_flair_alone():
    index = next(i for i in range(9) if (case(index=i).images["flair"] != case(index=i, patches=0).images["flair"]).any())
    with_patches, without = case(index=index), case(index=index, patches=0)
    for channel in ("t1", "t1ce", "t2"):
        np.testing.assert_array_equal(with_patches.images[channel], without.images[channel])
    assert (with_patches.images["flair"] - without.images["flair"].astype(int)).max() > 20
    np.testing.assert_array_equal(case(index=index, patch_contrast=0).images["flair"], without.images["flair"])


@pytest.mark.parametrize(("name", "value"), [("radius", (40, 40)), ("irregularity", 0), ("mass_effect", 0), ("deformation", 0)])
def test_shape_values_leave_what_they_do_not_name(name, value):
    plain, changed = case(), case(**{name: value})
    assert (plain.label != changed.label).any()
    assert plain.attributes["age"] == changed.attributes["age"]
    same_brain = ((plain.images["t1"] > 0) == (changed.images["t1"] > 0)).mean()
    if name == "irregularity":
        assert same_brain == 1
    assert same_brain > (0.85 if name == "deformation" else 0.97)
    if name == "radius":
        assert (changed.label > 0).sum() > 1.5 * (plain.label > 0).sum()


def test_without_deformation_all_subjects_are_the_template():
    first, second = (case("healthy", i, deformation=0) for i in range(2))
    np.testing.assert_array_equal(first.images["t1"] > 0, second.images["t1"] > 0)
    assert (case("healthy", 0).images["t1"] > 0).tolist() != (case("healthy", 1).images["t1"] > 0).tolist()


def test_noise_has_the_size_it_names():
    quiet, loud = (simulate(Simulation("tissue", 0, COARSE, {"noise": n, "bias": 0, "contrast": 0, "site": 0}), 0) for n in (0.0, 0.1))
    white = (quiet.label == 3) & (quiet.images["t1"] > 0)
    difference = (loud.images["t1"][white] - quiet.images["t1"][white].astype(float)) / np.median(quiet.images["t1"][white])
    assert difference.std() == pytest.approx(0.1, rel=0.15)


def test_presets_are_ordered_from_easy_to_hard():
    easy, default, hard = (PRESETS[p] for p in ("easy", "default", "hard"))
    assert list(PRESETS) == ["easy", "default", "hard"]
    for name in ("deformation", "contrast", "site", "bias", "noise", "irregularity", "caps", "spots", "patches", "patch_contrast"):
        assert getattr(easy, name) < getattr(default, name) < getattr(hard, name)
    assert easy.lesion_contrast[0] > default.lesion_contrast[0] > hard.lesion_contrast[0]
    assert easy.radius[0] > default.radius[0] > hard.radius[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "tumour"}, "did you mean 'tumor'"),
        ({"difficulty": "hrad"}, "did you mean 'hard'"),
        ({"difficulty": {"noize": 1}}, "did you mean 'noise'"),
        ({"difficulty": {"noise": -1}}, "difficulty.noise"),
        ({"difficulty": {"noise": "much"}}, "difficulty.noise"),
        ({"difficulty": {"radius": 5}}, "difficulty.radius"),
        ({"difficulty": {"radius": [20, 10]}}, "low <= high"),
        ({"difficulty": {"radius": [20, 90]}}, "45 mm"),
        ({"spacing": 0}, "spacing=0"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(SuiteError, match=message):
        Simulation(**options)
    with pytest.raises(SuiteError, match="did you mean 'spots'"):
        task_of("spot")


def test_lists_from_configuration_become_tuples():
    found = Simulation(difficulty={"radius": [10, 20], "spots": 3})
    assert found.difficulty.radius == (10.0, 20.0)
    assert {f.name for f in fields(Difficulty)} == set(vars(found.difficulty))


# the pieces


def test_smooth_fields_have_unit_deviation_and_do_not_depend_on_the_grid():
    field = Smooth(numpy_generator("field"), 15.0)
    values = field(grid(3.0))
    assert values.dtype == np.float32
    assert values.std() == pytest.approx(1, abs=0.12)
    axes = [a[5:9] for a in grid(3.0)]
    np.testing.assert_array_equal(field(axes), values[5:9, 5:9, 5:9])
    assert np.abs(np.diff(field([np.arange(0, 190, 0.5, np.float32), axes[1], axes[2]]), axis=0)).max() < 0.25  # continuous across knots


def test_place_inverts_the_deformation():
    deformation = Deformation(draw_for(0, 2), PRESETS["hard"])
    deformation.push = (np.array([60.0, 110, 90]), 25.0, 0.3)
    for point in ([70.0, 120, 80], [130.0, 60, 100]):
        placed = deformation.place(point)
        back = [t.item() for t in deformation([placed[k : k + 1] for k in range(3)])]
        np.testing.assert_allclose(back, point, atol=0.05)
        assert np.abs(placed - point).max() > 0.5


def test_geometry_is_lps_on_the_template():
    found = case()
    assert nib.aff2axcodes(found.affine) == ("L", "P", "S")
    geometry = Geometry.of(found.affine, found.label.shape)
    assert geometry.spacing == (COARSE,) * 3
    center = nib.affines.apply_affine(found.affine, np.argwhere(found.images["t1"] > 0).mean(axis=0))
    np.testing.assert_allclose(center, [0, -18, 10], atol=8)  # MNI
    tissue = case("tissue", deformation=0)
    behind = geometry.to_canonical(tissue.label)[:, : tissue.label.shape[1] // 3]
    assert (behind[:, :, :12] > 0).sum() > 500  # the cerebellum is low and at the back


def test_a_missing_template_is_explained(monkeypatch):
    from datamodules.simulated import simulation_variants

    monkeypatch.setattr(
        simulation_variants.importlib.util, "find_spec", lambda name: SimpleNamespace(origin="/nowhere/nilearn/__init__.py")
    )
    with pytest.raises(SuiteError, match="pip install 'nilearn"):
        simulation_variants.template.__wrapped__(2.0)


# files


@pytest.mark.parametrize("variant", ["raters", "habitats"])
def test_folder_layout_reads_back(tmp_path, variant):
    settings = Simulation(variant, 0, 6.0)
    write_folder(tmp_path, settings, range(2))
    task = task_of(variant)
    cases = find_folder(tmp_path, list(task.channels))
    assert [c.id for c in cases] == ["sim_0000", "sim_0001"]
    for index, found in enumerate(cases):
        made = simulate(settings, index)
        assert found.site == made.site
        assert found.attributes == made.attributes
        for channel, image in made.images.items():
            array, affine, _ = read_volume(found.images[channel])
            np.testing.assert_array_equal(array, image)
            np.testing.assert_allclose(affine, made.affine)
            assert array.dtype == np.int16
        assert [p.name for p in found.raters] == [f"{found.id}_rater{r + 1}.nii.gz" for r in range(len(made.raters))]
        for path, label in zip(found.raters or [found.label], made.raters or [made.label], strict=True):
            np.testing.assert_array_equal(read_volume(path)[0], label)
        assert (tmp_path / "habitats" / f"{found.id}.nii.gz").exists() == (variant == "habitats")
    assert not list(tmp_path.rglob(".writing-*"))


def test_folder_skips_what_is_complete_and_repairs_what_is_not(tmp_path, monkeypatch):
    settings = Simulation("stroke", 0, 6.0)
    write_folder(tmp_path, settings, range(2))
    expected = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*.json")}
    (tmp_path / "attributes" / "sim_0001.json").unlink()  # as after a kill before the last file
    (tmp_path / "labels" / "sim_0001.nii.gz").unlink()
    (tmp_path / "attributes.csv").unlink()
    made = []
    monkeypatch.setattr(simulation, "simulate", lambda s, i: made.append(i) or simulate(s, i))
    write_folder(tmp_path, settings, range(3))
    assert sorted(made) == [1, 2]
    assert all((tmp_path / name).read_bytes() == content for name, content in expected.items())
    assert [c.id for c in find_folder(tmp_path, ["t1"]) if c.label and c.attributes] == ["sim_0000", "sim_0001", "sim_0002"]
    made.clear()
    (tmp_path / "attributes.csv").unlink()  # killed between the last case and the table
    write_folder(tmp_path, settings, range(3))
    assert not made
    assert len((tmp_path / "attributes.csv").read_text().splitlines()) == 4


def test_a_failing_write_leaves_no_half_case(tmp_path, monkeypatch):
    written = []

    def fails_at_the_label(path, array, affine):
        written.append(path.name)
        if "labels" in str(path):
            raise OSError("disk full")
        path.write_bytes(b"x")

    monkeypatch.setattr(simulation, "write_volume", fails_at_the_label)
    with pytest.raises(OSError, match="disk full"):
        write_folder(tmp_path, Simulation("stroke", 0, 8.0), [0])
    assert written == ["sim_0000_t1.nii.gz", "sim_0000.nii.gz"]
    assert not list(tmp_path.rglob("*.*"))


FIRST_FILES = {
    "2018": r"(HGG|LGG)/Brats18_[ABC]_000_1/Brats18_[ABC]_000_1_t1ce\.nii\.gz",
    "2019": r"(HGG|LGG)/BraTS19_[ABC]_000_1/BraTS19_[ABC]_000_1_t1ce\.nii\.gz",
    "2020": r"BraTS20_Training_001/BraTS20_Training_001_t1ce\.nii\.gz",
    "2021": r"BraTS2021_00000/BraTS2021_00000_t1ce\.nii\.gz",
    "2023": r"BraTS-GLI-00000-000/BraTS-GLI-00000-000-t1c\.nii\.gz",
}


@pytest.mark.parametrize("layout", list(FIRST_FILES))
def test_brats_layouts_read_back(tmp_path, layout):
    settings = Simulation("tumor", 0, 6.0)
    out = write_brats(tmp_path / "new", settings, 3, layout, progress=False)
    assert any(re.fullmatch(FIRST_FILES[layout], str(p.relative_to(out))) for p in out.rglob("*.nii.gz"))
    assert len(list(out.rglob("*.nii.gz"))) == 3 * 5
    found = {c.id: c for c in find_brats(out, layout)}
    made = [case("tumor", i, 6.0) for i in range(3)]
    assert len(found) == 3
    for number, (identifier, one) in enumerate(sorted(found.items(), key=lambda item: re.findall(r"\d{3,}", item[0])[0])):
        attributes = made[number].attributes
        label, _, _ = read_volume(one.label)
        np.testing.assert_array_equal(
            label, np.where(made[number].label == 4, 3, made[number].label) if layout == "2023" else made[number].label
        )
        np.testing.assert_array_equal(read_volume(one.images["flair"])[0], made[number].images["flair"])
        if layout in ("2018", "2019", "2020"):
            listed = ("age", "survival", "event") if attributes["grade"] == "HGG" else ()
            assert {k: one.attributes[k] for k in ("grade", *listed)} == {k: attributes[k] for k in ("grade", *listed)}, identifier
            assert ("survival" in one.attributes) == bool(listed)
            assert one.site == made[number].site
        else:
            assert not one.attributes
    tables = {p.name for p in out.glob("*.csv")}
    assert tables == {"2018": {"survival_data.csv"}, "2019": {"survival_data.csv"}, "2020": {"survival_info.csv", "name_mapping.csv"}}.get(
        layout, set()
    )


def test_survival_is_written_as_brats_writes_it():
    assert survival_text({"survival": 289, "event": 1}) == "289"
    assert survival_text({"survival": 361, "event": 0}) == "ALIVE (361 days later)"


def test_cases_in_a_brats_layout_are_completed_after_a_kill(tmp_path, monkeypatch):
    from datamodules.simulated import brats_layout

    settings = Simulation(spacing=8.0)
    whole = write_brats(tmp_path / "whole", settings, 3, progress=False)
    real, written = brats_layout.write_volume, []

    def killed(*arguments):
        written.append(arguments)
        if len(written) == 8:  # in the second case
            os.kill(os.getpid(), signal.SIGKILL)
        real(*arguments)

    out = tmp_path / "killed"
    with monkeypatch.context() as patched:
        patched.setattr(brats_layout, "write_volume", killed)
        process = multiprocessing.get_context("fork").Process(target=write_brats, args=(out, settings, 3, "2020", False))
        process.start()
        process.join(60)
    assert process.exitcode == -signal.SIGKILL
    first = out / "BraTS20_Training_001" / "BraTS20_Training_001_seg.nii.gz"
    before = first.stat().st_mtime_ns
    for other in ((Simulation(spacing=8.0, seed=1), 3), (settings, 4)):
        with pytest.raises(SuiteError, match="not an empty folder"):
            write_brats(out, *other, progress=False)
    with held(out / ".simulating.json"), pytest.raises(SuiteError, match="another process is writing these cases"):
        write_brats(out, settings, 3, progress=False)
    write_brats(out, settings, 3, progress=False)
    assert first.stat().st_mtime_ns == before
    names = [sorted(str(p.relative_to(root)) for p in root.rglob("*")) for root in (whole, out)]
    assert names[0] == names[1]
    for name in names[0]:
        if name.endswith(".nii.gz"):
            assert np.array_equal(np.asarray(nib.load(whole / name).dataobj), np.asarray(nib.load(out / name).dataobj)), name
        elif name.endswith(".csv"):
            assert (whole / name).read_text() == (out / name).read_text()


def test_brats_refuses_what_it_cannot_do(tmp_path, monkeypatch):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(SuiteError, match="not an empty folder"):
        write_brats(tmp_path / "used", Simulation(), 1, progress=False)
    with pytest.raises(SuiteError, match="did you mean '2021'"):
        write_brats(tmp_path / "new", Simulation(), 1, "20211", progress=False)
    with pytest.raises(SuiteError, match="only tumor and habitats"):
        write_brats(tmp_path / "new", Simulation("stroke"), 1, progress=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(SuiteError, match="GB are free"):
        write_brats(tmp_path / "new", Simulation(), 1, progress=False)


# the baseline


def test_a_flair_threshold_is_far_from_enough_on_default_cases():
    found = [case(index=i) for i in range(8)]
    counts = [ScoreCounts.of(equalized(c.images["flair"], c.images["flair"] > 0), c.label > 0) for c in found]
    _, threshold = sum(counts[1:], counts[0]).best_dice(100)
    scores = [float(dice_of(*c.above(np.array(threshold)), c.positive)) for c in counts]
    assert 0.3 < np.mean(scores) < 0.7
