"""The phantom's true findings: what they are, and how a study comes to have them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ssacl.anatomy import FINDINGS, NO_FINDING, leaves_below
from ssacl.phantom.geometry import Body, Mask

SUPPORT_DEVICES = "Support Devices"
ZONES = ("upper lung zone", "mid lung zone", "lower lung zone")
NONE_SHARE = 0.29
"""Share of studies in which nothing at all is put."""
COUNTS, COUNT_SHARES = (1, 2, 3), (0.4, 0.35, 0.25)
WEIGHTS = {
    "Enlarged Cardiomediastinum": 1.1,
    "Cardiomegaly": 1.25,
    "Lung Opacity": 0.95,
    "Lung Lesion": 0.95,
    "Edema": 0.95,
    "Consolidation": 0.95,
    "Pneumonia": 0.95,
    "Atelectasis": 1.2,
    "Pneumothorax": 1.1,
    "Pleural Effusion": 2.1,
    "Pleural Other": 0.9,
    "Fracture": 0.9,
    "Support Devices": 1.3,
}
"""How often a finding is drawn, relative to the others."""
DEVICE_SHARES = {"endotracheal tube": 0.14, "jugular line": 0.18, "picc": 0.12, "pacemaker": 0.24, "enteric tube": 0.12, "chest tube": 0.2}


@dataclass(frozen=True)
class TrueFinding:
    """One finding that is in the picture, whatever the report says about it."""

    name: str
    """One of `FINDINGS`."""
    side: str = ""
    """The patient's "right", "left", "bilateral", or "" for the middle."""
    zones: tuple[str, ...] = ()
    """Leaves in which it lies."""
    kind: str = ""
    """"mass", "nodule", "rib", "clavicle", a device, ...; "" where there is one kind only."""
    size: str = ""
    """"small", "moderate", "large"; lesions: the diameter, as "2 cm"."""
    severity: str = "moderate"
    """"mild", "moderate" or "severe"."""
    certainty: str = "present"
    """"present", or "uncertain": it is there but subtle, and the report hedges."""
    amount: float = 0.5
    """Strength in the picture, 0..1."""
    place: tuple[float, ...] = ()
    """Free parameters of its shape, uniform in 0..1."""
    number: int = 0
    """Middle one of the three broken ribs; 0 without."""
    mask: Mask | None = field(default=None, repr=False, compare=False)
    """[S, S] bool: where the picture is changed; None when truth was not asked for."""

    def to_json(self) -> dict[str, Any]:
        """Everything but the mask."""
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name != "mask"}


def draw_findings(rng: np.random.Generator) -> list[TrueFinding]:
    """Findings of one study, in `FINDINGS` order; empty: a normal film."""
    if rng.random() < NONE_SHARE:
        return []
    count = int(rng.choice(COUNTS, p=COUNT_SHARES))
    weights = np.array(list(WEIGHTS.values()))
    names = rng.choice(list(WEIGHTS), size=count, replace=False, p=weights / weights.sum())
    taken: set[tuple[str, str]] = set()
    drawn: list[TrueFinding] = []
    for name in sorted(names, key=FINDINGS.index):
        drawn += _draw(str(name), rng, taken)
    return drawn


def is_normal(findings: list[TrueFinding]) -> bool:
    """CheXpert's "No Finding": nothing, or support devices only."""
    return all(item.name in (SUPPORT_DEVICES, NO_FINDING) for item in findings)


def changed_body(body: Body, findings: list[TrueFinding]) -> Body:
    """The body with the findings that change its proportions: heart, mediastinum, volume loss."""
    for item in findings:
        if item.name == "Cardiomegaly":
            body = dataclasses.replace(body, heart_ratio=0.54 + 0.13 * item.amount)
        elif item.name == "Enlarged Cardiomediastinum":
            body = dataclasses.replace(body, mediastinum=1.4 + 0.7 * item.amount)
        elif item.name == "Atelectasis":
            rise = 0.04 + 0.12 * item.amount
            if item.side in ("right", "bilateral"):
                body = dataclasses.replace(body, dome_right=body.dome_right - rise)
            if item.side in ("left", "bilateral"):
                body = dataclasses.replace(body, dome_left=body.dome_left - rise)
    return body


def _draw(name: str, rng: np.random.Generator, taken: set[tuple[str, str]]) -> list[TrueFinding]:
    severity = str(rng.choice(["mild", "moderate", "severe"], p=[0.27, 0.45, 0.28]))
    low, high = {"mild": (0.15, 0.35), "moderate": (0.45, 0.7), "severe": (0.8, 1.0)}[severity]
    common: dict[str, Any] = {
        "name": name,
        "severity": severity,
        "size": {"mild": "small", "moderate": "moderate", "severe": "large"}[severity],
        "amount": float(rng.uniform(low, high)),
        "place": tuple(float(value) for value in rng.random(6)),
    }
    side = str(rng.choice(["right", "left"]))
    if name in ("Cardiomegaly", "Enlarged Cardiomediastinum", "Edema"):
        zones = {
            "Cardiomegaly": leaves_below("cardiac silhouette"),
            "Enlarged Cardiomediastinum": ("upper mediastinum", "aortic arch", "superior vena cava"),
            "Edema": ("right hilar structures", "right mid lung zone", "left hilar structures", "left mid lung zone"),
        }[name]
        return [TrueFinding(**common, side="bilateral" if name == "Edema" else "", zones=zones, certainty=_certainty(severity, rng))]
    if name in ("Lung Opacity", "Lung Lesion", "Consolidation", "Pneumonia"):
        free = [(s, z) for s in ("right", "left") for z in ZONES if (s, z) not in taken]
        side, zone = free[int(rng.integers(len(free)))]
        taken.add((side, zone))
        if name == "Lung Lesion":
            common["size"] = f"{max(1, round(30 * lesion_radius(common['amount'])))} cm"
        kind = ("mass" if lesion_radius(common["amount"]) > 0.105 else "nodule") if name == "Lung Lesion" else ""
        return [TrueFinding(**common, side=side, zones=(f"{side} {zone}",), kind=kind, certainty=_certainty(severity, rng))]
    if name == "Atelectasis":
        side = str(rng.choice(["right", "left", "bilateral"], p=[0.35, 0.4, 0.25]))
        return [TrueFinding(**common, side=side, zones=_sided(side, "lower lung zone"), certainty=_certainty(severity, rng))]
    if name == "Pneumothorax":
        zones = (
            (f"{side} apical zone",) if severity == "mild" else (f"{side} apical zone", f"{side} upper lung zone", f"{side} mid lung zone")
        )
        return [TrueFinding(**common, side=side, zones=zones, certainty=_certainty(severity, rng))]
    if name == "Pleural Effusion":
        side = str(rng.choice(["right", "left", "bilateral"], p=[0.34, 0.34, 0.32]))
        parts = ["costophrenic angle", "hemidiaphragm"] + (["lower lung zone"] if severity != "mild" else [])
        return [
            TrueFinding(
                **common, side=side, zones=tuple(z for part in parts for z in _sided(side, part)), certainty=_certainty(severity, rng)
            )
        ]
    if name == "Pleural Other":
        kind = str(rng.choice(["apical thickening", "lateral thickening", "plaque"]))
        part = {"apical thickening": "apical zone", "lateral thickening": "mid lung zone", "plaque": "hemidiaphragm"}[kind]
        return [TrueFinding(**common, side=side, zones=(f"{side} {part}",), kind=kind)]
    if name == "Fracture":
        kind = str(rng.choice(["rib", "clavicle"], p=[0.5, 0.5]))
        if kind == "clavicle":
            return [TrueFinding(**common, side=side, zones=(f"{side} clavicle",), kind=kind)]
        number = int(rng.integers(4, 8))
        zone = "upper lung zone" if number < 6 else "mid lung zone"
        return [TrueFinding(**common, side=side, zones=(f"{side} {zone}",), kind=kind, number=number)]
    return _draw_devices(rng, common, side)


def _draw_devices(rng: np.random.Generator, common: dict[str, Any], side: str) -> list[TrueFinding]:
    count = int(rng.choice([1, 2], p=[0.65, 0.35]))
    result = []
    for kind in rng.choice(list(DEVICE_SHARES), size=count, replace=False, p=list(DEVICE_SHARES.values())):
        place = tuple(float(value) for value in rng.random(6))
        zones, where = {
            "endotracheal tube": (("trachea",), ""),
            "jugular line": (("superior vena cava", "cavoatrial junction"), "right"),
            "picc": (("superior vena cava",), side),
            "pacemaker": (("right atrium", f"{side} upper lung zone"), side),
            "enteric tube": (("abdomen",), ""),
            "chest tube": ((f"{side} lower lung zone", f"{side} mid lung zone"), side),
        }[str(kind)]
        result.append(TrueFinding(**{**common, "place": place}, side=where, zones=zones, kind=str(kind)))
    return result


def lesion_radius(amount: float) -> float:
    """Radius of a lung lesion in patient coordinates (1 is about 15 cm)."""
    return 0.055 + 0.115 * amount


def _certainty(severity: str, rng: np.random.Generator) -> str:
    return "uncertain" if severity == "mild" and rng.random() < 0.5 else "present"


def _sided(side: str, part: str) -> tuple[str, ...]:
    return (f"right {part}", f"left {part}") if side == "bilateral" else (f"{side} {part}",)
