#!/usr/bin/env bash
# In the BraTS 2026 evaluation, a prediction with one voxel of a value that the task does not know costs nothing, while a prediction that is not there costs the most.
# To be expected: both get the penalty, or the voxel counts as background; in any case the case stays in the mean.
# What happens (BraTS-evaluation 0.0.10, panoptica 2.1.7): the case is gone from the table, with a line in the output of the program and the exit code 0, and the
# mean is taken over the other cases; of a prediction that is absent the row holds 0 and HD95 373. Of two teams that fail on the same hard case, the
# one whose mask has a stray value 4 (enhancing tumor up to 2021; the resection cavity of another task) has the better mean.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet BraTS-evaluation==0.0.10 panoptica==2.1.7 SimpleITK==2.5.7 2>/dev/null
cd "$folder"
mkdir truth absent empty stray
venv/bin/python - <<'PY'
import nibabel as nib
import numpy as np

truth = np.zeros((20, 20, 20), np.uint8)
truth[5:10, 5:10, 5:10] = 1
empty, stray = np.zeros_like(truth), np.zeros_like(truth)
stray[0, 0, 0] = 4
for number in range(2):
    nib.Nifti1Image(truth, np.eye(4)).to_filename(f"truth/{number:05d}.nii.gz")
for name, hard in (("absent", None), ("empty", empty), ("stray", stray)):
    nib.Nifti1Image(truth, np.eye(4)).to_filename(f"{name}/00000.nii.gz")
    if hard is not None:
        nib.Nifti1Image(hard, np.eye(4)).to_filename(f"{name}/00001.nii.gz")
PY
for name in absent empty stray; do
  venv/bin/brats-evaluate --config GoAT --ref_path truth --pred_path $name --summary_json $name.json >log 2>&1
  venv/bin/brats-parse-metrics seg --json_path $name.json --output_csv_path $name.csv >>log 2>&1
  venv/bin/python - $name <<'PY' | tee -a output
import csv
import sys

*cases, mean, _, _ = csv.DictReader(open(f"{sys.argv[1]}.csv"))
print(f"{sys.argv[1]}: {len(cases)} of 2 cases, mean Dice {float(mean['global_dsc_wt']):g}, mean HD95 {float(mean['global_hd95_wt']):g}")
PY
done
diff output - <<'EXPECTED' && echo "as described"
absent: 2 of 2 cases, mean Dice 0.5, mean HD95 186.5
empty: 2 of 2 cases, mean Dice 0.5, mean HD95 186.5
stray: 1 of 2 cases, mean Dice 1, mean HD95 0
EXPECTED
