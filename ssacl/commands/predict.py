"""`ssacl predict`: draft reports for files and folders, without a server."""

from __future__ import annotations

import argparse

from ssacl.commands import Commands


def add_parsers(commands: Commands) -> None:
    parser = commands.add_parser(
        "predict",
        help="write draft reports for pictures and DICOM files",
        description="One result or one named reason for each input. Run it again to do only what is missing.",
    )
    parser.add_argument("--checkpoint", required=True, metavar="URL", help="model folder, or s3:// prefix of one")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--num-workers", type=int, default=1, help="parallel Ray actors; 1: in this process, without Ray")
    parser.add_argument("--overlays", action="store_true", help="also write an evidence picture per result")
    parser.add_argument("inputs", nargs="+", metavar="PATH", help="DICOM, PNG or JPEG files, or folders of them")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from ray_jobs.predict import run_predict
    from ssacl.errors import DataError

    summary = run_predict(
        options.checkpoint, options.inputs, options.out, num_workers=options.num_workers, overlays=options.overlays, progress=True
    )
    print(summary.describe())
    if not summary.num_results:
        reasons = sorted({outcome.reason for outcome in summary.outcomes})
        raise DataError(f"None of the inputs gave a draft: {reasons[0]}" + (f" ({len(reasons) - 1} more reasons)" if reasons[1:] else ""))
    return 0
