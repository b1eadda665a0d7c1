"""Why a picture is refused: the reasons by name, and the error that carries one. Ledgers and data set cards count these names."""

from __future__ import annotations

from ssacl.errors import ImageError

REASONS: dict[str, str] = {
    "empty": "The file is empty. Copy it again.",
    "too_large": "The picture is larger than any radiograph (200 MB, 100 million pixels). Check the file's header.",
    "too_small": "The picture is smaller than 32 px on a side. Give the film, not its thumbnail.",
    "not_dicom": "The file is named as DICOM but is none. Export it again as DICOM, PNG or JPEG.",
    "not_a_picture": "The file is neither DICOM, PNG nor JPEG. Convert it first.",
    "unreadable": "The file is damaged or truncated, or its compression cannot be decoded. Copy or export it again.",
    "no_pixels": "The DICOM file holds no pixels (a report, a presentation state or a header alone). Give the image object.",
    "multi_frame": "The file holds more than one frame. Give single radiographs.",
    "colour": "The picture is in colour. Give the grey film, without drawings on it.",
    "not_radiography": "The DICOM modality is not a projection radiograph (CR, DX, DR, RG). Leave this object out.",
    "lateral": "The film is a lateral or oblique view; the model reads frontal ones. Leave it out, or ingest it with --keep-lateral.",
    "not_chest": "The DICOM header names another part of the body than the chest. Leave this object out.",
    "not_human": "The DICOM header names an animal. Leave this object out.",
    "blank": "Every pixel has the same value. Check the export.",
}
"""Reason -> one sentence with the next step."""


class RefusedImageError(ImageError):
    """A picture that cannot be used, with `reason`, one of `REASONS`. The text holds no file name and no header value."""

    def __init__(self, reason: str) -> None:
        super().__init__(REASONS[reason])
        self.reason = reason

    def __reduce__(self) -> tuple[type[RefusedImageError], tuple[str]]:
        return type(self), (self.reason,)
