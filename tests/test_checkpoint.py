"""A checkpoint alone is enough to build its method, and it can make the suite build nothing else."""

import pickle
import re
import zipfile
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from torch import nn

from lesionbench.checkpoint import build_method, initialize_from, load_method, read_checkpoint, read_weights, refuse_strangers
from lesionbench.errors import SuiteError
from lesionbench.jobs.command_line import CONF
from lesionbench.task import Task

TASK = Task(("t1", "flair"), {"background": 0, "core": 1, "edema": 2}, {"WT": ("core", "edema"), "CORE": ("core",)}, ignore=(9,))
MODEL = {
    "_target_": "lightning_modules.Supervised",
    "network": {"_target_": "tests.toys.small_net", "_partial_": True, "width": 3},
    "loss": {"_target_": "lightning_modules.losses.DiceCE"},
    "target": {"_target_": "lesionbench.target.ClassSoftmax", "_partial_": True},
    "inferer": {"_target_": "lightning_modules.inferers.Window", "patch": [4, 4, 4], "overlap": 0.25},
    "optimizer": {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 0.1},
}


def saved(path: Path, model: dict | None = None, **changes) -> Path:
    """A checkpoint as a run writes it, with random weights."""
    torch.manual_seed(1)
    method = build_method(MODEL, TASK)
    method.iteration = 17
    checkpoint = {"state_dict": method.state_dict()}
    method.on_save_checkpoint(checkpoint)
    if model is not None:
        checkpoint["lesionbench"]["model"] = model
    torch.save({**checkpoint, **changes}, path)
    return path


def test_a_checkpoint_builds_its_method_with_its_weights(tmp_path):
    path = saved(tmp_path / "x.ckpt")
    method, own = load_method(path, trust=["tests"])
    torch.manual_seed(1)
    original = build_method(MODEL, TASK).eval()
    assert method.task == TASK
    assert method.iteration == own["iteration"] == 17
    assert method.config == MODEL
    assert method.inferer.overlap == 0.25
    assert not method.training
    image = torch.randn(1, 2, 6, 5, 7)
    with torch.no_grad():
        assert torch.equal(method.predict_case({"image": image}).regions, original.predict_case({"image": image}).regions)


def test_a_moved_checkpoint_is_the_same(tmp_path):
    path = saved(tmp_path / "x.ckpt")
    (tmp_path / "elsewhere").mkdir()
    moved = path.rename(tmp_path / "elsewhere" / "y.ckpt")
    assert load_method(moved, trust=["tests"])[0].iteration == 17


# what is refused


@pytest.mark.parametrize("kept", [0.0, 0.05, 0.5, 0.95, 0.999])
def test_truncated_checkpoints_are_refused(kept, tmp_path):
    path = saved(tmp_path / "x.ckpt")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    for read in (read_checkpoint, load_method, lambda p: initialize_from(nn.Linear(1, 1), p)):
        with pytest.raises(SuiteError, match=r"x\.ckpt: .*refused"):
            read(path)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(SuiteError, match="no such checkpoint"):
        read_checkpoint(tmp_path / "gone.ckpt")
    with pytest.raises(SuiteError, match="no such checkpoint"):
        read_checkpoint(tmp_path)
    for name, content in {"list.ckpt": [1, 2], "other.ckpt": {"weights": torch.zeros(1)}}.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(SuiteError, match=rf"{name}: .*no 'state_dict'"):
            read_checkpoint(tmp_path / name)
    (tmp_path / "text.ckpt").write_text("hello")
    with pytest.raises(SuiteError, match="refused"):
        read_checkpoint(tmp_path / "text.ckpt")


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("legacy", [False, True])
def test_nothing_in_a_checkpoint_is_executed(legacy, tmp_path):
    path, trap = tmp_path / "x.ckpt", tmp_path / "sprung"
    content = {"state_dict": {}, "extra": Trap(trap)}
    if legacy:
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path)
        assert zipfile.is_zipfile(path)
    with pytest.raises(SuiteError, match="refused"):
        read_checkpoint(path)
    assert not trap.exists()


def strangers(marker: str) -> dict[str, dict]:
    """Model configurations that would make a folder named `marker` if they were built."""
    make = {"_target_": "os.mkdir", "path": marker}
    return {
        "at the top": make,
        "nested": {**MODEL, "network": {**MODEL["network"], "extra": make}},
        "in a list": {**MODEL, "network": {"_target_": "torch.nn.Sequential", "_args_": [[make]]}},
        "in a tuple": {**MODEL, "network": {"_target_": "torch.nn.Sequential", "_args_": (make,)}},
        "computed": {**MODEL, "network": {"_target_": "torch.nn.Sequential", "x": "${oc.create:{_target_:os.mkdir,path:" + marker + "}}"}},
        "imported by a trusted module": {**MODEL, "loss": {"_target_": "lightning_modules.metrics.case_metrics.os.mkdir", "path": marker}},
        "imported by this suite": {**MODEL, "loss": {"_target_": "lesionbench.target.np.ndarray.tofile", "path": marker}},
        "the suite's own loader": {**MODEL, "loss": {"_target_": "lesionbench.checkpoint.load_method", "path": "x", "trust": ["os"]}},
        "a name that begins alike": {**MODEL, "loss": {"_target_": "torch.nnx.Loss"}},
        "built in": {**MODEL, "loss": {"_target_": "builtins.eval", "_args_": [f"__import__('os').mkdir('{marker}')"]}},
        "a function of the suite": {**MODEL, "loss": {"_target_": "lightning_modules.habitats.stages.write_checkpoint", "path": marker}},
        "a function of a library": {**MODEL, "loss": {"_target_": "monai.networks.utils.save_state", "src": {}, "path": marker}},
        "a class of the suite that writes": {**MODEL, "loss": {"_target_": "lightning_modules.habitats.EvaluationLog", "path": marker}},
        "a method of a class": {**MODEL, "loss": {"_target_": "lightning_modules.Supervised.to_onnx", "file_path": marker}},
        "a private maker": {**MODEL, "loss": {"_target_": "lightning_modules.schedules._per_iteration"}},
        "missing here": {**MODEL, "loss": {"_target_": "lightning_modules.losses.Vanished"}},
    }


@pytest.mark.parametrize("where", strangers(""))
def test_strangers_are_not_built(where, tmp_path):
    marker = tmp_path / "made"
    path = saved(tmp_path / "x.ckpt", model=strangers(str(marker))[where])
    with pytest.raises(SuiteError, match=r"x\.ckpt: (would build|its configuration)"):
        load_method(path, trust=["tests"])
    assert not marker.exists()


def test_an_untrusted_package_is_named_with_the_remedy(tmp_path):
    path = saved(tmp_path / "x.ckpt")
    with pytest.raises(SuiteError, match=r"'tests\.toys\.small_net'.*trust=\[tests\.toys\.small_net\].*trust=\[tests\]"):
        load_method(path)
    with pytest.raises(SuiteError, match=r"'tests\.toys\.small_net'"):
        load_method(path, trust=["tests.toys.small"])
    assert load_method(path, trust=["tests.toys.small_net"])[0].iteration == 17


@pytest.mark.parametrize("depth", [1, 2])
def test_trust_is_the_word_of_the_caller_at_every_depth(depth, tmp_path):
    """A checkpoint of checkpoints cannot vouch for what is in them."""
    path = saved(tmp_path / "inner.ckpt")
    for level in range(depth):
        outer = {"_target_": "lightning_modules.MissingModalities", "checkpoint": str(path), "trust": ["tests"]}
        method = build_method(outer, TASK)
        checkpoint = {"state_dict": method.state_dict()}
        method.on_save_checkpoint(checkpoint)
        path = tmp_path / f"outer{level}.ckpt"
        torch.save(checkpoint, path)
    with pytest.raises(SuiteError, match=r"inner\.ckpt: would build 'tests\.toys\.small_net'"):
        load_method(path)
    content = torch.load(path, weights_only=True)
    content["lesionbench"]["model"]["trust"] = []
    torch.save(content, path)
    assert load_method(path, trust=["tests"])[0].config["trust"] == ["tests"]


def test_an_import_of_a_trusted_module_is_named_by_where_it_comes_from(tmp_path):
    path = saved(tmp_path / "x.ckpt", model={**MODEL, "network": {"_target_": "tests.toys.deepcopy", "_partial_": True}})
    with pytest.raises(SuiteError, match=r"'copy\.deepcopy'"):
        load_method(path, trust=["tests"])


def test_every_target_of_the_suite_is_trusted():
    files = sorted((CONF / "model").rglob("*.yaml"))
    targets = {t for f in files for t in re.findall(r"_target_:\s*([\w.]+)", f.read_text())}
    assert len(targets) > 20
    for target in targets:
        refuse_strangers({"_target_": target}, "x")


def test_weights_without_configuration_and_weights_that_do_not_fit_are_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "bare.ckpt")
    with pytest.raises(SuiteError, match="no model configuration"):
        load_method(tmp_path / "bare.ckpt")
    wider = {**MODEL, "network": {**MODEL["network"], "width": 5}}
    with pytest.raises(SuiteError, match=r"x\.ckpt: .*network\.0\.weight"):
        load_method(saved(tmp_path / "x.ckpt", model=wider), trust=["tests"])


# init_from


def test_initialization_loads_what_matches_and_reports_the_rest(tmp_path):
    source = nn.ModuleDict({"stem": nn.Linear(2, 3), "head": nn.Linear(3, 4), "old": nn.Linear(1, 1)})
    torch.save({"state_dict": source.state_dict()}, tmp_path / "x.ckpt")
    model = nn.ModuleDict({"stem": nn.Linear(2, 3), "head": nn.Linear(3, 5), "new": nn.Linear(1, 1)})
    before = {k: v.clone() for k, v in model.state_dict().items()}
    report = initialize_from(model, tmp_path / "x.ckpt").splitlines()
    assert report[0] == f"init_from {tmp_path / 'x.ckpt'}: loaded 2 of 6 tensors"
    assert report[1] == "  other shape, kept as initialized (2): head.weight (4, 3) -> (5, 3), head.bias (4,) -> (5,)"
    assert report[2] == "  not in the checkpoint (2): new.weight, new.bias"
    assert report[3] == "  only in the checkpoint (2): old.weight, old.bias"
    for name, value in model.state_dict().items():
        expected = source.state_dict()[name] if name.startswith("stem") else before[name]
        assert torch.equal(value, expected), name


def test_initialization_from_the_same_model_says_only_that(tmp_path):
    model = nn.Linear(2, 2)
    torch.save({"state_dict": nn.Linear(2, 2).state_dict()}, tmp_path / "x.ckpt")
    assert initialize_from(model, tmp_path / "x.ckpt") == f"init_from {tmp_path / 'x.ckpt'}: loaded 2 of 2 tensors"


def test_initialization_from_a_stranger_is_an_error(tmp_path):
    torch.save({"state_dict": nn.Linear(2, 2).state_dict()}, tmp_path / "x.ckpt")
    with pytest.raises(SuiteError, match="none of its 2 weights match this model's 3"):
        initialize_from(nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.PReLU()}), tmp_path / "x.ckpt")


# weights from elsewhere


class Method(nn.Module):
    """Holds a network as methods do."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network


def unet(out_channels: int = 3) -> nn.Module:
    from lightning_modules.networks import basic_unet

    return basic_unet(1, out_channels, dimensions=2, features=(2, 2, 2, 4, 4, 2))


@pytest.mark.parametrize("wrapped", ["", "module.", "model.", "network.", "_orig_mod.", "net.", "module._orig_mod.", "model.network."])
def test_prefixes_of_common_wrappers_are_found(wrapped, tmp_path):
    source, model = unet(), Method(unet())
    torch.save({f"{wrapped}{k}": v for k, v in source.state_dict().items()}, tmp_path / "x.pth")
    report = initialize_from(model, tmp_path / "x.pth").splitlines()
    count = len(source.state_dict())
    assert report[0] == f"init_from {tmp_path / 'x.pth'}: loaded {count} of {count} tensors"
    shown = {"network.": [], "model.network.": ["  names: 'model.*' taken as '*'"]}
    assert report[1:] == shown.get(wrapped, [f"  names: '{wrapped}*' taken as 'network.*'"])
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in model.network.state_dict().items())


def test_the_weights_of_a_monai_bundle_fit_the_network_of_the_same_configuration(tmp_path):
    """A bundle keeps the plain state_dict of MONAI's own network in models/model.pt."""
    from monai.networks.nets import BasicUNet

    bundle = tmp_path / "bundle"
    (bundle / "models").mkdir(parents=True)
    (bundle / "configs").mkdir()
    (bundle / "configs" / "metadata.json").write_text("{}")
    theirs = BasicUNet(2, 1, 2, features=(2, 2, 2, 4, 4, 2), norm=("instance", {"affine": True}))
    torch.save(theirs.state_dict(), bundle / "models" / "model.pt")
    model = Method(unet())
    report = initialize_from(model, bundle / "models" / "model.pt").splitlines()
    own = model.state_dict()
    assert report[0].endswith(f"loaded {len(own) - 2} of {len(own)} tensors")
    assert report[1:] == [
        "  names: '*' taken as 'network.*'",
        "  other shape, kept as initialized (2): network.final_conv.weight (2, 2, 1, 1) -> (3, 2, 1, 1), network.final_conv.bias (2,) -> (3,)",
    ]
    assert all(torch.equal(own[f"network.{k}"], v) for k, v in theirs.state_dict().items() if "final_conv" not in k)


@pytest.mark.parametrize("holder", ["state_dict", "model_state_dict", "model", "network_weights"])
def test_a_state_dict_lies_bare_or_in_an_entry(holder, tmp_path):
    torch.save({"epoch": 3, holder: unet().state_dict()}, tmp_path / "x.pt")
    assert "loaded" in initialize_from(Method(unet()), tmp_path / "x.pt")


def test_a_prefix_is_renamed_in_whole_steps(tmp_path):
    source = nn.ModuleDict({"enc": nn.Linear(2, 3), "encoder": nn.Linear(2, 3)})
    torch.save(source.state_dict(), tmp_path / "x.pt")
    model = nn.ModuleDict({"stem": nn.Linear(2, 3), "encoder": nn.Linear(2, 3)})
    report = initialize_from(model, tmp_path / "x.pt", {"enc": "stem"}).splitlines()
    assert report == [f"init_from {tmp_path / 'x.pt'}: loaded 4 of 4 tensors", "  names: 'enc.*' taken as 'stem.*'"]
    assert torch.equal(model["stem"].weight, source["enc"].weight)
    whole = Method(nn.ModuleDict({"enc": nn.Linear(2, 3), "encoder": nn.Linear(2, 3)}))
    assert "loaded 4 of 4" in initialize_from(whole, tmp_path / "x.pt", {"": "network"})
    with pytest.raises(SuiteError, match=r"no name in .* begins with 'encodr'; its names are enc\.weight"):
        initialize_from(model, tmp_path / "x.pt", {"encodr": "encoder"})


def test_programs_are_refused_by_what_they_are(tmp_path):
    with ZipFile(tmp_path / "script.pt", "w") as archive:  # the members by which torch tells a TorchScript archive
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"script/{name}", "")
    with pytest.raises(SuiteError, match="a TorchScript archive, which is a program"):
        read_weights(tmp_path / "script.pt")
    torch.save(nn.Linear(2, 2), tmp_path / "whole.pt")
    with pytest.raises(SuiteError, match=r"refused \(.*Linear"):
        read_weights(tmp_path / "whole.pt")
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    with pytest.raises(SuiteError, match="no tensors by name; expected a state_dict"):
        read_weights(tmp_path / "none.pt")


def test_nothing_that_matches_is_told_with_the_nearest_names(tmp_path):
    torch.save({"stem.weight": torch.zeros(5, 2)}, tmp_path / "x.pt")
    model = Method(nn.ModuleDict({"stem": nn.Linear(2, 3)}))
    with pytest.raises(
        SuiteError, match=r"(?s)none of its 1 weights match this model's 2.*\(5, 2\), nearest here: network\.stem\.weight \(3, 2\)"
    ):
        initialize_from(model, tmp_path / "x.pt")


def test_safetensors_where_the_package_is_there(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"")
    try:
        from safetensors.torch import save_file
    except ImportError:
        with pytest.raises(SuiteError, match="install the package safetensors"):
            read_weights(tmp_path / "x.safetensors")
        return
    save_file(unet().state_dict(), tmp_path / "x.safetensors")
    assert "loaded" in initialize_from(Method(unet()), tmp_path / "x.safetensors")
