#!/usr/bin/env bash
# The BraTS 2026 evaluation of a NIfTI file gives each voxel size to the wrong axis, and none to the distances between whole masks.
# To be expected: a prediction that is one voxel off along the third axis of a file with voxels of 1 x 1 x 5 mm has a lesion-wise HD95 of 5 mm, one that
# is off along the first axis 1 mm; and of a single lesion the global HD95 is the lesion-wise one.
# What happens (BraTS-evaluation 0.0.10, panoptica 2.1.7, SimpleITK 2.5.7): 1 mm and 5 mm, and globally 1 either way. panoptica reads the array with its
# axes in the order z, y, x and the spacing in the order x, y, z and uses them together; for whole masks it passes no spacing. The same array and
# spacing handed over in one order (here: nibabel images) give 5 and 1. Files with cubic voxels hide the first; the second is seen with any size but 1 mm.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet BraTS-evaluation==0.0.10 panoptica==2.1.7 SimpleITK==2.5.7 2>/dev/null
cd "$folder"
mkdir truth prediction
venv/bin/python - <<'PY'
import nibabel as nib
import numpy as np

truth = np.zeros((20, 20, 20), np.uint8)
truth[5:10, 5:10, 5:10] = 1
for number, axis in enumerate((0, 2)):
    for name, mask in (("truth", truth), ("prediction", np.roll(truth, 1, axis))):
        nib.Nifti1Image(mask, np.diag([1, 1, 5, 1])).to_filename(f"{name}/{number:05d}.nii.gz")
PY
venv/bin/brats-evaluate --config MenRT --ref_path truth --pred_path prediction --summary_json found.json >log 2>&1
venv/bin/brats-parse-metrics seg --json_path found.json --output_csv_path found.csv >>log
venv/bin/python -W ignore - <<'PY' >log
import csv
import importlib.util
import os

import nibabel as nib
from panoptica import Panoptica_Evaluator

config = os.path.join(os.path.dirname(importlib.util.find_spec("brats_evaluation").origin), "configs", "config_MenRT.yaml")
printed = []
evaluator = Panoptica_Evaluator.load_from_config(config)
for axis, row in zip(("first", "third"), csv.DictReader(open("found.csv"))):
    images = [nib.load(f"{name}/{row['subject_id']}") for name in ("prediction", "truth")]
    handed = evaluator.evaluate(*images)["gtv"].sq_hd95
    lesion, whole = (float(row[f"{name}_gtv"]) for name in ("lesionwise_hd95_mean", "global_hd95"))
    printed.append(f"one voxel along the {axis} axis: files {lesion:g}, nibabel images {handed:g}, whole masks {whole:g}")
open("output", "w").write("\n".join(printed) + "\n")
PY
cat output
diff output - <<'EXPECTED' && echo "as described"
one voxel along the first axis: files 5, nibabel images 1, whole masks 1
one voxel along the third axis: files 1, nibabel images 5, whole masks 1
EXPECTED
