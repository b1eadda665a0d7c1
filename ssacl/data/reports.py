"""Report text: sections, sentences, laterality, and which text a model is trained on.

Written for English chest radiograph reports in the layouts of MIMIC-CXR (upper-case headers on their own lines), Open-i (fields
already separated) and plain letters (title-case headers inside a line, or none).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, Protocol

from ssacl.errors import ConfigError

Which = Literal["findings", "impression", "both"]

_FINDINGS = r"findings?(?:\s*(?:/|and|&)\s*impressions?)?|report|description|imaging notes|observations?|chest"
_IMPRESSION = r"(?:final )?impressions?|conclusions?|opinion|interpretation|summary|assessment|diagnosis"
# What comes before the findings: a paragraph of its own after one of these may be findings without a header.
_BEFORE = (
    r"indications?(?: for (?:the )?(?:exam(?:ination)?|study|procedure))?|(?:clinical |patient |past medical |relevant )?history"
    r"|clinical (?:information|indications?|data|details|question|statement)|reason for (?:the )?(?:exam(?:ination)?|study|test|visit)"
    r"|techniques?|comparisons?|(?:comparison|prior) (?:exams?|studies|study)|exam(?:ination)?(?: type| date)?|study|procedures?"
    r"|patient|name|age|sex|gender|dob|mrn|accession(?: number)?|date(?: of (?:exam(?:ination)?|study|birth|service))?"
    r"|referring (?:physician|doctor|provider)|physician|radiologist|views?|limitations?|comments?"
)
# What stands beside the report; none of it describes the film for this report.
_APART = (
    r"wet read|(?:preliminary|provisional) (?:report|read|findings impression(?: \(pfi\))?)|notifications?|recommendations?(?:\(s\))?"
    r"|(?:final )?addend(?:um|a)(?: (?:#? ?\d+|begins?))?|dictated by|transcribed by|signed by|electronically signed(?: by)?|attestation"
)
_BOILERPLATE = r"final report"
_KNOWN = {
    kind: re.compile(pattern, re.I)
    for kind, pattern in {
        "findings": _FINDINGS,
        "impression": _IMPRESSION,
        "before": _BEFORE,
        "apart": _APART,
        "boilerplate": _BOILERPLATE,
    }.items()
}
# A header stands at the start of a line, or inside one after the end of a sentence; a word like "chest" alone only at a line start.
_HEADER = re.compile(
    rf"(?:(?:^|\n)[ \t]*(?P<line>{_FINDINGS}|{_IMPRESSION}|{_BEFORE}|{_APART}|{_BOILERPLATE})[ \t]*(?::|(?=\n)|(?<=[ \t])[-\u2013][ \t])"
    rf"|(?<=[.?!:;)\]_])[ \t]*(?P<inline>findings?(?:\s*(?:/|and|&)\s*impressions?)?|{_IMPRESSION}|{_BEFORE}|{_APART})[ \t]*:"
    r"|(?:^|\n)[ \t]*(?P<other>[A-Z](?:[A-Z0-9 ,/&()_.-]|:(?=\d)){2,80}):(?!\d))",
    re.IGNORECASE,
)
_FILM_HEADER = re.compile(r"\b(?:chest|views?|radiographs?|frontal|portable|x-?rays?)\b", re.I)
_ORGAN_HEADER = re.compile(
    r"\b(?:lungs?|heart|cardi\w+|mediastin\w+|pleura\w*|bon(?:es?|y)|osseous|skelet\w+|airways?|hil(?:a|um|ar)|diaphragm\w*|tubes?|lines?"
    r"|devices?|abdomen|soft tissues?|ribs?|spine|vascul\w+)\b",
    re.I,
)
_NOT_A_TEXT = re.compile(r"exam|study|procedure|reason|type", re.I)
_RULE = re.compile(r"^[ \t]*[_=-]{4,}[ \t]*$", re.M)

_LIST_NUMBER = re.compile(r"(?:^|(?<=[.;:?!]\s)|(?<=\n)|(?<=[a-z]\.))[ \t]*(?:\(?\d{1,2}[.)](?=\s+\D|[A-Z])|[-*\u2022](?=\s))\s*", re.M)
_MAY_BE_A_LIST = re.compile(r"\d[.)]|[-*\u2022]\s")
_LATER_NUMBER = re.compile(r"(?P<word>[\w.)]+)[ \t]+\(?(?P<number>\d{1,2})[.)]\s+(?=[A-Z])")
_COUNTED = re.compile(r"(?:grade|stage|type|level|segment|series|image|number|no\.?|day|rib|of|than|to|and|or|about|[tlcx])", re.I)
_LETTER = re.compile(r"[^\W\d_]")
_BREAK = re.compile(r"[.!?]+[\"')\]]*(?:\s+|(?<=[a-zX_) ]\.)(?=[A-Z][a-z])|$)|\n+")
_NEVER_LAST = re.compile(
    r"(?:\b(?:dr|drs|mr|mrs|ms|prof|st|vs|approx|fig|incl|resp|cf|e\.g|i\.e)|\b(?:dr|mr|mrs|ms|prof)\.\s+[a-z])\.$", re.IGNORECASE
)
_LONGEST_SHORTENED = 16
_MAY_GO_ON = re.compile(r"(?:\b(?:a\.m|p\.m|cm|mm|etc|lat|post|ant|inf|sup|pt|pts|ca|[rl])|\bno)\.$", re.IGNORECASE)

# Heart chambers and named vessels keep their name on a mirrored film; the heart's borders are sides of the film.
_NAMED_SIDE = (
    r"(?:[ -]sided)?(?:\s+(?:and|or)\s+(?:right|left))?\s+"
    r"(?:atri(?:um|a|al)\b|ventric\w*|heart\b(?!\s+border)|bundle\b|anterior descending|main coronary|circumflex|coronary)"
)
_SIDE = re.compile(
    rf"\b(right|left|dextro|levo)(?=(?:ward|wards|-?sided|most)?\b|convex|curv|rot|scolio|posi)(?!{_NAMED_SIDE})", re.IGNORECASE
)
_OTHER_SIDE = {"right": "left", "left": "right", "dextro": "levo", "levo": "dextro"}
# A letter for a side. Not "2 L" (litres), "L-spine" (lumbar), "R/O" (rule out) or "R." (an initial): each condition holds for both letters,
# so that swapping twice gives the text back.
_SIDE_LETTER = re.compile(
    r"(?<![\w.'-])(?<!\d )(?:[RL](?=[UL]L\b|IJ\b)|[Rr](?=t\b(?!\w))|[Ll](?=t\b(?!\w))"
    r"|[RL](?=[\s,;)>]|/(?!O\b)|-sided\b|\.?\s*$)(?!\s+(?:spine|shaped)\b))"
)
_OTHER_LETTER = str.maketrans("RLrl", "LRlr")
_SIDE_WITHOUT_TWIN = re.compile(r"\b(?:RML|RT|LT|[RL](?![\w'])|[Ll]ingula\w*|[Dd]extrocardia|[Ss]itus|[Rr]etrocardiac|[Mm]iddle lobe)\b")


@dataclass(frozen=True)
class Sections:
    """The two parts of a report that describe the film; either may be empty. White space is single."""

    findings: str = ""
    impression: str = ""


class HasSections(Protocol):
    """What `training_text` reads: `Sections`, and a shard `Sample`."""

    @property
    def findings(self) -> str: ...
    @property
    def impression(self) -> str: ...


def split_sections(text: str) -> Sections:
    """Findings and impression of a whole report; indication, history, technique, comparison and names are left out.

    Text without any header is all findings. Where there are headers but no findings header, paragraphs that follow the first
    paragraph of a left-out section (MIMIC-CXR's layout without "FINDINGS:") are findings, and so is what stands under "FINAL REPORT".
    An upper-case header that is not known opens findings when it speaks of the film ("FRONTAL CHEST RADIOGRAPH:"), or of an organ, whose
    name is then kept ("HEART: Enlarged."), else a left-out section. Wet reads, addenda, recommendations and signatures are left out whole.
    """
    text = _RULE.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    # "other" is meant for upper-case headers; the pattern as a whole ignores case for the known ones.
    headers = [match for match in _HEADER.finditer(text) if match["other"] is None or match["other"].isupper()]
    if not headers:
        return Sections(findings=_flat(text))
    parts: dict[str, list[str]] = {"findings": [], "impression": []}
    loose = [text[: headers[0].start()]]
    for index, header in enumerate(headers):
        end = headers[index + 1].start() if index + 1 < len(headers) else len(text)
        body = text[header.end() : end]
        kind = _kind(header)
        if kind == "organ":
            # Inside an impression an organ is part of it.
            kind = "impression" if parts["impression"] else "findings"
            body = f"{header['other'].strip()}:{body}"
        if kind in parts:
            parts[kind].append(body)
        elif kind == "boilerplate":
            loose.append(body)
        elif kind == "before":
            loose.extend(re.split(r"\n\s*\n", body.strip("\n"))[1:])
    findings = _flat(" \n".join(parts["findings"]))
    if not findings:
        findings = _flat(" \n".join(part for part in loose if not _is_title(part)))
    return Sections(findings=findings, impression=_flat(" \n".join(parts["impression"])))


def _kind(header: re.Match[str]) -> str:
    name = header["line"] or header["inline"]
    if name is not None:
        return next(kind for kind, pattern in _KNOWN.items() if pattern.fullmatch(name))
    name = header["other"]
    if _FILM_HEADER.search(name) and not _NOT_A_TEXT.match(name):
        return "findings"
    return "organ" if _ORGAN_HEADER.search(name) and not _NOT_A_TEXT.match(name) else "before"


def _is_title(paragraph: str) -> bool:
    # "PORTABLE CHEST, ___" and "AP CHEST, 5:46 A.M., ___" head a report; they say nothing of the film.
    return len(paragraph.split()) <= 2 or paragraph.isupper()


def _flat(text: str) -> str:
    # List items keep their line, so that a list without full stops can still be split into sentences.
    lines = re.sub(r"[ \t]*\n(?=\s*(?:\(?\d{1,2}[.)]\s|[-*\u2022]\s))\s*", "\v", text.strip())
    return re.sub(r"\s+", " ", lines.replace("\v", "\0")).replace("\0", "\n").strip()


def split_sentences(text: str) -> list[str]:
    """Sentences in order, list numbers and bullets removed; pieces without a letter are dropped.

    Survives numbered lists, titles ("Dr."), decimals ("2.5 cm"), times ("3.40 p.m."), a missing space after a full stop
    ("apex.There"), and the de-identification marks `___` and `XXXX`.
    """
    if "  " in text or "\t" in text:
        text = re.sub(r"[ \t]+", " ", text)
    if _MAY_BE_A_LIST.search(text):
        text = _LIST_NUMBER.sub("\n", _split_list(text))
    sentences, start = [], 0
    for match in _BREAK.finditer(text):
        if not match[0].startswith("\n"):
            before = text[start : match.start() + 1]
            # "? pneumonia" doubts what follows.
            if before.strip() == "?":
                continue
            after = text[match.end() : match.end() + 1]
            last = before[-_LONGEST_SHORTENED:]
            if _NEVER_LAST.search(last) or (_MAY_GO_ON.search(last) and (after.islower() or after.isdigit())):
                continue
        sentences.append(text[start : match.end()])
        start = match.end()
    sentences.append(text[start:])
    return [" ".join(sentence.split()) for sentence in sentences if _LETTER.search(sentence)]


def _split_list(text: str) -> str:
    """`text` with a line for each item of a numbered list whose items have no full stop ("1. Effusion 2. Atelectasis")."""
    if not re.match(r"\s*\(?1[.)]\s", text):
        return text
    expected, pieces, start = 2, [], 0
    for match in _LATER_NUMBER.finditer(text):
        if int(match["number"]) == expected and not _COUNTED.fullmatch(match["word"]):
            pieces.append(text[start : match.end("word")])
            start = match.end("word")
            expected += 1
    return "\n".join([*pieces, text[start:]])


def swap_laterality(text: str) -> str:
    """`text` as said of the mirrored film: right <-> left (case kept, "-sided", "-ward" too), R <-> L, RLL <-> LLL, dextro- <-> levo-.

    Names of heart chambers and coronary vessels stay ("right atrium", "left ventricular"), as in `anatomy.mirrored`; "bilateral" is no
    side. What has no twin stays too: ask `can_swap_laterality` first. Applying it twice gives the text back.
    """
    words = _SIDE.sub(lambda match: _in_case(match[0], _OTHER_SIDE[match[0].lower()]), text)
    return _SIDE_LETTER.sub(lambda match: match[0].translate(_OTHER_LETTER), words)


def can_swap_laterality(text: str) -> bool:
    """False when `text` names a side that `swap_laterality` cannot mirror: "RML", "lingula", "middle lobe", "dextrocardia", "R." ..."""
    return _SIDE_WITHOUT_TWIN.search(_SIDE_LETTER.sub("~", text)) is None


def _in_case(pattern: str, word: str) -> str:
    if pattern.isupper():
        return word.upper()
    return word.capitalize() if pattern[0].isupper() else word


def training_text(report: HasSections, which: Which = "both") -> str:
    """The text to train on; empty when the wanted section is. "both" is findings, then impression.

    Raises
    ------
    ConfigError
        `which` is not one of "findings", "impression", "both".
    """
    if which not in ("findings", "impression", "both"):
        raise ConfigError(f"data.sections is '{which}'; expected findings, impression or both.")
    wanted = (report.findings, report.impression) if which == "both" else (getattr(report, which),)
    return " ".join(_with_stop(part.strip()) for part in wanted if part.strip())


def _with_stop(text: str) -> str:
    return text if text[-1] in ".!?" else f"{text}."
