"""Label maps as DICOM segmentations (SEG) of the series they were made from, written by highdicom (extra `dicom`)."""

from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from lesionbench.dicom_files import ordered_files, series_files
from lesionbench.installation import install
from lesionbench.task import Task
from lesionbench.written import whole

# SNOMED CT's words for classes, by their names; what has none here is "Tissue", and the segment's label tells more
CODES = {
    "ed": "Edema",
    "edema": "Edema",
    "snfh": "Edema",
    "ncr": "Necrosis",
    "necrosis": "Necrosis",
    "cyst": "Cyst",
    "cc": "Cyst",
    "lesion": "Lesion",
    "tumor": "Neoplasm",
}
NEEDED = (
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "FrameOfReferenceUID",
    "SOPClassUID",
    "SOPInstanceUID",
    "Modality",
)  # of the files that it refers to
ABNORMAL, OTHER = "MorphologicallyAbnormalStructure", "Tissue"


def can_write() -> bool:
    """Whether highdicom is installed."""
    return find_spec("highdicom") is not None


def how_to_install() -> str:
    """The command that installs what is needed."""
    return install("dicom")


def lacking(series: Path) -> list[str]:
    """What a file of the series lacks that a segmentation has to refer to; empty where one can be written."""
    import pydicom

    files = [pydicom.dcmread(file, specific_tags=list(NEEDED)) for file in series_files(series)]
    return [name for name in NEEDED if not all(file.get(name) for file in files)]


def write_segmentation(path: Path, labels: np.ndarray, task: Task, series: Path, made_by: str) -> Path:
    """Writes a binary DICOM segmentation, a segment for each foreground class in the order of the task, atomically.

    Segment numbers count from 1, since DICOM leaves no gaps; a segment's label is the name of its class and its description holds the class's value on
    disk, which may differ from the number. Patient, study and frame of reference are those of the series. Slices without a class are left out, unless
    there is none with one.

    Args:
        labels: class indices (X, Y, slices) on the grid of `dicom_files.read_series`.
        series: folder of the one DICOM series, which lacks nothing (see `lacking`).
        made_by: the name of the method, as the algorithm's.
    """
    import highdicom as hd
    import pydicom
    from pydicom.sr.codedict import codes

    algorithm = hd.AlgorithmIdentificationSequence(
        name=made_by, version=version("lesionbench"), family=codes.DCM.ArtificialIntelligence, source="lesionbench"
    )
    segments = []
    for number, (name, values) in enumerate(list(task.classes.items())[1:], start=1):
        word = CODES.get(name.lower())
        segment = hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=name[:64],
            segmented_property_category=getattr(codes.SCT, ABNORMAL if word else OTHER),
            segmented_property_type=getattr(codes.SCT, word or OTHER),
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
        segment.SegmentDescription = f"{name}, value {values[0]} in label maps"
        segments.append(segment)
    sources = [pydicom.dcmread(file) for file in ordered_files(series)]
    distance = float(np.linalg.norm(np.subtract(sources[1].ImagePositionPatient, sources[0].ImagePositionPatient)))
    for source in sources:  # what programs that remove names may have removed or emptied, and what ITK reads without
        for name, value in {"PatientID": "", "PixelSpacing": [1, 1], "SliceThickness": distance}.items():
            if not source.get(name):
                setattr(source, name, value)
        source.SpacingBetweenSlices = distance
    segmentation = hd.seg.Segmentation(
        source_images=sources,
        pixel_array=np.ascontiguousarray(labels.T.astype(np.uint8)),
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=segments,
        series_instance_uid=hd.UID(),
        series_number=int(sources[0].get("SeriesNumber") or 0) * 100 + 1,
        sop_instance_uid=hd.UID(),
        instance_number=1,
        manufacturer="lesionbench",
        manufacturer_model_name=made_by,
        software_versions=version("lesionbench"),
        device_serial_number="1",
        series_description=f"{made_by}: {', '.join(task.class_names[1:])}"[:64],
        omit_empty_frames=bool(labels.any()),
    )
    with whole(path) as temporary:
        segmentation.save_as(temporary)
    return Path(path)
