"""What of a submission is decided before a cluster is asked: usage, secrets, the package."""

from __future__ import annotations

import http.server
import json
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from ray_jobs import node_secrets, package
from ray_jobs.package import stage
from ray_jobs.session import storage_environment
from ssacl.cli import main
from ssacl.commands.doctor import _dashboard
from ssacl.commands.submit import checked_command
from ssacl.errors import ClusterError, ConfigError

NOWHERE = "http://127.0.0.1:9"
TRAIN = ["--config", "configs/phantom_tiny.yaml", "data.url=s3://bucket/data"]


@pytest.mark.parametrize(
    ("job", "arguments", "said"),
    [
        ("train", ["--config", "configs/phantom_tiny.yaml", "optim.lrx=1"], "unknown key 'optim.lrx'"),
        ("train", ["--config", "absent.yaml"], "Cannot read the configuration"),
        ("train", [*TRAIN, "--address", "head:6379"], "no --address"),
        ("train", ["--conf", "configs/phantom_tiny.yaml"], "Write --config in full"),
        ("ingest", ["--format", "dicomweb", "https://user:word@pacs/dicom-web", "--out", "s3://bucket/x"], "password inside a URL"),
        ("tune", ["--config", "configs/phantom_tiny.yaml"], ""),
    ],
)
def test_wrong_commands_end_here(job: str, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", job, "--address", NOWHERE, "--", *arguments]) == 1
    assert said in (told := capsys.readouterr().err)
    assert "No Ray dashboard" not in told
    assert "user:word" not in told


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--secret", "AWS_SECRET_ACCESS_KEY=hunter2"], "never a value"),
        (["--env", "AWS_SECRET_ACCESS_KEY=hunter2"], "use --secret AWS_SECRET_ACCESS_KEY"),
        (["--env", "PROXY=http://user:hunter2@proxy"], "use --secret PROXY"),
        (["--env", "hunter2"], "--env takes NAME=VALUE"),
        (["--name", "../hunter2"], "--name takes"),
        (["--image", "registry.example/ssacl:1", "--secret", "TOKEN=/run/token"], "not from files"),
        ([], "No Ray dashboard answers"),
    ],
)
def test_secrets_are_named_and_never_told(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "train", "--address", NOWHERE, *options, "--", *TRAIN]) == 1
    told = "".join(capsys.readouterr())
    assert said in told
    assert "hunter2" not in told
    assert len([line for line in told.splitlines() if line.startswith("ssacl: ")]) == 1


def test_unknown_options_of_the_command_are_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["submit", "train", "--address", NOWHERE, "--", *TRAIN, "--nonsense"])
    assert stopped.value.code == 2
    assert "--nonsense" in capsys.readouterr().err


def test_the_configuration_is_taken_out_of_the_words() -> None:
    words, config = checked_command("train", TRAIN)
    assert words == ("train", "data.url=s3://bucket/data")
    assert config == Path("configs/phantom_tiny.yaml")
    assert checked_command("train", ["data.url=x", "--config=configs/phantom_tiny.yaml"]) == (("train", "data.url=x"), config)
    reports = ["reports", "--pairs", "p.jsonl", "--out", "o"]
    assert checked_command("evaluate", reports) == (("evaluate", *reports), None)
    with pytest.raises(ConfigError, match="Cannot read"):
        checked_command("train", ["--config", "only/in/the/image.yaml"])
    assert checked_command("train", ["--config", "only/in/the/image.yaml"], here=False)[1] == Path("only/in/the/image.yaml")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout with code, something ignored, something outside the packages and a new file."""
    root = tmp_path / "tree"
    for name in ("ssacl/a.py", "ray_jobs/b.py", "configs/c.yaml", "films/patient.dcm", "ssacl/data.bin", "pyproject.toml"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / ".gitignore").write_text("*.bin\n")
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    subprocess.run(["git", "-C", str(root), "add", "."], check=True)
    (root / "ssacl/new.py").write_text("new")
    return root.resolve()


def test_the_package_holds_code_and_configurations_alone(tree: Path, tmp_path: Path) -> None:
    assert stage(tmp_path / "out", tree / "configs/c.yaml", tree) == "configs/c.yaml"
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found == {"ssacl/a.py", "ssacl/new.py", "ray_jobs/b.py", "configs/c.yaml", "pyproject.toml"}


def test_a_configuration_from_elsewhere_travels_along(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("run: {}")
    assert stage(tmp_path / "out", tmp_path / "mine.yaml", tree) == "submitted/mine.yaml"
    assert (tmp_path / "out/submitted/mine.yaml").read_text() == "run: {}"


@pytest.mark.parametrize(("base", "lies"), [("base.yaml", "submitted/base/base.yaml"), ("../tree/configs/c.yaml", "configs/c.yaml")])
def test_a_sweep_from_elsewhere_brings_its_training_configuration(tree: Path, tmp_path: Path, base: str, lies: str) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "base.yaml").write_text("run: {}")
    (mine / "sweep.yaml").write_text(f"name: s\nbase: {{config: {base}}}\n")
    assert stage(tmp_path / "out", mine / "sweep.yaml", tree) == "submitted/sweep.yaml"
    sent = yaml.safe_load((tmp_path / "out/submitted/sweep.yaml").read_text())
    assert sent["name"] == "s"
    place = tmp_path / "out/submitted" / sent["base"]["config"]
    assert place.resolve() == (tmp_path / "out" / lies).resolve()
    assert place.read_text() == (mine / base).read_text()


def test_a_package_with_data_in_it_is_refused(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "MAX_BYTES", 20)
    with pytest.raises(ClusterError, match="Only code and configurations travel"):
        stage(tmp_path / "out", None, tree)


def test_this_tree_is_far_below_the_limit(tmp_path: Path) -> None:
    stage(tmp_path / "out")
    size = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert size < package.MAX_BYTES / 4


def test_secrets_are_read_where_the_work_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text("hunter2\n")
    monkeypatch.setenv(node_secrets.REFERENCES, f"AWS_ACCESS_KEY_ID,AWS_SECRET_ACCESS_KEY={tmp_path / 'key'}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "mine")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://s3")
    node_secrets.provide()
    sent = storage_environment()
    assert sent["AWS_ENDPOINT_URL"] == "http://s3"
    assert not {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} & sent.keys()
    assert "hunter2" not in json.dumps(sent)
    for content, said in ((b"", "empty"), (b"\xff", "not text"), (b"x" * 70_000, "longer"), (None, "No such file")):
        if content is None:
            (tmp_path / "key").unlink()
        else:
            (tmp_path / "key").write_bytes(content)
        with pytest.raises(ClusterError, match=said):
            node_secrets.provide()
    monkeypatch.setenv(node_secrets.REFERENCES, "AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(ClusterError, match="AWS_ACCESS_KEY_ID is not in the environment"):
        node_secrets.provide()


@pytest.fixture
def answering() -> Iterator[tuple[str, dict[str, tuple[int, bytes]]]]:
    """An HTTP server that gives one answer to everything."""
    answer = {"": (200, b"")}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answer[""]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", answer
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (200, b'{"ray_version": "2.9.0"}', "runs Ray 2.9.0, this is Ray"),
        (200, b"<html>", "No Ray dashboard"),
        (200, b'["x"]', "No Ray dashboard"),
        (404, b"", "HTTP 404"),
        (401, b"", "wants a token"),
    ],
)
def test_what_answers_is_looked_at(
    status: int,
    body: bytes,
    said: str,
    answering: tuple[str, dict[str, tuple[int, bytes]]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    address, answer = answering
    answer[""] = (status, body)
    assert main(["submit", "status", "--address", address]) == 1
    assert said in capsys.readouterr().err
    assert _dashboard(address)[:3] == (False, "Ray cluster", "takes no jobs from here")
    assert said in _dashboard(address)[3]


def test_addresses_that_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "status", "--address", "head:6379"]) == 1
    assert "write it as http://head:8265" in capsys.readouterr().err
