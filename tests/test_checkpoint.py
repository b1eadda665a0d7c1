"""Model folders: complete or invisible, damaged ones named, wrong architectures explained."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ssacl.config import Config, parse_config
from ssacl.data.storage import open_storage
from ssacl.data.tokenization import Tokenizers, train_tokenizers
from ssacl.errors import CheckpointError
from ssacl.models.ssacl import SSACL
from ssacl.training.checkpoint import fill, load_model_folder, local_folder, open_model, save_model_folder
from ssacl.training.sealed import MANIFEST, check_folder, download_folder, new_folder, seal, upload_folder

TEXTS = ["The lungs are clear. No pleural effusion or pneumothorax.", "Small left pleural effusion. The heart is enlarged."] * 3
TREE = {
    "data": {"text_max_tokens": 32, "lm_max_tokens": 24},
    "model": {
        "vision": {
            "image_size_px": 32,
            "width": 16,
            "depth": 2,
            "num_heads": 2,
            "decoder_width": 16,
            "decoder_depth": 1,
            "decoder_num_heads": 2,
        },
        "text": {"width": 16, "depth": 1, "num_heads": 2, "ffn_width": 32, "max_tokens": 32},
        "language": {"width": 16, "depth": 1, "num_heads": 2, "max_positions": 128},
    },
}


@pytest.fixture(scope="module")
def tokenizers() -> Tokenizers:
    return train_tokenizers(TEXTS, 200, 300)


@pytest.fixture(scope="module")
def config() -> Config:
    return parse_config(TREE)


@pytest.fixture(scope="module")
def model(config: Config, tokenizers: Tokenizers) -> SSACL:
    torch.manual_seed(3)
    return SSACL.from_config(config, tokenizers).eval()


@pytest.fixture
def folder(tmp_path: Path, model: SSACL, config: Config, tokenizers: Tokenizers) -> Path:
    save_model_folder(tmp_path / "model", model, config, tokenizers, {"Edema": 0.3}, {"loss": 1.5}, {"data_sha256": "d"})
    return tmp_path / "model"


def test_round_trip_gives_the_same_weights_and_the_rest(folder, model, config, tokenizers):
    loaded = load_model_folder(folder)
    assert loaded.config == config
    assert loaded.thresholds == {"Edema": 0.3}
    assert loaded.tokenizers.fingerprint == tokenizers.fingerprint
    assert loaded.manifest["metrics"] == {"loss": 1.5}
    assert loaded.manifest["provenance"] == {"data_sha256": "d"}
    assert not loaded.model.training
    state = loaded.model.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded.model.encode(image).nodes_BGD, model.encode(image).nodes_BGD)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["model"]


def test_model_version_follows_the_weights(tmp_path, model, config, tokenizers, folder):
    again = save_model_folder(tmp_path / "again", model, config, tokenizers, {}, {})
    assert again["model_version"] == load_model_folder(folder).model_version
    changed = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    changed["tau"] += 1
    other = save_model_folder(tmp_path / "other", model, config, tokenizers, {}, {}, state=changed)
    assert other["model_version"] != again["model_version"]


def test_tied_tensors_are_stored_once_and_tied_again(tmp_path, model, config, tokenizers, folder):
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    tied = [group for group in names.values() if len(group) > 1]
    assert tied, "the language model ties its embedding to its head"
    loaded = dict(load_model_folder(folder).model.named_parameters(remove_duplicate=False))
    for group in tied:
        assert len({id(loaded[name]) for name in group}) == 1


def test_a_folder_without_manifest_is_incomplete(folder):
    (folder / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="incomplete"):
        load_model_folder(folder)


def test_a_missing_folder_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        load_model_folder(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["model.safetensors", "config.yaml", "wordpiece.json", "thresholds.json"])
def test_a_changed_file_is_damaged(folder, name):
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=rf"damaged.*{name}"):
        load_model_folder(folder)


def test_a_missing_file_is_named(folder):
    (folder / "wordpiece.json").unlink()
    with pytest.raises(CheckpointError, match=r"wordpiece\.json is missing"):
        load_model_folder(folder)


def test_another_architecture_names_the_tensors(folder, tokenizers):
    tree = json.loads(json.dumps(TREE))
    tree["model"]["vision"] |= {"depth": 3, "decoder_depth": 1, "width": 32}
    (folder / "config.yaml").write_text(parse_config(tree).to_yaml())
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).unlink()
    seal(folder, {key: value for key, value in manifest.items() if key != "files"})
    with pytest.raises(CheckpointError, match=r"another architecture.*missing: encoder.*of another shape.*instead of") as caught:
        load_model_folder(folder)
    assert "config.yaml" in str(caught.value)


def test_left_over_tensors_are_named(model):
    state = {**model.state_dict(), "stranger": torch.zeros(1)}
    with pytest.raises(CheckpointError, match="1 tensors unknown: stranger"):
        fill(model, state, "x")


def test_another_tokenizer_is_refused(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    train_tokenizers(["other words entirely, for a smaller tokenizer"] * 4, 200, 300).save(folder)
    (folder / MANIFEST).unlink()
    seal(folder, {key: value for key, value in manifest.items() if key != "files"})
    with pytest.raises(CheckpointError, match="tokenizer"):
        load_model_folder(folder)


def test_a_failing_write_leaves_the_old_folder(folder):
    before = check_folder(folder)
    with pytest.raises(KeyError), new_folder(folder) as work:
        (work / "model.safetensors").write_bytes({}["half way"])
    assert check_folder(folder) == before
    assert sorted(path.name for path in folder.parent.iterdir()) == ["model"]


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(tmp_path):
    script = """
import resource, sys
from pathlib import Path
from ssacl.errors import StorageError
from ssacl.training.sealed import new_folder
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    with new_folder(Path(sys.argv[1]) / "model") as work:
        (work / "model.safetensors").write_bytes(bytes(100_000))
except StorageError as error:
    print("named", error)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60, cwd=os.getcwd())
    assert done.stdout.startswith("named Cannot write the folder"), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_storage_round_trip(folder, tmp_path):
    storage = open_storage(str(tmp_path / "bucket"))
    upload_folder(folder, storage, "runs/a/model")
    fetched = download_folder(storage, "runs/a/model", tmp_path / "fetched")
    assert check_folder(fetched) == check_folder(folder)
    assert open_model(storage.sub("runs/a/model").url).model_version == open_model(folder).model_version
    with local_folder(folder) as same:
        assert same == folder


def test_upload_in_progress_is_invisible(folder, tmp_path):
    storage = open_storage(str(tmp_path / "bucket"))
    upload_folder(folder, storage, "model")
    storage.delete("model/" + MANIFEST)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        download_folder(storage, "model", tmp_path / "fetched")


def test_damage_in_storage_is_found_and_leaves_nothing(folder, tmp_path):
    storage = open_storage(str(tmp_path / "bucket"))
    upload_folder(folder, storage, "model")
    storage.write("model/config.yaml", b"model: {}\n")
    with pytest.raises(CheckpointError, match=r"damaged.*config\.yaml"):
        download_folder(storage, "model", tmp_path / "fetched")
    assert not (tmp_path / "fetched").exists()


def test_a_manifest_cannot_write_outside_its_folder(tmp_path):
    storage = open_storage(str(tmp_path / "bucket"))
    storage.write("model/" + MANIFEST, json.dumps({"files": {"../outside": "0" * 64}}).encode())
    with pytest.raises(CheckpointError, match="outside"):
        download_folder(storage, "model", tmp_path / "fetched")
    assert not (tmp_path / "outside").exists()
