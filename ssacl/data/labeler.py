"""Report text -> the 14 CheXpert findings, with the sentence, the status and the place of every mention. Rules, no model.

Policy
------
- A mention is PRESENT unless a cue in its clause denies it (ABSENT) or doubts it (UNCERTAIN). Of several cues before it the nearest
  rules; "no ... to suggest X" denies. "X or Y" and "X versus Y", when affirmed, doubt both. "Unlikely", "resolved", "removed",
  "rather than X" deny. A list after "differential includes" is doubted whole.
  "Consistent with" and "representing" affirm. "Borderline" and a blunted costophrenic angle are UNCERTAIN, and so is a deformed rib;
  "upper limits of normal" is normal. De-identification marks: "XXXX representing X" is doubt, "sternotomy XXXX" are its wires; others say
  nothing. What an uncertain finding counts as is decided by those who use it (`data.uncertain`, `evaluation.clinical.positives`).
- "History of X", "evaluate for X" and "to document resolution of X" say nothing of the film.
- Over a report, and over findings and impression alike: PRESENT beats UNCERTAIN beats ABSENT.
- Normal statements ("the heart is normal in size", "lungs are clear", "no bony abnormality") deny what `lexicon.COVERED` lists, for the
  report only when they speak of both sides. "No acute cardiopulmonary process" denies nothing by name.
- Like CheXpert, a finding does not imply its parent: consolidation is not also lung opacity.
- "No Finding" is PRESENT when no pathology is PRESENT or UNCERTAIN (support devices are no pathology), else ABSENT. What lies outside the
  14 (emphysema, granuloma, scoliosis) does not count against it. An empty report leaves all 14 UNMENTIONED.
- A place is read from the words next to the mention; without any, the finding's usual place on both sides (`lexicon.DEFAULT_PLACE`).
  An effusion always includes the costophrenic angle of its side.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Literal

from ssacl.anatomy import FINDING_INDEX, FINDINGS, NO_FINDING, FindingStatus
from ssacl.data import lexicon
from ssacl.data.places import PlaceWord, find_places, find_sides, leaves_of, nodes_of
from ssacl.data.reports import split_sentences

Uncertain = Literal["present", "absent", "ignore"]
_NO_PATHOLOGY = (NO_FINDING, "Support Devices")
# Findings with a usual place of their own: "lung" says no more than the side, and a neighbour's zone is not theirs.
_LOCAL = ("Pleural Effusion", "Pneumothorax", "Pleural Other", "Atelectasis", "Edema")
_RANK = {FindingStatus.UNMENTIONED: 0, FindingStatus.ABSENT: 1, FindingStatus.UNCERTAIN: 2, FindingStatus.PRESENT: 3}
_COPULA = re.compile(r"\b(?:is|are|was|were|appears?|remains?|be|looks?|within|size|contours?)(?: [\w-]+){0,4} $")
_LINK = re.compile(r",|/|\b(?:and|or|with|without|versus|vs|representing|reflecting|suggest\w*|consistent|may|likely)\b")
_SHORT_GAP = re.compile(r"(?: (?!and\b|or\b|with\b)[\w-]+){0,3} ")


@dataclass(frozen=True)
class Mention:
    """One statement about a finding, or one normal statement, in one sentence."""

    sentence_index: int
    sentence: str
    finding: str | None
    """A CheXpert finding, or None for a normal statement."""
    status: FindingStatus
    leaves: frozenset[str]
    """Leaves that the statement speaks of; empty: the whole chest."""
    covers: tuple[str, ...] = ()
    """Findings that a normal statement denies at its leaves."""
    denies_overall: bool = False
    """The normal statement speaks of both sides, so that what it covers is absent in the whole film."""


@dataclass(frozen=True)
class ReportLabels:
    """Labels of a report: one `FindingStatus` per finding in `FINDINGS` order, and the mentions that they rest on."""

    labels: tuple[FindingStatus, ...]
    mentions: tuple[Mention, ...]

    def __getitem__(self, finding: str) -> FindingStatus:
        return self.labels[FINDING_INDEX[finding]]


def label_report(findings: str, impression: str = "") -> ReportLabels:
    """Label a report. Sentences are numbered through findings, then impression (as `split_sentences` gives them)."""
    sentences = [*split_sentences(findings), *split_sentences(impression)]
    mentions = [
        mention if index == 0 else replace(mention, sentence_index=index)
        for index, sentence in enumerate(sentences)
        for mention in _label_sentence(sentence)
    ]
    status = dict.fromkeys(FINDINGS, FindingStatus.UNMENTIONED)
    for mention in mentions:
        stated = (mention.finding,) if mention.finding is not None else mention.covers if mention.denies_overall else ()
        for finding in stated:
            status[finding] = max(status[finding], mention.status, key=_RANK.__getitem__)
    if sentences:
        pathology = any(
            _RANK[status[name]] >= _RANK[FindingStatus.UNCERTAIN] for name in FINDINGS if name not in (NO_FINDING, "Support Devices")
        )
        status[NO_FINDING] = FindingStatus.ABSENT if pathology else FindingStatus.PRESENT
    return ReportLabels(tuple(status[name] for name in FINDINGS), tuple(mentions))


def label_sentence(text: str) -> list[Mention]:
    """Mentions of one sentence, in the order of its words; `sentence_index` is 0."""
    return list(_label_sentence(text))


def sentence_place(text: str) -> tuple[tuple[str, ...], str | None, FindingStatus]:
    """What one sentence speaks of: anatomy nodes (empty: the whole chest), finding, status.

    Of several mentions the firmest status rules (PRESENT, UNCERTAIN, ABSENT) and its first finding; the nodes are of all mentions with that
    status. A sentence that names a place and no finding ("The trachea is midline.") has finding None; without any statement the
    status is UNMENTIONED.
    """
    mentions = _label_sentence(text)
    if not mentions:
        lowered = _plain(text)
        return (
            nodes_of({leaf for word in find_places(lowered) for leaf in leaves_of(word.part, word.sides)}),
            None,
            FindingStatus.UNMENTIONED,
        )
    status = max((mention.status for mention in mentions), key=_RANK.__getitem__)
    firm = [mention for mention in mentions if mention.status == status]
    finding = next((mention.finding for mention in firm if mention.finding is not None), None)
    return nodes_of({leaf for mention in firm for leaf in mention.leaves}), finding, status


def entities(labels: Sequence[int], uncertain: Uncertain = "present") -> list[str]:
    """Names of the present findings for the prompt, without "No Finding"; UNCERTAIN ones only under the policy "present"."""
    wanted = {FindingStatus.PRESENT, FindingStatus.UNCERTAIN} if uncertain == "present" else {FindingStatus.PRESENT}
    return [name for name, status in zip(FINDINGS, labels, strict=True) if name != NO_FINDING and status in wanted]


def _plain(text: str) -> str:
    return lexicon.LABELLED.sub(r"\1", " ".join(text.lower().split()))


@dataclass
class _Hit:
    start: int
    end: int
    finding: str
    status: FindingStatus
    soft: bool = False


@lru_cache(maxsize=32768)
def _label_sentence(text: str) -> tuple[Mention, ...]:
    mentions: list[Mention] = []
    for clause in lexicon.CLAUSE.split(_plain(text)):
        if clause.strip():
            mentions += _label_clause(clause, text)
    return tuple(mentions)


def _label_clause(clause: str, sentence: str) -> list[Mention]:
    cues = lexicon.NOT_A_CUE.sub(lambda match: "~" * len(match[0]), clause)
    hits = _find_hits(clause)
    kept = [hit for hit in hits if _judge(hit, hits, clause, cues)]
    _doubt_alternatives(kept, clause)
    places = find_places(clause)
    chunks = _chunks(kept, clause)
    told = [(hit.start, _mention(hit, index, chunks, places, clause, sentence)) for index, hit in enumerate(kept)]
    told += _normal_statements(clause, cues, hits, places, sentence)
    return [mention for _, mention in sorted(told, key=lambda item: item[0])]


def _find_hits(clause: str) -> list[_Hit]:
    hits: list[_Hit] = []
    for finding, pattern in lexicon.MENTIONS.items():
        if lexicon.STEMS[finding].search(clause) is None:
            continue
        # One statement per finding and place in a clause: "endotracheal tube tip ... the tube" counts twice, which does no harm.
        found = [_Hit(match.start(), match.end(), finding, FindingStatus.PRESENT) for match in pattern.finditer(clause)]
        soft = lexicon.SOFT_MENTIONS.get(finding)
        if not found and soft is not None:
            found = [_Hit(match.start(), match.end(), finding, FindingStatus.PRESENT, soft=True) for match in soft.finditer(clause)]
        hits += found
    return sorted(hits, key=lambda hit: (hit.start, hit.end))


def _judge(hit: _Hit, hits: Sequence[_Hit], clause: str, cues: str) -> bool:
    """Set the status of `hit` from the cues around it; False when the clause says nothing of the film about it."""
    hit.status = FindingStatus.UNCERTAIN if hit.soft else FindingStatus.PRESENT
    after = cues[hit.end :]
    doubt, denial = lexicon.DOUBT_AFTER.search(after), lexicon.DENIAL_AFTER.search(after)
    if doubt and _reaches(after[: doubt.start()]):
        hit.status = FindingStatus.UNCERTAIN
        return True
    if denial and _reaches(after[: denial.start()]):
        hit.status = FindingStatus.ABSENT
        return True
    denied = hinted = False
    for cue in reversed(list(lexicon.CUE_BEFORE.finditer(cues, 0, hit.end))):
        if cue.start() >= hit.start and not (cue["denial"] or cue["doubt"]):
            continue
        lists = cue["denial"] is not None or cue["choice"] is not None
        if cue.end() <= hit.start and _scope_ends(clause, cue.end(), hit.start, lists):
            break
        if cue["skip"]:
            return False
        if cue["doubt"] or cue["choice"] or cue["mark"]:
            hinted = True
            break
        denied = denied or cue["denial"] is not None or cue["instead"] is not None
        hinted = hinted or cue["hint"] is not None
        if denied:
            break
    if denied:
        hit.status = FindingStatus.ABSENT
    elif hinted:
        hit.status = FindingStatus.UNCERTAIN
    return True


def _reaches(between: str) -> bool:
    return len(between) < 80 and lexicon.VERB_OR_COMMA.search(between) is None


def _scope_ends(clause: str, start: int, end: int, lists: bool) -> bool:
    """Does something between a cue's end and a mention's start end the cue's scope?"""
    between = clause[start:end]
    if lexicon.SCOPE_END.search(between):
        return True
    list_goes_on = lexicon.LATER_OR.search(clause, end) is not None or lexicon.LATER_OR.search(between) is not None
    if list_goes_on:
        return False
    # Doubt is told of one thing: it does not cross a comma as "no A, B, C" and "differential includes A, B, C" do.
    if not lists and "," in between:
        return True
    return lexicon.NEW_STATEMENT.search(clause[start : end + 1]) is not None


def _doubt_alternatives(hits: Sequence[_Hit], clause: str) -> None:
    for first, second in pairwise(hits):
        between = clause[first.end : second.start]
        both_affirmed = first.status in (FindingStatus.PRESENT, FindingStatus.UNCERTAIN) and second.status in (
            FindingStatus.PRESENT,
            FindingStatus.UNCERTAIN,
        )
        devices = "Support Devices" in (first.finding, second.finding)
        if both_affirmed and not devices and first.finding != second.finding and lexicon.LIST_LINK.fullmatch(between):
            first.status = second.status = FindingStatus.UNCERTAIN


def _chunks(hits: Sequence[_Hit], clause: str) -> list[tuple[int, int]]:
    """The stretch of the clause around each hit in which its place words stand: cut at the last connective between two hits."""
    cuts = [0]
    for first, second in pairwise(hits):
        links = list(_LINK.finditer(clause, first.end, second.start))
        cuts.append(max(links[-1].start() if links else second.start, cuts[-1]))
    return list(zip(cuts, [*cuts[1:], len(clause)], strict=True))


def _mention(hit: _Hit, index: int, chunks: Sequence[tuple[int, int]], places: Sequence[PlaceWord], clause: str, sentence: str) -> Mention:
    allowed = lexicon.PLACES_FOR[hit.finding]
    spread = sorted(range(len(chunks)), key=lambda other: (abs(other - index), other > index))
    leaves: frozenset[str] = frozenset()
    # Its own words first, then its neighbours': "right lower lobe consolidation and effusion" has one side for both.
    for step, chunk in enumerate(spread):
        start, end = chunks[chunk]
        own = [word for word in places if start <= word.start < end]
        sides = frozenset().union(*(side for at, side in find_sides(clause[start:end]))) | frozenset().union(*(word.sides for word in own))
        parts = [word for word in own if word.part in allowed and (word.part != "lung" or hit.finding not in _LOCAL)]
        if hit.finding == "Support Devices":
            leaves = _device_leaves(clause[hit.start : end] if step == 0 else clause[hit.start : hit.end], parts, sides)
            break
        if parts and (step == 0 or hit.finding not in _LOCAL):
            leaves = frozenset().union(*(leaves_of(word.part, word.sides or sides) for word in parts))
            if hit.finding == "Pleural Effusion":
                leaves |= leaves_of("costophrenic angle", sides)
        elif sides and allowed:
            leaves = _default_leaves(hit.finding, sides)
        if leaves or not allowed:
            break
    return Mention(0, sentence, hit.finding, hit.status, leaves or _default_leaves(hit.finding, frozenset()))


def _default_leaves(finding: str, sides: frozenset[str]) -> frozenset[str]:
    return frozenset().union(*(leaves_of(part, sides) for part in lexicon.DEFAULT_PLACE[finding]))


def _device_leaves(words: str, parts: Sequence[PlaceWord], sides: frozenset[str]) -> frozenset[str]:
    usual = next((places for pattern, places in lexicon.DEVICE_PLACE if pattern.search(words)), None)
    leaves = frozenset().union(*(leaves_of(word.part, word.sides) for word in parts))
    if usual is not None:
        leaves |= frozenset().union(*(leaves_of(part, sides) for part in usual))
    return leaves or _default_leaves("Support Devices", sides)


def _normal_statements(
    clause: str, cues: str, hits: Sequence[_Hit], places: Sequence[PlaceWord], sentence: str
) -> list[tuple[int, Mention]]:
    found: list[tuple[int, Mention]] = []
    # A place word inside a finding's own words ("heart is enlarged") is no subject of a normal statement.
    free = [
        word
        for word in places
        if not any(hit.start < word.end and word.start < hit.end for hit in hits) and not lexicon.NOT_A_SUBJECT.match(clause, word.end)
    ]
    match = lexicon.NO_ABNORMALITY.search(cues)
    if match and not any(match.start() < hit.end and hit.start < match.end() for hit in hits):
        subject = [word for word in free if match.start() <= word.start < match.end() + 30]
        if not subject and match[0].startswith("without"):
            subject = [word for word in free if word.end <= match.start()][:1]
        found.append((match.start(), _normal_mention(subject, clause, sentence)))
        free = [word for word in free if word not in subject]
    segment_start = 0
    predicates = [item for item in lexicon.NORMAL.finditer(clause) if not lexicon.NORMAL_DENIED.search(clause[: item.start()])]
    for index, predicate in enumerate(predicates):
        next_start = predicates[index + 1].start() if index + 1 < len(predicates) else len(clause)
        if match and match.end() <= predicate.start():
            segment_start = max(segment_start, match.end())
        barrier = max([segment_start, *(hit.end for hit in hits if hit.end <= predicate.start())])
        before = [word for word in free if barrier <= word.start and word.end <= predicate.start()]
        after = [word for word in free if predicate.end() <= word.start < next_start]
        said_of_before = before and (
            _COPULA.search(clause[: predicate.start()]) is not None
            or _SHORT_GAP.fullmatch(clause[before[-1].end : predicate.start()]) is not None
        )
        subject = before if said_of_before else after
        if subject:
            found.append((subject[0].start, _normal_mention(subject, clause, sentence)))
        segment_start = predicate.end()
    if not found and not any(hit.status != FindingStatus.ABSENT for hit in hits) and lexicon.NORMAL_CHEST.search(cues):
        found.append((0, Mention(0, sentence, None, FindingStatus.ABSENT, frozenset())))
    return found


def _normal_mention(subject: Sequence[PlaceWord], clause: str, sentence: str) -> Mention:
    leaves = frozenset().union(*(leaves_of(word.part, word.sides) for word in subject))
    covers = tuple(name for name in FINDINGS if any(name in lexicon.COVERED.get(word.part, ()) for word in subject))
    partial = "otherwise" in clause or "remainder" in clause or any(len(word.sides) == 1 for word in subject)
    return Mention(0, sentence, None, FindingStatus.ABSENT, leaves, covers, denies_overall=bool(covers) and not partial)
