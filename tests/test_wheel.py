"""The wheel: what is in it, and that it runs from an empty folder, with a configuration and a method of one's own, without the clone."""

import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "adding_a_method.md"
PACKAGES = ("lesionbench", "lightning_modules", "datamodules", "callbacks", "hydra_plugins")
# takes the place of the page's method, and says where the modules of the process come from
WITNESS = """

class Witness(NoiseConsistency):
    def on_test_end(self):
        import json, sys
        super().on_test_end()
        files = {name: module.__file__ for name, module in sys.modules.items() if getattr(module, "__file__", None)}
        open("modules.json", "w").write(json.dumps(files))
"""
QUICK = "debug=tiny data.limit_cases=4 data.spacing=4 model.network.features=[4,4,4,4,4,4] callbacks.figures=null threads=1"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from the clone, without a download."""
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check", "--wheel-dir", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(ROOT)], check=True, capture_output=True, timeout=120)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def program(wheel, tmp_path_factory) -> Path:
    """The console command, in an environment that has the wheel and sees this environment's other packages, but not the clone."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    options = ["--no-deps", "--no-index", "--quiet", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), "install", *options, str(wheel)], check=True, timeout=120)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    return folder / "bin" / "lesionbench"


@pytest.fixture
def own(tmp_path) -> Path:
    """A folder as the page describes it, with the files that the page shows."""
    text = PAGE.read_text()
    code = dict(re.findall(r"^```python\n# (\S+)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL))
    settings = dict(re.findall(r"^```yaml\n# (\S+)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL))
    files = {
        "mine/__init__.py": "",
        "mine/noise_consistency.py": code["lightning_modules/noise_consistency.py"] + WITNESS,
        "my_conf/model/noise_consistency.yaml": settings["conf/model/noise_consistency.yaml"].replace(
            "lightning_modules.noise_consistency.NoiseConsistency", "mine.noise_consistency.Witness"
        ),
        "my_conf/experiment/noise_consistency/simulated.yaml": settings["conf/experiment/noise_consistency/simulated.yaml"],
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    return tmp_path


def call(program: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """The console command as a user of the wheel calls it."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "LESIONBENCH_DATA", "LESIONBENCH_RUN_FOLDER")
    }
    return subprocess.run([program, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def documented() -> list[str]:
    """Arguments of the one command of the page that calls the installed program."""
    (line,) = re.findall(r"^lesionbench (.*)$", PAGE.read_text(), flags=re.MULTILINE)
    return shlex.split(line)


def test_everything_that_the_clone_has_is_in_the_wheel(wheel):
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = [p for package in PACKAGES for p in (ROOT / package).rglob("*") if p.suffix in (".py", ".yaml", ".json", ".typed")]
    expected = {p.relative_to(ROOT).as_posix() for p in files}
    settings = {f"lesionbench/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / "conf").rglob("*.yaml")}
    assert {"lesionbench/jobs/program.py", "lesionbench/conf/config.yaml", "lesionbench/py.typed"} <= inside
    assert {
        "lightning_modules/catalog.json",
        "lightning_modules/semi_supervised/coranet.yaml",
        "lightning_modules/networks/basic_unet.yaml",
    } <= inside
    assert inside == expected | settings


def test_every_package_says_that_it_is_typed():
    assert [p for p in PACKAGES if not list((ROOT / p).rglob("py.typed"))] == []


def test_the_catalog_is_there_without_the_clone(program, own):
    said = call(program, own, "job=methods", "report=json")
    assert said.returncode == 0, said.stderr
    rows = {row["name"]: row for row in json.loads(said.stdout)}
    assert rows["coranet"]["parameters"] > 1e6
    assert "coranet/acdc" in rows["coranet"]["experiments"]
    said = call(program, own, "job=methods", "report=docs")
    assert said.stderr.startswith("error: report=docs: the documentation is in the clone")


def test_help_and_advice_know_the_folder_of_ones_own(program, own):
    said = call(program, own, "--help", "--config-dir", "my_conf")
    assert said.returncode == 0, said.stderr
    assert "  lesionbench [job=JOB]" in said.stdout
    assert "run.py" not in said.stdout
    for line in ("experiment", "model "):
        (names,) = [row for row in said.stdout.splitlines() if row.startswith(f"  {line}") and "," in row]
        assert "noise_consistency" in names
    assert "noise_consistency" not in call(program, own, "--help").stdout
    said = call(program, own, "--config-dir=my_conf", "experiment=noise_consistency/simulatd")
    assert "did you mean 'noise_consistency/simulated'" in said.stderr
    said = call(program, own, "model.sigmaa=1", *documented())
    assert "did you mean model.sigma" in said.stderr
    said = call(program, own, "--config-dir=elsewhere", "--help")
    assert said.stderr.startswith("error: --config-dir=elsewhere: no such folder")


def test_the_command_of_the_page_runs_without_the_clone(program, own):
    done = call(program, own, *documented(), *QUICK.split())
    assert done.returncode == 0, done.stderr
    assert "lesionbench job=predict" in done.stdout
    (run,) = (own / "runs" / "noise_consistency" / "simulated").glob("*/seed=0")
    assert (run / "test" / "cases.csv").is_file()
    assert json.loads((run / "environment.json").read_text())["git"]["revision"] is None
    assert (own / "data" / "simulated").is_dir()
    files = {name: Path(file) for name, file in json.loads((own / "modules.json").read_text()).items()}
    suite = {
        n: f for n, f in files.items() if n.split(".")[0] in PACKAGES and not n.startswith("hydra_plugins.hydra_")
    }  # not others' plugins
    assert {
        "lesionbench.jobs.program",
        "lightning_modules.supervised.supervised",
        "datamodules.simulated.simulated",
        "callbacks.cost",
    } <= set(suite)
    assert {name: file for name, file in suite.items() if not file.is_relative_to(program.parent.parent)} == {}
    assert files["mine.noise_consistency"] == own / "mine" / "noise_consistency.py"
