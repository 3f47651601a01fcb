"""Settings that a paper states stand in `tests/papers` with their section; the experiments, the pages and these files say the same."""

import pytest

from tests.claims import FILES, KINDS, ROOT, differences, entries, guarded, malformed, page_with, read, untold

each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


@each_file
def test_experiments_do_what_the_paper_states(file):
    claims = read(file)
    assert malformed(claims) == []
    assert differences(claims) == []


@each_file
def test_every_setting_of_the_experiment_is_told(file):
    assert untold(file.stem, read(file)) == []


@each_file
def test_the_page_s_settings_are_made_of_the_file(file):
    page = (ROOT / "docs" / "methods" / f"{file.stem}.md").read_text(encoding="utf-8")
    assert page == page_with(page, file.stem, read(file)), "python -m tests.claims writes it anew"


@each_file
def test_a_changed_setting_is_found(file):
    """The first value of each kind, changed on the command line; `benchmarks/changed_settings.py` changes all of them."""
    claims = read(file)
    for kind in KINDS:
        entry = next((entry for k, entry in entries(claims) if k == kind and entry.get("is")), None)
        if entry is None:
            continue
        key = next(iter(entry["is"]))
        assert key in guarded(claims)
        wrong = {**claims, "stated": [], "open": [], "departed": [], kind: [{**entry, "is": {key: "something else"}}]}
        assert any(line.startswith(f"{entry['what']}: {key} is ") for line in differences(wrong))


def test_what_is_wrong_with_a_file_is_named():
    claims = {"experiment": "maab_unet/brats2021", "stated": [{"what": "rate", "text": "1e-4", "is": {"epochs": 300}}], "opne": []}
    assert malformed(claims) == ["opne: no such part", "stated, rate: lacks where"]
    nothing = {
        "experiment": "maab_unet/brats2021",
        "open": [{"what": "x", "why": "y"}, {"what": "z", "why": "y", "test": "tests/test_claims.py::test_none"}],
    }
    assert malformed(nothing) == ["open, x: neither `is` nor `test`", "open, z: tests/test_claims.py::test_none is no test"]


def test_numbers_text_and_truth_are_told_apart():
    claims = {"experiment": "maab_unet/brats2021", "open": [{"what": "a", "why": "b", "is": {"epochs": 300.0}}]}
    assert differences(claims) == []
    for value in ("300", True, None, [300], 301):
        claims["open"][0]["is"] = {"epochs": value}
        assert differences(claims) == [f"a: epochs is 300, not {value!r}"]
