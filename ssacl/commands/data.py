"""`ssacl data phantom|ingest|verify|show|deidentify|tokenizer`: from pictures and reports to shards that training can read."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ssacl.commands import Commands
from ssacl.errors import ConfigError


def add_parsers(commands: Commands) -> None:
    actions = commands.add_parser("data", help="make, ingest and check data sets").add_subparsers(
        dest="action", required=True, metavar="ACTION"
    )

    phantom = actions.add_parser("phantom", help="write made-up chest radiographs as DICOM, with reports and measuring truth")
    phantom.add_argument("--out", required=True, metavar="DIR", help="new folder; the truth goes beside it, to DIR_truth")
    phantom.add_argument("--num-studies", type=int, default=200)
    phantom.add_argument("--seed", type=int, default=0)
    phantom.add_argument("--size-px", type=int, default=256)
    phantom.add_argument("--num-processes", type=int, default=2)
    phantom.set_defaults(run=_phantom)

    ingest = actions.add_parser(
        "ingest",
        help="studies -> de-identified WebDataset shards + index",
        description="Reads studies, de-identifies them and writes shards. Run it again to do only what is missing. "
        "What could not be used is listed with its reason in ledger.jsonl.",
        epilog="example: ssacl data ingest --format csv films.csv --out s3://bucket/films --image-root images "
        "--column image=file --column report=text --column patient=patient_id",
    )
    ingest.add_argument(
        "source", metavar="PATH", help="folder or file, here or at s3://bucket/prefix, as the format wants it; or a server's URL"
    )
    ingest.add_argument(
        "--format", required=True, metavar="NAME", help="csv, dicom-dir, mimic-cxr, mimic-cxr-jpg, iu-xray, release-csv, dicomweb"
    )
    ingest.add_argument("--out", required=True, metavar="URL", help="data set root: folder or s3://bucket/prefix")
    ingest.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="ROLE=NAME",
        help="csv: image, report, patient, study, split, view, labels, licence",
    )
    ingest.add_argument(
        "--image-root", metavar="URL", help="csv, release-csv: folder that image paths are relative to (default: the CSV's folder)"
    )
    ingest.add_argument(
        "--reports", metavar="URL", help="mimic-cxr, mimic-cxr-jpg: folder of the reports' files/pNN/... (default: the source)"
    )
    ingest.add_argument(
        "--query",
        action="append",
        default=[],
        metavar="ATTRIBUTE=VALUE",
        help="dicomweb: what studies must match, such as StudyDate=20240101-",
    )
    ingest.add_argument("--max-studies", type=int, default=100_000, help="dicomweb: studies asked for at most")
    ingest.add_argument("--longest-side-px", type=int, default=512, help="pictures are scaled down to this")
    ingest.add_argument("--keep-lateral", action="store_true", help="keep lateral views instead of rejecting them")
    ingest.add_argument("--bits", type=int, default=8, help="8, or 16 to keep the depth of deeper films (PNG)")
    ingest.add_argument("--blank-text", action="store_true", help="fill what looks like text burned into a film")
    ingest.add_argument("--num-workers", type=int, default=2, help="parallel tasks; 0: in this process, without Ray")
    ingest.set_defaults(run=_ingest)

    verify = actions.add_parser("verify", help="re-check every shard of a data set; exits 1 on any damage")
    verify.add_argument("data", metavar="URL")
    verify.set_defaults(run=_verify)

    show = actions.add_parser("show", help="write a contact sheet of a data set's samples, to look at")
    show.add_argument("data", metavar="URL")
    show.add_argument("--out", required=True, metavar="PNG")
    show.add_argument("--split", default="train", metavar="NAME", help="train, val or test")
    show.add_argument("--num-samples", type=int, default=48)
    show.set_defaults(run=_show)

    deidentify = actions.add_parser(
        "deidentify",
        help="write de-identified copies of DICOM films (PS3.15 basic profile)",
        description="Ids become keyed hashes, dates are shifted per patient, free text and private elements are removed.",
    )
    deidentify.add_argument("source", metavar="IN", help="DICOM file, folder or s3://bucket/prefix")
    deidentify.add_argument("target", metavar="OUT", help="folder or s3://bucket/prefix")
    deidentify.add_argument("--blank-text", action="store_true", help="fill what looks like text burned into a film")
    deidentify.set_defaults(run=_deidentify)

    tokenizer = actions.add_parser("tokenizer", help="train the tokenizers from the reports of the training split")
    tokenizer.add_argument("--data", required=True, metavar="URL")
    tokenizer.add_argument("--out", metavar="URL", help="default: beside the data set")
    tokenizer.add_argument("--text-vocab-size", type=int, default=30000, help="WordPiece entries of the text encoder")
    tokenizer.add_argument("--lm-vocab-size", type=int, default=8000, help="byte-level BPE entries of the language model")
    tokenizer.set_defaults(run=_tokenizer)


def _phantom(options: argparse.Namespace) -> int:
    from ssacl.phantom import write_dicom_tree
    from ssacl.progress import ProgressBar

    out = Path(options.out)
    with ProgressBar("phantom", total=options.num_studies, unit="studies") as bar:
        write_dicom_tree(out, options.num_studies, options.seed, options.size_px, options.num_processes, progress=bar.advance)
    print(f"studies: {out}\ntruth, for measuring only: {out}_truth")
    return 0


def _ingest(options: argparse.Namespace) -> int:
    from ssacl.data.ingest import IngestSettings
    from ssacl.data.sources import SourceOptions

    settings = IngestSettings.from_environment(
        longest_side_px=options.longest_side_px, keep_lateral=options.keep_lateral, bits=options.bits, blank_text=options.blank_text
    )
    source = SourceOptions(
        columns=_pairs("--column", options.column),
        image_root=options.image_root,
        reports=options.reports,
        query=_pairs("--query", options.query),
        max_studies=options.max_studies,
    )
    if options.num_workers > 0:
        from ray_jobs.ingest import run_ingest

        summary = run_ingest(options.format, options.source, options.out, settings, source, num_workers=options.num_workers, progress=True)
    else:
        from ssacl.data.ingest import run_local

        summary = run_local(options.format, options.source, options.out, settings, source, progress=True)
    print(summary.describe())
    return 0


def _pairs(option: str, texts: list[str]) -> dict[str, str]:
    pairs = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator:
            raise ConfigError(f"{option} {text}: write NAME=VALUE, as in --column image=file or --query StudyDate=20240101-.")
        pairs[name] = value
    return pairs


def _show(options: argparse.Namespace) -> int:
    from ssacl.data.contact_sheet import contact_sheet
    from ssacl.data.storage import open_storage

    out = Path(options.out)
    content = contact_sheet(open_storage(options.data), options.num_samples, options.split)
    open_storage(out.parent).write(out.name, content)
    print(out)
    return 0


def _deidentify(options: argparse.Namespace) -> int:
    from ssacl.data.deidentify import key_secret
    from ssacl.data.deidentify_dicom import deidentify_files

    done = deidentify_files(options.source, options.target, key_secret(), blank_text=options.blank_text)
    left_out = ", ".join(f"{reason} {count}" for reason, count in done.refused.items())
    print(f"{done.num_written} films written to {options.target}" + (f"; left out: {left_out}" if left_out else ""))
    if done.num_flagged:
        print(f"{done.num_flagged} may carry burned-in text (0028,0301): look at them, or use --blank-text")
    return 0 if done.num_written else 1


def _verify(options: argparse.Namespace) -> int:
    from ssacl.data.shards import ShardIndex
    from ssacl.data.storage import open_storage
    from ssacl.data.verification import verify
    from ssacl.progress import ProgressBar

    storage = open_storage(options.data)
    num_samples = sum(shard.count for shard in ShardIndex.load(storage).shards)
    with ProgressBar("verify", num_samples, "samples") as bar:
        damages = verify(storage, bar.advance)
    for damage in damages:
        print(damage, file=sys.stderr)
    print(f"{len(damages)} damaged" if damages else f"every shard is whole: {num_samples} samples")
    return 1 if damages else 0


def _tokenizer(options: argparse.Namespace) -> int:
    from ssacl.data.corpus import train_dataset_tokenizers

    tokenizers = train_dataset_tokenizers(options.data, options.out, options.text_vocab_size, options.lm_vocab_size)
    print(f"text encoder: {tokenizers.text.get_vocab_size()} entries; language model: {len(tokenizers.lm)} entries")
    return 0
