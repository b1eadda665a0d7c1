"""`ssacl finetune`: what a checkpoint's features are worth for other tasks."""

from __future__ import annotations

import argparse
from typing import Any

from ssacl.commands import Commands
from ssacl.commands.tasks import add_leave_out_bad, add_trained_films, names, run_task

CLASSIFY_EXAMPLES = """\
  ssacl finetune classify --checkpoint C --data nih14 --labels 1,10,100 --out scores
  ssacl finetune classify --checkpoint C --data shards --findings Pneumonia --only "Pneumonia,No Finding" --out scores

DIR is NIH's folder (Data_Entry_2017.csv), RSNA's (stage_2_train_labels.csv) or an ingested data set. Patients are split; penalty or epoch
are chosen on validation films; the test films are answered once. Logistic regression on raw pixels always stands beside.
"""
SEGMENT_EXAMPLES = """\
  ssacl finetune segment --checkpoint C --data siim --out scores
  ssacl finetune segment --checkpoint C --data real --structures "right lung,left lung" --leave-out-bad --out scores

DIR is SIIM-ACR's folder (train-rle.csv and DICOM files), or films with masks as in `ssacl evaluate grounding`. The same decoder on raw
pixels, and the average mask of the training films, always stand beside.
"""


def add_parsers(commands: Commands) -> None:
    tasks = commands.add_parser("finetune", help="downstream tasks on the frozen or trained encoder").add_subparsers(
        dest="task", required=True, metavar="TASK"
    )
    classify = tasks.add_parser(
        "classify",
        help="findings by linear regression on frozen features, or by the trained encoder, with few or all labels",
        epilog=CLASSIFY_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_common(classify)
    classify.add_argument("--layout", default="", choices=("nih", "rsna", "ingested"), help="told by the files if not given")
    classify.add_argument("--mode", default="linear", choices=("linear", "full"), help="frozen features (default), or the encoder trained")
    classify.add_argument(
        "--labels", default="100", metavar="PERCENTS", help="shares of the training patients, as in 1,10,100 (%(default)s)"
    )
    classify.add_argument("--findings", default="", metavar="NAMES", help="comma-separated; all of the layout if not given")
    classify.add_argument("--only", default="", metavar="NAMES", help="only films on which one of these findings is present")
    classify.add_argument(
        "--uncertain", default="present", choices=("present", "absent", "ignore"), help="of an ingested set (%(default)s)"
    )
    classify.set_defaults(run=_classify)
    segment = tasks.add_parser(
        "segment",
        help="masks by a small decoder on patch features",
        epilog=SEGMENT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_common(segment)
    segment.add_argument("--mode", default="frozen", choices=("frozen", "full"), help="frozen encoder (default), or trained too")
    segment.add_argument("--structures", default="", metavar="NAMES", help="comma-separated; all that are drawn if not given")
    segment.set_defaults(run=_segment)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, metavar="URL", help="model folder, or s3:// prefix of one")
    parser.add_argument("--data", required=True, metavar="DIR")
    parser.add_argument("--out", required=True, metavar="DIR", help="the same command again goes on where it stopped")
    parser.add_argument("--seed", type=int, default=0, help="of splits, subsets, training and resamples")
    parser.add_argument("--epochs", type=int, default=10, help="where a net is trained (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="films between optimizer steps (%(default)s)")
    parser.add_argument("--lr", type=float, default=1e-4, help="of the encoder, where it is trained (%(default)s)")
    parser.add_argument("--head-lr", type=float, default=1e-3, help="of the head (%(default)s)")
    parser.add_argument("--device", default="cpu", help="where nets run, as torch names it (%(default)s)")
    add_trained_films(parser)
    add_leave_out_bad(parser)


def _classify(options: argparse.Namespace) -> int:
    from ssacl.errors import ConfigError
    from ssacl.evaluation.downstream.classify import ClassifyOptions, classify
    from ssacl.evaluation.downstream.label_layouts import LabelOptions

    try:
        percents = tuple(float(part) for part in names(options.labels))
    except ValueError as error:
        raise ConfigError(f"--labels '{options.labels}' is no list of percentages; expected something like 1,10,100.") from error
    labels = LabelOptions(
        layout=options.layout,
        findings=names(options.findings),
        only=names(options.only),
        uncertain=options.uncertain,
        seed=options.seed,
        leave_out_bad=options.leave_out_bad,
    )
    learned = ClassifyOptions(percents=percents, **_learning(options))
    return run_task("finetune classify", classify, *_places(options), labels, learned, device=options.device)


def _segment(options: argparse.Namespace) -> int:
    from ssacl.evaluation.downstream.segment import SegmentOptions, segment

    learned = SegmentOptions(structures=names(options.structures), leave_out_bad=options.leave_out_bad, **_learning(options))
    return run_task("finetune segment", segment, *_places(options), learned, device=options.device)


def _places(options: argparse.Namespace) -> tuple[str, str, str]:
    return options.checkpoint, options.data, options.out


def _learning(options: argparse.Namespace) -> dict[str, Any]:
    """How either task is learned."""
    from ssacl.evaluation.downstream.epochs import Schedule

    return {
        "mode": options.mode,
        "schedule": Schedule(options.epochs, options.batch_size, options.lr, options.head_lr),
        "seed": options.seed,
        "trained_films": options.trained_films,
        "trained_on": options.trained_on,
    }
