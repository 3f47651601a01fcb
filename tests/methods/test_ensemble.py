"""Several checkpoints as one: through the jobs, on tiny data, members of one method and of several."""

import csv
import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml

from lesionbench.errors import SuiteError
from lesionbench.jobs.ensemble_members import best_per_fold, groups_of, is_ensemble
from lesionbench.results import write_json, write_rows
from tests.fake_data import write_fake_folder
from tests.harness import SMALL, rows, run, run_folders

SHORT = [*SMALL, "epochs=1", "data.samples_per_epoch=4", "data.split.folds=2"]
ALL = ["data.split.test=all"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_fake_folder(tmp_path_factory.mktemp("data"), 8, shape=(14, 13, 12))


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """Run folders by name: two folds, and members that differ in preprocessing, channels, target and method."""
    runs = tmp_path_factory.mktemp("runs")
    kinds = {
        "fold0": ["data.split.fold=0"],
        "fold1": ["data.split.fold=1"],
        "uncropped": ["data.preprocessing.crop=none", "data.preprocessing.normalize=minmax", "seed=1"],
        "flair": ["task.channels=[flair]", "seed=2"],
        "regions": ["model/target=regions", "~model.loss", "+model.loss={_target_:lightning_modules.losses.RegionTopKDice}", "seed=3"],
        "branches": ["model._target_=tests.toys.Branches", "seed=4"],
    }
    found = {}
    for name, more in kinds.items():
        run(*SHORT, f"data.root={folder}", f"runs={runs / name}", *more)
        (found[name],) = run_folders(runs / name)
    return found


def checkpoint(trained, *names):
    """`ckpt=` of these runs."""
    paths = [str(trained[n] / "checkpoints" / "last.ckpt") for n in names]
    return f"ckpt=[{','.join(paths)}]"


@pytest.fixture(scope="module")
def alone(trained, folder, tmp_path_factory):
    """Name of a member -> what it says alone, predicted when it is first asked for."""
    known = {}

    def ask(name):
        if name not in known:
            known[name] = predicted(trained, folder, tmp_path_factory.mktemp(name), name)
        return known[name]

    return ask


def volumes(out, suffix=""):
    """Case -> what was predicted, by the end of the file's name."""
    found = {p.name.removesuffix(f"{suffix}.nii.gz"): p for p in (out / "predictions").glob(f"case_??{suffix}.nii.gz")}
    return {case: np.asarray(nib.load(path).dataobj) for case, path in sorted(found.items())}


def predicted(trained, folder, out, *names, more=()):
    """Probabilities and masks of these members."""
    ckpt = checkpoint(trained, *names) if len(names) > 1 else f"ckpt={trained[names[0]] / 'checkpoints' / 'last.ckpt'}"
    run("job=predict", ckpt, f"input={folder / 'images'}", f"out={out}", "writer.probabilities=true", "trust=[tests]", *more)
    return volumes(out, "_prob_lesion"), volumes(out)


def job_test(folder, out, *more):
    """The run folder of job=test."""
    run("job=test", *SHORT, f"data.root={folder}", f"runs={out}", *more)
    (found,) = run_folders(out)
    return found


def scores(found, member=""):
    return {r["case"]: (r["dice"], r["hd95_mm"]) for r in rows(found) if r["member"] == member and r["region"]}


# fusion through the jobs


def test_an_ensemble_of_one_is_that_one(trained, folder, tmp_path):
    alone = job_test(folder, tmp_path / "alone", f"ckpt={trained['fold0'] / 'checkpoints' / 'last.ckpt'}")
    for fusion in ("mean", "vote", "staple"):
        together = job_test(folder, tmp_path / fusion, checkpoint(trained, "fold0"), f"ensemble.fusion={fusion}")
        assert scores(together) == scores(alone) == scores(trained["fold0"])
        assert together.parent.parent.name == f"folder-{fusion}"


def test_members_of_every_kind_meet_on_the_native_grid(trained, alone, folder, tmp_path):
    """The mean of what each member says alone, whatever its channels, preprocessing, target and method."""
    names = ["fold0", "uncropped", "flair", "regions", "branches"]
    single = [alone(n) for n in names]
    together, _ = predicted(trained, folder, tmp_path / "mean", *names, more=["writer.uncertainty=true"])
    assert len(together) == 8
    spread = volumes(tmp_path / "mean", "_uncertainty_disagreement")
    for case in together:
        members = np.stack([probabilities[case] for probabilities, _ in single])
        assert np.allclose(together[case], members.mean(0), atol=1e-6)
        assert np.allclose(spread[case], members.std(0), atol=1e-3)
        assert np.abs(members - members[0]).max() > 0.01  # they do differ


def test_vote_is_the_majority_of_masks(trained, alone, folder, tmp_path):
    names = ["fold0", "uncropped", "regions"]
    single = [alone(n)[1] for n in names]
    share, masks = predicted(trained, folder, tmp_path / "vote", *names, more=["ensemble.fusion=vote"])
    for case in masks:
        votes = np.stack([m[case] for m in single]).astype(int).sum(0)
        assert np.allclose(share[case], votes / 3, atol=1e-6)
        assert np.array_equal(masks[case] > 0, votes >= 2)


def test_patterns_and_references_to_other_keys(trained, folder, tmp_path):
    pattern = str(trained["fold0"]).replace("seed=0", "seed=${seed}") + "/checkpoints/l*.ckpt"
    found = job_test(folder, tmp_path, f"ckpt=['{pattern}']", "seed=0")
    assert scores(found) == scores(trained["fold0"])


def test_weights_and_groups(trained, alone, folder, tmp_path):
    names = ["fold0", "uncropped", "regions"]
    a, b, c = (alone(n)[0] for n in names)
    weighted, _ = predicted(trained, folder, tmp_path / "w", *names, more=["ensemble.weights=[2,1,1]"])
    paths = [trained[n] / "checkpoints" / "last.ckpt" for n in names]
    out = tmp_path / "grouped"
    run("job=predict", f"ckpt=[[{paths[0]},{paths[1]}],{paths[2]}]", f"input={folder / 'images'}", f"out={out}", "writer.probabilities=true", "trust=[tests]")  # fmt: skip
    grouped = volumes(out, "_prob_lesion")
    for case in a:
        assert np.allclose(weighted[case], (2 * a[case] + b[case] + c[case]) / 4, atol=1e-6)
        assert np.allclose(grouped[case], ((a[case] + b[case]) / 2 + c[case]) / 2, atol=1e-6)


def test_an_ensemble_writes_what_a_run_writes(trained, folder, tmp_path):
    figures = ["+callbacks.figures._target_=callbacks.OverlayFigures", "+callbacks.figures.folder=${run_folder}"]
    options = ["ensemble.members=true", "ensemble.fusion=staple", "writer.uncertainty=true", "metrics.names=[dice,error_auroc]"]  # fmt: skip
    found = job_test(folder, tmp_path, checkpoint(trained, "fold0", "regions"), *options, *figures)
    assert {(r["member"], r["region"]) for r in rows(found)} == {("", "lesion"), ("", ""), ("m1", "lesion"), ("m2", "lesion")}
    assert {p.name for p in (found / "figures").iterdir()} >= {"best.png", "worst.png", "summary.png"}
    assert len(list((found / "predictions").glob("*_uncertainty_disagreement.nii.gz"))) == 4
    assert len(list((found / "predictions").glob("*_m1.nii.gz"))) == 0  # writer.members says so, not ensemble.members
    assert all(r["auroc_disagreement"] for r in rows(found) if r["region"] and not r["member"])
    assert json.loads((found / "summary.json").read_text())["status"] == "finished"
    config = yaml.safe_load((found / "config.yaml").read_text())
    assert config["model"]["_target_"] == "lightning_modules.Ensemble"


def test_mirroring_and_rules_reach_the_members(trained, alone, folder, tmp_path):
    plain = {case: (maps + alone("regions")[0][case]) / 2 for case, maps in alone("fold0")[0].items()}
    mirrored, _ = predicted(trained, folder, tmp_path / "mirrored", "fold0", "regions", more=["mirror=[0,1,2]"])
    kept, _ = predicted(trained, folder, tmp_path / "kept", "fold0", "regions", more=["mirror=[0,1,2]", "ensemble.keep_loaded=true"])
    single = [predicted(trained, folder, tmp_path / n, n, more=["mirror=[0,1,2]"])[0] for n in ("fold0", "regions")]
    for case in plain:
        assert np.allclose(mirrored[case], (single[0][case] + single[1][case]) / 2, atol=1e-6)
        assert np.array_equal(mirrored[case], kept[case])
        assert not np.allclose(mirrored[case], plain[case], atol=1e-3)
    _, masks = predicted(trained, folder, tmp_path / "rules", "fold0", "regions", more=["postprocessing.min_volume={lesion:100000}"])
    assert not any(mask.any() for mask in masks.values())


# who may answer for whom


def test_out_of_fold_every_case_is_tested_by_the_fold_that_held_it_out(trained, folder, tmp_path):
    found = job_test(folder, tmp_path, *ALL, checkpoint(trained, "fold0", "fold1"), "ensemble.out_of_fold=true")
    assert scores(found) == {**scores(trained["fold0"]), **scores(trained["fold1"])}
    assert len(scores(found)) == 8


def test_patients_that_a_member_knows_are_refused(trained, folder, tmp_path):
    with pytest.raises(SuiteError) as caught:
        job_test(folder, tmp_path, *ALL, checkpoint(trained, "fold0", "fold1"))
    text = str(caught.value)
    assert str(trained["fold0"]) in text
    assert str(trained["fold1"]) in text
    assert "on 4 of the test patients" in text
    assert not list(tmp_path.rglob("cases.csv"))
    with pytest.raises(SuiteError, match="nobody is left for 4 of the patients"):
        job_test(folder, tmp_path, *ALL, checkpoint(trained, "fold0", "uncropped"), "ensemble.out_of_fold=true")
    with pytest.raises(SuiteError, match="patients of a data set"):
        predicted(trained, folder, tmp_path / "out", "fold0", "fold1", more=["ensemble.out_of_fold=true"])


def test_everything_wrong_with_the_members_is_one_screen(trained, folder, tmp_path):
    good = trained["fold0"] / "checkpoints" / "last.ckpt"
    truncated, strange, foreign = (tmp_path / f"{name}.ckpt" for name in ("truncated", "strange", "foreign"))
    truncated.write_bytes(good.read_bytes()[:3000])
    content = torch.load(good, weights_only=True)
    torch.save({**content, "lesionbench": {**content["lesionbench"], "task": {**content["lesionbench"]["task"], "regions": {"other": ["lesion"]}}}}, strange)  # fmt: skip
    torch.save({"state_dict": content["state_dict"]}, foreign)
    with pytest.raises(SuiteError) as caught:
        run("job=predict", f"ckpt=[{good},{good},{truncated},{strange},{foreign},{tmp_path}/absent.ckpt]", f"input={folder / 'images'}", f"out={tmp_path / 'out'}", "trust=[tests]")  # fmt: skip
    text = str(caught.value)
    assert text.startswith("5 problem(s) with the 6 member(s)")
    for part in ("given 2 times", "truncated.ckpt: not a checkpoint", "its regions other: lesion are not lesion: lesion", "no model configuration", "absent.ckpt: no such checkpoint"):  # fmt: skip
        assert part in text
    assert len(text.splitlines()) == 6
    assert not (tmp_path / "out").exists()
    with pytest.raises(SuiteError, match=r"needs the channel\(s\) t1; there are flair"):
        job_test(folder, tmp_path / "t", checkpoint(trained, "fold0", "flair"), "task.channels=[flair]")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["ensemble.fusion=median"], r"ensemble\.fusion"),
        (["ensemble.weights=[1]"], "expected 2 positive numbers"),
        (["ensemble.weights=[1,0]"], "expected 2 positive numbers"),
        (["ensemble.weights=[1,2]", "ensemble.fusion=staple"], "STAPLE estimates"),
        (["ensemble.policy=some"], r"ensemble\.policy"),
        (["metrics.space=network"], "native grid"),
        (["postprocessing.min_component={tumor:3}"], "tumor"),
    ],
)
def test_wrong_options_are_refused(trained, folder, tmp_path, options, message):
    with pytest.raises(SuiteError, match=message):
        job_test(folder, tmp_path, checkpoint(trained, "fold0", "uncropped"), *options)


def test_other_members_make_another_run_and_moved_ones_the_same(trained, folder, tmp_path):
    moved = tmp_path / "moved.ckpt"
    shutil.copy(trained["fold0"] / "checkpoints" / "last.ckpt", moved)
    names = {}
    for name, ckpt in {"a": checkpoint(trained, "fold0"), "b": checkpoint(trained, "uncropped"), "moved": f"ckpt=[{moved}]"}.items():
        names[name] = job_test(folder, tmp_path / name, ckpt).parent.name
    assert names["a"] == names["moved"] != names["b"]


def test_a_member_whose_threshold_was_chosen_on_the_case_marks_its_row(trained, folder, tmp_path, monkeypatch):
    from tests.toys import Branches

    monkeypatch.setattr(Branches, "tuned_on", lambda self, batch: batch["case"][0] != "case_00", raising=False)
    found = job_test(folder, tmp_path, checkpoint(trained, "fold0", "branches"))
    assert {r["case"]: r["oracle"] == "1" for r in rows(found)} == {c: c != "case_00" for c in scores(trained["fold0"])}


def test_rules_for_unknown_regions_are_refused_before_training(folder, tmp_path):
    with pytest.raises(SuiteError, match="tumor"):
        run(*SHORT, f"data.root={folder}", f"runs={tmp_path}", "postprocessing.min_component={tumor:3}")
    assert not list(tmp_path.rglob("*.ckpt"))


# which checkpoints


def test_lists_patterns_and_groups(tmp_path):
    for name in ("b", "a"):
        (tmp_path / f"{name}.ckpt").touch()
    a, b = str(tmp_path / "a.ckpt"), str(tmp_path / "b.ckpt")
    assert groups_of([a, b]) == [[a], [b]]
    assert groups_of(f"{tmp_path}/*.ckpt") == [[a], [b]]
    assert groups_of([f"{tmp_path}/?.ckpt", [b, a]]) == [[a], [b], [b, a]]
    assert groups_of([f"{tmp_path}/*.pt"]) == [[f"{tmp_path}/*.pt"]]
    assert [is_ensemble(c) for c in (None, a, [a], f"{tmp_path}/*.ckpt")] == [False, False, True, True]
    with pytest.raises(SuiteError, match="at least one"):
        groups_of([])


DICE_CE = [0.9008, 0.9116, 0.9149, 0.9157, 0.9052]  # mean region Dice of five folds, Ma & Chen, BrainLes 2021
DICE_TOPK = [0.9080, 0.8996, 0.8960, 0.9096, 0.8957]


def candidates(root, mode="max"):
    """Run folders of both losses on five folds; returns the checkpoints."""
    paths = []
    for loss, values in (("ce", DICE_CE), ("topk", DICE_TOPK)):
        for fold, value in enumerate(values):
            path = root / loss / f"fold{fold}" / "seed=0"
            config = {"data": {"split": {"folds": 5, "fold": fold, "seed": 0}}, "objective": {"name": "val/dice", "mode": mode}}
            (path / "checkpoints").mkdir(parents=True)
            (path / "config.yaml").write_text(yaml.safe_dump(config))
            write_json(path / "summary.json", {"objective": value})
            row = {"case": f"c{fold}", "patient": f"p{fold}", "site": "", "member": "", "region": "WT", "dice": 1 - value}
            write_rows(path / "test" / "cases.csv", [row])
            paths.append(str(path / "checkpoints" / "best.ckpt"))
    return paths


def test_the_best_of_each_fold_is_kept(tmp_path):
    paths = candidates(tmp_path / "max")
    kept = [c.path.split("/")[-5] for c in sorted(best_per_fold(paths), key=lambda c: c.fold) if c.chosen]
    assert kept == ["topk", "ce", "ce", "ce", "ce"]
    by_test = best_per_fold(paths, "test")  # the other way round, as the test scores are here
    assert [c.path.split("/")[-5] for c in sorted(by_test, key=lambda c: c.fold) if c.chosen] == ["ce", "topk", "topk", "topk", "topk"]
    assert {p for c in by_test for p in c.patients} == {f"p{f}" for f in range(5)}
    lower = best_per_fold(candidates(tmp_path / "min", "min"))
    assert [c.path.split("/")[-5] for c in sorted(lower, key=lambda c: c.fold) if c.chosen] == ["ce", "topk", "topk", "topk", "topk"]


def test_candidates_that_cannot_be_compared(tmp_path):
    paths = candidates(tmp_path)
    write_json(tmp_path / "ce" / "fold0" / "seed=0" / "summary.json", {"objective": None})
    with pytest.raises(SuiteError) as caught:
        best_per_fold([*paths, str(tmp_path / "loose.ckpt")])
    assert "no validation score" in str(caught.value)
    assert "loose.ckpt" in str(caught.value)
    with pytest.raises(SuiteError, match="median"):
        best_per_fold(paths, "median")


def test_best_per_fold_through_the_job(trained, folder, tmp_path, capsys):
    names = ["fold0", "fold1", "uncropped"]  # the last is of fold 0 as well
    options = ["ensemble.policy=best_per_fold", "ensemble.score=test", "ensemble.out_of_fold=true"]
    found = job_test(folder, tmp_path, *ALL, checkpoint(trained, *names), *options)
    mean = {n: np.mean([float(v[0]) for v in scores(trained[n]).values()]) for n in names}
    best = "fold0" if mean["fold0"] >= mean["uncropped"] else "uncropped"
    assert scores(found) == {**scores(trained[best]), **scores(trained["fold1"])}
    assert capsys.readouterr().out.count("kept ") == 2
    assert all(r["oracle"] == "1" for r in rows(found))  # chosen by the very cases it was tested on


def test_compare_pools_the_folds_of_real_runs(trained):
    from lesionbench.reports.comparison import compare

    comparison = compare([trained["fold0"], trained["fold1"]], metrics="dice")
    (cell,) = comparison.cells
    every = [float(v[0]) for n in ("fold0", "fold1") for v in scores(trained[n]).values()]
    assert (cell["n_folds"], cell["n_cases"], cell["n_seeds"]) == (2, 8, 1)
    assert cell["mean"] == pytest.approx(np.mean(every))
    assert cell["std_cases"] == pytest.approx(np.std(every, ddof=1))
    assert [cell["q25"], cell["median"], cell["q75"]] == pytest.approx(np.percentile(every, [25, 50, 75]).tolist())
    by_fold = [np.mean([float(v[0]) for v in scores(trained[n]).values()]) for n in ("fold0", "fold1")]
    assert [f["mean"] for f in comparison.folds] == pytest.approx(by_fold)


# thresholds tuned out of fold


def test_tune_reads_folds_and_its_threshold_is_applied(trained, folder, tmp_path):
    out = tmp_path / "thresholds.json"
    runs = f"tune.runs=[{trained['fold0']},{trained['fold1']}]"
    run("job=tune", runs, "tune.region=lesion", "tune.grid=null", f"out={out}")
    found = json.loads(out.read_text())
    assert len(found["patients"]) == 8
    every = {c: float(v[0]) for n in ("fold0", "fold1") for c, v in scores(trained[n]).items()}
    assert found["before"] == pytest.approx(np.mean(list(every.values())), abs=1e-6)
    assert found["after"] == max(found["tried"].values()) >= found["before"]
    run("job=tune", runs, "tune.region=lesion", "tune.metric=hd95", f"out={tmp_path / 'distance.json'}")
    by_distance = json.loads((tmp_path / "distance.json").read_text())
    distances = [float(v[1]) for n in ("fold0", "fold1") for v in scores(trained[n]).values()]
    assert by_distance["before"] == pytest.approx(np.mean(distances), abs=1e-3)

    found["min_volume"] = {"lesion": 100000}
    out.write_text(json.dumps(found))
    again = job_test(folder, tmp_path / "again", f"ckpt={trained['fold0'] / 'checkpoints' / 'last.ckpt'}", "postprocessing=tuned", f"postprocessing.thresholds={out}", "postprocessing.min_component=null")  # fmt: skip
    assert all(float(r["dice"]) in (0, 1) and r["oracle"] == "1" for r in rows(again))
    with pytest.raises(SuiteError, match="smallest volume already"):
        run("job=tune", f"tune.runs=[{again}]", "tune.region=lesion", f"out={out}")


def test_thresholds_and_suppression_are_tuned_on_folds_and_applied(trained, folder, tmp_path):
    maps = ["writer.on_test=true", "writer.probabilities=true"]
    tested = [
        job_test(folder, tmp_path / n, f"data.split.fold={n[-1]}", f"ckpt={trained[n] / 'checkpoints' / 'last.ckpt'}", *maps)
        for n in ("fold0", "fold1")
    ]
    runs = f"tune.runs=[{tested[0]},{tested[1]}]"
    levels, gone = tmp_path / "levels.json", tmp_path / "gone.json"
    run("job=tune", runs, "tune.what=thresholds", "tune.trials=8", f"out={levels}")
    found = json.loads(levels.read_text())
    every = [float(v[0]) for t in tested for v in scores(t).values()]
    assert found["before"] == pytest.approx(np.mean(every), abs=2e-3)  # the classes of this network are softmax, its regions one
    assert found["after"] >= found["before"]
    assert len(found["patients"]) == 8
    assert set(found["by_run"]) == {str(t) for t in tested}
    run("job=tune", runs, "tune.what=suppression", "tune.region=lesion", f"postprocessing.thresholds={levels}", f"out={gone}")
    rule = json.loads(gone.read_text())
    assert rule["before"] == pytest.approx(found["after"], abs=2e-3)
    rule["suppress"] = {"lesion": [{"lesion": [None, 100000]}]}
    gone.write_text(json.dumps(rule))
    again = job_test(
        folder, tmp_path / "again", f"ckpt={trained['fold0'] / 'checkpoints' / 'last.ckpt'}", f"postprocessing.thresholds=[{levels},{gone}]"
    )
    assert all(float(r["dice"]) in (0, 1) and r["oracle"] == "1" for r in rows(again))
    with pytest.raises(SuiteError, match=r"writer\.probabilities=true"):
        run("job=tune", f"tune.runs=[{trained['fold0']}]", "tune.what=thresholds", f"out={tmp_path / 'x.json'}")
    with pytest.raises(SuiteError, match=r"tune\.what 'treshold'"):
        run("job=tune", runs, "tune.what=treshold")


def test_tune_takes_ensembles_out_of_fold(trained, folder, tmp_path):
    together = job_test(folder, tmp_path / "e", *ALL, checkpoint(trained, "fold0", "fold1"), "ensemble.out_of_fold=true")
    run("job=tune", f"tune.runs=[{together}]", "tune.region=lesion", f"out={tmp_path / 'a.json'}")
    run("job=tune", f"tune.runs=[{trained['fold0']},{trained['fold1']}]", "tune.region=lesion", f"out={tmp_path / 'b.json'}")
    a, b = (json.loads((tmp_path / f"{n}.json").read_text()) for n in "ab")
    assert a["tried"] == pytest.approx(b["tried"])
    assert (a["held_out"], b["held_out"] is None) == (None, False)


def test_tune_refuses_cases_with_other_contents(trained, folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    runs = [
        f"tune.runs=[{trained['fold0']},{trained['fold1']}]",
        "tune.region=lesion",
        f"tune.data_root={other}",
        f"out={tmp_path / 'x.json'}",
    ]
    run("job=tune", *runs)  # the same elsewhere
    for label in (other / "labels").iterdir():
        image = nib.load(label)
        nib.Nifti1Image(np.roll(np.asarray(image.dataobj), 1, axis=0), image.affine).to_filename(label)
    with pytest.raises(SuiteError, match="have changed since it was tested"):
        run("job=tune", *runs)


def test_tune_builds_nothing_but_data_sets(trained, tmp_path):
    forged = shutil.copytree(trained["fold0"], tmp_path / "forged")
    config = yaml.safe_load((forged / "config.yaml").read_text())
    config["data"]["split"] = {"_target_": "os.mkdir", "path": str(tmp_path / "made")}
    (forged / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SuiteError, match=r"config\.yaml: would build 'os\.mkdir', which makes no data of this suite"):
        run("job=tune", f"tune.runs=[{forged}]", "tune.region=lesion", f"out={tmp_path / 'x.json'}")
    assert not (tmp_path / "made").exists()


def test_tune_refuses_cases_that_were_not_held_out(trained, folder, tmp_path):
    forged = tmp_path / "forged"
    shutil.copytree(trained["fold0"], forged)
    tested_on = next(csv.DictReader((forged / "test" / "cases.csv").open()))["patient"]
    for path in (forged / "checkpoints").glob("*.ckpt"):
        content = torch.load(path, weights_only=True)
        content["lesionbench"]["patients"].append(tested_on)
        torch.save(content, path)
    with pytest.raises(SuiteError, match=rf"trained or selected on 1 of the patients that it predicted \({tested_on}\)"):
        run("job=tune", f"tune.runs=[{trained['fold1']},{forged}]", "tune.region=lesion", f"out={tmp_path / 'x.json'}")
    shutil.rmtree(forged / "checkpoints")
    with pytest.raises(SuiteError, match="no checkpoint any more"):
        run("job=tune", f"tune.runs=[{forged}]", "tune.region=lesion", f"out={tmp_path / 'x.json'}")
    with pytest.raises(SuiteError, match="ET"):
        run("job=tune", f"tune.runs=[{trained['fold1']}]", f"out={tmp_path / 'x.json'}")
    assert not (tmp_path / "x.json").exists()
