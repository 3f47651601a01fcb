"""The documentation: its commands compose and build, its examples run, its links lead somewhere."""

import contextlib
import dataclasses
import io
import itertools
import re
import shlex
import shutil
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.utils import instantiate
from omegaconf import OmegaConf

import datamodules
import lightning_modules
from hydra_plugins.lesionbench_optuna.optuna_search import OptunaSearchConf
from lesionbench.checkpoint import build_method
from lesionbench.jobs.command_line import CONF, JOBS, options
from lesionbench.jobs.run_folder import RunFolder
from lesionbench.jobs.stages import _stage_config
from lightning_modules.segmentation import SegmentationMethod
from tests import harness
from tests.fake_data import LPS, fake_case
from tests.harness import composed
from tests.test_nnunet_data import write_decathlon, write_nnunet

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = ("noise_consistency/simulated", "supervised/wmh", "supervised/simulated_two_stage")  # experiments that the pages add
FLAGS = {"-m", "--multirun", "--help", "--cfg", "job", "--info", "all"}


def fenced(text: str, language: str) -> list[str]:
    """Fenced code of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    """Fenced code of one language on a page."""
    return fenced(page.read_text(), language)


def called(text: str) -> list[list[str]]:
    """Arguments of every call of run.py in the shell blocks of a text."""
    lines = [line for block in fenced(text, "bash") for line in block.replace("\\\n", " ").splitlines() if "run.py" in line]
    return [shlex.split(line.partition("run.py")[2], comments=True) for line in lines]


def commands(page: Path) -> list[list[str]]:
    """Arguments of every call of run.py on a page."""
    return called(page.read_text())


def overrides(arguments: list[str]) -> list[str]:
    """The overrides of a call; of a sweep the first choice of each. A launcher that is not installed is left out."""
    words = [a for a in arguments if a not in FLAGS]
    launcher = next((w.partition("=")[2] for w in words if w.startswith("launcher=")), "basic")
    if launcher != "basic" and find_spec(f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher") is None:
        words = [w for w in words if not w.lstrip("+").startswith(("launcher=", "hydra.launcher."))]
    if not {"-m", "--multirun"} & set(arguments) and not any(a.startswith(("sweep=", "launcher=")) for a in arguments):
        return words
    parsed = OverridesParser.create().parse_overrides(words)
    return [f"{o.get_key_element()}={first(o)}" if o.is_sweep_override() else word for o, word in zip(parsed, words, strict=True)]


def first(override: Override) -> object:
    """The first value that a sweep would try."""
    return next(iter(override.sweep_string_iterator())) if override.is_discrete_sweep() else override.value().start


DESCRIBED = {"datamodules.NNUNet": write_nnunet, "datamodules.Decathlon": write_decathlon}  # whose tasks are in their folders
CALLS = sorted({tuple(c) for page in PAGES for c in commands(page)})


@pytest.mark.parametrize("call", CALLS, ids=" ".join)
def test_command_composes_and_builds(call, tmp_path):
    cfg = composed(*overrides(list(call)))
    cfg.run_folder = str(tmp_path)
    if cfg.data._target_ in DESCRIBED:
        cfg.data.root = str(DESCRIBED[cfg.data._target_](tmp_path / "described"))
    assert cfg.job in JOBS
    assert OmegaConf.to_container(cfg, resolve=True)
    if cfg.job not in ("fit", "test"):
        return
    data = instantiate(cfg.data, _convert_="all")
    with torch.device("meta"):
        method = build_method(OmegaConf.to_container(cfg.model, resolve=True), data.task)
    if not isinstance(method, SegmentationMethod):  # no network on patches or slices
        return
    slab, view = getattr(method.network, "slab", None), cfg.data.view
    assert slab == (cfg.data.slab if view == "slab" else None)
    assert method.network.dimensions == (3 if view == "patch" else 2)
    assert cfg.data.patch is None or all(size % by == 0 for size, by in zip(cfg.data.patch, method.network.divisor, strict=True))
    for part in [*cfg.callbacks.values(), *cfg.logger.values()]:
        if part and "wandb" not in part._target_.lower():
            instantiate(part, _convert_="all")


def test_there_are_commands_on_every_page_that_should_have_some():
    bare = {page.stem for page in PAGES if not commands(page)}
    assert bare == {"adding_a_method", "adding_a_dataset", "tutorial"}


def keys(node, prefix: str = "") -> set[str]:
    """Dotted keys of a configuration."""
    if not isinstance(node, dict):
        return set()
    return {f"{prefix}{k}" for k in node} | set(itertools.chain.from_iterable(keys(v, f"{prefix}{k}.") for k, v in node.items()))


def test_keys_and_choices_in_the_text_exist():
    variants = [
        [], ["metrics=brats2023"], ["debug=profile"], ["benchmark=brats2020", "model=supervised"], ["experiment=supervised/folder", "callbacks=[default,ema,early_stopping]", "logger=[csv,wandb]"],
        ["experiment=multi_rater/qubiq_kidney", "model/target=level_k"], ["experiment=multi_rater/simulated", "model/target=simple"],
        ["benchmark=brats2020", "model=supervised", "model/network=slab"], ["benchmark=brats2020", "model=supervised", "model/network=dynunet", "model/scheduler=warmup"],
        ["experiment=reciprocal_adversarial/toy2d"],
        ["experiment=modality_pairing/toy_missing"],
        ["experiment=spin/atlas"], ["experiment=spin/semi_real"], ["experiment=swin_unetr/brats2021"],
        ["experiment=flair_threshold/simulated"],
        ["experiment=umm/simulated"],
        ["experiment=fae/simulated"],
        ["experiment=blur_residual/simulated"],
        ["benchmark=blobs", "model=pseudo_label", "callbacks=[default,pseudo_label_quality]"], ["benchmark=blobs", "model=co_learning"],
        ["experiment=nnunet_region_loss_ensemble/brats2021", "model/loss=region_topk_dice"],
        ["experiment=coranet/blobs"],
        ["experiment=cmm_net_3d/brats2021"], ["experiment=modified_unet_horizontal/brats2021"], ["experiment=deepseg_nnunet_staple_ensemble/brats2021"], ["experiment=resunet3d_pei/brats2021"],
        ["experiment=attention_unet_positive_mining/simulated"],
        ["experiment=hardnet_bts/simulated"],
        ["experiment=cascaded_3d_unet/brats2021"], ["experiment=residual_unet_localization/brats2021"], ["experiment=dints_topology_search/brats2021"],
        ["experiment=two_phase_omt/brats2021"], ["experiment=vae_unet_hausdorff_loss/brats2021"], ["experiment=multiplane_unetpp/brats2021"],
        ["experiment=hierarchical_global_modality_interaction/brats2021"], ["experiment=emsvit/brats2019"], ["experiment=unet_context_encoding_uncertainty/brats2021"],
        ["experiment=supervised/folder", "data=nnunet"], ["experiment=supervised/folder", "data=bids"],
    ]  # fmt: skip
    known = set().union(*(keys(OmegaConf.to_container(composed(*v), resolve=False)) for v in variants))
    known |= {key.rpartition(".")[2] for key in known}  # tables leave the beginning of a key to their title
    known |= {f"hydra.sweeper.{f.name}" for f in dataclasses.fields(OptunaSearchConf)} | {"hydra.sweeper.pruner.n_warmup_steps"}
    known |= {"use_distributed_sampler", "lesion_min_iou", "lesion_dilation", "bins", "slice_bounds"}  # arguments in Python
    wrong = []
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        text = re.sub(
            r"^## Settings\n.*?(?=^## )", "", text, flags=re.MULTILINE | re.DOTALL
        )  # made of files that `test_claims.py` compares
        for key, value in re.findall(r"`([a-z_]+(?:[./][a-z_]+)*)=([^`\s]*)`", text):
            if (CONF / key).is_dir():
                wrong += [f"{page.name}: {key}={v}" for v in value.strip("[]").split(",") if v and v not in [*options(key), *EXAMPLES]]
            elif key not in known and not key.startswith("hydra.launcher."):  # those belong to packages that may not be installed
                wrong.append(f"{page.name}: {key}")
    assert wrong == []


def test_links_lead_to_files_and_headings():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
            if target.startswith("http"):
                continue
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.is_file(), f"{page.name}: {target}"
            headings = re.findall(r"^#+ (.+)$", file.read_text(), flags=re.MULTILINE) if file.suffix == ".md" else []
            assert not anchor or anchor in {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}, (
                f"{page.name}: {target}"
            )


def test_every_result_is_linked():
    text = "".join(page.read_text() for page in PAGES)
    assert [f.name for f in sorted((ROOT / "docs" / "results").iterdir()) if f"results/{f.name}" not in text] == []


def test_tables_name_nothing_twice():
    """Two rows of one table with the same first cell: a merge that kept both, and they may contradict each other."""
    for page in PAGES:
        for table in re.findall(r"(?:^\|.*\n)+", page.read_text(), flags=re.MULTILINE):
            firsts = re.findall(r"^\| (`[^`|]+`) \|", table, flags=re.MULTILINE)
            assert len(firsts) == len(set(firsts)), f"{page.name}: {sorted(f for f in firsts if firsts.count(f) > 1)}"


def test_files_named_in_the_text_exist():
    made = {"conf/model/noise_consistency.yaml", "lightning_modules/noise_consistency.py", "datamodules/wmh.py", "conf/data/wmh.yaml"}
    for page in PAGES:
        for name in re.findall(r"`((?:tests|datamodules|lightning_modules|lesionbench|callbacks|conf)/[\w/]+\.\w+)`", page.read_text()):
            assert name in made or (ROOT / name).exists(), f"{page.name}: {name}"


@pytest.fixture
def examples(tmp_path, monkeypatch):
    """Puts the example files of the pages where they say they belong: YAML into a copy of conf/, Python into importable modules."""
    conf = tmp_path / "conf"
    shutil.copytree(CONF, conf)
    monkeypatch.setattr(harness, "CONF", conf)
    for page in PAGES:
        for text in blocks(page, "yaml"):
            if text.startswith("# lightning_modules/"):  # an entry of the catalog; see tests/test_catalog.py
                continue
            place = re.match(r"# conf/(\S+\.yaml)\n", text)
            assert place, f"{page.name}: a YAML block that does not say where it belongs"
            (conf / place[1]).parent.mkdir(parents=True, exist_ok=True)
            (conf / place[1]).write_text(text.partition("\n")[2])
        for text in blocks(page, "python"):
            if place := re.match(r"# (\w+)/(\w+)\.py\n", text):
                name = f"{place[1]}.{place[2]}"
                module = types.ModuleType(name)
                monkeypatch.setitem(sys.modules, name, module)
                monkeypatch.setattr(
                    {"lightning_modules": lightning_modules, "datamodules": datamodules}[place[1]], place[2], module, raising=False
                )
                exec(compile(text, f"{page.name}:{name}", "exec"), vars(module))


def loose_python(page: Path) -> list[str]:
    """Python blocks that are no file of their own."""
    return [b for b in blocks(page, "python") if not re.match(r"# \w+/\w+\.py\n", b)]


def built(cfg) -> tuple:
    """Data module and method of a configuration."""
    data = instantiate(cfg.data, _convert_="all")
    return data, build_method(OmegaConf.to_container(cfg.model, resolve=True), data.task)


@pytest.mark.filterwarnings("ignore:You are trying to")
def test_example_of_a_method(examples, tmp_path):
    cfg = composed(
        "experiment=noise_consistency/simulated",
        "debug=tiny",
        f"run_folder={tmp_path}",
        "model.network.features=[4,4,4,4,4,4]",
        "model.sigma=0.5",
    )
    _, method = built(cfg)
    torch.manual_seed(0)
    batch = {"image": torch.randn(1, 4, 32, 32, 32), "label": torch.randint(0, 4, (1, 1, 32, 32, 32))}
    loss = method.training_step(batch, 0)
    assert loss > method.compute_loss(batch)  # the consistency term adds
    assert torch.equal(loss, method.training_step(batch, 0))  # keyed noise
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())
    with torch.no_grad():
        prediction = method.predict_case({"image": torch.randn(1, 4, 40, 32, 32)})
    assert prediction.labels.shape == prediction.uncertainty["entropy"].shape == (40, 32, 32)
    assert prediction.uncertainty["entropy"].min() >= 0


def test_example_without_hydra(examples, tmp_path, monkeypatch):
    import pytorch_lightning as pl

    monkeypatch.chdir(tmp_path)
    calls = []
    monkeypatch.setattr(pl.Trainer, "fit", lambda trainer, method, datamodule: calls.append(("fit", method, datamodule)))
    monkeypatch.setattr(pl.Trainer, "test", lambda trainer, method, datamodule: calls.append(("test", method, datamodule)))
    (code,) = loose_python(ROOT / "docs" / "adding_a_method.md")
    names = {}
    exec(code, names)
    assert [c[0] for c in calls] == ["fit", "test"]
    assert calls[0][1].network(torch.zeros(1, 4, 48, 48, 48)).shape == (1, 4, 48, 48, 48)
    assert names["rows"] == []


def test_tutorial(tmp_path, monkeypatch):
    """One program from top to bottom: what its blocks print and draw is what the page shows, decimals within 0.1."""
    import numpy as np
    from matplotlib.image import imread

    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "tutorial.md"
    names, printed, shown = {}, [], []
    for code, text in re.findall(r"^```python\n(.*?)^```\n+(?:```text\n(.*?)^```)?", page.read_text(), flags=re.MULTILINE | re.DOTALL):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(code, page.name, "exec"), names)
        printed.append(out.getvalue())
        shown.append(text)
    decimal = r"\d+\.\d+"
    assert [re.sub(decimal, "<decimal>", text) for text in printed] == [re.sub(decimal, "<decimal>", text) for text in shown]
    measured, stated = ([float(x) for x in re.findall(decimal, "".join(texts))] for texts in (printed, shown))
    assert measured == pytest.approx(stated, abs=0.1)
    drawn, committed = imread("tutorial.png"), imread(page.parent / "images" / "tutorial.png")
    assert drawn.shape == committed.shape
    assert np.abs(drawn - committed).mean() < 0.05


def test_example_of_a_data_set(examples, tmp_path):
    from lesionbench.geometry import write_volume

    names = {}
    (code,) = loose_python(ROOT / "docs" / "adding_a_dataset.md")
    exec(code, names)
    assert names["data"].task.region_names == ("WMH",)
    root = tmp_path / "wmh"
    for number, place in enumerate(["Utrecht/0", "Utrecht/2", "Amsterdam/GE3T/100", "Singapore/50"]):
        images, label = fake_case(("FLAIR", "T1"), (1, 2), (12, 12, 8), (0, number))
        for name, image in images.items():
            write_volume(root / place / "pre" / f"{name}.nii.gz", image, LPS)
        write_volume(root / place / "wmh.nii.gz", label, LPS)
    cfg = composed("experiment=supervised/wmh", f"data.root={root}", f"run_folder={tmp_path}", "data.split.test=1", "data.split.val=1")
    data, method = built(cfg)
    assert method.network.dimensions == 3
    cases = data.cases()
    assert [(c.id, c.site) for c in cases] == [
        ("Amsterdam_100", "Amsterdam"),
        ("Singapore_50", "Singapore"),
        ("Utrecht_0", "Utrecht"),
        ("Utrecht_2", "Utrecht"),
    ]
    assert not [f for f in data.findings(progress=False) if f.level == "error"]
    (root / "Utrecht/2/pre/T1.nii.gz").unlink()
    with pytest.raises(Exception, match="Utrecht_2: t1"):
        data.cases()


def test_example_of_two_stages(examples, tmp_path):
    cfg = composed("experiment=supervised/simulated_two_stage")
    folder = RunFolder(tmp_path)
    folder.mark_done("warm", {"run": "fit", "artefact": "warm.ckpt"})
    warm, fit, test = (_stage_config(cfg, stage, folder)[0] for stage in cfg.stages)
    assert warm.model.loss == {"_target_": "lightning_modules.losses.CrossEntropy"}
    assert (warm.trainer.max_epochs, fit.trainer.max_epochs) == (4, cfg.epochs)
    assert (warm.init_from, fit.init_from, test.init_from) == (None, "warm.ckpt", None)
    assert fit.model.loss._target_.endswith("DiceCE")
    assert (warm.run_folder, test.run_folder) == (str(tmp_path / "warm"), str(tmp_path))


def test_nothing_names_a_machine():
    """Paths of the machine that this was written on have no place here; the runner of the checks may look beside the repository."""
    forbidden = re.compile("(?<![\\w.:])/" + "work" + "(?![\\w-])|\\.\\./" + "shared")
    kinds = {".py", ".md", ".yaml", ".yml", ".toml", ".cff", ".cfg", ".txt", ""}
    folders = ["conf", "lesionbench", "lightning_modules", "datamodules", "callbacks", "tests", "benchmarks", "docs"]
    files = [f for folder in folders for f in (ROOT / folder).rglob("*") if f.is_file() and f.suffix in kinds]
    files += [
        ROOT / name
        for name in (
            "README.md",
            "CONTRIBUTING.md",
            "CHANGELOG.md",
            "Makefile",
            "mkdocs.yml",
            "run.py",
            "pyproject.toml",
            "CITATION.cff",
            ".gitignore",
        )
    ]
    assert len(files) > 100
    assert [f"{f}: {hit}" for f in files for hit in forbidden.findall(f.read_text(errors="ignore"))] == []


def test_license_and_citation():
    import yaml

    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["license"] == "Apache-2.0"
    assert f'version = "{citation["version"]}"' in (ROOT / "pyproject.toml").read_text()
