#!/usr/bin/env bash
# A DICOM segmentation (SEG) that highdicom writes of an MR series, read by SimpleITK.
# To be expected: SimpleITK refuses the file, or gives a mask on the grid of the series, or at least stacks its frames at their own distance, with the segments told apart.
# What happens (SimpleITK 2.5.7, highdicom 0.28.2): it reads the file without a word. The frames of all segments become the slices of one volume, segment after segment; slices
# without a mask, which highdicom leaves out, are closed up; the distance of slices is 1 mm where the series has 4 (spacing between slices, thickness and the positions of all
# frames stand in the file); every voxel of every segment is 255. Here two segments with four frames in all give a volume of just the size of the series of four slices, so that
# nothing shows. highdicom itself reads the file back on the grid of the series.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet SimpleITK==2.5.7 highdicom==0.28.2 pydicom==3.0.2 numpy==2.2.6 2>/dev/null
cd "$folder"
venv/bin/python - <<'PY' 2>/dev/null | tee output
import highdicom as hd
import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage

study, series, frame_of_reference = pydicom.uid.generate_uid(), pydicom.uid.generate_uid(), pydicom.uid.generate_uid()
sources = []
for n in range(4):
    meta = pydicom.dataset.FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = MRImageStorage, ExplicitVRLittleEndian
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    image = pydicom.dataset.FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    image.SOPClassUID, image.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    image.StudyInstanceUID, image.SeriesInstanceUID, image.FrameOfReferenceUID = study, series, frame_of_reference
    image.Modality, image.PatientID, image.PatientName, image.InstanceNumber = "MR", "1", "A", n + 1
    image.PatientBirthDate = image.PatientSex = image.StudyID = image.StudyDate = image.StudyTime = image.AccessionNumber = ""
    image.ReferringPhysicianName, image.SeriesNumber, image.Manufacturer = "", 1, ""
    image.Rows, image.Columns, image.PixelSpacing, image.SliceThickness, image.SpacingBetweenSlices = 6, 5, [1.5, 0.9], 4, 4
    image.ImageOrientationPatient, image.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [-31.5, 12.25, 7 + 4 * n]
    image.SamplesPerPixel, image.PhotometricInterpretation, image.PixelRepresentation = 1, "MONOCHROME2", 0
    image.BitsAllocated, image.BitsStored, image.HighBit = 16, 16, 15
    image.PixelData = np.zeros((6, 5), np.uint16).tobytes()
    sources.append(image)

mask = np.zeros((4, 6, 5), np.uint8)
mask[[0, 2, 3], 2:4, 1:3] = 1  # slices 0, 2 and 3
mask[3, 0, 0] = 2
algorithm = hd.AlgorithmIdentificationSequence(name="a", version="1", family=codes.DCM.ArtificialIntelligence)
segments = [
    hd.seg.SegmentDescription(n, name, codes.SCT.Tissue, codes.SCT.Tissue, hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC, algorithm)
    for n, name in ((1, "core"), (2, "edema"))
]
hd.seg.Segmentation(
    sources, mask, "BINARY", segments, series_instance_uid=hd.UID(), series_number=2, sop_instance_uid=hd.UID(), instance_number=1,
    manufacturer="m", manufacturer_model_name="m", software_versions="1", device_serial_number="1",
).save_as("seg.dcm")

file = pydicom.dcmread("seg.dcm")
measures = file.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
print(f"in the file: {len(file.PerFrameFunctionalGroupsSequence)} frames, {measures.SpacingBetweenSlices:g} mm between slices")
for group in file.PerFrameFunctionalGroupsSequence:
    number, position = group.SegmentIdentificationSequence[0].ReferencedSegmentNumber, group.PlanePositionSequence[0].ImagePositionPatient
    print(f"  segment {number} at {position[2]:g} mm")
volume = hd.seg.segread("seg.dcm").get_volume(combine_segments=True)
print(f"highdicom: {volume.spatial_shape} with values {np.unique(volume.array).tolist()}, {np.linalg.norm(volume.affine[:3, 0]):g} mm between slices")
image = sitk.ReadImage("seg.dcm")
array = sitk.GetArrayFromImage(image)
print(f"SimpleITK: {array.shape} with values {np.unique(array).tolist()}, {image.GetSpacing()[2]:g} mm between slices, origin at {image.GetOrigin()[2]:g} mm")
print(f"  voxels of its slices: {np.count_nonzero(array, axis=(1, 2)).tolist()}, of the mask's: {np.count_nonzero(mask, axis=(1, 2)).tolist()}")
PY
diff output - <<'EXPECTED' && echo "as described"
in the file: 4 frames, 4 mm between slices
  segment 1 at 19 mm
  segment 1 at 15 mm
  segment 1 at 7 mm
  segment 2 at 19 mm
highdicom: (4, 6, 5) with values [0, 1, 2], 4 mm between slices
SimpleITK: (4, 6, 5) with values [0, 255], 1 mm between slices, origin at 19 mm
  voxels of its slices: [4, 4, 4, 1], of the mask's: [4, 0, 4, 5]
EXPECTED
