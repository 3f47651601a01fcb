#!/usr/bin/env bash
# Writing one DICOM file with a position or another decimal number in its tags sets the locale of the whole process to "C", for good.
# To be expected: a library that needs a locale of its own for numbers gives the caller's back, or uses one of its thread alone; SimpleITK's
# own example of writing a series sets such tags.
# What happens (SimpleITK 2.5.7, Python 3): once a slice with ImagePositionPatient is written the process's locale is C, and Python, which
# asks the locale for the encoding of text files that are opened without one, reads and writes ASCII from then on: a configuration or CSV file
# with an accent, which could be read before, raises UnicodeDecodeError. Slices without such tags, reading DICOM, and NRRD, MetaImage and
# NIfTI files leave the locale alone.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet SimpleITK==2.5.7 numpy==2.2.6 2>/dev/null
cd "$folder"
export LC_ALL=C.UTF-8
unset PYTHONUTF8 PYTHONIOENCODING
cat > state.py <<'PY'
import locale


def state(name):
    """The encoding of a text file that is opened without one, and what the process's locale is."""
    with open("note.txt") as file:
        codec = file.encoding
        try:
            found = file.read()
        except UnicodeDecodeError:
            found = "UnicodeDecodeError"
    ctype = locale.setlocale(locale.LC_CTYPE)
    print(f"{name}: locale {ctype}, encoding {codec}, read {ascii(found)}")
PY
venv/bin/python - <<'PY' | tee output
import numpy as np
import SimpleITK as sitk
from state import state

with open("note.txt", "w", encoding="utf-8") as file:
    file.write("1.0 \u00b1 0.1")
image = sitk.GetImageFromArray(np.arange(60, dtype=np.int16).reshape(3, 4, 5))
state("at first")
for name in ("a.nrrd", "a.mha", "a.nii.gz"):
    sitk.WriteImage(image, name)
    sitk.ReadImage(name)
state("after NRRD, MetaImage, NIfTI")
piece = image[:, :, 0]
sitk.WriteImage(piece, "a.dcm")
piece.SetMetaData("0008|0060", "MR")
sitk.WriteImage(piece, "b.dcm")
sitk.ReadImage("b.dcm")
state("after DICOM without a position")
piece.SetMetaData("0020|0032", "0\\0\\1.5")
sitk.WriteImage(piece, "c.dcm")
state("after DICOM with a position")
PY
venv/bin/python - <<'PY' | tee -a output
import SimpleITK as sitk
from state import state

sitk.ReadImage("c.dcm")
state("another process, after reading it")
PY
diff output - <<'EXPECTED' && echo "as described"
at first: locale C.UTF-8, encoding UTF-8, read '1.0 \xb1 0.1'
after NRRD, MetaImage, NIfTI: locale C.UTF-8, encoding UTF-8, read '1.0 \xb1 0.1'
after DICOM without a position: locale C.UTF-8, encoding UTF-8, read '1.0 \xb1 0.1'
after DICOM with a position: locale C, encoding ANSI_X3.4-1968, read 'UnicodeDecodeError'
another process, after reading it: locale C.UTF-8, encoding UTF-8, read '1.0 \xb1 0.1'
EXPECTED
