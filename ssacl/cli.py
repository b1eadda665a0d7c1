"""The `ssacl` command. Subcommands live in `ssacl/commands/`, and import Ray or a web framework only when they run."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
from collections.abc import Sequence

from ssacl import __version__
from ssacl.commands import (
    access,
    checkpoint,
    data,
    doctor,
    evaluate,
    finetune,
    gateway,
    ground,
    model,
    predict,
    serve,
    submit,
    train,
    tune,
    warm_language,
)
from ssacl.errors import SSACLError
from ssacl.log_format import JsonLines

EXAMPLES = """\
the way from pictures to a served draft report:
  ssacl data phantom --out phantom --num-studies 200          made-up chest radiographs, reports and measuring truth
  ssacl data ingest --format dicom-dir phantom --out shards   de-identified WebDataset shards + index
  ssacl data tokenizer --data shards                          tokenizers from the training reports
  ssacl train --config configs/phantom_tiny.yaml data.url=shards
  ssacl evaluate reports --checkpoint runs/phantom_tiny/model --data shards --out scores
  ssacl predict --checkpoint runs/phantom_tiny/model --out drafts FILM.dcm ...
  ssacl ground --checkpoint runs/phantom_tiny/model --film FILM.dcm --out evidence "left pleural effusion"
  ssacl serve --checkpoint runs/phantom_tiny/model --port 8000
  ssacl gateway --config gateway.yaml                         DICOM in by C-STORE or STOW-RS, results back to the archive
  ssacl submit train --address http://head:8265 -- --config configs/phantom_tiny.yaml data.url=s3://bucket/shards
  ssacl model register s3://bucket/models s3://bucket/runs/phantom_tiny/model

data sets and runs may be folders or s3://bucket/prefix; endpoint and keys come from AWS_ENDPOINT_URL,
AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY. `ssacl doctor` says what works here.
Every output is a preliminary, unverified draft: not a medical device.
"""

_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_OWN = ("ssacl", "ray_jobs", "serve")
EXIT_ERROR, EXIT_INTERRUPTED = 1, 130


def build_parser() -> argparse.ArgumentParser:
    """The whole command tree."""
    parser = argparse.ArgumentParser(
        prog="ssacl",
        description="Learns to write chest X-ray reports and to show where in the image each sentence comes from.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ssacl {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="show debug records on stderr")
    parser.add_argument("--log-format", choices=("text", "json"), default="text", help="records on stderr: text, or one JSON object a line")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (
        data,
        warm_language,
        train,
        tune,
        evaluate,
        finetune,
        predict,
        ground,
        serve,
        access,
        gateway,
        checkpoint,
        submit,
        model,
        doctor,
    ):
        module.add_parsers(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 a named error, 2 wrong usage, 130 interrupted."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if options.log_format == "json" else logging.Formatter(_TEXT, "%H:%M:%S"))
    logging.basicConfig(level=logging.DEBUG if options.verbose else logging.INFO, handlers=[handler])
    for noisy in ("botocore", "boto3", "urllib3", "s3transfer", "matplotlib", "PIL", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        return int(options.run(options) or 0)
    except Exception as error:
        logging.getLogger(__name__).debug("the command failed", exc_info=True)
        return _failed(error)
    except KeyboardInterrupt:
        return _say("Interrupted. The same command goes on where it stopped.", EXIT_INTERRUPTED)


def _failed(error: Exception) -> int:
    """The exit code of a failure that is the user's or the machine's, told in one line; a fault of our own is raised again."""
    if isinstance(error, SSACLError):
        return _say(error, EXIT_ERROR)
    if isinstance(error, BrokenPipeError):
        # Whoever read our output (head, less) has gone; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR
    if isinstance(error, OSError):
        return _say(_explained(error), EXIT_ERROR)
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] not in _OWN:
        return _say(
            f"This command needs the package '{error.name}'. Install it with make setup; ssacl doctor lists what is missing.", EXIT_ERROR
        )
    raise error


def _explained(error: OSError) -> str:
    """A refusal of the system that no part has named: what, where it is known, and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "The disk is full. Free some space and run the same command again; it goes on where it stopped."
    where = f" ({error.filename})" if error.filename else ""
    return (
        f"{error.strerror or type(error).__name__}{where}. Check the path and its permissions, then run again; -v shows where it happened."
    )


def _say(problem: object, code: int) -> int:
    print(f"ssacl: {' '.join(str(problem).split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
