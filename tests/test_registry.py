"""Model registry: versions that cannot change unseen, channels that move and come back, in a folder and in S3."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_model import tiny_model_folder

from ssacl.cli import main
from ssacl.data.lease import hold_lease
from ssacl.data.storage import FolderStorage, Storage, embedded_s3, open_storage
from ssacl.errors import CheckpointError, RegistryError, StorageError
from ssacl.registry import channels
from ssacl.registry.addresses import find_version, resolve_model
from ssacl.registry.channels import promote, read_channel, rollback
from ssacl.registry.signing import PUBLIC_KEY, SIGNING_KEY, new_keys
from ssacl.registry.versions import Version, open_version, register, version_names
from ssacl.training.checkpoint import local_folder, open_model
from ssacl.training.sealed import MANIFEST, read_manifest, seal


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three model folders that differ in a recorded metric."""
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("models")
    first = tiny_model_folder(place / "0")
    found = [first]
    for number in (1, 2):
        copy = shutil.copytree(first, place / str(number))
        manifest = read_manifest(copy)
        seal(copy, {**{key: value for key, value in manifest.items() if key != "files"}, "metrics": {"figure": number}}, manifest["files"])
        found.append(copy)
    return found


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.external)])
def storage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    if request.param == "folder":
        yield open_storage(tmp_path / "registry")
        return
    with embedded_s3(tmp_path / "s3") as s3:
        for name, value in s3.environment.items():
            monkeypatch.setenv(name, value)
        yield open_storage("s3://ssacl/registry")


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SIGNING_KEY, raising=False)
    monkeypatch.delenv(PUBLIC_KEY, raising=False)


def add(storage: Storage, folder: Path) -> Version:
    return register(storage, open_storage(folder), folder)


def test_versions_move_through_channels_and_models_load_by_them(storage: Storage, folders: list[Path]) -> None:
    first, second = add(storage, folders[0]), add(storage, folders[1])
    assert version_names(storage) == sorted([first.version, second.version])
    assert first.version != second.version
    assert first.check_files() == len(read_manifest(folders[0])["files"])
    assert second.record["metrics"] == {"figure": 1}
    assert "figure: 1" in second.card()
    with pytest.raises(RegistryError, match="no channel stable"):
        resolve_model(f"{storage.url}@stable")
    promote(storage, first.version, "stable", "first")
    promote(storage, second.version, "stable")
    assert resolve_model(f"{storage.url}@stable") == second.model_url
    with local_folder(f"{storage.url}@stable") as folder:
        assert read_manifest(folder)["metrics"] == {"figure": 1}
    assert open_model(f"{storage.url}@{first.version}").manifest["metrics"] == {}
    assert rollback(storage, "stable", "worse").version == first.version
    assert resolve_model(f"{storage.url}@stable") == first.model_url
    with pytest.raises(RegistryError, match="no version before"):
        rollback(storage, "stable")
    assert [(step.action, step.version, step.reason) for step in read_channel(storage, "stable").history] == [
        ("promote", first.version, "first"),
        ("promote", second.version, ""),
        ("rollback", first.version, "worse"),
    ]


def test_rollbacks_go_back_step_by_step_and_what_was_rolled_back_is_left_out(tmp_path: Path, folders: list[Path]) -> None:
    storage = open_storage(tmp_path / "registry")
    a, b, c = (add(storage, folder).version for folder in folders)
    for version in (a, b, b, c):
        promote(storage, version, "stable")
    assert rollback(storage, "stable").version == b
    promote(storage, c, "stable")
    assert [rollback(storage, "stable").version for _ in range(2)] == [b, a]


def test_registering_again_changes_nothing(tmp_path: Path, folders: list[Path]) -> None:
    storage = open_storage(tmp_path / "registry")
    before = add(storage, folders[0]).record
    again = register(storage, open_storage(folders[0]), folders[0], card="another card")
    assert again.record == before
    assert "another card" not in again.card()


def test_a_version_that_was_not_finished_is_none(tmp_path: Path, folders: list[Path]) -> None:
    storage = open_storage(tmp_path / "registry")
    version = add(storage, folders[0])
    version.storage.delete("record.json")
    assert version_names(storage) == []
    with pytest.raises(RegistryError, match="has no version"):
        promote(storage, version.version, "stable")
    assert add(storage, folders[0]).version == version.version


@pytest.mark.parametrize("key", ["model/model.safetensors", f"model/{MANIFEST}", "MODEL_CARD.md", "record.json"])
@pytest.mark.parametrize("change", ["flip", "delete"])
def test_what_is_changed_or_lost_is_found_and_not_promoted(key: str, change: str, tmp_path: Path, folders: list[Path]) -> None:
    storage = open_storage(tmp_path / "registry")
    version = add(storage, folders[0])
    if change == "delete":
        version.storage.delete(key)
    else:
        content = version.storage.read(key)
        version.storage.write(key, content[:-30] + bytes([content[-30] ^ 1]) + content[-29:])
    if key == "record.json" and change == "flip":
        return  # Only a signature vouches for the record itself; see below.
    with pytest.raises(RegistryError):
        promote(storage, version.version, "stable")
    assert not storage.exists("channels/stable.json")


def test_signatures_are_asked_for_where_a_public_key_is_named(tmp_path: Path, folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(tmp_path / "registry")
    for name in ("ours", "theirs"):
        new_keys(tmp_path / f"{name}.pem", tmp_path / f"{name}.pub")
    assert (tmp_path / "ours.pem").stat().st_mode & 0o777 == 0o600
    with pytest.raises(RegistryError, match="never replaced"):
        new_keys(tmp_path / "ours.pem", tmp_path / "new.pub")
    unsigned = add(storage, folders[0])
    assert unsigned.signature == "not signed"
    monkeypatch.setenv(SIGNING_KEY, str(tmp_path / "ours.pem"))
    signed = add(storage, folders[1])
    assert signed.signature.startswith("signed, not checked")
    monkeypatch.setenv(PUBLIC_KEY, str(tmp_path / "ours.pub"))
    promote(storage, signed.version, "stable")
    assert find_version(storage.url, "@stable").signature == "signed"
    with pytest.raises(RegistryError, match="not signed"):
        promote(storage, unsigned.version, "stable")
    record = json.loads(signed.storage.read("record.json"))
    signed.storage.write("record.json", json.dumps({**record, "source": "elsewhere"}).encode())
    with pytest.raises(RegistryError, match="was changed"):
        resolve_model(f"{storage.url}@stable")
    signed.storage.write("record.json", json.dumps(record, indent=1, sort_keys=True).encode())
    assert resolve_model(f"{storage.url}@stable") == signed.model_url
    monkeypatch.setenv(PUBLIC_KEY, str(tmp_path / "theirs.pub"))
    with pytest.raises(RegistryError, match="another key"):
        open_version(storage, signed.version)
    monkeypatch.setenv(PUBLIC_KEY, str(folders[0] / "config.yaml"))
    with pytest.raises(RegistryError, match="no Ed25519 key"):
        open_version(storage, signed.version)


def test_a_signed_record_of_one_version_does_not_vouch_for_another(
    tmp_path: Path, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage(tmp_path / "registry")
    new_keys(tmp_path / "key.pem", tmp_path / "key.pub")
    monkeypatch.setenv(SIGNING_KEY, str(tmp_path / "key.pem"))
    monkeypatch.setenv(PUBLIC_KEY, str(tmp_path / "key.pub"))
    first, second = add(storage, folders[0]), add(storage, folders[1])
    for name in ("record.json", "record.sig"):
        second.storage.write(name, first.storage.read(name))
    with pytest.raises(RegistryError, match="damaged"):
        open_version(storage, second.version)


def test_a_channel_is_moved_by_one_at_a_time(tmp_path: Path, folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(tmp_path / "registry")
    version = add(storage, folders[0]).version
    with hold_lease(storage, channels._HOLDER):
        monkeypatch.setattr("ssacl.data.lease.HEARTBEAT_S", 0.05)
        monkeypatch.setattr("ssacl.data.lease._is_gone", lambda content: False)
        monkeypatch.setattr("ssacl.data.lease.PATIENCE_S", 0.5)
        with pytest.raises(StorageError, match="Another promotion"):
            _promote_while_beating(open_storage(storage.url), version)
    promote(storage, version, "stable")


def _promote_while_beating(storage: Storage, version: str) -> None:
    """The other one's heartbeat goes on, as the lease's own thread would have it every ten seconds."""
    key, content = channels._HOLDER.key, json.loads(storage.read(channels._HOLDER.key))
    reads = storage.read

    def read(name: str, start: int = 0, end: int | None = None) -> bytes:
        if name == key:
            content["beats"] += 1
            storage.write(key, json.dumps(content).encode())
        return reads(name, start, end)

    assert isinstance(storage, FolderStorage)
    storage.read = read  # type: ignore[method-assign]
    promote(storage, version, "stable")


def test_addresses_that_mean_no_registry_come_back(tmp_path: Path) -> None:
    (tmp_path / "runs@stable").mkdir()
    for address in (
        "runs/model",
        "s3://bucket/runs/model",
        "s3://bucket/a@b/model",
        str(tmp_path / "runs@stable"),
        "@stable",
        "x@Not A Name",
    ):
        assert resolve_model(address) == address


def test_what_is_no_model_is_not_registered(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    seal(tmp_path / "checkpoint", {"format": 1})
    with pytest.raises(CheckpointError, match="not a model folder"):
        add(open_storage(tmp_path / "registry"), tmp_path / "checkpoint")


def test_the_commands(tmp_path: Path, folders: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    registry = str(tmp_path / "registry")
    assert main(["model", "list", registry]) == 0
    assert "holds no version" in capsys.readouterr().err
    (tmp_path / "card.md").write_text("# Our card\n")
    assert main(["model", "register", registry, str(folders[0]), "--card", str(tmp_path / "card.md")]) == 0
    version = capsys.readouterr().out.split()[1]
    assert main(["model", "register", registry, str(folders[1])]) == 0
    other = capsys.readouterr().out.split()[1]
    assert main(["model", "promote", registry, version, "--channel", "canary"]) == 0
    assert main(["model", "promote", registry, "@canary", "--channel", "stable", "--reason", "agreed"]) == 0
    assert main(["model", "promote", registry, other, "--channel", "stable"]) == 0
    assert main(["model", "rollback", registry, "--channel", "stable"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"canary: {version}", f"stable: {version}", f"stable: {other}", f"stable: {version}"]
    assert main(["model", "list", registry]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 2
    assert next(line for line in listed if line.startswith(version)).endswith("@canary @stable")
    assert main(["model", "show", registry, "@stable"]) == 0
    assert "# Our card" in capsys.readouterr().out
    assert main(["model", "verify", registry, "@stable"]) == 0
    assert "files are whole, not signed" in capsys.readouterr().out
    assert main(["model", "verify", registry, "@Stable"]) == 1
    assert "is no channel" in capsys.readouterr().err
    assert main(["model", "keys", str(tmp_path / "k.pem"), str(tmp_path / "k.pub")]) == 0
