"""What six real cases carry: intervals come from the committed tables, and the pages say no more than these."""

import csv
import math
import re
import shutil
from pathlib import Path

import pytest

from benchmarks.six_cases import COLUMNS, main
from lesionbench.reports.statistics import t_interval

DOCS = Path(__file__).parent.parent / "docs"
RESULTS = DOCS / "results"


def intervals(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_students_interval_by_hand():
    assert t_interval([1, 2, 3]) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))
    assert t_interval([1, 2, 3], level=0.5) == pytest.approx((2 - 0.816497 / 3**0.5, 2 + 0.816497 / 3**0.5), rel=1e-5)
    assert t_interval([0.5, 0.5]) == (0.5, 0.5)
    assert all(map(math.isnan, t_interval([0.5])))


def test_the_committed_intervals_are_those_of_the_committed_tables(tmp_path):
    for table in RESULTS.glob("*.csv"):
        shutil.copy(table, tmp_path)
    (tmp_path / "six_cases.csv").unlink()
    main(tmp_path)
    assert (tmp_path / "six_cases.csv").read_text() == (RESULTS / "six_cases.csv").read_text()
    rows = intervals(RESULTS / "six_cases.csv")
    assert tuple(rows[0]) == COLUMNS
    assert {row["n"] for row in rows} == {"6"}
    assert all(float(row["t_low"]) <= float(row["mean"]) <= float(row["t_high"]) for row in rows)


@pytest.mark.parametrize(
    ("table", "page"),
    [
        ("modality_pairing_brats18_weight", "modality_pairing"),
        ("umm_tissue_slabs", "umm"),
        ("flair_threshold_brats18_cases", "flair_threshold"),
    ],
)
def test_a_page_gives_every_difference_of_dice_with_its_interval(table, page):
    text = (DOCS / "methods" / f"{page}.md").read_text()
    number = r"([+-]?\d\.\d{3})"
    said = [tuple(map(float, triple)) for triple in re.findall(rf"{number}\s+\[{number},\s+{number}\]", text)]
    for row in intervals(RESULTS / "six_cases.csv"):
        if row["table"] == table and row["baseline"] and row["metric"] == "dice" and row["region"] != "fused, mean":
            found = tuple(float(row[key]) for key in ("mean", "t_low", "t_high"))
            assert any(triple == pytest.approx(found, abs=6e-4) for triple in said), (row["group"], row["region"], found)


def test_groups_of_committed_tables_are_what_a_person_types():
    for path in RESULTS.glob("*.csv"):
        for row in intervals(path):
            for name in (row.get("group"), row.get("baseline")):
                assert not name or not ("lightning_modules." in name or "(none)" in name), (path.name, name)
