"""`ssacl evaluate grounding`: anatomy and phrase maps against boxes or masks."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from ssacl.commands import Commands
from ssacl.commands.tasks import add_leave_out_bad, add_trained_films, names

EXAMPLES = """\
  ssacl evaluate grounding --checkpoint runs/real_small/model --data real --out scores --trained-films leave-out

DIR holds films with boxes or masks: MS-CXR's JSON, COCO boxes, masks/LABEL folders, or boxes.csv and masks.csv (docs/GROUNDING.md).
Writes scorecard.json (every figure, case by case too) and cases.png (best, median and worst cases).
"""
_COLUMNS = {
    "pointing": "pointing",
    "iou": "IoU",
    "mean_iou": "mean IoU",
    "iou_best": "best IoU",
    "cnr": "CNR",
    "average_precision": "AP",
    "centroid_error": "centroid error",
    "correlation_x": "r x",
    "correlation_y": "r y",
}


def add_parser(tasks: Commands) -> None:
    """Add `grounding` to the tasks of `ssacl evaluate`."""
    parser = tasks.add_parser(
        "grounding",
        help="anatomy and phrase maps against boxes or masks",
        description="Every score stands beside the centre, chance and the average mask of other patients, as filmed, moved and cropped.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, metavar="URL", help="model folder, or s3:// prefix of one")
    parser.add_argument("--data", required=True, metavar="DIR", help="films with boxes or masks")
    parser.add_argument("--out", required=True, metavar="DIR")
    add_trained_films(parser, "films")
    add_leave_out_bad(parser)
    parser.add_argument("--conditions", default="plain,affine,crop", help="comma-separated (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random poses")
    parser.add_argument("--limit", type=int, help="first films only")
    parser.add_argument("--min-cases", type=int, default=5, help="smallest group in the printed table; the card has all")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from ssacl.evaluation.grounding_card import evaluate_grounding
    from ssacl.progress import ProgressBar

    with ProgressBar("grounding", total=None, unit="films") as bar:
        card = evaluate_grounding(
            options.checkpoint,
            options.data,
            options.out,
            trained_on=options.trained_on,
            trained_films=options.trained_films,
            leave_out_bad=options.leave_out_bad,
            conditions=names(options.conditions),
            seed=options.seed,
            limit=options.limit,
            start=bar.set_total,
            progress=bar.advance,
        )
    print_grounding(card, options.min_cases)
    return 0


def print_grounding(card: Mapping[str, Any], min_cases: int) -> None:
    """Tables for people: one per condition, a row per group and system, and the landmark errors."""
    from rich.console import Console
    from rich.table import Table

    from ssacl.evaluation.grounding_card import table_rows

    console, data = Console(), card["data"]
    rows = table_rows(card, min_cases)
    for condition in card["groups"]:
        table = Table("anatomy or finding", "n", "maps", *_COLUMNS.values(), title=condition)
        last = ""
        for row in rows:
            if row["condition"] != condition:
                continue
            new = row["group"] != last
            last = row["group"]
            if new:
                table.add_section()
            figures = ("" if row[name] is None else f"{row[name]:.3f}" for name in _COLUMNS)
            table.add_row(row["group"] if new else "", str(row["num_cases"]) if new else "", row["system"], *figures)
        console.print(table)
    if any(card["landmarks"].values()):
        table = Table("lung landmarks, mean error in half-widths", *card["landmarks"])
        names = dict.fromkeys(name for each in card["landmarks"].values() for name in each.get("systems", ()))
        for name in names:
            errors = (each.get("systems", {}).get(name, {}).get("landmark_error") for each in card["landmarks"].values())
            table.add_row(name, *("" if error is None else f"{error:.3f}" for error in errors))
        console.print(table)
    left_out = ", ".join(f"{problem}: {count}" for problem, count in data["left_out"].items()) or "nothing"
    small = sum(group["num_cases"] < min_cases for group in next(iter(card["groups"].values()), {}).values())
    console.print(
        f"{data['layout']}, {data['num_films']} films of {data['num_patients']} patients"
        f"{'' if data['patients_known'] else ' (patients unknown: every film counts as one)'}; left out: {left_out}; "
        f"{small} groups under {min_cases} cases are on the card only. {card['training_films']['what']}"
    )
