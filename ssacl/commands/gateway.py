"""`ssacl gateway`: the DICOM node between an archive and the HTTP endpoint."""

from __future__ import annotations

import argparse
import json

EXAMPLE = """\
ae_title: SSACL                      # how the archive calls us
port: 11112
calling_ae: [ORTHANC]                # who may call; all others are rejected
spool: gateway_spool                 # accepted films stay here until they are settled
endpoint:
  url: http://127.0.0.1:8000/v1/reports
destinations:
  archive: {kind: c-store, host: 127.0.0.1, port: 4242, ae_title: ORTHANC}
web: {port: 8043}                    # films by STOW-RS too; other machines need access: {keys_file: keys.json}
metrics: {port: 9464}                # figures for Prometheus
rules:
  - {subject: [frontal], action: report}
  - {subject: [lateral], action: pass, reason: lateral film}
otherwise: pass
"""
_EPILOG = f"""\
a short configuration (docs/GATEWAY.md lists every key):

{"".join(f"  {line}{chr(10)}" for line in EXAMPLE.splitlines())}
try it, with dcmtk's tools:
  ssacl serve --checkpoint MODEL &
  ssacl gateway --config gateway.yaml &
  echoscu -aet ORTHANC -aec SSACL 127.0.0.1 11112
  storescu -aet ORTHANC -aec SSACL 127.0.0.1 11112 FILM.dcm
  ssacl gateway --config gateway.yaml --status

Success is answered once a film is on the disk; results (Structured Report, overlay, segmentation) go to the
destinations in the film's own study. While endpoint or archive are away, films wait. SIGTERM stops cleanly.
Every result is a preliminary, unverified draft: not for diagnosis.
"""


def add_parsers(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "gateway",
        help="DICOM node: films come by C-STORE or STOW-RS, results go back to the archive",
        description="Takes films by C-STORE or STOW-RS, has the endpoint report them, sends the results back. Nothing accepted is lost.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML configuration")
    parser.add_argument("--status", action="store_true", help="print what the spool holds, as JSON, and end; the gateway may be running")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from serve.gateway.config import load_gateway_config

    config = load_gateway_config(options.config)
    if options.status:
        from serve.gateway.spool import read_status

        print(json.dumps(read_status(config.spool), indent=2))
        return 0
    from serve.gateway.service import run_gateway

    run_gateway(config)
    return 0
