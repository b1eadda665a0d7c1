"""`ssacl evaluate zero-shot` and `retrieval`: ranks and precisions by hand, figures worked out anew from the model, prompts, bad input."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from sklearn.metrics import roc_auc_score
from tiny_model import tiny_model_folder
from torch.nn import functional
from training_set import EFFUSION, NORMAL, write_training_set

from ssacl.anatomy import FINDING_INDEX, FINDINGS, FindingStatus
from ssacl.cli import main
from ssacl.data.shards import ShardIndex, read_sample
from ssacl.data.storage import open_storage
from ssacl.data.transforms import load_square, normalise
from ssacl.errors import CheckpointError, ConfigError, DataError, GenerationError, SplitError
from ssacl.evaluation.downstream import contrast
from ssacl.evaluation.downstream.contrast_run import ContrastOptions
from ssacl.evaluation.downstream.prompts import load_prompts
from ssacl.evaluation.downstream.retrieval import ClassQuery, candidates, chance, precision_at, ranks, retrieval
from ssacl.evaluation.downstream.zero_shot import zero_shot
from ssacl.evaluation.scorecard import read_card
from ssacl.training.checkpoint import open_model

PROMPTS = Path(__file__).parents[1] / "configs" / "zero_shot.yaml"
VAL = ContrastOptions(split="val", findings=("Pleural Effusion", "No Finding"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tiny_model_folder(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_training_set(tmp_path_factory.mktemp("contrast") / "set")


def unit(rows: Any) -> np.ndarray:
    array = np.asarray(rows, dtype=np.float32)
    return array / np.linalg.norm(array, axis=1, keepdims=True)


def test_ranks_by_hand() -> None:
    # Queries look along the axes; the partner of each has its row. The third query's partner is behind two others.
    queries = unit([[1, 0, 0], [0, 1, 0], [0, 0, 1]])
    gallery = unit([[1, 0, 0.5], [0, 1, 0.2], [1, 1, 0]])
    assert ranks(queries, gallery, np.array(["a", "b", "c"])).tolist() == [0, 0, 2]
    assert ranks(queries, gallery, np.array(["a", "b", "a"])).tolist() == [0, 0, 0], "the report of the first film is the third's too"


def test_a_model_to_which_all_is_alike_finds_nothing() -> None:
    same = unit(np.ones((6, 4)))
    assert ranks(same, same, np.array(list("abcdef"))).tolist() == [5] * 6
    assert ranks(same, same, np.array(list("aabbcc"))).tolist() == [4] * 6


def test_chance_is_the_share_of_all_orders() -> None:
    keys = np.array(list("aabcd"))
    for k in (1, 2, 3, 5):
        drawn = list(combinations(range(5), k))
        by_hand = [sum(any(keys[row] == own for row in rows) for rows in drawn) / math.comb(5, k) for own in keys]
        assert chance(keys, k) == pytest.approx(np.mean(by_hand))


def test_precision_of_the_nearest_by_hand() -> None:
    query = ClassQuery("x", np.array([0.9, 0.1, 0.5, 0.7, 0.7], np.float32), np.array([True, True, False, True, False]))
    assert [precision_at(query, k)[0] for k in (1, 2, 3, 5)] == pytest.approx([1, 1 / 2, 2 / 3, 3 / 5])
    # The first film drawn twice, the second never.
    weights = np.array([[2, 0, 1, 1, 1]], np.float32)
    assert [precision_at(query, k, weights)[0] for k in (1, 2, 3, 4)] == pytest.approx([1, 1, 2 / 3, 3 / 4])


def test_the_gallery_of_classes_has_films_of_one_class_alone() -> None:
    labels = np.array([[1, 0], [1, 1], [0, 1], [0, 0], [1, 0], [1, 0]], np.int8)
    keys = list("abcdef")
    assert candidates(labels, keys, 5, 0).tolist() == [0, 2, 4, 5]
    drawn = {tuple(candidates(labels, keys, 1, seed).tolist()) for seed in range(20)}
    assert all(len(rows) == 2 and 2 in rows for rows in drawn)
    assert len(drawn) == 3, "every film of the larger class is drawn by some seed"


def by_hand(model: Path, data: Path, split: str) -> tuple[Any, np.ndarray, np.ndarray, list[Any]]:
    """The loaded model, image and report embeddings of a split, one film at a time, and the samples."""
    loaded, storage = open_model(model), open_storage(str(data))
    samples = [read_sample(storage, entry) for entry in ShardIndex.load(storage).samples(split)]
    images, texts = [], []
    with torch.no_grad():
        for sample in samples:
            latent = loaded.model.encode(torch.from_numpy(normalise(load_square(sample, 64)[0]))[None])
            images.append(functional.normalize(loaded.model.img_mlp(latent.patches_BND[0]).mean(0), dim=0).numpy())
            texts.append(text_by_hand(loaded, f"{sample.findings} {sample.impression}"))
    return loaded, np.stack(images), np.stack(texts), samples


def text_by_hand(loaded: Any, text: str) -> np.ndarray:
    ids = torch.tensor([loaded.tokenizers.text_ids(text)])
    with torch.no_grad():
        found: np.ndarray = functional.normalize(loaded.model.text(ids, torch.ones_like(ids).bool())[0], dim=0).numpy()
    return found


def test_zero_shot_is_what_the_prompts_say(model: Path, data: Path, tmp_path: Path) -> None:
    card = zero_shot(model, data, tmp_path, PROMPTS, VAL)
    assert card == read_card(tmp_path)
    loaded, images, _, samples = by_hand(model, data, "val")
    for name in VAL.findings:
        pair = yaml.safe_load(PROMPTS.read_text())["findings"][name]
        present, absent = (unit([np.mean([text_by_hand(loaded, each) for each in pair[side]], axis=0)])[0] for side in pair)
        truth = [sample.labels[FINDING_INDEX[name]] == FindingStatus.PRESENT for sample in samples]
        expected = roc_auc_score(truth, images @ (present - absent))
        assert card["metrics"][f"auc_{name.lower().replace(' ', '_')}"] == pytest.approx(expected, abs=1e-6)
    assert card["details"]["present"] == {"Pleural Effusion": 4, "No Finding": 4}
    assert set(card["prompts"]["findings"]) == set(VAL.findings)
    assert (tmp_path / "scorecard.html").is_file()


def test_a_finding_that_no_film_has_scores_nothing(model: Path, data: Path, tmp_path: Path) -> None:
    card = zero_shot(model, data, tmp_path, PROMPTS)
    assert len(card["metrics"]) == 15
    assert card["metrics"]["auc_fracture"] is None
    assert card["metrics"]["auc_mean"] == pytest.approx(
        np.mean([card["metrics"][f"auc_{name}"] for name in ("pleural_effusion", "no_finding")])
    )


def test_retrieval_is_what_the_cosines_say(model: Path, data: Path, tmp_path: Path) -> None:
    card = retrieval(model, data, tmp_path, PROMPTS, VAL)
    _, images, texts, samples = by_hand(model, data, "val")
    reports = [sample.findings for sample in samples]
    assert set(reports) == {EFFUSION, NORMAL}
    # Two reports: a film finds its own at once, or behind all four of the other.
    nearest = [reports[int((texts @ image).argmax())] == report for image, report in zip(images, reports, strict=True)]
    metrics = card["metrics"]
    assert metrics["image_to_text_r_1"] == np.mean(nearest)
    assert metrics["image_to_text_r_5"] == metrics["text_to_image_r_5"] == 1.0
    back = [reports[int((images @ text).argmax())] == report for text, report in zip(texts, reports, strict=True)]
    assert metrics["text_to_image_r_1"] == np.mean(back)
    chances = {row["figure"]: row["baseline"] for row in card["rows"]}
    assert chances["image_to_text_r_1"] == 0.5
    assert chances["precision_5_pleural_effusion"] == 0.5
    assert card["gallery_of_classes"] == {"Pleural Effusion": 4, "No Finding": 4}
    assert "precision_10" not in metrics, "eight films have no ten nearest"
    assert metrics["precision_5"] == pytest.approx((metrics["precision_5_pleural_effusion"] + metrics["precision_5_no_finding"]) / 2)
    page = (tmp_path / "scorecard.html").read_text()
    assert EFFUSION in page
    assert EFFUSION not in (tmp_path / "scorecard.json").read_text()


def test_an_interrupted_evaluation_goes_on(model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrast, "PART", 2)
    whole = retrieval(model, data, tmp_path / "whole", PROMPTS, VAL)

    def stop(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        retrieval(model, data, tmp_path / "cut", PROMPTS, VAL, progress=stop)
    kept = list((tmp_path / "cut" / "kept").iterdir())
    assert len(kept) == 1
    kept[0].write_bytes(b"damaged")
    assert retrieval(model, data, tmp_path / "cut", PROMPTS, VAL) == whole
    assert len(list((tmp_path / "cut" / "kept").iterdir())) == 4
    with pytest.raises(DataError, match="another evaluation"):
        zero_shot(model, data, tmp_path / "cut", PROMPTS, VAL)


def test_the_shipped_prompts_are_whole_and_fit_the_text_encoder(model: Path) -> None:
    prompts = load_prompts(PROMPTS)
    assert tuple(prompts.pairs) == FINDINGS
    said = [each for pair in prompts.pairs.values() for each in (*pair.present, *pair.absent)]
    assert len(said) == len(set(said))


PAIR = {"present": ["It is there."], "absent": ["It is not there."]}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"findings": {"Gout": PAIR}}, "'Gout', which is no finding"),
        ({"findings": {"Edema": {"present": ["Edema."]}}}, "'Edema': the absent prompt is missing"),
        ({"findings": {"Edema": {"present": [], "absent": ["No edema."]}}}, "'Edema': the present prompt is missing"),
        ({"findings": {"Edema": PAIR | {"perhaps": ["Edema?"]}}}, "unknown key 'perhaps'"),
        ({"findings": {"Edema": "edema"}}, "no mapping"),
        ({"findings": {}}, "one key, 'findings'"),
        ({"prompts": {}}, "one key, 'findings'"),
        (["Edema"], "one key, 'findings'"),
    ],
)
def test_damaged_prompt_files_are_named(tree: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=message):
        load_prompts(tmp_path / "prompts.yaml")


def test_prompts_that_cannot_be_used_are_named(model: Path, data: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.yaml"
    for content in ("findings: [", "\x00"):
        file.write_text(content)
        with pytest.raises(ConfigError, match="cannot be read"):
            load_prompts(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_prompts(tmp_path / "none.yaml")
    file.write_text(yaml.safe_dump({"findings": {"Edema": PAIR | {"present": ["edema " * 200]}}}))
    with pytest.raises(ConfigError, match="Edema, present: the prompt"):
        zero_shot(model, data, tmp_path / "a", file, ContrastOptions(split="val"))
    with pytest.raises(ConfigError, match="no prompts for 'Pneumonia'"):
        zero_shot(model, data, tmp_path / "b", file, ContrastOptions(findings=("Pneumonia",)))
    with pytest.raises(ConfigError, match="'Gout' is no finding"):
        zero_shot(model, data, tmp_path / "b", PROMPTS, ContrastOptions(findings=("Gout",)))
    assert not (tmp_path / "b").exists()


def test_checkpoints_and_splits_that_cannot_be_used(model: Path, data: Path, tmp_path: Path) -> None:
    never = tiny_model_folder(tmp_path / "never", ("findings",))
    with pytest.raises(CheckpointError, match="share no space"):
        zero_shot(never, data, tmp_path / "out", PROMPTS)
    with pytest.raises(SplitError, match="training split"):
        retrieval(model, data, tmp_path / "out", PROMPTS, ContrastOptions(split="train"))
    with pytest.raises(DataError, match="1 films of the split 'test' have a report"):
        retrieval(model, data, tmp_path / "one", PROMPTS, ContrastOptions(limit=1))
    with pytest.raises(DataError, match="leaves no case"):
        zero_shot(model, data, tmp_path / "out", PROMPTS, ContrastOptions(limit=0))
    with pytest.raises(ConfigError, match="no gallery"):
        retrieval(model, data, tmp_path / "out", PROMPTS, per_class=0)
    assert not (tmp_path / "out").exists()


def test_damaged_weights_are_named(data: Path, tmp_path: Path) -> None:
    loaded = open_model(tiny_model_folder(tmp_path / "model"))
    with torch.no_grad():
        loaded.model.img_mlp.weight[0, 0] = float("nan")
    storage = open_storage(str(data))
    with pytest.raises(GenerationError, match="not finite"):
        contrast.embed_split(loaded, storage, ShardIndex.load(storage).samples("val"), tmp_path)


def test_by_the_command(model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--checkpoint", str(model), "--data", str(data), "--prompts", str(PROMPTS)]
    assert main(["evaluate", "retrieval", *common, "--out", str(tmp_path / "r"), "--classes", "Pleural Effusion,No Finding"]) == 0
    assert "image_to_text_r_1" in capsys.readouterr().out
    assert main(["evaluate", "zero-shot", *common, "--out", str(tmp_path / "z"), "--findings", "Pleural Effusion"]) == 0
    assert "auc_pleural_effusion" in capsys.readouterr().out
    assert main(["evaluate", "zero-shot", *common, "--out", str(tmp_path / "y"), "--findings", "Gout"]) == 1
    assert "'Gout' is no finding" in capsys.readouterr().err
