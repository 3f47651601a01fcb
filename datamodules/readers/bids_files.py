"""Finds cases in a BIDS folder: images by the end of their names, in raw data and derivatives, one case for each subject and session."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datamodules.readers.brats_files import lacking_channels, require_root
from datamodules.readers.folder_files import walked
from datamodules.readers.tables import ABSENT, parsed, read_table
from lesionbench.case import Case
from lesionbench.errors import Incomplete, SuiteError
from lesionbench.geometry import ending_of, stem_of

_NAME = re.compile(r"(?P<sub>sub-[A-Za-z0-9]+)(?:_(?P<ses>ses-[A-Za-z0-9]+))?_.+")
Key = tuple[str, str]  # subject, session ("" without)


def find_bids(
    root: Path, images: Mapping[str, str], label: str | None, allow_missing: bool = False, channels: Sequence[str] | None = None
) -> list[Case]:
    """The cases of a BIDS folder, sorted by id: `sub-01`, or `sub-01_ses-1` where there are sessions; the patient is the subject.

    A file is told by the end of its name before the ending, from a `_` on: `T1w`, `space-MNI152NLin2009aSym_T1w`, `desc-lesion_mask`. A folder
    and a colon before it narrow the search: `derivatives/lesions:mask`. `participants.tsv` gives attributes, and `site`; so does
    `sub-01_sessions.tsv` for sessions.

    Args:
        images: channel -> end of the name.
        label: end of the name of the label map; None for none.
        allow_missing: accept cases that lack channels, as long as one is there.
        channels: those of `images` that cases must have; None = all.

    Raises:
        SuiteError: no folder, nothing that fits, two files for one channel of a case.
        Incomplete: missing channels (all listed at once).
    """
    root = require_root(root, "BIDS")
    wanted = {name: end for name, end in images.items() if channels is None or name in channels}
    files = list(_files(root))
    if not files:
        there = ", ".join(sorted(p.name for p in root.iterdir())[:5]) or "nothing"
        raise SuiteError(f"{root}: no image named sub-<label>_..., it holds {there}; expected sub-01/anat/sub-01_T1w.nii.gz and the like")
    found: dict[Key, dict[str, Path]] = {}
    for name, end in [*wanted.items(), *([("", label)] if label else [])]:
        for key, path in files:
            if _fits(root, path, end):
                other = found.setdefault(key, {}).setdefault(name, path)
                if other != path:
                    what = f"channel {name}" if name else "the label"
                    raise SuiteError(
                        f"two files for {what} ({end}): {other} and {path}; give a longer end, or a folder before it: derivatives/NAME:{end}"
                    )
    cases = [_case(key, dict(own)) for key, own in sorted(found.items()) if set(own) - {""}]
    if not cases:
        ends = sorted({stem_of(path).rpartition("_")[2] for _, path in files})
        raise SuiteError(
            f"{root}: no image ends with {' or '.join(wanted.values())} (data.images); names there end with {', '.join(ends[:10])}"
        )
    _add_participants(root, cases)
    if gaps := lacking_channels(cases, tuple(wanted), allow_missing):
        raise Incomplete(gaps, cases)
    return cases


def _files(root: Path) -> Iterator[tuple[Key, Path]]:
    for folder, _, names in walked(root):
        for name in sorted(names):
            path = Path(folder) / name
            if ending_of(path) and (match := _NAME.fullmatch(stem_of(path))):
                yield (match["sub"], match["ses"] or ""), path


def _fits(root: Path, path: Path, end: str) -> bool:
    folder, _, last = end.rpartition(":")
    return stem_of(path).endswith(f"_{last}") and (not folder or path.is_relative_to(root / folder))


def _case(key: Key, files: dict[str, Path]) -> Case:
    label = files.pop("", None)
    return Case("_".join(part for part in key if part), files, label, patient=key[0])


def _add_participants(root: Path, cases: Sequence[Case]) -> None:
    """Attributes of subjects from `participants.tsv`, and of sessions from `sub-01_sessions.tsv`, wherever these lie."""
    of_subject: dict[str, dict[str, Any]] = {}
    of_session: dict[str, dict[str, Any]] = {}
    for folder, _, names in walked(root):
        for name in sorted(names):
            if name == "participants.tsv":
                for row in read_table(Path(folder) / name):
                    of_subject[row.pop("participant_id", "")] = row
            elif match := re.fullmatch(r"(sub-[A-Za-z0-9]+)_sessions\.tsv", name):
                for row in read_table(Path(folder) / name):
                    of_session[f"{match[1]}_{row.pop('session_id', '')}"] = row
    for case in cases:
        row = {**of_subject.get(case.patient, {}), **of_session.get(case.id, {})}
        case.site = row.pop("site", "")
        case.attributes = {k: parsed(v) for k, v in row.items() if v.lower() not in ABSENT}
