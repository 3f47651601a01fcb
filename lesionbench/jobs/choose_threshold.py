"""A stage that chooses the one threshold of a score map on labeled cases."""

from pathlib import Path
from typing import Any

from lesionbench.errors import SuiteError, unknown
from lesionbench.results import write_json
from lightning_modules.anomaly.base import Scored


def choose_threshold(cfg: Any, folder: Path) -> Path:
    """A stage: the one threshold with the best Dice over all voxels of some labeled cases (Meissen et al., BrainLes 2021, Section 2.3).

    The search looks at unfiltered maps and at `metrics.thresholds` values, evenly spaced from the lowest to the highest score (null =
    every one that makes a difference). It reads from the configuration, under `calibration`:

        parts: of the split whose cases are used. `test` is the protocol of the papers and makes the masks of the test an oracle's,
            which every table then says.
        filter_in_search: search with the rule on components applied at each threshold.

    Returns:
        `threshold.json`: threshold, the Dice it had, parts and patients.

    Raises:
        SuiteError: no labeled case in these parts, or no slice of them in the slice range.
    """
    from lesionbench.jobs.assembled import Assembled

    run = Assembled(cfg)
    run.prepare()
    if cfg.ckpt:
        run.load(cfg.ckpt)
    run.data.setup("test")
    parts = list(cfg.calibration.parts)
    for part in parts:
        if part not in ("train", "val", "test"):
            raise unknown("calibration.parts", part, ["train", "val", "test"])
    cases = [case for part in parts for case in run.data.parts[part]]
    if not cases:
        raise SuiteError(f"calibration.parts={parts}: no labeled case in these parts of the split")
    scored = Scored(run, cases)
    counts = scored.counts()
    if not counts.values.size:
        raise SuiteError(f"no voxel to choose a threshold on: model.slice_range={cfg.model.slice_range} holds no slice of these cases")
    found, threshold = counts.best_dice(cfg.metrics.thresholds)
    if cfg.calibration.filter_in_search:
        found, threshold = scored.best_filtered(cfg.metrics.thresholds)
    patients = sorted({case.patient for case in cases})
    return write_json(folder / "threshold.json", {"threshold": threshold, "dice": found, "parts": parts, "patients": patients})
