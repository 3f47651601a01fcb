"""The list of changes that `benchmarks/mutants.py` tries is about the code as it is: trying them takes long and is done by hand."""

import ast

import pytest

from benchmarks.mutants import ROOT, Mutant, mutants

ALL = list(mutants())
METHODS = list(dict.fromkeys(mutant.method for mutant in ALL))


@pytest.mark.parametrize("method", METHODS)
def test_changes_of_a_method_can_be_made(method):
    own = [mutant for mutant in ALL if mutant.method == method]
    assert len(own) >= 10
    assert len({(mutant.file, mutant.new, mutant.old) for mutant in own}) == len(own)
    for mutant in own:
        changed = mutant.applied((ROOT / mutant.file).read_text(encoding="utf-8"))
        if mutant.file.endswith(".py"):
            ast.parse(changed)
        files = [word.split("::")[0] for word in mutant.tests if word.startswith("tests/")]
        assert files
        assert all((ROOT / file).is_file() for file in files)


def test_a_change_is_one_place():
    with pytest.raises(ValueError, match=r"'a' stands 2 times in x\.py"):
        Mutant("m", (), "x.py", "a", "b").applied("a a")
    assert Mutant("m", (), "x.py", "a b", "c").applied("a a b") == "a c"
