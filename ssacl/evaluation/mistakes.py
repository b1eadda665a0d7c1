"""What a draft says wrong that overlap with a reference does not show: sides, earlier films that nobody gave it, texts cut short."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ssacl.anatomy import FindingStatus, mirrored
from ssacl.data.labeler import Mention

# A model that sees one film knows no earlier one. Words alone that also describe a film by itself ("new", "stable", "change") count only
# beside words that compare. Nor is "prior granulomatous disease" an earlier film.
_PRIOR = re.compile(
    r"\bcompar(?:ed|ison|ing|ative\w*)\b|\bunchanged\b|\binterval(?:ly)?\b|\bno (?:significant |relevant |interval |other )?change\b"
    r"|\b(?:prior|previous|preceding|earlier|last) (?:\w+ )?"
    r"(?:films?|stud(?:y|ies)|exam\w*|radiographs?|chest|images?|x-?rays?|cts?|scans?)\b"
    r"|\bpreviously (?:seen|noted|described|identified|demonstrated)\b|\bsince (?:the )?(?:prior|previous|last|earlier)\b"
    r"|\bagain (?:seen|noted|demonstrated|identified|present|visuali[sz]ed)\b|\bredemonstrat\w+|\bno longer\b"
    r"|\b(?:has|have) (?:\w+ )?(?:increased|decreased|improved|worsened|progressed|resolved|cleared|enlarged|developed)\b"
    r"|\b(?:improv(?:ed|ing|ement)|worsen(?:ed|ing)|progress(?:ed|ion))\b"
    r"|\b(?:new|stable) (?:from|since|compared|appearance|in appearance)\b|\b(?:remains?|is|are) stable\b|\bnew(?:ly)? since\b",
    re.IGNORECASE,
)
_ENDS = re.compile(r"[.!?][\"')\]]*\s*$")


def speaks_of_a_prior(text: str) -> bool:
    """Does a report compare the film with an earlier one ("unchanged", "compared to", "has improved")?"""
    return _PRIOR.search(text) is not None


def is_truncated(text: str) -> bool:
    """Does a report, not empty, end in the middle of a sentence?"""
    return bool(text.strip()) and _ENDS.search(text) is None


def sides(mentions: Iterable[Mention]) -> dict[str, frozenset[str]]:
    """Finding that a report states -> sides on which it places it; no entry where its place has no side (the heart).

    A finding without a word for its side counts as on both.
    """
    found: dict[str, frozenset[str]] = {}
    for mention in mentions:
        if mention.finding is None or mention.status not in (FindingStatus.PRESENT, FindingStatus.UNCERTAIN):
            continue
        # Names without a twin (the right atrium) are no side of the film.
        named = frozenset(leaf.partition(" ")[0] for leaf in mention.leaves if mirrored(leaf) != leaf)
        if named:
            found[mention.finding] = found.get(mention.finding, frozenset()) | named
    return found


def side_errors(predicted: Iterable[Mention], reference: Iterable[Mention]) -> tuple[int, int]:
    """Findings that both reports place on a single side, and those of them where it is the other side.

    Returns
    -------
    compared, wrong
        "Right effusion" against "left effusion" is (1, 1); against "effusions" it is (0, 0).
    """
    stated, real = sides(predicted), sides(reference)
    both = [finding for finding in stated if len(stated[finding]) == len(real.get(finding, ())) == 1]
    return len(both), sum(stated[finding] != real[finding] for finding in both)
