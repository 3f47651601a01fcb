"""Test-time copies: every move has an exact inverse, and the mean over a group knows no direction."""

import pytest
import torch

from lesionbench.errors import SuiteError
from lightning_modules.inferers import GROUPS, Mirrored, Move, SliceWise, Transformed, Whole, Window
from tests.test_postprocessing import INFERERS, slanted

AXES = (0, 1, 2)


def volume(*shape):
    return torch.rand(1, 2, *shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize(("group", "count"), [("flips", 8), ("dihedral", 16)])
def test_moves_are_all_different_and_their_inverses_exact(group, count, axis):
    image = volume(4, 4, 4)
    moved = [move(image, axis) for move in GROUPS[group](axis)]
    assert len({tuple(m.flatten().tolist()) for m in moved}) == count
    for move, copy in zip(GROUPS[group](axis), moved, strict=True):
        assert torch.equal(move.back(copy, axis), image)


@pytest.mark.parametrize("axis", AXES)
def test_dihedral_moves_keep_slices_slices(axis):
    image = volume(4, 4, 4)
    slices = {frozenset(s.flatten().tolist()) for s in image[0, 0].unbind(axis)}
    for move in GROUPS["dihedral"](axis):
        assert {frozenset(s.flatten().tolist()) for s in move(image, axis)[0, 0].unbind(axis)} == slices


def test_a_move_mirrors_first_and_turns_then():
    image = torch.arange(4.0).reshape(1, 1, 2, 2, 1)  # [[0, 1], [2, 3]]
    move = Move(flips=(0,), quarters=1)
    moved = move(image, axis=2)  # mirrored [[2, 3], [0, 1]], then a quarter turn
    assert moved[0, 0, :, :, 0].tolist() == [[3, 1], [2, 0]]
    assert torch.equal(move.back(moved, axis=2), image)
    wrong = image.flip(2).rot90(1, [2, 3]).flip(2).rot90(-1, [2, 3])  # undone in the order in which it was done
    assert not torch.equal(wrong, image)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("axis", AXES)
def test_what_returns_its_input_gets_it_back_bit_for_bit(group, axis):
    image = (volume(6, 5, 7) * 1024).round() / 1024  # few enough digits for exact sums
    for inferer in (Whole(1), SliceWise(1, batch=3), Window((6, 5, 7), overlap=0, blending="constant")):
        seen = []

        def same(view, seen=seen):
            seen.append(view)
            return {"probabilities": view}

        result = Transformed(inferer, group)(image, same, axis)["probabilities"]
        assert torch.equal(result, image)
        assert len(seen) >= len(GROUPS[group](axis))


@pytest.mark.parametrize("name", INFERERS)
def test_a_moved_case_gives_the_moved_result(name):
    image = volume(9, 8, 7)
    transformed = Transformed(INFERERS[name], "dihedral")
    result = transformed(image, slanted, 2)["probabilities"]
    for move in GROUPS["dihedral"](2):
        assert torch.allclose(transformed(move(image, 2), slanted, 2)["probabilities"], move(result, 2), atol=1e-5)
    flips_alone = Transformed(INFERERS[name], "flips")(image, slanted, 2)["probabilities"]
    assert torch.equal(flips_alone, Mirrored(INFERERS[name])(image, slanted, 2)["probabilities"])
    assert not torch.allclose(flips_alone, result, atol=1e-3)


def test_an_unknown_group_is_refused():
    with pytest.raises(SuiteError, match=r"test_time 'flop'.*flips"):
        Transformed(Whole(1), "flop")
