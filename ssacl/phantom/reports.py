"""The phantom's language: a report that says what is in the picture, no more and no less, in varied words.

Statements follow the order of a read: lungs, pleura, heart, mediastinum, bones, devices. A finding that is subtle may be hedged
("possible"), as its truth records. INDICATION, COMPARISON and TECHNIQUE are distractors: only FINDINGS and IMPRESSION describe.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ssacl.phantom.findings import SUPPORT_DEVICES, TrueFinding, is_normal

_LUNG = ("Lung Opacity", "Lung Lesion", "Edema", "Consolidation", "Pneumonia", "Atelectasis")
_ORDINALS = {3: "third", 4: "fourth", 5: "fifth", 6: "sixth", 7: "seventh", 8: "eighth"}
_SYNONYMS = {
    "upper lung zone": ("upper lung zone", "upper lobe"),
    "mid lung zone": ("mid lung zone", "mid lung"),
    "lower lung zone": ("lower lung zone", "lower lobe", "base"),
}
_ADVERBS = {"mild": "mildly", "moderate": "moderately", "severe": "severely"}

# {sev} severity, {adv} its adverb, {size}, {side}, {zone} "right upper lobe", {kind}, {rib} "fifth".
_PRESENT: dict[str, tuple[str, ...]] = {
    "Lung Opacity": (
        "There is {a_sev} hazy opacity in the {zone}.",
        "Hazy {sev} opacity is seen in the {zone}.",
        "{sev} hazy opacity projects over the {zone}.",
    ),
    "Lung Lesion": (
        "There is a {size} {kind} in the {zone}.",
        "A rounded {size} {kind} is seen in the {zone}.",
        "A well defined {kind} in the {zone} measures {size}.",
    ),
    "Edema": (
        "There is {sev} pulmonary edema.",
        "Perihilar haze and septal thickening indicate {sev} pulmonary edema.",
        "Bilateral perihilar haze is present with {sev} pulmonary edema.",
    ),
    "Consolidation": (
        "There is {sev} consolidation in the {zone}.",
        "Dense {sev} consolidation is present in the {zone}.",
        "{zone} consolidation is {sev}.",
    ),
    "Pneumonia": (
        "There is {sev} patchy pneumonia in the {zone}.",
        "Patchy {zone} pneumonia is seen with air bronchograms, {sev} in extent.",
        "{sev} pneumonia involves the {zone} with air bronchograms.",
    ),
    "Atelectasis": (
        "There is {sev} linear atelectasis {base}.",
        "{sev} plate-like atelectasis is seen {base}.",
        "Volume loss with {sev} bands of atelectasis {base}.",
    ),
    "Pneumothorax": (
        "There is a {size} {side} pneumothorax.",
        "A {size} {side} pneumothorax is present with a visible pleural edge.",
        "{size} {side} pneumothorax, largest at the apex.",
    ),
    "Pleural Effusion": (
        "There is {a_size} {side} pleural effusion{s}.",
        "{size} {side} pleural effusion{s} {is_are} present.",
        "{size} {side} pleural effusion{s} with blunting of the costophrenic angle{s}.",
    ),
    "Pleural Other:apical thickening": (
        "There is {sev} {side} apical pleural thickening.",
        "{sev} pleural thickening is seen at the {side} apex.",
    ),
    "Pleural Other:lateral thickening": (
        "There is {sev} pleural thickening along the {side} lateral chest wall.",
        "{sev} {side} lateral pleural thickening is seen.",
    ),
    "Pleural Other:plaque": (
        "There is a {size} calcified pleural plaque over the {side} hemidiaphragm.",
        "A {size} pleural plaque is seen at the {side} hemidiaphragm.",
    ),
    "Cardiomegaly": ("The heart is {adv} enlarged.", "There is {sev} cardiomegaly.", "The cardiac silhouette is {adv} enlarged."),
    "Enlarged Cardiomediastinum": (
        "The mediastinum is {adv} widened.",
        "There is {sev} mediastinal widening.",
        "The upper mediastinum is {adv} widened.",
    ),
    "Fracture:rib": ("There are displaced fractures of the {side} {rib} ribs.", "{sev} displaced {side} {rib} rib fractures are seen."),
    "Fracture:clavicle": (
        "There is a displaced fracture of the {side} clavicle.",
        "A {side} clavicle fracture is seen with {sev} displacement.",
    ),
    "Support Devices:endotracheal tube": (
        "The endotracheal tube ends above the carina.",
        "An endotracheal tube is in place with its tip in the trachea.",
    ),
    "Support Devices:jugular line": (
        "A right internal jugular line ends at the cavoatrial junction.",
        "The right jugular central venous catheter ends at the cavoatrial junction.",
    ),
    "Support Devices:picc": (
        "A {side} PICC line ends in the superior vena cava.",
        "The tip of the {side} PICC is in the superior vena cava.",
    ),
    "Support Devices:pacemaker": (
        "A {side} chest wall pacemaker is present with leads in the heart.",
        "There is a {side} sided pacemaker with its lead in the right ventricle.",
    ),
    "Support Devices:enteric tube": (
        "An enteric tube ends in the stomach.",
        "The enteric tube passes below the diaphragm into the stomach.",
    ),
    "Support Devices:chest tube": ("A {side} chest tube is in place.", "There is a {side} sided chest tube."),
}
_UNCERTAIN: dict[str, tuple[str, ...]] = {
    "Lung Opacity": ("Possible faint opacity in the {zone}.", "A faint opacity in the {zone} cannot be excluded."),
    "Lung Lesion": ("Possible {size} {kind} in the {zone}.", "Questionable {size} {kind} in the {zone}."),
    "Edema": ("Possible mild pulmonary edema.", "Mild pulmonary edema cannot be excluded."),
    "Consolidation": ("Possible early consolidation in the {zone}.", "Early consolidation in the {zone} cannot be excluded."),
    "Pneumonia": ("Possible early pneumonia in the {zone}.", "Early pneumonia in the {zone} cannot be excluded."),
    "Atelectasis": ("Possible minimal atelectasis {base}.", "Questionable minimal atelectasis {base}."),
    "Pneumothorax": ("Possible small {side} apical pneumothorax.", "A small {side} pneumothorax cannot be excluded."),
    "Pleural Effusion": ("Possible small {side} pleural effusion{s}.", "Small {side} pleural effusion{s} cannot be excluded."),
    "Cardiomegaly": ("Possible mild cardiomegaly.", "Questionable mild enlargement of the heart."),
    "Enlarged Cardiomediastinum": ("Possible mild mediastinal widening.", "Mild widening of the mediastinum cannot be excluded."),
}
_IMPRESSION: dict[str, str] = {
    "Lung Opacity": "{sev} {zone} opacity.",
    "Lung Lesion": "{size} {zone} {kind}.",
    "Edema": "{sev} pulmonary edema.",
    "Consolidation": "{sev} {zone} consolidation.",
    "Pneumonia": "{sev} {zone} pneumonia.",
    "Atelectasis": "{sev} {side_base} atelectasis.",
    "Pneumothorax": "{size} {side} pneumothorax.",
    "Pleural Effusion": "{size} {side} pleural effusion{s}.",
    "Pleural Other:apical thickening": "{side} apical pleural thickening.",
    "Pleural Other:lateral thickening": "{side} pleural thickening.",
    "Pleural Other:plaque": "{side} pleural plaque.",
    "Cardiomegaly": "{sev} cardiomegaly.",
    "Enlarged Cardiomediastinum": "{sev} mediastinal widening.",
    "Fracture:rib": "{side} {rib} rib fractures.",
    "Fracture:clavicle": "{side} clavicle fracture.",
}
_NORMAL_LUNGS = ("The lungs are clear.", "The lungs are well expanded and clear.", "Both lungs are clear.")
_NORMAL_HEART = ("The heart is normal in size.", "Heart size is normal.", "The cardiac silhouette is within normal limits.")
_NORMAL_MEDIASTINUM = (
    "The mediastinal contours are normal.",
    "Mediastinal contours are within normal limits.",
    "The mediastinum is unremarkable.",
)
_NORMAL_BONES = ("No acute osseous abnormality.", "The bones are intact.", "The visualized bony thorax is intact.")
_NORMAL = ("No acute cardiopulmonary process.", "No acute cardiopulmonary abnormality.", "Normal chest radiograph.")
_INDICATIONS = (
    "Cough and fever.",
    "Shortness of breath.",
    "Chest pain, rule out pneumonia.",
    "History of heart failure, evaluate for edema.",
    "Status post fall.",
    "Preoperative evaluation.",
    "History of treated pneumothorax.",
)


def write_report(findings: Sequence[TrueFinding], view: str, is_follow_up: bool, rng: np.random.Generator) -> str:
    """The report of a study with exactly `findings`, sections in capitals with a colon, a blank line between sections."""
    sections = []
    if rng.random() < 0.6:
        sections.append(("INDICATION", _pick(rng, _INDICATIONS)))
    if rng.random() < 0.4:
        sections.append(("TECHNIQUE", f"Single {view} view of the chest."))
    if is_follow_up:
        sections.append(("COMPARISON", "Prior chest radiograph."))
    elif rng.random() < 0.4:
        sections.append(("COMPARISON", "None."))
    sections.append(("FINDINGS", " ".join(_findings(findings, rng))))
    sections.append(("IMPRESSION", " ".join(_impression(findings, rng))))
    return "\n\n".join(f"{name}: {text}" for name, text in sections) + "\n"


def _findings(findings: Sequence[TrueFinding], rng: np.random.Generator) -> list[str]:
    names = {item.name for item in findings}

    def say(*wanted: str) -> list[str]:
        return [_statement(item, rng) for item in findings if item.name in wanted]

    text = say(*_LUNG)
    lung_sides = {item.side for item in findings if item.name in _LUNG}
    if not lung_sides:
        text.append(_pick(rng, _NORMAL_LUNGS))
    elif lung_sides == {"right"} and rng.random() < 0.7:
        text.append("The left lung is clear.")
    elif lung_sides == {"left"} and rng.random() < 0.7:
        text.append("The right lung is clear.")
    text += say("Pneumothorax", "Pleural Effusion", "Pleural Other")
    absent = [] if names & {"Consolidation", "Pneumonia"} else ["focal consolidation"]
    absent += [word for name, word in (("Pleural Effusion", "pleural effusion"), ("Pneumothorax", "pneumothorax")) if name not in names]
    if len(absent) == 3 and rng.random() < 0.5:
        absent = absent[1:]
    if absent:
        lead = _pick(rng, ("No", "There is no", "No evidence of"))
        text.append(f"{lead} {absent[0]}." if len(absent) == 1 else f"{lead} {', '.join(absent[:-1])} or {absent[-1]}.")
    text += say("Cardiomegaly") or [_pick(rng, _NORMAL_HEART)]
    if "Edema" not in names and rng.random() < 0.3:
        text.append("No pulmonary edema.")
    text += say("Enlarged Cardiomediastinum") or [_pick(rng, _NORMAL_MEDIASTINUM)]
    text += say("Fracture") or [_pick(rng, _NORMAL_BONES)]
    return text + say(SUPPORT_DEVICES)


def _impression(findings: Sequence[TrueFinding], rng: np.random.Generator) -> list[str]:
    text = [
        _fill(("Possible " if item.certainty == "uncertain" else "") + _IMPRESSION[_key(item)], item, rng)
        for item in findings
        if item.name != SUPPORT_DEVICES
    ]
    if is_normal(list(findings)):
        text.append(_pick(rng, _NORMAL))
    if any(item.name == SUPPORT_DEVICES for item in findings):
        text.append("Support devices as described.")
    return text


def _statement(finding: TrueFinding, rng: np.random.Generator) -> str:
    templates = _UNCERTAIN[finding.name] if finding.certainty == "uncertain" else _PRESENT[_key(finding)]
    return _fill(_pick(rng, templates), finding, rng)


def _fill(template: str, finding: TrueFinding, rng: np.random.Generator) -> str:
    both = finding.side == "bilateral"
    zone = finding.zones[0] if finding.zones else ""
    side, _, part = zone.partition(" ")
    words = _SYNONYMS.get(part, (part,))
    text = template.format(
        sev=finding.severity,
        a_sev=f"a {finding.severity}",
        adv=_ADVERBS[finding.severity],
        size=finding.size,
        a_size=finding.size if both else f"a {finding.size}",
        side=finding.side,
        zone=f"{side} {_pick(rng, words)}" if part else zone,
        base=_pick(
            rng,
            ("at both lung bases", "in both lower lobes")
            if both
            else (f"at the {finding.side} lung base", f"in the {finding.side} lower lobe"),
        ),
        side_base="bibasilar" if both else f"{finding.side} basilar",
        kind=finding.kind,
        rib=f"{_ORDINALS[finding.number - 1]} to {_ORDINALS[finding.number + 1]}" if finding.number else "",
        s="s" if both else "",
        is_are="are" if both else "is",
    )
    return text[0].upper() + text[1:]


def _key(finding: TrueFinding) -> str:
    return f"{finding.name}:{finding.kind}" if f"{finding.name}:{finding.kind}" in _PRESENT else finding.name


def _pick(rng: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(rng.integers(len(choices)))]
