"""Where a sentence points: words for sides, lung zones and organs -> leaves and nodes of the anatomy graph.

Choices that are ours, because a report's words and the graph's leaves do not always meet:

- A lobe is the zone that it mostly projects on: upper lobe -> upper zone, middle lobe and lingula -> mid zone, lower lobe, base and
  retrocardiac -> lower zone. A lung without a zone is its upper, mid and lower zones.
- Heart words mean both leaves of the cardiac silhouette; mediastinal words mean upper mediastinum, aortic arch, superior vena cava.
- Ribs have no node. A rib with a side means that side's upper, mid and lower zones, which it projects on; bones mean the spine and
  both clavicles.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ssacl.anatomy import NODES

SIDES = ("right", "left")
ZONES = ("upper lung zone", "mid lung zone", "lower lung zone")
_SIDED = (*ZONES, "hilar structures", "apical zone", "costophrenic angle", "hemidiaphragm")
_HEART = frozenset({"right atrium", "cavoatrial junction"})
_MEDIASTINUM = frozenset({"upper mediastinum", "aortic arch", "superior vena cava"})
_SKELETON = frozenset({"spine", "right clavicle", "left clavicle"})

_NOT_A_ZONE = r"(?! (?:abdom|mediast|extrem|quadrant|limit|thorac|cervi|lumbar|svc|normal|gi\b|pole|neck|rib|spine|sternal))"
_PART_WORDS: dict[str, str] = {
    "right atrium": r"right atri(?:um|al)",
    "cavoatrial junction": r"cavo-?atrial(?: junction)?",
    "superior vena cava": r"svc|(?:superior )?vena cava",
    "apical zone": r"(?:lungs? )?(?:apex|apices)|(?:bi)?apical",
    "upper lung zone": rf"upper{_NOT_A_ZONE}(?:[ -](?:lobes?|lungs?(?: zones?| fields?)?|zones?))?|suprahilar|r\.?u\.?l\.?|l\.?u\.?l\.?",
    "mid lung zone": r"middle lobes?|mid(?:dle)?[- ]?(?:lungs?(?: zones?| fields?)?|zones?|fields?)|mid(?= (?:and|to|or) )"
    r"|lingul\w+|r\.?m\.?l\.?",
    "lower lung zone": rf"(?:lungs? )?(?:bi)?bas(?:es?|ilar|al)(?! of (?:the )?(?:neck|heart))|lower{_NOT_A_ZONE}"
    r"(?:[ -](?:lobes?|lungs?(?: zones?| fields?)?|zones?))?|retrocardiac|infrahilar|r\.?l\.?l\.?|l\.?l\.?l\.?",
    "hilar structures": r"(?:peri|para)?hil(?:a|um|ar|i)",
    "costophrenic angle": r"costo-?phrenic(?: (?:angles?|sulc\w+|recess\w*))?|cp angles?|sulc(?:us|i)",
    "hemidiaphragm": r"hemi-?diaphragm\w*|diaphragm\w*",
    "vasculature": r"(?:pulmonary |broncho-?)?vascul(?:ature|arity|ar)(?: markings)?|pulmonary (?:vess\w+|markings)",
    "cardiomediastinum": r"cardio-?mediastin\w+|heart and mediastin\w+",
    "heart": r"heart|cardiac|cardio-?pericardial|sternal wires",
    "mediastinum": r"mediastin\w+|paratracheal",
    "aortic arch": r"aort\w+",
    "trachea": r"trachea\w*|airways?",
    "carina": r"carina\w*",
    "spine": r"spin(?:e|al)|vertebra\w*|(?:t|thoracolumbar|thoracic)[- ]spine|scoliosis|d[ie]s[ck]s?",
    "clavicle": r"clavic\w+",
    "ribs": r"ribs?",
    "bones": r"bon(?:es?|y)|osseous|skelet\w+|(?:thoracic|rib) cage",
    "abdomen": r"abdom\w+|stomach|gastric(?! tube)|bowel|sub-?diaphragmatic|quadrants?|liver|spleen|duoden\w+",
    "pleura": r"pleura|pleural (?:spaces?|surfaces?|cavit\w+|contours?|margins?)|pleural(?= (?:abnorm|disease|and |or ))",
    "lung": r"lungs?(?! (?:volumes?|cancer|capacity))(?: fields?| parenchyma)?|hemi-?thora\w+|pulmonary parenchyma|parenchym\w+"
    r"|pulmonary(?= abnorm)",
}
"""Part -> words. "vasculature", "heart", "bones", ... are parts of speech here, not nodes; `leaves_of` turns them into leaves."""

_NAMES = {f"p{index}": part for index, part in enumerate(_PART_WORDS)}
_PART = re.compile(r"\b(?:" + "|".join(f"(?P<p{index}>{words})" for index, words in enumerate(_PART_WORDS.values())) + r")(?!\w)")
# A chamber or a named border is no side of the film for the finding that is told beside it.
_SIDE = re.compile(
    r"\b(right|left|bilateral(?:ly)?|both|bi(?=bas|api))(?:-?sided)?(?! (?:atri|ventric|heart failure|main coronary))(?=\b|bas|api)"
)
_IMPLIED_SIDE = re.compile(r"^(?:(?P<right>r\.?[uml]\.?l|middle lobe)|(?P<left>l\.?[ul]\.?l|lingul|retrocardiac))")
_BOTH = frozenset(SIDES)


@dataclass(frozen=True)
class PlaceWord:
    """A place in a clause: character span, part (a key of the word table), sides (empty: none said)."""

    start: int
    end: int
    part: str
    sides: frozenset[str]


def find_sides(text: str) -> list[tuple[int, frozenset[str]]]:
    """Side words of lower-case `text` with their position."""
    return [(match.start(), frozenset({match[1]}) if match[1] in SIDES else _BOTH) for match in _SIDE.finditer(text)]


def find_places(text: str) -> list[PlaceWord]:
    """Place words of lower-case `text`, each with the side word before it, else the one right after it, else none."""
    sides = find_sides(text)
    places = []
    for match in _PART.finditer(text):
        implied = _IMPLIED_SIDE.match(match[0])
        if implied is not None:
            said = frozenset({"right" if implied["right"] else "left"})
        else:
            before = [side for at, side in sides if at <= match.start()]
            after = [side for at, side in sides if match.end() <= at <= match.end() + 12]
            said = before[-1] if before else after[0] if after else frozenset()
        places.append(PlaceWord(match.start(), match.end(), _NAMES[str(match.lastgroup)], said))
    return places


def leaves_of(part: str, sides: frozenset[str]) -> frozenset[str]:
    """Leaves that `part` means on `sides`; no side means both."""
    sides = sides or _BOTH
    if part in _SIDED:
        return frozenset(f"{side} {part}" for side in sides)
    if part in ("lung", "ribs"):
        return frozenset(f"{side} {zone}" for side in sides for zone in ZONES)
    if part == "vasculature":
        return frozenset(f"{side} hilar structures" for side in sides)
    if part == "pleura":
        return frozenset(f"{side} costophrenic angle" for side in sides)
    if part == "clavicle":
        return frozenset(f"{side} clavicle" for side in sides)
    fixed = {"heart": _HEART, "mediastinum": _MEDIASTINUM, "cardiomediastinum": _HEART | _MEDIASTINUM, "bones": _SKELETON}
    return fixed.get(part, frozenset({part}))


def nodes_of(leaves: Iterable[str]) -> tuple[str, ...]:
    """The fewest nodes that name `leaves`, in graph order: all zones of a lung -> that lung, both -> "lungs", and so on."""
    left_over = set(leaves)
    nodes: set[str] = set()
    for side in SIDES:
        if {f"{side} {zone}" for zone in ZONES} <= left_over:
            nodes.add(f"{side} lung")
            left_over -= {f"{side} {part}" for part in _SIDED}
    if {"right lung", "left lung"} <= nodes:
        nodes = {"lungs"}
    if left_over >= _MEDIASTINUM:
        nodes.add("mediastinum")
        left_over -= _MEDIASTINUM | _HEART | {"trachea", "carina"}
    if left_over >= _HEART:
        nodes.add("cardiac silhouette")
        left_over -= _HEART
    if left_over >= _SKELETON:
        nodes.add("skeletal structures")
        left_over -= _SKELETON
    nodes |= left_over
    return tuple(node for node in NODES if node in nodes)
