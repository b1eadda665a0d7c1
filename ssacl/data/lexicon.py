"""The words of the labeler: patterns per finding, cues of negation and doubt, and where a finding lies when no place is said.

All patterns expect lower-case text. Finding words follow the mention lists published with the CheXpert labeler (arXiv 1901.07031,
section 2.2), written anew and widened by what the Indiana University reports say.
"""

from __future__ import annotations

import re

from ssacl.anatomy import FINDINGS

_HEART = r"(?:heart|cardiac)(?: size| silhouette| shadow| contours?)*"
_MEDIASTINUM = r"(?:cardio-?)?mediastin(?:um|al)(?: silhouette| contours?| shadow| structures| width)*"
_GAP = r"(?: (?!normal|and|or|with|without)[\w-]+){0,4}?"

_MENTIONS: dict[str, str] = {
    "Enlarged Cardiomediastinum": (
        rf"(?:widen(?:ed|ing)|enlarge(?:d|ment)|prominen(?:t|ce)|broad(?:ened|ening)?)(?: of)?(?: the)?(?: superior| upper)? {_MEDIASTINUM}"
        rf"|{_MEDIASTINUM}{_GAP} (?:widen(?:ed|ing)|enlarge(?:d|ment)|prominen(?:t|ce)|broad(?:ened|ening)?)"
    ),
    "Cardiomegaly": (
        r"cardiomegaly"
        r"|(?:enlarge(?:d|ment)|(?<!no )large|increased)(?: of| in)?(?: the)?(?: size of the)? (?:heart|cardiac"
        r"|cardio-?pericardial)(?: size| silhouette| shadow)?"
        rf"|{_HEART}{_GAP} (?:enlarged|enlargement|increased in size|large)"
    ),
    "Lung Opacity": (
        r"(?<!nodular )opaci(?:ty|ties|fications?|fied)|infiltrat(?:es?|ions?|ive)|air-? ?space (?:disease|process|filling)|hazy|haziness"
        r"|interstitial (?:and \w+ |pulmonary |lung )?(?:opaci\w+"
        r"|markings?|pattern|thickening|prominence|lung disease|disease|changes?)|reticul\w+"
        r"|(?<!bone )(?<!nodular )densit(?:y|ies)"
        r"|(?<!fibrous )(?<!pleural )scar(?:s|ring)?|peribronchial (?:thickening|cuffing)|ground[- ]glass|whiteout|white-out"
    ),
    "Lung Lesion": (
        r"mass(?:es)?(?![ -]effect)|nodul(?:es?|ar(?:ity)? (?:opaci\w+|densit\w+|lesions?|shadow\w*))|(?:lung|pulmonary"
        r"|cavitary|parenchymal) lesions?"
        r"|carcinoma|neoplas\w+|tumou?rs?|malignan(?:cy|t)|metasta\w+|cavit(?:y|ation|ary lesions?)"
    ),
    "Edema": (
        r"(?<!subcutaneous )(?<!soft tissue )(?<!tissue )(?<!laryngeal )o?edema|(?:vascular|pulmonary|venous|vessel) congestion"
        r"|congestive (?:heart )?(?:failure|changes?)"
        r"|(?<!congestive )heart failure"
        r"|(?<!heart )(?<!respiratory )(?<!renal )(?<!liver )(?<!hardware )failure"
        r"|chf|cephali[sz]ation|(?:vascular|venous) (?:engorgement|prominence|redistribution|indistinctness)"
        r"|kerley|(?:volume|fluid) overload"
        rf"|vascul(?:ature|arity|ar markings){_GAP} (?:congested|engorged|prominent|indistinct)"
    ),
    "Consolidation": r"consolidat(?:ions?|ive|ed)",
    "Pneumonia": r"(?:broncho-?|pleuro-?)?pneumonias?|pneumonic|infectio(?:n|us)(?: process| etiology| infiltrates?)?|pneumonitis",
    "Atelectasis": r"(?:sub-?segmental )?atelecta\w+|(?:lobar|lung|lobe|pulmonary|segmental) collapse"
    r"|collapse of(?: the)? (?:\w+ ){0,2}(?:lobe|lung)|collapsed (?:lung|lobe)",
    "Pneumothorax": r"(?:hydro|haemo|hemo)?-?pneumothora(?:x|ces)|ptx|pleural air(?: collections?)?",
    "Pleural Effusion": r"(?<!pericardial )effusions?|pleural fluid|hydrothorax|hydropneumothorax|ha?emothorax|empyema",
    "Pleural Other": (
        r"pleural(?:[- ]based)? (?:thickening|plaques?|scarring|scar|fibrosis|calcifications?|nodularity|disease|caps?|mass(?:es)?)"
        r"|(?:apical|biapical|pleuro-?parenchymal) (?:pleural )?(?:thickening|caps?|scarring)|fibrothorax|fibrous scarring"
        r"|thickening of(?: the)? (?:\w+ )?pleura"
    ),
    "Fracture": r"fractur(?:es?|ed)|(?:compression|wedge)(?: \w+)? deformit(?:y|ies)",
    "Support Devices": (
        r"pace-?makers?|pacer|pacing|a?icd|defibrillators?|(?:pacemaker |pacer |pacing |icd |ventricular |atrial |ekg |ecg )?leads?"
        r"|(?:endo-?tracheal|et|ng|og|naso-?gastric|oro-?gastric|enteric|feeding|chest|tracheostomy|drainage|gastric"
        r"|gastrostomy|intestinal|thoracostomy|dobb?-?hoff|peg|g|j|gj) ?-?tubes?"
        r"|tubes?|catheters?|picc(?: line)?|(?:central|venous|jugular|subclavian|arterial|picc|infusion|dialysis"
        r"|ij)(?: venous)? lines?|lines and tubes|support lines?"
        r"|port-?a-?cath|mediport|chest port|infusaport|(?:right|left) port|swan[- ]ganz|sheath|introducer|cannula|balloon pump"
        r"|iabp|lvad|stents?|drains?"
        r"|tracheostomy|(?:sternal|sternotomy|cerclage) (?:wires|sutures)|sternotomy xxxx|(?:prosthetic|mechanical|artificial|replacement"
        r"|replaced) (?:\w+ )?valves?|valve (?:replacement|prosthes[ie]s)"
        r"|hardware|arthroplasty|prosthes[ie]s|(?:support|monitoring|medical) (?:and \w+ )?(?:devices?|apparatus|equipment)"
        r"|devices?|spinal rods?|stimulators?"
    ),
}
MENTIONS: dict[str, re.Pattern[str]] = {
    finding: re.compile(rf"(?<![\w-])(?:{_MENTIONS[finding]})(?!\w)") for finding in FINDINGS if finding in _MENTIONS
}
"""Finding -> words that state it when nothing denies or doubts them. "No Finding" has none: it follows from the others."""

_STEMS: dict[str, tuple[str, ...]] = {
    "Enlarged Cardiomediastinum": ("mediastin",),
    "Cardiomegaly": ("cardi", "heart"),
    "Lung Opacity": ("opaci", "infiltrat", "space", "haz", "interstiti", "reticul", "densit", "scar", "peribronch", "glass", "white"),
    "Lung Lesion": ("mass", "nodul", "lesion", "carcinom", "neoplas", "tumo", "malignan", "metasta", "cavit"),
    "Edema": ("edema", "congest", "failure", "chf", "cephali", "vascul", "venous", "kerley", "overload"),
    "Consolidation": ("consolidat",),
    "Pneumonia": ("pneumoni", "infecti"),
    "Atelectasis": ("atelecta", "collaps"),
    "Pneumothorax": ("pneumothora", "ptx", "pleural air"),
    "Pleural Effusion": ("effusion", "pleural fluid", "thorax", "empyema", "blunt"),
    "Pleural Other": ("pleur", "apical", "thorax", "fibrous scar"),
    "Fracture": ("fractur", "deformit"),
    "Support Devices": (
        *("pace", "pacing", "icd", "defib", "lead", "tube", "cath", "picc", "line", "port", "swan", "sheath", "introduc", "cannula"),
        *("pump", "iabp", "lvad", "stent", "drain", "tracheo", "stern", "cerclage", "valv", "hardware", "arthropl", "prosth"),
        *("equipment", "apparatus", "device", "rod", "stimul"),
    ),
}
STEMS = {finding: re.compile("|".join(stems)) for finding, stems in _STEMS.items()}
"""Finding -> one of these stands in every mention of it. Looking for them first spares most patterns."""

SOFT_MENTIONS: dict[str, re.Pattern[str]] = {
    "Pleural Effusion": re.compile(
        r"blunt(?:ed|ing)[\w ]{0,30}?(?:costo-?phrenic|cp|sulc)\w*|(?:costo-?phrenic|cp|sulc)[\w ]{0,40}?blunt(?:ed|ing)"
    ),
    "Cardiomegaly": re.compile(
        rf"borderline (?:\w+ )?{_HEART}|{_HEART}{_GAP} (?:borderline|prominent)|prominen(?:t|ce)(?: of the)? (?:heart|cardiac)"
    ),
    "Fracture": re.compile(r"\bribs? deformit(?:y|ies)|deformit(?:y|ies) of(?: [\w-]+){1,6}? ribs?\b"),
}
"""Words that hint at a finding: affirmed they are UNCERTAIN, denied they are ABSENT."""

# "no change in the effusion" denies nothing. Blanked before cues are looked for.
NOT_A_CUE = re.compile(
    r"\b(?:no|not|without)(?: (?:significant|definite|interval|substantial|appreciable|obvious|relevant|major|overall|much"
    r"|evidence|of|radiographic)(?:ly)?)*"
    r" (?:change[sd]?|increased?|decreased?|improvements?|improved|progression|worsening|difference|only|well|fully"
    r"|completely)\b(?: (?:in|of|from|to))?"
    r"|\b(?:nearly|almost|partial(?:ly)?|mostly|near[- ]complete(?:ly)?|incomplete(?:ly)?)(?: complete(?:ly)?)? (?:resolv\w+"
    r"|resolution|clear\w+)(?: of)?"
    r"|\bno doubt\b|\bmay \d{1,4}\b|\bnot (?:otherwise )?specified\b|\bwith or without\b"
)
_SEEN = (
    r"(?:seen|identified|visuali[sz]ed|present|evident|noted|detected|demonstrated|apparent|appreciated|observed|visible"
    r"|shown|found|definitely seen|clearly seen)"
)
CUE_BEFORE = re.compile(
    r"\b(?:"
    r"(?P<skip>(?:more )?sensitive (?:in|for|to)|to (?:identify|look for)|(?:history|hx) of|h/o|(?:to |for )?evaluat\w* for"
    r"|eval for|assess\w* for|r/o|(?<!cannot )(?<!not )rule out"
    r"|(?:to )?(?:document|ensure|confirm|assess|demonstrate|allow)(?:ing)?(?: the)?(?: complete)? (?:resolution|clearing)(?: of)?)"
    r"|(?P<doubt>possib\w+|probab\w+|likely|may|might|could|perhaps|presum\w+|suspected|potential(?:ly)?|questionabl[ey]"
    r"|questions? of|questioned|equivocal"
    r"|can ?not (?:\w+ )?(?:exclude|rule out)|(?:difficult|hard) to (?:exclude|rule out)|not (?:\w+ )?(?:exclude|rule out)"
    r"|exclude|excluding"
    r"|xxxx represent\w*|borderline|vs|versus|correlat\w+(?: \w+)? for|consider(?:ations?|ed|ing)?|uncertain|whether|unclear)"
    r"|(?P<instead>rather than)"
    r"|(?P<choice>differential(?: \w+){0,3})"
    r"|(?P<hint>suggest\w*|concern\w*|suspicio\w+|worrisome|favou?r(?:s|ed|ing)?|indicat\w+)"
    r"|(?P<denial>no longer|no|without|absen(?:ce|t)|free (?:of|from)|clear of|negative for|nor|neither|not|never|lack(?:s"
    r"|ing)?(?: of)?|denies|none"
    r"|(?:interval )?(?:resolution|clearing|removal) of|resolved|removed)"
    r")\b|(?P<mark>\?)(?=\s?\w)"
)
DENIAL_AFTER = re.compile(
    rf"\b(?:(?:(?:is|are|was|were|has|have|had|can) ?(?:been )?)?(?:no longer|not) (?:been )?(?:be )?(?:\w+ )?{_SEEN}\b"
    rf"|cannot be (?:\w+ly )?{_SEEN}"
    r"|(?:is|are|appears?|remains?) (?:within )?(?:normal limits|limits of normal|normal\b)|(?:(?:is|are) )?absent|(?:(?:has"
    r"|have)(?: since| now| \w+ly)? )?(?:resolved|cleared|disappeared|been (?:\w+ )?removed|removed)"
    r"|(?:(?:has|have) been |is |are )(?:excluded|ruled out)|(?:(?:is|are|seems?|appears?|felt)(?: to be| \w+)? )?unlikely)"
    r"|: ?(?:no\b|none|negative|absent)"
)
DOUBT_AFTER = re.compile(
    r"\b(?:(?:cannot|can not|can't|could not)(?: \w+)? be(?: \w+ly)? (?:excluded|ruled out)"
    r"|(?:(?:is|are|was|were) )?(?:also )?not (?:\w+ )?(?:excluded|ruled out)"
    r"|(?:(?:is|are|would be) )?(?:difficult|hard) to (?:exclude|rule out)"
    r"|(?:is|are|remains?|would be) (?:\w+ )?(?:possible|suspected|questioned|considered|likely|probable|questionable|equivocal"
    r"|uncertain|of concern)"
    r"|(?:is|are|remains?) (?:also )?(?:a |in the |on the )(?:possibility|consideration|concern|differential)|(?:may|might"
    r"|could) be (?:present|considered)"
    r"|(?:should|must|to) be (?:considered|excluded))\b|^ ?\?"
)
LABELLED = re.compile(
    r"\b(heart|cardiac silhouette|cardiomediastinal silhouette|mediastin\w+|lungs?|pleura"
    r"|bon(?:es|y structures)|osseous structures) ?:(?= )"
)
"""A part as the header of a line ("heart: enlarged"), which reads like a sentence without its colon."""
CLAUSE = re.compile(
    r";|\bbut\b(?! (?:\w+ )?(?:clear|normal|unremarkable))|\bhowever\b|\balthough\b|\bthough\b|\bexcept\b|\bwhereas\b|\bwhile\b"
    r"|\bapart from\b|\baside from\b"
    r"|\bother than\b|\byet\b|\. |\n"
)
"""Where the scope of every cue ends."""
SCOPE_END = re.compile(
    r"\bwith\b(?! (?:no|evidence))|\bthere (?:is|are|has|have)\b|\bwhich\b|\bthat\b|\bsecondary to\b|\bdue to\b|\brelated to\b|\bremains?\b"
    r"|\b(?:is|are) (?:again |now |also |still )?(?:seen|noted|present|identified|demonstrated|visuali[sz]ed|evident|unchanged"
    r"|stable|normal|clear)\b|\)"
)
"""Where the forward scope of a cue ends inside a clause."""
NEW_STATEMENT = re.compile(
    r"(?:,| and|, and) (?:stable|unchanged|mild(?:ly)?|moderate|small|minimal|persistent|new|increas\w+|there|the|heart|cardiac"
    r"|an?|both|status|again)\b"
)
"""A new statement in a list, unless a later "or" shows that the list goes on."""
LATER_OR = re.compile(r"\b(?:or|nor)\b")
VERB_OR_COMMA = re.compile(r"\b(?:is|are|was|were|has|have|with|there|which|without)\b|,(?! (?:or|nor|and)\b)")
LIST_LINK = re.compile(r",? ?(?:and/or|or|versus|vs\.?|/)(?: (?!no |without )[\w-]+){0,3} ?$")

NORMAL = re.compile(
    r"\b(?:(?:top|high|upper) (?:limits? of )?normal|within (?:the )?(?:upper )?(?:limits of normal|normal limits"
    r"|normal size limits)|normal(?! (?:position|variant|location))|unremarkable|(?<!not )clear(?! of)"
    r"|intact|sharp(?:ly)?(?: defined)?|midline|not (?:\w+ )?(?:enlarged|widened)|preserved|unobstructed|non-?enlarged)\b"
)
NORMAL_DENIED = re.compile(r"\b(?:not|no longer|limits? of|less than|below)(?: \w+ly)? $|\bnear(?:ly)?[ -]$|\b(?:not|cannot be) $")
NO_ABNORMALITY = re.compile(
    r"\b(?:no|without|negative for)(?: (?:evidence of|evidence for|radiographic|findings? of))?(?: [\w/-]+,?){0,7}? (?:abnormalit(?:y|ies)"
    r"|process(?:es)?|diseases?|findings?|patholog(?:y|ies)|injur(?:y|ies))\b"
)
NOT_A_SUBJECT = re.compile(r" (?:calcific\w+|clips?|lymph\w*|granulomas?|surgery|tortuosity)\b")
"""After a place word: it is part of something else's name, and no subject of a normal statement."""
NORMAL_CHEST = re.compile(
    r"\b(?:normal|negative|unremarkable) (?:portable |frontal |pa |ap )?(?:chest|study|exam\w*|film|radiograph\w*|cxr)\b"
)

COVERED: dict[str, tuple[str, ...]] = {
    "heart": ("Cardiomegaly",),
    "cardiomediastinum": ("Enlarged Cardiomediastinum", "Cardiomegaly"),
    "mediastinum": ("Enlarged Cardiomediastinum",),
    "lung": ("Lung Opacity", "Lung Lesion", "Edema", "Consolidation", "Pneumonia", "Atelectasis"),
    "vasculature": ("Edema",),
    "pleura": ("Pneumothorax", "Pleural Effusion", "Pleural Other"),
    "costophrenic angle": ("Pleural Effusion",),
    "bones": ("Fracture",),
    "ribs": ("Fracture",),
}
"""Part that is called normal -> findings that this denies. Clear lungs deny lung opacity and so everything below it in CheXpert's tree."""

_LUNG_PLACES = frozenset(
    {"upper lung zone", "mid lung zone", "lower lung zone", "hilar structures", "apical zone", "costophrenic angle", "lung"}
)
_SKELETAL_PLACES = frozenset({"spine", "clavicle", "ribs", "bones"})
PLACES_FOR: dict[str, frozenset[str]] = {
    **dict.fromkeys(("Lung Opacity", "Lung Lesion", "Edema", "Consolidation", "Pneumonia", "Atelectasis"), _LUNG_PLACES),
    **dict.fromkeys(("Pneumothorax", "Pleural Effusion"), _LUNG_PLACES),
    "Pleural Other": _LUNG_PLACES | {"hemidiaphragm"},
    "Enlarged Cardiomediastinum": frozenset(),
    "Cardiomegaly": frozenset(),
    "Fracture": _SKELETAL_PLACES,
    "Support Devices": frozenset({"trachea", "carina", "superior vena cava", "cavoatrial junction", "right atrium", "abdomen", "spine"}),
}
"""Finding -> parts that can be its place; other place words of the sentence ("obscures the heart border") are not where it lies."""
ALL_ZONES = ("upper lung zone", "mid lung zone", "lower lung zone")
DEFAULT_PLACE: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("Lung Opacity", "Lung Lesion", "Consolidation", "Pneumonia"), ALL_ZONES),
    "Edema": ("hilar structures", *ALL_ZONES),
    "Atelectasis": ("lower lung zone",),
    "Pneumothorax": ("apical zone", "upper lung zone"),
    "Pleural Effusion": ("costophrenic angle", "lower lung zone"),
    "Pleural Other": ("mid lung zone", "costophrenic angle"),
    "Enlarged Cardiomediastinum": ("mediastinum",),
    "Cardiomegaly": ("heart",),
    "Fracture": ("bones",),
    "Support Devices": ("upper mediastinum", "superior vena cava", "abdomen"),
}
"""Finding -> parts where it lies when none is said; a side that is said still counts."""
DEVICE_PLACE: tuple[tuple[re.Pattern[str], tuple[str, ...]], ...] = tuple(
    (re.compile(words), places)
    for words, places in (
        (r"endo-?tracheal|\bet ?-?tube|tracheostomy", ("trachea", "carina")),
        (r"naso-?gastric|oro-?gastric|enteric|feeding|\b(?:ng|og|peg|g|j|gj)[ -]?tube|dobb?-?hoff|gastr", ("abdomen",)),
        (
            r"picc|central|venous|jugular|subclavian|\bport\b|port-a|mediport|swan|catheter|dialysis"
            r"|\bij\b",
            ("superior vena cava", "cavoatrial junction"),
        ),
        (r"pace|pacing|icd|defib|lead", ("superior vena cava", "right atrium")),
        (r"chest tube|thoracostomy|pleural|pigtail|drain", ("mid lung zone", "lower lung zone")),
        (r"wires|sternotomy", ("upper mediastinum",)),
        (r"valve", ("heart",)),
        (r"spin|rod", ("spine",)),
    )
)
