"""`ssacl ground`: where a film shows what words say."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ssacl.commands import Commands

EXAMPLES = """\
  ssacl ground --checkpoint runs/phantom_tiny/model --film FILM.dcm --out evidence "left pleural effusion" "carina"

writes evidence.json (maps, boxes in pixels of the film, confidence) and evidence.png (a panel for each phrase).
"""


def add_parsers(commands: Commands) -> None:
    parser = commands.add_parser(
        "ground",
        help="show where a film shows what a phrase says",
        description="Maps, boxes and a confidence for phrases that name anatomy or a finding, with its side.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, metavar="URL", help="model folder, or s3:// prefix of one")
    parser.add_argument("--film", required=True, type=Path, metavar="FILE", help="DICOM, PNG or JPEG")
    parser.add_argument("--out", required=True, type=Path, metavar="NAME", help="NAME.json and NAME.png are written")
    parser.add_argument("phrases", nargs="+", metavar="PHRASE", help="as in 'right upper lung zone' or 'left pleural effusion'")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from ssacl.data.dicom import read_picture
    from ssacl.inference.files import read_input, write_whole
    from ssacl.inference.generator import ReportGenerator
    from ssacl.inference.phrase_sheet import phrase_sheet_png
    from ssacl.inference.report import DISCLAIMER

    content, image_ref = read_input(options.film)
    picture = read_picture(content, options.film.name)
    generator = ReportGenerator.load(options.checkpoint)
    answers = generator.ground(picture, options.phrases)
    tree = {
        "status": "preliminary",
        "disclaimer": DISCLAIMER,
        "model_version": generator.model_version,
        "image_ref": image_ref,
        "phrases": [answer.to_json() for answer in answers],
    }
    write_whole(options.out.with_name(f"{options.out.name}.json"), json.dumps(tree, allow_nan=False).encode())
    write_whole(options.out.with_name(f"{options.out.name}.png"), phrase_sheet_png(picture.pixels, answers))
    table = Table("phrase", "read as", "confidence", "box (x0, y0, x1, y1 px)", "note", title=DISCLAIMER)
    for answer in answers:
        box = (
            "" if answer.box is None else ", ".join(f"{edge:.0f}" for edge in (answer.box.x0, answer.box.y0, answer.box.x1, answer.box.y1))
        )
        meaning = ", ".join(part for part in (answer.finding, *answer.anatomy) if part) or "-"
        table.add_row(answer.phrase, meaning, f"{answer.confidence:.2f}", box, answer.reason)
    Console().print(table)
    return 0
