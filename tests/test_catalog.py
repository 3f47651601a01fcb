"""The catalog: an entry for everything, facts that agree with classes, configurations, pages and tables, and what the job shows of it."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hydra.utils import get_object

import lightning_modules
from lesionbench.errors import SuiteError
from lesionbench.installation import CONF
from lesionbench.jobs import catalog
from lesionbench.jobs.catalog import EFFECTS, INDEX, NEEDS, Entry, chosen, entries, families, find, root
from lesionbench.jobs.command_line import options
from lesionbench.jobs.methods import PAGE, counted, page, table
from lesionbench.resolvers import register
from tests.harness import composed, run

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
ENTRIES = entries()
METHODS = [entry for entry in ENTRIES if not entry.is_network]
NETWORKS = [entry for entry in ENTRIES if entry.is_network]
RENEW = "make catalog renews it"


def named(found: list[Entry]) -> dict:
    """Parametrizes a test by entries."""
    return {"argnames": "entry", "argvalues": found, "ids": [entry.name for entry in found]}


def test_every_method_and_network_has_an_entry():
    known = {get_object(entry.target) for entry in METHODS}
    bases = {lightning_modules.Method, lightning_modules.SegmentationMethod, lightning_modules.SemiSupervised, lightning_modules.Cascade}
    public = {getattr(lightning_modules, name) for name in lightning_modules.__all__}
    assert {c.__name__ for c in public - known - bases if issubclass(c, lightning_modules.Method)} == set()
    for group, found in (("model", METHODS), ("model/network", NETWORKS)):
        listed = [config for entry in found for config in entry.configs]
        assert sorted(listed) == options(group)


def test_an_entry_lies_beside_what_it_is_about():
    for entry in METHODS:
        if entry.configs:
            assert get_object(entry.target).__module__ == f"lightning_modules.{entry.family}.{entry.name}"
        else:
            assert get_object(entry.target) is not None
    for entry in NETWORKS:
        assert get_object(entry.target).__module__.startswith("lightning_modules.networks.")
    assert len({entry.name for entry in ENTRIES}) == len(ENTRIES)


@pytest.mark.parametrize(**named(ENTRIES))
def test_pages_tables_and_figures_agree(entry):
    text = (DOCS / entry.page).read_text()
    if entry.is_network:
        assert f"`{entry.name}`" in text or entry.target.rpartition(".")[2] in text
    else:
        assert entry.page == f"methods/{entry.name}.md"
        assert entry.link is None or entry.link in text
        assert entry.year is None or str(entry.year) in text
    evidence = entry.evidence
    assert evidence.effect in EFFECTS
    assert (evidence.effect == "not compared") <= entry.is_network
    assert (evidence.effect in ("not run", "not compared")) == (not evidence.text)
    figures = re.findall(r"\d*\.\d+", re.sub(r"2\.5D", "", evidence.text))
    assert figures or not evidence.text
    results = text if entry.is_network else text[text.index("## Results") :]
    assert [figure for figure in figures if not re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", results)] == []
    if evidence.effect == "not run":
        assert "Not run" in results
    if evidence.csv:
        assert (DOCS / "results" / evidence.csv).is_file()
        assert f"results/{evidence.csv}" in results


@pytest.mark.parametrize(**named(METHODS))
def test_needs_and_dimensions_agree_with_the_class(entry):
    assert set(entry.needs) <= set(NEEDS)
    made = get_object(entry.target)
    assert ("unlabeled cases" in entry.needs) == ("unlabeled" in made.streams)
    assert ("raters" in entry.needs) == issubclass(made, lightning_modules.MultiRater)
    assert ("labels" in entry.needs) == (
        issubclass(made, lightning_modules.SegmentationMethod) and not issubclass(made, lightning_modules.Autoencoder)
    )
    takes = "checkpoint" in chosen_keys(entry) or made.__module__.endswith((".ensemble", ".habitats"))
    assert ("checkpoint" in entry.needs) == takes
    views = {"slice": 2, "slab": 2.5}
    for experiment in entry.experiments:
        inferer = {**chosen("model", entry.name), **chosen("experiment", experiment)}.get("model/inferer")
        if inferer:
            assert views.get(inferer, 3) in entry.dimensions, experiment


def chosen_keys(entry: Entry) -> set[str]:
    """Keys of the model configuration."""
    return set(catalog._read(CONF / "model" / f"{entry.name}.yaml"))


@pytest.mark.parametrize(**named(ENTRIES))
def test_the_index_holds_what_is_counted(entry):
    register()
    assert counted(entry) == json.loads(INDEX.read_text())[entry.name], RENEW


def test_the_page_is_current_and_the_index_has_no_more():
    assert set(json.loads(INDEX.read_text())) == {entry.name for entry in ENTRIES}, RENEW
    assert (ROOT / PAGE).read_text() == page(), RENEW


# one of each way in which a configuration chooses: by its name alone, bases, overrides, several networks, added models, a package of its own
SAMPLE = [
    "autoencoder/simulated_variational", "fae/simulated", "nnunet_region_loss_ensemble/brats2021", "modality_pairing/toy_missing",
    "reciprocal_adversarial/toy2d_robustness", "spin/simulated_stroke", "supervised/ibsr", "umm/thick_slices_unreliable", "coranet/left_atrium", "multi_rater/simulated",
]  # fmt: skip


@pytest.mark.parametrize("experiment", SAMPLE)
def test_choices_are_those_of_hydra(experiment):
    choices = composed(f"experiment={experiment}", hydra=True).hydra.runtime.choices
    assert root("model", choices["model"]) == root("model", chosen("experiment", experiment).get("model", "supervised"))
    networks = {
        root("model/network", v) for k, v in choices.items() if k.partition("@")[0] == "model/network" and v and k.count("network@") < 2
    }
    if "umm" not in experiment:  # of which one branch is made of another network
        assert networks == catalog._networks(experiment)
    assert networks >= catalog._networks(experiment)


def test_benchmarks_are_those_that_the_tests_run():
    found = {entry.name: set(entry.benchmarks) for entry in ENTRIES}
    few = {"acdc", "blobs", "left_atrium", "simulated_few_labels"}
    assert found["mean_teacher"] == found["co_learning"] == few
    assert found["spin"] == found["umm"] == found["ensemble"] == set()
    assert found["supervised"] > few | {"simulated", "brats2018"}
    assert "acdc" in found["multi_head_unet"] - found["basic_unet"]
    assert "simulated" in found["basic_unet"] - found["multi_head_unet"]


@pytest.mark.parametrize("name", ["co_learning", "CoLearning", "colearning", "Co-learning", "co learning"])
def test_an_entry_is_found_by_any_of_its_names(name):
    assert find(name).name == "co_learning"


def test_variants_former_names_and_classes_lead_to_the_entry():
    found = {"coranet_paper": "coranet", "vat": "virtual_adversarial_training", "umm_2d": "basic_unet", "branched_vnet": "multi_head_vnet"}
    assert {name: find(name).name for name in found} == found
    assert find("SubpixelNet").name == "subpixel"
    assert find("Supervised").name == "supervised"
    with pytest.raises(SuiteError, match=r"Unknown method or network 'meanteacherr'; did you mean 'mean_teacher'\? Known: .*unetr"):
        find("meanteacherr")


def test_the_example_of_the_documentation_is_an_entry(tmp_path, monkeypatch):
    (text,) = re.findall(
        r"^```yaml\n# lightning_modules/(supervised/noise_consistency\.yaml\n.*?)^```",
        (DOCS / "adding_a_method.md").read_text(),
        re.M | re.S,
    )
    place, _, data = text.partition("\n")
    (tmp_path / "supervised").mkdir()
    (tmp_path / place).write_text(data + "class: mine.NoiseConsistency\n")
    monkeypatch.setattr(catalog, "FOLDER", tmp_path)
    (entry,) = entries()
    assert set(entry.needs) <= set(NEEDS)
    assert (entry.name, entry.family, entry.year, entry.evidence.effect) == ("noise_consistency", "supervised", 2024, "not shown")
    for need in NEEDS:
        assert f"`{need}`" in (DOCS / "adding_a_method.md").read_text()


def test_mistakes_in_an_entry_name_the_file(tmp_path, monkeypatch):
    (tmp_path / "supervised").mkdir()
    path = tmp_path / "supervised" / "mine.yaml"
    monkeypatch.setattr(catalog, "FOLDER", tmp_path)
    path.write_text("titel: Mine\n")
    with pytest.raises(SuiteError, match=r"mine\.yaml: unknown keys \['titel'\]"):
        entries()
    catalog._read.cache_clear()
    path.write_text("title: Mine\n")
    with pytest.raises(SuiteError, match=r"mine\.yaml: 'paper' is missing"):
        entries()


@pytest.mark.parametrize("width", [100, 160])
def test_the_table_cuts_nothing(width):
    from rich.console import Console

    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table())
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    seen = "".join(text.split())
    for entry in ENTRIES:
        assert entry.name in text
    words = {word for entry in METHODS for word in entry.evidence.line().split()}
    assert {word for word in words if word not in seen} == set()
    assert families()["semi_supervised"][0] in text


def test_the_job_prints_and_writes(tmp_path, capsys):
    run("job=methods", "report=json")
    listed = json.loads(capsys.readouterr().out)
    assert {row["name"]: row for row in listed}["coranet"]["evidence"]["csv"] == "coranet_blobs.csv"
    run("job=methods", "name=flair_threshold", f"out={tmp_path / 'new' / 'one.json'}")
    one = json.loads((tmp_path / "new" / "one.json").read_text())
    assert (one["name"], one["parameters"], one["needs"]) == ("flair_threshold", 0, ["labels for a threshold"])
    capsys.readouterr()
    run("job=methods", "name=spin")
    shown = " ".join(capsys.readouterr().out.split())
    for part in ("lightning_modules.SPiN", "arXiv:2109.08791", "experiment=spin/atlas", "docs/results/spin_simulated_stroke.csv", "0.554"):
        assert part in shown
    run("job=methods")
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 160


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["report=html"], "Unknown report 'html'"),
        (["out=table.csv"], "job=methods writes JSON, out=<file>.json"),
        (["report=docs", "name=umm"], "leave name= and out= away"),
        (["name=umn"], "did you mean 'umm'"),
    ],
)
def test_mistakes_are_answered(overrides, message):
    with pytest.raises(SuiteError, match=re.escape(message)):
        run("job=methods", *overrides)


def test_the_table_needs_no_torch():
    import subprocess
    import sys

    code = "import sys; from lesionbench.jobs.catalog import entries; from lesionbench.jobs.methods import table; table(); assert not {'torch', 'monai'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_evidence_that_was_measured_says_so():
    """The line of the table: the effect first, then the figures."""
    evidence = find("umm").evidence
    assert evidence.line().startswith("not shown: thick slices")
    assert replace(evidence, text="", effect="not run").line() == "not run"
