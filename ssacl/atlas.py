"""The atlas prior: where anatomy lies on a frontal chest film, as general knowledge and never as a label of any image.

Source: descriptions of the normal frontal radiograph as every radiology textbook gives them (zones, hila at mid height, right
dome above the left, carina at T4/5, superior vena cava along the right border, ...). The chart was drawn once from such words; it
is never fitted to the phantom generator or to an evaluation image. It is a schematic drawing: on many real films it is too tall
(apex, dome and costophrenic angle point outside the lungs), which is why the losses use it up to an affine map.

Coordinates: x right and y down on the image, the whole padded square film is [-1, 1]^2. The patient faces the viewer, so the
patient's right side lies at negative x.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ssacl.anatomy import LEAVES, NODE_INDEX, mirrored
from ssacl.drawing import drawn_centroids

_SIDED = (
    "upper lung zone",
    "mid lung zone",
    "lower lung zone",
    "hilar structures",
    "apical zone",
    "costophrenic angle",
    "hemidiaphragm",
    "clavicle",
)
CHART: tuple[tuple[float, float], ...] = tuple(drawn_centroids()[NODE_INDEX[leaf]] for leaf in LEAVES)
"""(x, y) of the 25 leaves' centroids in the drawing, `LEAVES` order, half-widths of the padded film."""

RelationKind = Literal["left_of", "above", "medial_of", "level_with"]


@dataclass(frozen=True)
class Relation:
    """`first` lies left of / above / medial of / level with `second`, on the image."""

    kind: RelationKind
    first: str
    second: str
    reason: str


def _sided(kind: RelationKind, first: str, second: str, reason: str) -> Iterator[Relation]:
    """A relation between right-sided leaves, and its mirror image; a midline partner stays."""
    yield Relation(kind, first, second, reason)
    yield Relation(kind, mirrored(first), mirrored(second), reason)


def _relations() -> Iterator[Relation]:
    facing = "The film is read as if facing the patient: the patient's right side lies left on the image."
    for part in _SIDED:
        yield Relation("left_of", f"right {part}", f"left {part}", facing)
        yield Relation("left_of", f"right {part}", "spine", f"The spine marks the midline. {facing}")
        yield Relation("left_of", "spine", f"left {part}", f"The spine marks the midline. {facing}")
        yield Relation("level_with", f"right {part}", f"left {part}", "The thorax is symmetric but for some centimetres at hila and domes.")

    yield Relation("left_of", "trachea", "aortic arch", "A left arch passes left of the trachea and indents its left wall.")
    yield Relation("left_of", "spine", "aortic arch", "The aortic knob shows left of the spine.")
    for midline in ("trachea", "spine", "aortic arch"):
        yield Relation("left_of", "superior vena cava", midline, "The superior vena cava forms the right border of the upper mediastinum.")
    yield Relation("left_of", "right atrium", "spine", "The right atrium forms the right heart border, right of the spine.")
    yield Relation("left_of", "cavoatrial junction", "spine", "The cavoatrial junction lies on the right heart border.")

    yield from _sided("medial_of", "right hilar structures", "right mid lung zone", "Lung fans out sideways from the hilum.")
    yield from _sided("medial_of", "right hemidiaphragm", "right costophrenic angle", "The angle is the lateral end of the diaphragm.")
    yield from _sided("medial_of", "right lower lung zone", "right costophrenic angle", "The angle is the lateral recess of the base.")
    lung_border = "The mediastinum lies between the lungs."
    yield Relation("medial_of", "right atrium", "right lower lung zone", lung_border)
    yield Relation("medial_of", "cavoatrial junction", "right mid lung zone", lung_border)
    yield Relation("medial_of", "superior vena cava", "right upper lung zone", lung_border)
    yield Relation("medial_of", "aortic arch", "left upper lung zone", lung_border)

    zones = "Lung zones are named from the top down: apex, upper, mid, lower."
    yield from _sided("above", "right apical zone", "right upper lung zone", zones)
    yield from _sided("above", "right upper lung zone", "right mid lung zone", zones)
    yield from _sided("above", "right mid lung zone", "right lower lung zone", zones)
    hilum = "The hilum lies at mid height of the lung."
    yield from _sided("above", "right upper lung zone", "right hilar structures", hilum)
    yield from _sided("above", "right hilar structures", "right lower lung zone", hilum)
    base = "The diaphragm bounds the lung below; the costophrenic angle is its lowest point."
    yield from _sided("above", "right lower lung zone", "right hemidiaphragm", base)
    yield from _sided("above", "right lower lung zone", "right costophrenic angle", base)
    yield from _sided("above", "right hemidiaphragm", "right costophrenic angle", base)
    yield from _sided("above", "right hemidiaphragm", "abdomen", "The abdomen lies below the diaphragm.")
    yield from _sided("above", "right clavicle", "right mid lung zone", "The clavicles cross the lung apices.")
    airway = "The trachea runs down to the carina at T4/5; the arch crosses above the carina."
    yield Relation("above", "trachea", "aortic arch", airway)
    yield Relation("above", "trachea", "carina", airway)
    yield Relation("above", "upper mediastinum", "carina", "The upper mediastinum ends at the sternal angle, the height of the carina.")
    yield Relation("above", "aortic arch", "carina", airway)
    caval = "The superior vena cava runs down to the cavoatrial junction, the upper end of the right atrium."
    yield Relation("above", "superior vena cava", "cavoatrial junction", caval)
    yield Relation("above", "cavoatrial junction", "right atrium", caval)
    yield Relation("above", "carina", "cavoatrial junction", "The cavoatrial junction lies some 4 cm below the carina.")
    for organ in ("right atrium", "spine"):
        yield Relation("above", organ, "abdomen", "What a chest film shows of the abdomen lies below heart and thoracic spine.")


RELATIONS: tuple[Relation, ...] = tuple(_relations())
"""Order relations between leaves that follow from names and graph."""


def _overlaps() -> Iterator[tuple[str, str, str]]:
    for side in ("right", "left"):
        for zone in ("upper", "mid", "lower"):
            yield f"{side} hilar structures", f"{side} {zone} lung zone", "Hilar vessels and bronchi reach into the zones."
        yield f"{side} apical zone", f"{side} upper lung zone", "The apex is the top of the upper zone."
        yield f"{side} clavicle", f"{side} apical zone", "The clavicle projects over the apex."
        yield f"{side} clavicle", f"{side} upper lung zone", "The clavicle crosses the top of the upper zone."
        yield f"{side} hemidiaphragm", f"{side} lower lung zone", "The dome rises into the lower zone."
        yield f"{side} costophrenic angle", f"{side} lower lung zone", "The angle is the lateral corner of the lower zone."
        yield f"{side} costophrenic angle", f"{side} hemidiaphragm", "The angle is where the diaphragm meets the ribs."
        yield f"{side} hemidiaphragm", "abdomen", "The dome is the roof of the abdomen."
    yield "carina", "trachea", "The carina is the lower end of the trachea."
    for part in ("trachea", "aortic arch", "superior vena cava", "carina"):
        yield part, "upper mediastinum", "It lies within the upper mediastinum."
    for part in ("trachea", "upper mediastinum", "carina", "aortic arch", "abdomen"):
        yield part, "spine", "The spine is projected behind it."
    yield "cavoatrial junction", "superior vena cava", "The junction is the lower end of the vein."
    yield "cavoatrial junction", "right atrium", "The junction is the upper end of the atrium."


OVERLAPS: dict[frozenset[str], str] = {frozenset((first, second)): reason for first, second, reason in _overlaps()}
"""Pairs of leaves that truly share area on a frontal film -> why: their maps may overlap (no slot repulsion)."""
