"""What the release gets wrong (METHOD section 6), line by line: where each is tested, and tests of the lines that no other file holds."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from small_model import random_batch, small_config, small_model

from ssacl.config import Config, load_config
from ssacl.inference.decoding import GenerationOptions

HERE = Path(__file__).parent
TESTED = {
    1: {
        "test_collate": [
            "test_laterality_flip_turns_picture_words_and_places_together",
            "test_naive_flip_turns_the_picture_alone_and_unmirrorable_text_stays",
        ]
    },
    2: {
        "test_loader": ["test_training_cannot_open_the_test_split"],
        "test_training": ["test_a_training_run_opens_neither_test_shards_nor_truth"],
    },
    3: {
        "test_generator": ["test_only_pictures_reach_the_model"],
        "test_evaluate_checkpoint": ["test_a_report_leaked_into_the_prompt_is_caught"],
    },
    4: {
        "test_model": ["test_two_phrases_of_one_image_give_two_maps"],
        "test_generator": ["test_sentences_get_their_place_and_their_words_matter"],
    },
    5: {"test_text_metrics": ["test_references_are_never_truncated"]},
    6: {
        "test_clinical": ["test_policy_on_uncertain_findings_changes_the_score_and_is_stored"],
        "test_study_set": ["test_card_states_what_scores_depend_on_and_comes_back"],
    },
    7: {"test_release_mistakes": ["test_it_starts_anywhere_without_gpu_process_group_and_network"]},
    8: {"test_release_mistakes": ["test_no_vocabulary_logits_that_no_loss_reads", "test_leaf_names_are_as_long_as_the_longest_of_them"]},
    9: {
        "test_generator": ["test_generation_has_the_positions_of_training"],
        "test_release_mistakes": ["test_lengths_are_counted_in_new_tokens"],
    },
}


@pytest.mark.parametrize("line", range(1, 10))
def test_every_line_has_its_test(line: int) -> None:
    for module, names in TESTED[line].items():
        tree = ast.parse((HERE / f"{module}.py").read_text(encoding="utf-8"))
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert functions >= set(names), module


def test_no_preset_mirrors_images_alone() -> None:
    """Line 1: the release's flip exists for the ablation, and must be asked for."""
    assert Config().data.augment.flip == "none"
    presets = sorted((HERE.parent / "configs").rglob("*.yaml"))
    trees = {path: yaml.safe_load(path.read_text(encoding="utf-8")) for path in presets}
    ours = [path for path, tree in trees.items() if set(tree) <= set(Config.model_fields) and "flip" not in path.stem]
    assert ours
    for path in ours:
        assert load_config(path).data.augment.flip != "naive", path.name


STARTS = """
import os, pkgutil, socket, sys, importlib, warnings

warnings.filterwarnings("error", module=r"ssacl(\\..*)?")

def refuse(*_, **__):
    raise AssertionError("the network was asked")

socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import ssacl
for module in pkgutil.walk_packages(ssacl.__path__, "ssacl."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
foreign = sorted({"ray", "fastapi", "deepspeed"} & set(sys.modules))
assert not foreign, foreign
import torch
from small_model import random_batch, small_config, small_model
assert not torch.cuda.is_initialized()
config = small_config()
model = small_model(config).train()
assert not torch.distributed.is_initialized()
model(random_batch(2, config), "joint").total.backward()
assert not torch.distributed.is_initialized()
assert os.listdir(".") == [], os.listdir(".")
print("started")
"""


def test_it_starts_anywhere_without_gpu_process_group_and_network(tmp_path: Path) -> None:
    """Line 7: every module is imported and a training step made, in an empty folder, with our warnings as errors."""
    environment = {
        **{name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ},
        "HOME": str(tmp_path / "home"),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
    }
    (tmp_path / "empty").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", STARTS],
        cwd=tmp_path / "empty",
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.stdout.endswith("started\n"), done.stderr[-2000:]


@pytest.mark.parametrize("wiring", ["paper", "official"])
def test_no_vocabulary_logits_that_no_loss_reads(wiring: str) -> None:
    """Line 8: the language model's head sees the report's tokens and nothing else; the text encoder has no such head."""
    config = small_config(model__wiring=wiring, model__vision__decoder_width=24, losses__grounding={"enabled": False})
    model, batch = small_model(config), random_batch(3, config)
    rows: list[int] = []
    model.language.model.get_output_embeddings().register_forward_hook(
        lambda module, given, result: rows.append(result.numel() // result.shape[-1])
    )
    vocabulary = model.text.bert.get_input_embeddings().num_embeddings
    wide = []
    for module in model.text.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda module, given, result: wide.append(result.shape[-1] == vocabulary))
    model(batch, "joint").total.backward()
    assert rows == [int(batch.report_mask.sum())]
    assert wide
    assert not any(wide)


def test_leaf_names_are_as_long_as_the_longest_of_them() -> None:
    """Line 8: no padding to the text encoder's limit."""
    model = small_model(small_config())
    lengths = model.leaf_ids_mask.sum(1)
    assert model.leaf_ids.shape[1] == int(lengths.max()) < model.config.text.max_tokens
    assert int(lengths.min()) >= 1


def test_lengths_are_counted_in_new_tokens() -> None:
    """Line 9: a limit of 100 must not be met by the prefix; the prefix of the base size has 222 slots."""
    names = set(GenerationOptions.model_fields)
    assert {"max_new_tokens", "min_new_tokens"} <= names
    assert not {"max_length", "min_length"} & names
    assert GenerationOptions.release().min_new_tokens == 80
