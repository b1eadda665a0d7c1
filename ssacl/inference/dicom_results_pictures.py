"""The evidence of a draft as DICOM pictures: the overlay as Secondary Capture, the regions as a segmentation over the film."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ssacl.anatomy import NODE_INDEX
from ssacl.data.dicom import Picture
from ssacl.inference.dicom_results_codes import CodeTriple, own_code
from ssacl.inference.evidence import overlay_png
from ssacl.inference.film import printable
from ssacl.inference.maps import region_of_map
from ssacl.inference.report import DraftReport

if TYPE_CHECKING:
    from highdicom.sc import SCImage
    from highdicom.seg import Segmentation, SegmentDescription

    from ssacl.inference.dicom_results import Source

_EXPLICIT_LITTLE_ENDIAN = "1.2.840.10008.1.2.1"
_REGION: CodeTriple = ("309825002", "SCT", "Spatial and Relational Concept")
_AI: CodeTriple = ("123110", "DCM", "Artificial Intelligence")


def overlay_capture(source: Source, picture: Picture, report: DraftReport, common: dict[str, Any]) -> SCImage:
    """The picture of the evidence over the film, with the words that it is a draft below it."""
    from highdicom.sc import SCImage

    with Image.open(io.BytesIO(overlay_png(picture.pixels, report))) as png:
        pixels = np.asarray(png.convert("RGB"))
    ds = SCImage.from_ref_dataset(
        source.stand_in,
        pixels,
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        patient_orientation=("L", "F"),
        transfer_syntax_uid=_EXPLICIT_LITTLE_ENDIAN,
        **common,
    )
    ds.ImageType = ["DERIVED", "SECONDARY"]
    ds.BurnedInAnnotation = "YES" if picture.burned_in else "NO"
    ds.SourceImageSequence = [_reference(source)]
    ds.ImageComments = report.disclaimer
    return ds


def evidence_segmentation(source: Source, _: Picture, report: DraftReport, common: dict[str, Any]) -> Segmentation | None:
    """A binary segment per stated sentence: the region that its box bounds. It marks where the model looked, not a lesion's edge."""
    from highdicom.seg import Segmentation, SegmentDescription
    from highdicom.sr import CodedConcept

    from ssacl.inference.dicom_results import derived_uid

    segments: list[SegmentDescription] = []
    masks: list[NDArray[np.bool_]] = []
    for label, grid_map in evidence_maps(report):
        region = region_of_map(grid_map, report.map_frame, report.image_width_px, report.image_height_px)
        if region is None:
            continue
        masks.append(source.frame.mask(region))
        segments.append(
            SegmentDescription(
                segment_number=len(masks),
                segment_label=label[:64],
                segmented_property_category=CodedConcept(*_REGION),
                segmented_property_type=CodedConcept(*own_code("Evidence region")),
                algorithm_type="AUTOMATIC",
                algorithm_identification=_algorithm(report),
                tracking_uid=derived_uid("segment", str(source.header.SOPInstanceUID), report.model_version, label),
                tracking_id=label[:64],
            )
        )
    if not masks:
        return None
    return Segmentation(
        source_images=[source.stand_in],
        pixel_array=np.stack(masks, axis=-1)[None],
        segmentation_type="BINARY",
        segment_descriptions=segments,
        content_label="EVIDENCE",
        content_description="Draft evidence, not for diagnosis",
        transfer_syntax_uid=_EXPLICIT_LITTLE_ENDIAN,
        **common,
    )


def evidence_maps(report: DraftReport) -> list[tuple[str, NDArray[np.float32]]]:
    """Label and map of what is marked: the sentences that state something, as in the overlay; the whole chest where none does."""
    stated = [
        (f"{number} {printable(sentence.finding or 'other')} ({sentence.status})", sentence.evidence)
        for number, sentence in enumerate(report.sentences, 1)
        if sentence.status in ("present", "uncertain")
    ]
    return stated or [("no finding stated: chest", report.anatomy_maps[NODE_INDEX["chest"]])]


def _algorithm(report: DraftReport) -> Any:
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.sr import CodedConcept

    return AlgorithmIdentificationSequence("ssacl", CodedConcept(*_AI), report.model_version, source="ssacl")


def _reference(source: Source) -> Any:
    from highdicom.sr import CodedConcept
    from pydicom import Dataset

    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = source.header.SOPClassUID, source.header.SOPInstanceUID
    item.PurposeOfReferenceCodeSequence = [CodedConcept("121322", "DCM", "Source image for image processing operation")]
    return item
