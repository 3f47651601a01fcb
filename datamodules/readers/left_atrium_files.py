"""Finds the cases of the 2018 left-atrium challenge on disk, as the challenge or as the semi-supervised literature stores them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datamodules.provenance import derive
from datamodules.readers.array_files import h5_array, h5_names, write_pair
from datamodules.readers.brats_files import require_root
from lesionbench.case import Case
from lesionbench.errors import SuiteError, unknown
from lesionbench.geometry import read_volume

FILES = {"h5": "mri_norm2.h5", "nrrd": "lgemri.nrrd"}
LABEL = "laendo.nrrd"
SPACING = 0.625  # mm, of every scan of the challenge; the HDF5 files do not hold it

_TRAIN = (
    "06SR5RBREL16DQ6M8LWS 0RZDK210BSMWAA6467LU 1D7CUD1955YZPGK8XHJX 1GU15S0GJ6PFNARO469W 1MHBF3G6DCPWHSKG7XCP "
    "23X6SY44VT9KFHR7S7OC 2XL5HSFSE93RMOJDRGR4 38CWS74285MFGZZXR09Z 3C2QTUNI0852XV7ZH4Q1 3DA0T2V6JJ2NLUAV6FWM "
    "4498CA6DZWELOXCBRYRF 45C45I6IXAFGNRO067W9 4CHFJGF6ZUM7CMZTNFQF 4EPVTT1HPA8U60CDUKXE 57SGAJMLCTCH92QUA0EE "
    "5BHTH9RHH3PQT913I59W 5FKQL4K14KCB72Y8YMC2 5HH0WPWIY06DLAFOBQ4M 5QFK2PMHNX7UALK52NNA 5UB5KFD2PK38Z4LS6W80 "
    "6799D6LEBH3NSRV1KH27 78NJ5YFQF72BGC8RO51C 7FUCNXB39F78WTOP5K71 8GYK8A9MBRC9TV0FVSRA 8M99G0JLAXG9GLPV0O8G "
    "8RE90C8H5DKF4V6HO8UU 8ZG2TRZ81MAWHZPN9KKG 9DCM2IB45SK6YKQNYUQY 9DHWWP5Y66VDMPXISZ13 9DQYTIU00I4JC0OEOKQQ "
    "A11O45O3NAXWM7T2H8CH A4R1S23KR0KU2WSYHK2X A5RNNK0A891WUSC2V624 AT5CRO5JUDBWD4RUPXSQ BNK95S2SJXEGSW7VAKYU "
    "BXJWOUYP2J3EN4U92517 BYSRSI3H4YTWKMM3MADP BZUFJX66T0W6ZPVTL9DU CB5P5W7X310NIIVU7UZV CBIJFVZ5L9BS0LKWE8YL "
    "CCGAKN4EDT72KC8TTJ76 CLXFYOBQDCVXQ9P7YC07 CMPXO4J23G58J53Q98SZ CZPMV6KWZ4I7IJJP9FOK DLKXBV73A55ZTSZ0QQI2 "
    "DQ5UYBGR5QP6L692QSG6 DYXSCIWHLSUOZIDDSZ40 E2ZMO66WGS74UKXTZPPQ EJ5V7SPR4961JWD6SS8V FGM5NIWN3URY4HF4WNUW "
    "GSC9KNY0VEZXFSGWNF25 HVE7DR3CUA2IM3RC6OMA HZZ4O0BRKF8S0YX3NNF7 I2VZ7N8H9QYNYT7ZZF1Y IDWWHGWJ5STOQXSDT6GU "
    "IIY6TYJMTJIZRIZLB9YW IJJY51YW3W4YJJ7DTVTK IQYKPTWXVV9H0IHB8YXC JEC6HJ7SQJXBKVREX03F JGFOLWJF7YCYD8DPHQNH "
    "K32FD6LRSUSSXGS1YUOX KM5RYAMP4P4ZP6XWP3Q2 KSNYHUBHHUJTYJ14UQZR LH4FVU3TQDEC87YGN6FL LJSDNMND9SHKM7Q4IRHJ "
    "MFTDVMBWFNQ3F5KHBRDR MJHV7F65TB2A76CQLOC3 MVKIPGBKTNSENNP1S4HB O5TSIKRD4AIB8K84WIR9 OIRDLE32TXZX942FVZMM "
    "P1OTI3IWJUIB5NRLULLH PVNXUK681N9BY14K4Z86 Q0MEX9ZIKAGJORSPLQ3Y Q7J0WYM695R9MA285ZW0 QZC1W0FNR19KJFLOCFLH "
    "R8ER97O9UUN77C02VE2J RSZY41MT2FGDKHWWL5L2 SN4LF8SGBSRQUPTDSX78 TDDI6L3Y0L9VVFP9MNFS UZUZZT2W9IUSHL6ASOX3"
)
_TEST = (
    "UPT6DX9IQY9JAZ7HJKA7 UTBUJIWZMKP64E3N73YC ULHWPWKKLTE921LQLH1P V0MZOWJ6MU3RMRCV9EXR VDOF02M8ZHEAADFMS6NP "
    "VG4C826RAAKVMV9BQLVD VIXBEFTNVHZWKAKURJBN VQ2L3WM8KEVF6L44E6G9 WBG9WYZ1B25WDT5WAT8T WMDG2EFA6L2SNDZXIRU0 "
    "WNPKE0W404QE9AELX1LR WSJB9P4JCXUVHBOYFVWL WW8F5CO4S4K5IM5Z7EXX X18LU5AOBNNDMLTA0JZL XYDLYJ5CS19FDBVLJIPI "
    "Y7ZU0B2APPF54WG6PDMF YDKD1HVHSME6NVMA8I39 Z9GMG63CJLL0VW893BB1 ZIJLJAVQV3FJ6JSQOH1E ZQPMJ4XEC5A4BISD45P1"
)
# Yu et al., MICCAI 2019 (UA-MT), and every semi-supervised left-atrium table since: 80 to train on, of which the first 4, 8 or 16 are
# labeled, and 20 to test on
NAMED_SPLITS = {"yu2019": {"train": tuple(_TRAIN.split()), "test": tuple(_TEST.split())}}

_CASE = re.compile(r"[0-9A-Z]{20}")


@dataclass(frozen=True)
class Scan:
    """One scan as found: its id, its image file, and the file of its label, where it has one (with HDF5 the same file)."""

    id: str
    image: Path
    label: Path | None

    @property
    def sources(self) -> list[Path]:
        """The files it is made from."""
        return [self.image, *([self.label] if self.label else [])]


def find_left_atrium(root: Path, files: str = "h5") -> list[Scan]:
    """The scans of a left-atrium folder, sorted by id. HDF5 files are opened to see whether they hold a label, no voxels are read.

    Case folders, named by 20 capital letters and digits, may lie in `root` or up to two folders below it.

    Args:
        root: folder with the scans.
        files: `h5` (`<case>/mri_norm2.h5` with the arrays `image` and `label`) or `nrrd` (`<case>/lgemri.nrrd` and `laendo.nrrd`).

    Raises:
        SuiteError: unknown `files`, a missing folder, no scans, two scans of one name, no label at all.
    """
    if files not in FILES:
        raise unknown("form of the left-atrium files (data.files)", files, FILES)
    root = require_root(root, "left atrium")
    paths = {kind: sorted(_images(root, name)) for kind, name in FILES.items()}
    if not paths[files]:
        other = next((f"; what is there fits data.files={kind}" for kind, found in paths.items() if found), "")
        there = ", ".join(sorted(p.name for p in root.iterdir())[:5]) or "nothing"
        example = f"{NAMED_SPLITS['yu2019']['train'][0]}/{FILES[files]}"
        raise SuiteError(f"{root}: no left-atrium scans, it holds {there}; expected files such as {example}{other}")
    names = [path.parent.name for path in paths[files]]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise SuiteError(f"{root}: two scans of one name: {twice[:5]}; is the data set unpacked twice?")
    scans = sorted((_scan(path, files) for path in paths[files]), key=lambda s: s.id)
    if not any(scan.label for scan in scans):
        raise SuiteError(f"{root}: none of {len(scans)} scans has a label ({'array label' if files == 'h5' else LABEL})")
    return scans


def _images(root: Path, name: str) -> list[Path]:
    return [p for up in ("", "*/", "*/*/") for p in root.glob(f"{up}*/{name}") if _CASE.fullmatch(p.parent.name)]


def _scan(path: Path, files: str) -> Scan:
    if files == "h5":
        return Scan(path.parent.name, path, path if "label" in h5_names(path) else None)
    label = path.with_name(LABEL)
    return Scan(path.parent.name, path, label if label.is_file() else None)


def as_case(scan: Scan, folder: Path) -> Case:
    """The case with the files that `write_scan` makes of the scan under `folder`, there or not."""
    home = folder / scan.id
    return Case(scan.id, {"mri": home / "mri.nii"}, label=home / "atrium.nii" if scan.label else None)


def write_scan(scan: Scan, folder: Path) -> None:
    """Writes image and label as NIfTI under `folder`, values and axes as they are, unless made from it before.

    NRRD files keep their place in the world. HDF5 files have none: axes stay as stored, voxels are of 0.625 mm.

    Raises:
        SuiteError: an unreadable file, other dimensions than three, a label on another grid; names the file.
    """
    targets = as_case(scan, folder).files
    derive(targets, scan.sources, lambda: _write_scan(scan, targets))


def _write_scan(scan: Scan, targets: Sequence[Path]) -> None:
    if scan.image.suffix == ".h5":
        image, affine = h5_array(scan.image, "image", 3), np.diag([SPACING, SPACING, SPACING, 1])
        label = h5_array(scan.image, "label", 3) if scan.label else None
    else:
        image, affine, _ = read_volume(scan.image)
        label = read_volume(scan.label)[0] if scan.label else None
    write_pair(image, label, affine, targets, scan.image)
