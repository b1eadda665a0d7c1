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
_IMPRESSION = r"impressions?|conclusions?|opinion|interpretation|summary|assessment|diagnosis"
_OMITTED = (
    r"indications?(?: for (?:the )?(?:exam(?:ination)?|study|procedure))?|(?:clinical |patient |past medical |relevant )?history"
    r"|clinical (?:information|indications?|data|details|question|statement)|reason for (?:the )?(?:exam(?:ination)?|study|test|visit)"
    r"|techniques?|comparisons?|(?:comparison|prior) (?:exams?|studies|study)|exam(?:ination)?(?: type| date)?|study|procedures?"
    r"|final report|wet read|notifications?|recommendations?|addend(?:um|a)|patient|name|age|sex|gender|dob|mrn|accession(?: number)?"
    r"|date(?: of (?:exam(?:ination)?|study|birth|service))?|referring (?:physician|doctor|provider)|physician|radiologist"
    r"|dictated by|signed by|electronically signed(?: by)?"
    r"|views?|limitations?|comments?"
)
_KIND = {"findings": re.compile(_FINDINGS, re.I), "impression": re.compile(_IMPRESSION, re.I)}
# A header stands at the start of a line, or inside one after the end of a sentence; a word like "chest" alone only at a line start.
_HEADER = re.compile(
    rf"(?:(?:^|\n)[ \t]*(?P<line>{_FINDINGS}|{_IMPRESSION}|{_OMITTED})[ \t]*(?::|(?=\n))"
    rf"|(?<=[.?!:;)\]_][ \t])[ \t]*(?P<inline>findings?|{_IMPRESSION}|{_OMITTED})[ \t]*:"
    r"|(?:^|\n)[ \t]*(?P<other>[A-Z](?:[A-Z0-9 ,/&()_.-]|:(?=\d)){2,80}):)",
    re.IGNORECASE,
)
_FILM_HEADER = re.compile(r"\b(?:chest|views?|radiographs?|frontal|portable|x-?rays?|lungs?|heart|pleura|bones)\b", re.I)
_NOT_A_TEXT = re.compile(r"exam|study|procedure|reason", re.I)

_LIST_NUMBER = re.compile(r"(?:^|(?<=[.;:?!]\s)|(?<=\n))[ \t]*(?:\(?\d{1,2}[.)](?=\s+\D)|[-*\u2022](?=\s))\s*", re.M)
_BREAK = re.compile(r"[.!?]+[\"')\]]*(?:\s+|(?<=[a-z]\.)(?=[A-Z][a-z])|$)|\n+")
_NEVER_LAST = re.compile(
    r"(?:\b(?:dr|drs|mr|mrs|ms|prof|st|vs|approx|fig|incl|resp|cf|e\.g|i\.e)|\b(?:dr|mr|mrs|ms|prof)\.\s+[a-z])\.$", re.IGNORECASE
)
_MAY_GO_ON = re.compile(r"(?:\b(?:a\.m|p\.m|cm|mm|etc|lat|post|ant|inf|sup)|\bno)\.$", re.IGNORECASE)

# Heart chambers and named vessels keep their name on a mirrored film; the heart's borders are sides of the film.
_NAMED_SIDE = (
    r"(?:[ -]sided)?(?:\s+(?:and|or)\s+(?:right|left))?\s+"
    r"(?:atri(?:um|a|al)\b|ventric\w*|heart\b(?!\s+border)|bundle\b|anterior descending|main coronary|circumflex|coronary)"
)
_SIDE = re.compile(
    rf"\b(right|left|dextro|levo)(?=(?:ward|wards|-?sided|most)?\b|convex|curv|rot|scolio|posi)(?!{_NAMED_SIDE})", re.IGNORECASE
)
_OTHER_SIDE = {"right": "left", "left": "right", "dextro": "levo", "levo": "dextro"}
_SIDE_WITHOUT_TWIN = re.compile(
    r"\b(?:R[UML]L|L[UL]L|RIJ|LIJ|RT|LT|[RL](?=[\s/.,)-])|[Ll]ingula\w*|[Dd]extrocardia|[Ss]itus|[Rr]etrocardiac|[Mm]iddle lobe)\b"
)


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
    paragraph of a left-out section (MIMIC-CXR's layout without "FINDINGS:") are findings. An upper-case header that is not known
    opens findings when it speaks of the film ("FRONTAL CHEST RADIOGRAPH:"), else a left-out section.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    # "other" is meant for upper-case headers; the pattern as a whole ignores case for the known ones.
    headers = [match for match in _HEADER.finditer(text) if match["other"] is None or match["other"].isupper()]
    if not headers:
        return Sections(findings=_flat(text))
    parts: dict[str, list[str]] = {"findings": [], "impression": [], "omitted": [], "loose": []}
    lead = text[: headers[0].start()]
    parts["loose"].append(lead)
    for index, header in enumerate(headers):
        end = headers[index + 1].start() if index + 1 < len(headers) else len(text)
        body = text[header.end() : end]
        kind = _kind(header)
        if kind == "omitted":
            first, *later = re.split(r"\n\s*\n", body.strip("\n"))
            parts["omitted"].append(first)
            parts["loose"].extend(later)
        else:
            parts[kind].append(body)
    findings = _flat(" \n".join(parts["findings"]))
    if not findings:
        findings = _flat(" \n".join(part for part in parts["loose"] if len(part.split()) > 2))
    return Sections(findings=findings, impression=_flat(" \n".join(parts["impression"])))


def _kind(header: re.Match[str]) -> str:
    name = header["line"] or header["inline"]
    if name is None:
        return (
            "findings"
            if _FILM_HEADER.search(header["other"]) and not re.match(r"(?i)exam|study|procedure|reason", header["other"])
            else "omitted"
        )
    return next((kind for kind, pattern in _KIND.items() if pattern.fullmatch(name)), "omitted")


def _flat(text: str) -> str:
    # List items keep their line, so that a list without full stops can still be split into sentences.
    lines = re.sub(r"[ \t]*\n(?=\s*(?:\(?\d{1,2}[.)]\s|[-*\u2022]\s))\s*", "\v", text.strip())
    return re.sub(r"\s+", " ", lines.replace("\v", "\0")).replace("\0", "\n").strip()


def split_sentences(text: str) -> list[str]:
    """Sentences in order, list numbers and bullets removed; pieces without a letter are dropped.

    Survives numbered lists, titles ("Dr."), decimals ("2.5 cm"), times ("3.40 p.m."), a missing space after a full stop
    ("apex.There"), and the de-identification marks `___` and `XXXX`.
    """
    text = _LIST_NUMBER.sub("\n", re.sub(r"[ \t]+", " ", text))
    sentences, start = [], 0
    for match in _BREAK.finditer(text):
        if not match[0].startswith("\n"):
            before = text[start : match.start() + 1]
            # "? pneumonia" doubts what follows.
            if before.strip() == "?":
                continue
            after = text[match.end() : match.end() + 1]
            if _NEVER_LAST.search(before) or (_MAY_GO_ON.search(before) and (after.islower() or after.isdigit())):
                continue
        sentences.append(text[start : match.end()])
        start = match.end()
    sentences.append(text[start:])
    return [" ".join(sentence.split()) for sentence in sentences if re.search(r"[^\W\d_]", sentence)]


def swap_laterality(text: str) -> str:
    """`text` as said of the mirrored film: right <-> left (case kept, "-sided", "-ward" too), dextro- <-> levo-.

    Names of heart chambers and coronary vessels stay ("right atrium", "left ventricular"), as in `anatomy.mirrored`. Letters
    alone (R, LLL) are not touched: ask `can_swap_laterality` first. Applying it twice gives the text back.
    """
    return _SIDE.sub(lambda match: _in_case(match[0], _OTHER_SIDE[match[0].lower()]), text)


def can_swap_laterality(text: str) -> bool:
    """False when `text` names a side that `swap_laterality` cannot mirror: "RLL", "lingula", "middle lobe", "dextrocardia"..."""
    return _SIDE_WITHOUT_TWIN.search(text) is None


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
