"""What is in a data set and what is not: the card for programs and for people, and the ledger of what was left out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from ssacl.anatomy import FINDINGS, FindingStatus
from ssacl.data.chunks import Part
from ssacl.data.convert import IngestSettings, Reject
from ssacl.data.plan import last_places
from ssacl.data.records import SPLITS

CARD = "dataset_card.json"
README = "README.md"
LEDGER = "ledger.jsonl"
_STATUSES = tuple(status.name.lower() for status in FindingStatus)


def left_out(parts: Sequence[Part], notes: Iterable[Reject]) -> list[Reject]:
    """The lines of the ledger: rejects as of each study's last try, and `notes` on studies that differ from the source."""
    speaks = last_places(parts)
    return [*(reject for part in parts for reject in part.rejects if speaks[reject.study_key] == part.key), *notes]


def ledger(rejects: Iterable[Reject]) -> bytes:
    """The content of `ledger.jsonl`."""
    return "".join(json.dumps(asdict(reject)) + "\n" for reject in rejects).encode()


def make_card(parts: Sequence[Part], rejects: Sequence[Reject], settings: IngestSettings, num_studies: int) -> dict[str, Any]:
    """The card as a JSON tree; equal for equal data sets.

    Parameters
    ----------
    num_studies
        In the source.
    """
    counts: dict[str, Counter[str]] = {}
    samples, patients = dict.fromkeys(SPLITS, 0), {split: set[str]() for split in SPLITS}
    statuses = [[0] * len(FindingStatus) for _ in FINDINGS]
    for part in parts:
        samples[part.shard.split] += part.shard.count
        patients[part.shard.split].update(part.patients)
        for kind, values in part.counts.items():
            counts.setdefault(kind, Counter()).update(values)
        for total, row in zip(statuses, part.statuses, strict=True):
            total[:] = [one + other for one, other in zip(total, row, strict=True)]
    return {
        "samples": samples,
        "patients": {split: len(keys) for split, keys in patients.items()},
        "studies": num_studies,
        "findings": {name: dict(zip(_STATUSES, row, strict=True)) for name, row in zip(FINDINGS, statuses, strict=True)},
        **{kind: dict(sorted(count.items(), key=lambda item: (-item[1], item[0]))) for kind, count in sorted(counts.items())},
        "left_out": dict(sorted(Counter(reject.reason for reject in rejects).items())),
        "settings": {name: value for name, value in asdict(settings).items() if name != "key_secret"},
    }


def readable(card: dict[str, Any]) -> str:
    """The card as Markdown."""
    licences = ", ".join(f"{name} ({count})" for name, count in card.get("licence", {}).items())
    lines = [
        "# Chest radiographs with reports",
        "",
        f"{sum(card['samples'].values())} samples from {card['studies']} studies, de-identified: keyed hashes stand for patients and",
        "studies. Films of people are used under the terms of their source.",
        "",
        f"Licence of the pictures: {licences or 'not stated'}.",
        "",
        *_table(("split", "samples", "patients"), [(split, card["samples"][split], card["patients"][split]) for split in SPLITS]),
        *_table(("finding", *_STATUSES), [(name, *row.values()) for name, row in card["findings"].items()]),
    ]
    for kind in ("view", "report", "labels", "source", "licence", "polarity", "release"):
        lines += _table((kind, "samples"), card.get(kind, {}).items())
    lines += _table(("left out (`ledger.jsonl`)", "times"), card["left_out"].items())
    lines += _table(("setting", "value"), card["settings"].items())
    return "\n".join(lines)


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    rows = list(rows)
    if not rows:
        return []
    # A source's own words must not break the table.
    cells = [[str(cell).replace("|", "/").replace("\n", " ") for cell in row] for row in [head, ["---"] * len(head), *rows]]
    return [*(f"| {' | '.join(row)} |" for row in cells), ""]
