"""The command line: help at once, mistakes answered with what exists, jobs that need something say what."""

import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException

from lesionbench.errors import SuiteError
from lesionbench.jobs.catalog import families
from lesionbench.jobs.command_line import CONF, JOBS, explain, help_text, named, options, own_folder, quoted, runs_of
from lesionbench.jobs.program import main
from tests.harness import run

ROOT = Path(__file__).parent.parent


def command(*arguments: str) -> subprocess.CompletedProcess:
    """run.py as a user starts it."""
    return subprocess.run([sys.executable, "run.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)


def answer(monkeypatch, *arguments: str) -> str:
    """What the program ends with, run in this process."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    monkeypatch.setattr("lesionbench.stopping.stop_at_signals", lambda: None)  # this process has handlers of its own
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit) as ended:
        main()
    return str(ended.value.code)


def test_a_reader_that_stops_early_is_no_error():
    with subprocess.Popen([sys.executable, "run.py", "--help"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_help_lists_jobs_groups_and_options_without_heavy_imports():
    code = "import sys; sys.argv=['run.py','--help']; import run; run.main(); assert not {'torch','hydra','monai'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in [
        *JOBS,
        "model/loss",
        "coranet",
        "dice_ce",
        "benchmark=NAME",
        "left_atrium_full",
        "resume=true",
        "sweep=",
        "tpe",
        "submitit_slurm",
    ]:
        assert word in done.stdout


def test_help_names_families_and_methods_instead_of_experiments():
    """A hundred names of experiments say nothing to somebody who does not know the methods."""
    said = help_text().splitlines()
    start = next(i for i, line in enumerate(said) if line.startswith("Methods by family"))
    shown = dict(line.split(maxsplit=1) for line in said[start + 1 : said.index("", start)])
    assert shown == {family: ", ".join(names) for family, names in families().items() if family != "networks"}
    assert [line.split(maxsplit=1)[1] for line in said if line.split()[:1] == ["experiment"]] == ["METHOD/DATA, see job=methods"]
    assert sum(name in help_text() for name in options("experiment")) <= 2  # the default, and an example


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["job=methods", "coranet"], ["job=methods", 'name="coranet"']),
        (["mean", "teacher", "job=methods", "report=json"], ["job=methods", "report=json", 'name="mean teacher"']),
        (["--config-dir", "conf", "job=methods", "--cfg", "job", "-m", "umm"], ["--config-dir", "conf", "job=methods", "--cfg", "job", "-m", 'name="umm"']),
        (["job=methods"], ["job=methods"]),
        (["job=fit", "coranet"], ["job=fit", "coranet"]),
    ],
)  # fmt: skip
def test_bare_words_of_the_job_methods_are_its_name(given, expected):
    assert named(given) == expected


def test_jobs_of_help_are_the_jobs_that_exist():
    from lesionbench.jobs import main as jobs

    assert set(JOBS) == set(jobs.JOBS)
    assert all(name in help_text() for name in options("model/loss"))
    assert (CONF / "config.yaml").exists()


@pytest.mark.parametrize(
    ("mistake", "hint"),
    [
        ("experiment=spin/simulated_strok", "did you mean 'spin/simulated_stroke'"),
        ("benchmark=acdcc", "There is no benchmark=acdcc; did you mean 'acdc'"),
        ("benchmark=acdc model=fae", "model=fae does not run on benchmark=acdc, which chooses a model/network: the method has none"),
        ("model/loss=dice_c", "did you mean 'dice_ce'"),
        ("data.batchsize=3", "data.batch_size"),
        ("modle.seed=3", "did you mean model"),
        ("trainer=ddp2", "did you mean 'ddp'"),
        ("sweep=tpee", "There is no sweep=tpee; did you mean 'tpe'"),
        ("hydra.sweeper.trails=3 sweep=tpe", "did you mean hydra.sweeper.trials"),
        ("launcher=joblb", "There is no launcher=joblb; did you mean 'joblib'"),
        ("modle/loss=dice", "There is no group 'modle/loss'; did you mean 'model/loss'"),
        ("model/gate=fixed", "have no model/gate that could be replaced"),
        ("job=methods coranett", "Unknown method or network 'coranett'; did you mean 'coranet'?"),
        ("model.loss._target_=foo.Bar", "Error locating target 'foo.Bar'"),
        ("+model.loss.nope=1", "unexpected keyword argument 'nope'"),
        ("logger=[csv,tensorbord]", "There is no logger=tensorbord; did you mean 'tensorboard'"),
        ("runs=README.md/runs", "README.md/runs"),
        ("job=simulate out=README.md/cases simulate.count=1 simulate.spacing=4", "README.md/cases"),
    ],
)
def test_mistakes_name_the_nearest(mistake, hint, monkeypatch):
    text = answer(monkeypatch, *mistake.split())
    assert hint in text
    assert text.startswith("error: ")
    assert len(text.splitlines()) < 24


def test_a_mistake_is_all_that_the_program_prints():
    done = command("benchmark=acdcc")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: There is no benchmark=acdcc; did you mean 'acdc'")
    assert "Traceback" not in done.stderr


def test_the_error_of_a_sweep_names_the_job():
    done = command("-m", "select=best,bets", "epochs=0,1", "job=compare", "compare.runs=[nowhere]")
    assert done.stderr.startswith("error: nowhere: no such folder")
    assert "in this job of the sweep: select=best epochs=0 " in done.stderr


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["job=fitt"], "did you mean 'fit'"),
        (["benchmark=blobs", "model=multi_rater"], "rater targets need a data set with raters"),
        (["job=predict"], "needs ckpt="),
        (["job=predict", "ckpt=/nowhere.ckpt"], "no such checkpoint"),
        (["job=simulate"], "needs out="),
        (["benchmark=brats2020", "model=supervised", "trainer=cpu", "data.root=/nowhere"], "/nowhere"),
        (["data.view=pach"], "did you mean 'patch'"),
        (["data.sampling.name=forground"], "did you mean 'foreground'"),
        (["model/loss=region_bce"], "change one of them"),
        (["metrics.names=[dise]"], "did you mean 'dice'"),
        (["task.channels=[flare]"], "did you mean 'flair'"),
        (["seed=one"], "seed=one: expected a whole number, at least 0"),
        (["epochs=0"], "epochs=0: expected a whole number, at least 1"),
        (["accumulate=0"], "accumulate=0: expected"),
        (["data.batch_size=0"], "data.batch_size=0: datamodules.Simulated expects a whole number, at least 1"),
        (["data.samples_per_epoch=1.5"], "data.samples_per_epoch=1.5: datamodules.Simulated expects a whole number"),
        (["data.num_workers=-1"], "data.num_workers=-1: datamodules.Simulated expects a whole number, at least 0"),
        (["threads=-2"], "threads=-2: expected a whole number, at least 1"),
        (["epochs=true"], "epochs=True: expected a whole number"),
        (["data.split.val=-1"], "data.split.val=-1: expected a share of the patients below 1, or their number"),
        (["data.split.test=1.5"], "data.split.test=1.5: expected a share"),
        (["data.split.val=some"], "data.split.val=some: expected a share"),
        (["clip=-1"], "clip=-1: expected a number, above 0, or null"),
        (["clip=nan"], "clip=nan: expected a number, above 0"),
        (["resume=maybe"], "resume=maybe: expected true or false"),
        (["mirror=[7]"], "mirror=[7]: expected some of the axes 0, 1 and 2"),
        (["mirror=[0,0]"], "mirror=[0, 0]: expected some of the axes"),
        (["mirror=all"], "mirror=all: expected some of the axes"),
        (["test_time=flip"], "test_time 'flip'"),
        (["job=tune", "tune.what=thresholds", "tune.trials=0"], "tune.trials=0: expected a whole number, at least 1"),
        (["job=tune", "tune.what=suppression", "tune.depth=deep"], "tune.depth=deep: expected a whole number, at least 1"),
        (["job=tune", "tune.grid=[-1,3]"], "tune.grid=[-1, 3]: expected a list, each of it a whole number, at least 0"),
        (["job=tune", "tune.region=5"], "tune.region=5: expected a name"),
        (["job=tune", "tune.what=all"], "Unknown tune.what 'all'"),
        (["job=compare", "compare.group_by=model"], "compare.group_by=model: expected a list, each of it a name"),
        (["job=simulate", "out=nowhere", "simulate.count=few"], "simulate.count=few: expected a whole number, at least 1"),
        (["job=show", "show.cases=0"], "show.cases=0: expected a whole number, at least 1"),
        (["job=dashboard", "dashboard.dry_run=1"], "dashboard.dry_run=1: expected true or false"),
        (["validation_metrics=dice"], "validation_metrics=dice: expected a list"),
        (["mirror=[0]", "test_time=flips"], "mirror=[0] and test_time=flips: one of them"),
        (["select=bset"], "did you mean 'best'"),
        (
            ["model.network.features=[4,4,8]"],
            "model (lightning_modules.Supervised): cannot be built: ValueError: Sequence must have length 6, got 3.",
        ),
        (["model.network.features=abc"], "model.network.features=abc: lightning_modules.networks.basic_unet expects a list"),
        (["model.optimizer.lr=fast"], "model.optimizer.lr=fast: torch.optim.AdamW expects a number, at least 0"),
        (["model.loss=dice"], "to choose one of the group write model/loss=dice"),
        (["+trainer.accumulate_grad_batches=2"], "trainer.accumulate_grad_batches=2: the program fills it in from accumulate"),
        (["+trainer.gradient_clip_val=1"], "trainer.gradient_clip_val=1: the program fills it in from clip"),
        (["objective.mode=most"], "Unknown objective.mode 'most'"),
        (["patch=big"], "patch=big: expected voxels along each axis"),
        (["patch=[8,-8,8]", "patch_cap=4"], "patch=[8, -8, 8]: expected voxels along each axis"),
        (["patch=[32,32]"], "patch=[32, 32] has 2 sides, BasicUNet is a 3D network"),
        (["precision=half"], "trainer.precision=half: pytorch_lightning.Trainer expects 64 or 32 or 16"),
        (
            ["+model.nope=1"],
            "model (lightning_modules.Supervised): cannot be built: TypeError: Method.__init__() got an unexpected keyword argument 'nope'",
        ),
        (["+trainer.nope=1"], "unexpected keyword argument 'nope'"),
        (["job=predict", "ckpt=README.md"], "refused (Unsupported operand"),
    ],
)
def test_errors_say_what_and_how(overrides, message, tmp_path):
    from hydra.errors import InstantiationException
    from omegaconf.errors import OmegaConfBaseException

    from lesionbench.jobs.program import _suite_error

    with pytest.raises((SuiteError, InstantiationException, OmegaConfBaseException)) as caught:
        run(*overrides, f"runs={tmp_path}", "data.limit_cases=3" if "job=predict" not in overrides else "threads=1")
    assert message in str(_suite_error(caught.value))


def test_runs_of_a_method():
    assert runs_of("co_learning") == [f"benchmark={b} model=co_learning" for b in ("acdc", "blobs", "left_atrium", "simulated_few_labels")]
    assert runs_of("flair_threshold") == [f"experiment={name}" for name in options("experiment") if name.startswith("flair_threshold/")]
    assert {"experiment=supervised/ibsr", "benchmark=blobs_full model=supervised"} <= {*runs_of("supervised")}
    assert "benchmark=ibsr model=supervised" not in runs_of("supervised")


def test_without_a_gpu_the_error_says_what_to_write(tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SuiteError, match=r"(?s)trainer\.accelerator=gpu.*Without a GPU write trainer=cpu"):
        run("trainer=gpu", f"runs={tmp_path}")


def test_a_launcher_that_is_not_installed_says_what_to_install():
    error = ConfigCompositionException("In 'launcher/ray': Could not find 'hydra/launcher/ray'\n\nAvailable options ...")
    assert "pip install -e '.[ray]'" in str(explain(error, ["launcher=ray"]))


GRAMMAR = [  # a form of each rule of Hydra's override grammar (1.3)
    "a=1", "+a=1", "++a=1", "~a", "~a=1", "a.b=1", "db@src=mysql", "a=", "a=null", "a=true", "a=1e-3", "a=-inf", "a=nan", "a=1_000", "a=50%",
    "a=b c", "a='b=c'", 'a="b=c"', "a='it\\'s'", "a=a\\,b", "a=/b/c.d-e_f+g?h|i@j*k", "a=[]", "a=[1,[b,c]]", "a={}", "a={b:1,c:[d]}", "a=${b}", "a=${b.c}/d", "a=${oc.env:HOME}",
    "a=${f:b,c}", "a=1,2", "a=b,c", "a=[1],[2]", "a={b:1},{c:2}", "a=choice(b,c)", "a=range(3)", "a=range(1,3)", "a=range(start=0,stop=3,step=2)",
    "a=interval(0,1)", "a=interval(start=0,end=1)", "a=glob(*)", "a=glob([b*,c*],exclude=d*)", "a=sort(3,1,2)", "a=sort(3,1,2,reverse=true)", "a=sort(list=[2,1],reverse=true)",
    "a=shuffle(1,2)", "a=shuffle(range(1,3))", "a=tag(log,interval(0,1))", "a=tag(b,c,choice(1,2))", "a=int(3.2)", "a=float(3)", "a=str([1,2])", "a=bool(1)", "a=int(choice(1.5,2.5))",
]  # fmt: skip


@pytest.mark.parametrize("argument", GRAMMAR)
def test_what_hydra_knows_is_left_alone(argument):
    OverridesParser.create().parse_override(argument)
    assert quoted([argument]) == [argument]


HOME = str(Path.home())


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("runs/a/seed=0/x.ckpt", "runs/a/seed=0/x.ckpt"),
        ("[runs/seed=0,b]", ["runs/seed=0", "b"]),
        ("[[a=1],{b:c=2,d:[e=3]}]", [["a=1"], {"b": "c=2", "d": ["e=3"]}]),
        ("C:/a/seed=0", "C:/a/seed=0"),
        ("${runs}/seed=0", "${runs}/seed=0"),
        ("[${runs}/seed=0,1]", ["${runs}/seed=0", 1]),
        ("~/x", f"{HOME}/x"),
        ("[~/x,~y]", [f"{HOME}/x", "~y"]),
        ("/d/Übung/脳", "/d/Übung/脳"),
        ("/d/BraTS (1)", "/d/BraTS (1)"),
        ("/d/BraTS(1)/a=b", "/d/BraTS(1)/a=b"),
        ("it's", "it's"),
        ("a#b;c&d<e>", "a#b;c&d<e>"),
        ("D:\\data\\a=b\\", "D:\\data\\a=b\\"),
        ("a=b,'c,d',e", ["a=b", "c,d", "e"]),
        ("choice(a=1,~/b)", ["a=1", f"{HOME}/b"]),
    ],
)
def test_other_values_need_no_quotes(typed, value):
    (argument,) = quoted([f"key={typed}"])
    override = OverridesParser.create().parse_override(argument)
    found = [getattr(v, "text", v) for v in override.value().list] if override.is_sweep_override() else override.value()

    def plain(node):
        if isinstance(node, list):
            return [plain(v) for v in node]
        return {k: plain(v) for k, v in node.items()} if isinstance(node, dict) else getattr(node, "text", node)

    assert plain(found) == value


@pytest.mark.parametrize("argument", ["a=range(1,2", "a=[b,c", "a={b:1", "a='b", "a=rnage(1,2)=3,range(", "--cfg=job", "=b=c"])
def test_a_mistake_in_the_grammar_is_not_made_a_string(argument):
    assert quoted([argument]) == [argument]


def test_a_mistake_in_the_grammar_is_answered_with_what_to_type():
    done = command("data.patch=[8,8")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: data.patch=[8,8: not in Hydra's grammar of overrides (no viable alternative at input '[8,8'); a text is quoted twice: 'data.patch=\"[8,8\"'"
    ]


def test_the_folder_of_ones_own_goes_before_the_overrides(tmp_path):
    folder = str(tmp_path)
    expected = (tmp_path, ["--config-dir", folder, "a=1", "b=2"])
    for given in (["a=1", f"--config-dir={folder}", "b=2"], ["a=1", "b=2", "--config-dir", folder], ["-cd", folder, "a=1", "b=2"]):
        assert own_folder(given) == expected
    assert own_folder(expected[1]) == expected
    assert own_folder(["a=1", "-m", "b=2"]) == (None, ["-m", "a=1", "b=2"])
    assert own_folder(["a=1", "--multirun", "-cd", folder]) == (tmp_path, ["--config-dir", folder, "--multirun", "a=1"])
    for given in (["--config-dir"], ["--config-dir="], [f"--config-dir={folder}/none"]):
        with pytest.raises(SuiteError, match=r"--config-dir=.*: no such folder"):
            own_folder(given)


def test_options_of_ones_own_stand_beside_the_suites(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "fusion" / "deep").mkdir(parents=True)
    for name in ("model/mine.yaml", "model/_part.yaml", "model/supervised.yaml", "fusion/mean.yaml", "fusion/deep/max.yaml"):
        (tmp_path / name).touch()
    assert options("model", tmp_path) == sorted([*options("model"), "mine"])
    assert options("fusion", tmp_path) == ["mean"]
    assert [line.split()[:2] for line in help_text(tmp_path).splitlines() if line.startswith("  fusion")] == [
        ["fusion", "mean"],
        ["fusion/deep", "max"],
    ]


def test_foreign_pickle_is_refused(tmp_path):
    import pickle

    path = tmp_path / "foreign.ckpt"
    path.write_bytes(pickle.dumps({"state_dict": {}, "surprise": print}))
    with pytest.raises(SuiteError, match="refused"):
        run("job=predict", f"ckpt={path}", f"out={tmp_path}")


def test_checkpoint_that_builds_strangers_is_refused(tmp_path):
    import torch

    task = {"channels": ["t1"], "classes": {"background": [0], "lesion": [1]}}
    torch.save({"state_dict": {}, "lesionbench": {"model": {"_target_": "os.system"}, "task": task}}, tmp_path / "evil.ckpt")
    with pytest.raises(SuiteError, match=r"os\.system"):
        run("job=predict", f"ckpt={tmp_path / 'evil.ckpt'}", f"out={tmp_path}")
