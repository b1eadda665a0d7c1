"""The command: a help text everywhere, and for every bad input one line with the next step, a non-zero exit and nothing half-written."""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from tiny_model import encoded_film, tiny_model_folder
from training_set import tiny_tree, write_training_set

from ssacl.cli import build_parser, main
from ssacl.data.storage import embedded_s3
from ssacl.phantom import write_dicom_tree
from ssacl.training.sealed import MANIFEST, seal

ROOT = Path(__file__).parents[1]
COMMANDS = [
    "data phantom",
    "data ingest",
    "data verify",
    "data show",
    "data deidentify",
    "data tokenizer",
    "train",
    "tune",
    "evaluate reports",
    "evaluate compare",
    "evaluate retrieval",
    "evaluate zero-shot",
    "finetune classify",
    "finetune segment",
    "predict",
    "serve",
    "access",
]
COMMANDS += ["submit train", "submit tune", "submit ingest", "submit evaluate", "submit status", "submit logs", "submit stop"]
COMMANDS += ["checkpoint import", "checkpoint export", "checkpoint show", "doctor"]
COMMANDS += [f"model {action}" for action in ("list", "show", "register", "promote", "rollback", "verify", "keys")]
Failing = Callable[..., str]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_training_set(tmp_path_factory.mktemp("cli") / "set")


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantom") / "films"
    write_dicom_tree(folder, 5, seed=4, size_px=64, num_processes=1)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tiny_model_folder(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSACL_KEY_SECRET", "command line test secret")


@pytest.fixture
def failing(capfd: pytest.CaptureFixture[str]) -> Failing:
    """Run a command that must fail; gives its one line."""

    def run(*arguments: object, code: int = 1) -> str:
        capfd.readouterr()
        assert main([str(each) for each in arguments]) == code
        return one_line(capfd.readouterr().err)

    return run


def one_line(stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if line.startswith("ssacl: ")]
    assert len(lines) == 1, stderr
    assert "Traceback" not in stderr
    assert len(lines[0]) < 700
    return lines[0]


def parsers(parser: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    yield words, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                yield from parsers(child, (*words, name))


def test_the_tree_is_whole_and_every_help_text_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    tree = dict(parsers(build_parser()))
    assert {tuple(command.split()) for command in COMMANDS} <= set(tree)
    for words in tree:
        with pytest.raises(SystemExit) as stopped:
            main([*words, "--help"])
        assert stopped.value.code == 0
        assert "usage: ssacl" in capsys.readouterr().out


def test_as_an_installed_program() -> None:
    program = Path(sys.executable).with_name("ssacl")
    for words, code in ((["--version"], 0), ([], 2), (["nonsense"], 2), (["train"], 2)):
        done = subprocess.run([program, *words], capture_output=True, text=True, timeout=60)
        assert done.returncode == code
        assert "Traceback" not in done.stderr


def test_help_needs_no_optional_package() -> None:
    assert blocked("--help", "torch ray serve fastapi deepspeed boto3 pydicom pydantic yaml rich numpy").returncode == 0


# --- doctor


def blocked(command: str, modules: str) -> subprocess.CompletedProcess[str]:
    """The command in a process in which none of `modules` can be imported."""
    program = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {modules.split()!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
from ssacl.cli import main
sys.exit(main({command.split()!r}))
"""
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, cwd=ROOT)


@pytest.mark.parametrize("modules", ["ray", "torch", "rich pydantic yaml numpy", "pydicom gdcm boto3 deepspeed fastapi"])
def test_doctor_names_what_is_missing(modules: str) -> None:
    done = blocked("doctor --data s3://bucket/films", modules)
    assert done.returncode == 1
    assert done.stderr == ""
    missing = [line for line in done.stdout.splitlines() if "missing" in line and "not installed" in line]
    assert len(missing) == len(modules.split()), done.stdout
    assert all("make setup" in line or "make" in line for line in missing)


def test_doctor_looks_at_data_and_cluster(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        assert main(["doctor", "--data", str(data), "--address", address]) == 0
        out = capsys.readouterr().out
        assert "index found" in out
        assert "answers" in out
    for wrong in (address, "[::1", "no-such-host.invalid:1", "127.0.0.1:port"):
        assert main(["doctor", "--address", wrong, "--data", str(tmp_path / "nothing")]) == 1
        out = capsys.readouterr().out
        assert "no answer" in out
        assert "no index.json" in out
    assert main(["doctor", "--data", "ftp://x"]) == 1
    assert "not reachable" in capsys.readouterr().out


def test_a_missing_package_is_one_line() -> None:
    done = blocked("serve --checkpoint x", "ray")
    assert done.returncode == 1
    assert "needs the package 'ray'" in one_line(done.stderr)


# --- bad input


def config(tmp_path: Path, data: Path | str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tiny_tree(data, tmp_path / "runs")))
    return path


def test_no_data(tmp_path: Path, failing: Failing, model: Path) -> None:
    nothing, out = tmp_path / "nothing", tmp_path / "out"
    (tmp_path / "empty").mkdir()
    ingest = ("--out", out, "--num-workers", 0)
    assert "Check the path" in failing("data", "ingest", "--format", "dicom-dir", nothing, *ingest)
    assert "No .dcm file" in failing("data", "ingest", "--format", "dicom-dir", tmp_path / "empty", *ingest)
    assert "ssacl data ingest" in failing("data", "verify", nothing)
    assert "ssacl data ingest" in failing("data", "tokenizer", "--data", nothing)
    assert "ssacl data ingest" in failing("train", "--config", config(tmp_path, nothing))
    assert "ssacl data ingest" in failing("evaluate", "reports", "--checkpoint", model, "--data", nothing, "--out", out)
    assert "no file or folder" in failing("predict", "--checkpoint", model, "--out", out, nothing)
    assert "Give files" in failing("predict", "--checkpoint", model, "--out", out, tmp_path / "empty")
    assert not out.exists()
    assert not nothing.exists()
    assert not (tmp_path / "runs").exists()


BAD_FILES = {
    "broken.dcm": encoded_film("DICOM")[:700],
    "empty.png": b"",
    "truncated.png": encoded_film("PNG")[:300],
    "text.dcm": b"Findings: none. " * 40,
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_files_that_are_no_films(name: str, tmp_path: Path, failing: Failing, model: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / name).write_bytes(BAD_FILES[name])
    said = failing("predict", "--checkpoint", model, "--out", tmp_path / "drafts", source / name)
    assert "None of the inputs gave a draft: The file" in said
    assert any(step in said for step in ("Copy", "Export", "export", "Give"))
    assert list((tmp_path / "drafts" / "results").iterdir()) == []
    (tmp_path / "films.csv").write_text(f"file\n{name}\n")
    csv = ("--format", "csv", tmp_path / "films.csv", "--image-root", source, "--column", "image=file")
    said = failing("data", "ingest", *csv, "--out", tmp_path / "set", "--num-workers", 0)
    assert "Not one usable picture" in said
    assert "ledger.jsonl" in said
    assert not (tmp_path / "set" / "index.json").exists()


def test_one_bad_file_among_good_ones_is_listed_and_no_failure(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "good.png").write_bytes(encoded_film("PNG"))
    (tmp_path / "bad.dcm").write_bytes(BAD_FILES["text.dcm"])
    command = [
        "predict",
        "--checkpoint",
        str(model),
        "--out",
        str(tmp_path / "drafts"),
        str(tmp_path / "good.png"),
        str(tmp_path / "bad.dcm"),
    ]
    assert main(command) == 0
    assert "1 drafts and 1 rejects of 2 inputs" in capsys.readouterr().out
    assert len((tmp_path / "drafts" / "rejects.jsonl").read_text().splitlines()) == 1


def test_a_wrong_secret(tmp_path: Path, failing: Failing, films: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with embedded_s3(tmp_path / "s3") as server:
        for name, value in {**server.environment, "AWS_SECRET_ACCESS_KEY": "wrong" * 8}.items():
            monkeypatch.setenv(name, value)
        url = "s3://ssacl/set"
        for command in (
            ("data", "verify", url),
            ("data", "ingest", "--format", "dicom-dir", films, "--out", url, "--num-workers", 0),
            ("train", "--config", config(tmp_path, url)),
            ("predict", "--checkpoint", url, "--out", tmp_path / "out", films),
        ):
            assert "AWS_SECRET_ACCESS_KEY" in failing(*command)
    assert list((tmp_path / "s3" / "ssacl").iterdir()) == []


def test_a_server_that_goes_down_in_the_middle(tmp_path: Path, failing: Failing, films: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server is killed when the first shard has arrived; started again, the same command goes on."""
    from ssacl.data.s3_storage import S3Storage

    write, url = S3Storage.write, "s3://ssacl/set"
    command = ["data", "ingest", "--format", "dicom-dir", str(films), "--out", url, "--num-workers", "0"]

    def write_then_kill(self: S3Storage, key: str, content: bytes) -> None:
        write(self, key, content)
        os.kill(server.pid, signal.SIGKILL)

    monkeypatch.setattr("ssacl.data.s3_storage.time.sleep", lambda _: None)
    with embedded_s3(tmp_path / "s3") as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        with monkeypatch.context() as patch:
            patch.setattr(S3Storage, "write", write_then_kill)
            assert "Start the server or check AWS_ENDPOINT_URL" in failing(*command)
    assert not (tmp_path / "s3" / "ssacl" / "set" / "index.json").exists()
    with embedded_s3(tmp_path / "s3") as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        assert main(command) == 0
        assert main(["data", "verify", url]) == 0


def test_a_port_that_is_taken(failing: Failing, model: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        assert f"Port {port} on 127.0.0.1 is taken; choose another with --port" in failing("serve", "--checkpoint", model, "--port", port)
    assert "port" in failing("serve", "--checkpoint", model, "--port", 99999)


def limited(words: list[str], num_bytes: int) -> subprocess.CompletedProcess[str]:
    """The command in a process whose files the kernel refuses to grow beyond `num_bytes`."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "ssacl.cli", *words],
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=limit,
        env=environment,
        cwd=ROOT,
    )


@pytest.mark.parametrize("kind", ["phantom", "ingest", "predict"])
def test_a_full_disk(kind: str, tmp_path: Path, films: Path, model: Path) -> None:
    out = tmp_path / "out"
    words = {
        "phantom": ["data", "phantom", "--out", str(out), "--num-studies", "3", "--num-processes", "1"],
        "ingest": ["data", "ingest", "--format", "dicom-dir", str(films), "--out", str(out), "--num-workers", "0"],
        "predict": ["predict", "--checkpoint", str(model), "--out", str(out), str(films)],
    }[kind]
    done = limited(words, 3000)
    assert done.returncode == 1
    assert any(step in one_line(done.stderr) for step in ("Free space", "Free some space"))
    left = [path for path in out.rglob("*") if path.is_file() and path.name != "run.json"]
    assert [path for path in left if path.suffix not in (".txt", ".json")] == []
    assert not (out / "index.json").exists()


def test_unknown_keys_and_wrong_values(tmp_path: Path, failing: Failing, data: Path) -> None:
    path = config(tmp_path, data)
    assert "unknown key 'optim.speed'. Known keys there: lr" in failing("train", "--config", path, "optim.speed=1")
    assert "engine.zero_stage" in failing("train", "--config", path, "engine.zero_stage=7")
    assert "write section.key=value" in failing("train", "--config", path, "optim.lr")
    assert "Presets are in configs/" in failing("train", "--config", tmp_path / "none.yaml")
    path.write_text("data: [")
    assert "not valid YAML" in failing("train", "--config", path)
    assert "write NAME=VALUE" in failing("data", "ingest", "--format", "csv", path, "--out", tmp_path / "x", "--column", "image")
    assert not (tmp_path / "runs").exists()


def test_a_checkpoint_of_another_architecture(tmp_path: Path, failing: Failing, model: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in model.rglob("*"):
        target = folder / path.relative_to(model)
        target.mkdir() if path.is_dir() else target.write_bytes(path.read_bytes())
    tree = yaml.safe_load((folder / "config.yaml").read_text())
    tree["model"]["vision"]["depth"] = 3
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).unlink()
    seal(folder, {key: value for key, value in manifest.items() if key != "files"})
    (tmp_path / "film.png").write_bytes(encoded_film("PNG"))
    assert "another architecture" in failing("predict", "--checkpoint", folder, "--out", tmp_path / "out", tmp_path / "film.png")
    assert "another architecture" in failing("checkpoint", "show", folder)
    (folder / MANIFEST).unlink()
    assert "incomplete" in failing("checkpoint", "show", folder)
    assert "does not exist" in failing("checkpoint", "show", tmp_path / "none")
    assert [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()] == ["run.json"]


def test_what_the_system_refuses_is_one_line(tmp_path: Path, failing: Failing) -> None:
    (tmp_path / "file").write_text("in the way")
    said = failing("data", "phantom", "--out", tmp_path / "file" / "films", "--num-studies", 1, "--num-processes", 1)
    assert "Check" in said or "Choose" in said or "Free" in said


def test_a_reader_that_goes_away_is_no_traceback(model: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "ssacl.cli", "checkpoint", "show", str(model)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
        assert b"Traceback" not in said
        assert b"BrokenPipe" not in said
        process.wait(60)


def test_an_interrupted_command_exits_130(tmp_path: Path) -> None:
    words = ["data", "phantom", "--out", str(tmp_path / "films"), "--num-studies", "5000", "--size-px", "64", "--num-processes", "1"]
    process = subprocess.Popen([sys.executable, "-m", "ssacl.cli", *words], stderr=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        while not list(tmp_path.glob("films/*/*")):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 130
        assert process.stderr is not None
        assert "goes on where it stopped" in one_line(process.stderr.read())
    finally:
        process.kill()
