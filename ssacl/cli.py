"""The `ssacl` command. Subcommands live in `ssacl/commands/`, and import Ray or a web framework only when they run."""

from __future__ import annotations

import argparse
import errno
import logging
import sys
from collections.abc import Sequence

from ssacl import __version__
from ssacl.commands import checkpoint, data, doctor, evaluate, later, predict, serve, train
from ssacl.errors import NotBuiltError, SSACLError

EXAMPLES = """\
the way from pictures to a served draft report:
  ssacl data phantom --out phantom --num-studies 200          made-up chest radiographs, reports and measuring truth
  ssacl data ingest --format dicom-dir phantom --out shards   de-identified WebDataset shards + index
  ssacl data tokenizer --data shards                          tokenizers from the training reports
  ssacl train --config configs/phantom_tiny.yaml data.url=shards
  ssacl evaluate reports --checkpoint runs/phantom_tiny/model --data shards --out scores
  ssacl predict --checkpoint runs/phantom_tiny/model --out drafts FILM.dcm ...
  ssacl serve --checkpoint runs/phantom_tiny/model --port 8000

data sets and runs may be folders or s3://bucket/prefix; endpoint and keys come from AWS_ENDPOINT_URL,
AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY. `ssacl doctor` says what works here.
Every output is a preliminary, unverified draft: not a medical device.
"""

EXIT_ERROR, EXIT_NOT_BUILT, EXIT_INTERRUPTED = 1, 2, 130


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
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (data, train, evaluate, predict, serve, checkpoint, doctor, later):
        module.add_parsers(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 a named error, 2 wrong usage or not built yet, 130 interrupted."""
    options = build_parser().parse_args(arguments)
    logging.basicConfig(
        level=logging.DEBUG if options.verbose else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )
    for noisy in ("botocore", "boto3", "urllib3", "s3transfer", "matplotlib", "PIL", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        return int(options.run(options) or 0)
    except NotBuiltError as error:
        return _say(error, EXIT_NOT_BUILT)
    except SSACLError as error:
        return _say(error, EXIT_ERROR)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return _say("The disk is full. Free some space and run the same command again; it goes on where it stopped.", EXIT_ERROR)
    except KeyboardInterrupt:
        return _say("Interrupted. The same command goes on where it stopped.", EXIT_INTERRUPTED)


def _say(problem: object, code: int) -> int:
    print(f"ssacl: {' '.join(str(problem).split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
