#!/usr/bin/env bash
# The unit of a NIfTI file (`xyzt_units`: meter, millimeter, micrometer) is honored by one reader and left to the user by the other.
# To be expected: both give millimeters, or both give the numbers of the file.
# What happens (nibabel 5.4.2, SimpleITK 2.5.7): nibabel's affine and zooms are in the unit of the file, SimpleITK's spacing and origin are
# turned to millimeters. A volume of 500 x 500 x 500 micrometers has voxels of 0.5 mm in SimpleITK and "500" in nibabel, which code that takes
# affines for millimeters reads as half a meter; a file in meters, as some simulators write it, becomes a thousand times too small.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet nibabel==5.4.2 SimpleITK==2.5.7 numpy 2>/dev/null
cd "$folder"
venv/bin/python - <<'PY' | tee output
import nibabel as nib
import numpy as np
import SimpleITK as sitk

for unit, size in (("meter", 0.0005), ("mm", 0.5), ("micron", 500.0)):
    affine = np.diag([size, size, size, 1])
    affine[:3, 3] = 4 * size
    image = nib.Nifti1Image(np.zeros((4, 4, 4), np.int16), affine)
    image.header.set_xyzt_units(unit)
    image.to_filename("x.nii")
    read, other = nib.load("x.nii"), sitk.ReadImage("x.nii")
    print(
        f"{unit}: nibabel voxel {read.affine[0, 0]:.4g}, origin {read.affine[0, 3]:.4g}; "
        f"SimpleITK voxel {other.GetSpacing()[0]:.4g}, origin {abs(other.GetOrigin()[0]):.4g}"
    )
PY
diff output - <<'EXPECTED' && echo "as described"
meter: nibabel voxel 0.0005, origin 0.002; SimpleITK voxel 0.5, origin 2
mm: nibabel voxel 0.5, origin 2; SimpleITK voxel 0.5, origin 2
micron: nibabel voxel 500, origin 2000; SimpleITK voxel 0.5, origin 2
EXPECTED
