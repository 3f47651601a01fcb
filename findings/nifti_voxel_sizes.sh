#!/usr/bin/env bash
# One NIfTI file, two voxel sizes. A header holds voxel sizes twice, in `pixdim` and in the columns of the sform, and nothing keeps them equal;
# some exporters write an sform of unit voxels beside the true pixdim.
# To be expected: the programs of one field read one size, and nibabel's `affine` and `header.get_zooms()` agree with each other.
# What happens (nibabel 5.4.2, SimpleITK 2.5.7): nibabel's affine follows the sform (1 x 1 x 1 mm) while its zooms follow pixdim
# (1.316 x 1.316 x 10 mm), without a word; SimpleITK takes pixdim, whether there is a qform or not, and
# warns of "unexpected scales in sform". A surface distance along the third axis
# differs by a factor of ten between two evaluations of the same file.
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

for name, qform_code in (("no qform", 0), ("qform", 1)):
    image = nib.Nifti1Image(np.zeros((4, 4, 4), np.int16), None)
    image.header.set_sform(np.eye(4), code=1)
    image.header.set_qform(np.diag([1.316, 1.316, 10, 1]), code=qform_code)
    image.header["pixdim"][1:4] = 1.316, 1.316, 10
    nib.Nifti1Image(np.asarray(image.dataobj), None, image.header).to_filename("x.nii")
    read = nib.load("x.nii")
    affine = np.linalg.norm(read.affine[:3, :3], axis=0)
    spacing = sitk.ReadImage("x.nii").GetSpacing()
    shown = [" x ".join(f"{v:.4g}" for v in values) for values in (affine, read.header.get_zooms(), spacing)]
    print(f"{name}: nibabel affine {shown[0]}, nibabel zooms {shown[1]}, SimpleITK {shown[2]}")
PY
diff output - <<'EXPECTED' && echo "as described"
no qform: nibabel affine 1 x 1 x 1, nibabel zooms 1.316 x 1.316 x 10, SimpleITK 1.316 x 1.316 x 10
qform: nibabel affine 1 x 1 x 1, nibabel zooms 1.316 x 1.316 x 10, SimpleITK 1.316 x 1.316 x 10
EXPECTED
