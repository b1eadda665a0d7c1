"""ReportGenerator on a tiny random model: the image decides, twice gives the same, maps land on the right pixels, errors have names."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_model import REPORT, encoded_film, film, tiny_model_folder

from ssacl.anatomy import NODES
from ssacl.data.dicom import Picture, read_picture
from ssacl.data.transforms import load_square, normalise
from ssacl.errors import GenerationError
from ssacl.inference import generator as module
from ssacl.inference.beams import Written
from ssacl.inference.decoding import decode, token_probabilities
from ssacl.inference.evidence import evidence_sheet_png
from ssacl.inference.generator import GenerationOptions, ReportGenerator, TimeLimitError
from ssacl.inference.maps import map_on_picture

FAST = GenerationOptions(num_beams=2, max_new_tokens=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def generator(folder: Path) -> ReportGenerator:
    torch.set_num_threads(1)
    return ReportGenerator.load(folder)


def picture(seed: int = 0, width: int = 96, height: int = 128) -> Picture:
    return read_picture(encoded_film("PNG", width, height, seed), "film")


def test_twice_is_the_same_and_another_image_is_not(generator: ReportGenerator) -> None:
    first, other = generator.generate([picture(0), picture(1)], FAST)
    assert first.to_json() == generator.generate([picture(0), picture(1)], FAST)[0].to_json()
    assert [item.probability for item in first.findings] != [item.probability for item in other.findings]
    assert not np.array_equal(first.anatomy_maps, other.anatomy_maps)
    assert first.image_ref != other.image_ref
    assert generator.generate([picture(0)], FAST.model_copy(update={"deterministic": True}))[0].text == first.text


def test_a_draft_is_complete(generator: ReportGenerator) -> None:
    draft = generator.generate([picture()], FAST)[0]
    tree = json.loads(json.dumps(draft.to_json(), allow_nan=False))
    assert tree["status"] == "preliminary"
    assert len(tree["findings"]) == 14
    assert draft.anatomy_maps.shape == (len(NODES), 16, 16), "twice as fine as the patches"
    assert draft.anatomy_maps.sum((1, 2)) == pytest.approx(np.ones(len(NODES)), abs=1e-4)
    assert (draft.image_width_px, draft.image_height_px) == (96, 128)
    assert all(0 <= sentence.confidence <= 1 for sentence in draft.sentences)
    assert evidence_sheet_png(picture().pixels, draft).startswith(b"\x89PNG")


def test_only_pictures_reach_the_model() -> None:
    assert list(inspect.signature(ReportGenerator.generate).parameters) == ["self", "pictures", "options"]
    names = {item.name for item in dataclasses.fields(Picture)}
    assert not names & {"report", "text", "findings", "impression", "labels", "anatomy_groups"}


def _prefix(generator: ReportGenerator, seeds: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    model = generator._loaded.model
    images = torch.stack([torch.as_tensor(normalise(load_square(film(seed=seed), 64)[0])) for seed in seeds])
    leaf_mask = torch.zeros(len(seeds), 25, dtype=torch.bool)
    for row in range(len(seeds)):
        leaf_mask[row, row : row + 9] = True
    with torch.inference_mode():
        return model.prefix(model.encode(images), leaf_mask)


def test_generation_has_the_positions_of_training(generator: ReportGenerator) -> None:
    """Greedy search with cache, dropped slots and left pads = argmax of the training forward pass, token by token."""
    language, tokenizers = generator._loaded.model.language, generator._loaded.tokenizers
    prefix, mask = _prefix(generator, (0, 1, 2))
    prompts = [tokenizers.lm_ids(text) for text in ("Edema\n", "No Finding\n", "Fracture, Pleural Effusion, Edema\n")]
    options = GenerationOptions(num_beams=1, max_new_tokens=10, min_new_tokens=10)
    written = decode(language, tokenizers, prefix, mask, prompts, options)
    for row, prompt in enumerate(prompts):
        expected: list[int] = []
        while len(expected) < 10:
            ids = torch.tensor([[*prompt, *expected]])
            with torch.inference_mode():
                embeds = torch.cat([prefix[row : row + 1], language.embed(ids)], 1)
                hidden = language(embeds, torch.cat([mask[row : row + 1], torch.ones_like(ids, dtype=torch.bool)], 1))
                scores = language.logits(hidden[0, -1])
                scores[[tokenizers.newline_id, tokenizers.lm.eos_token_id]] = -torch.inf
            expected.append(int(scores.argmax()))
        assert written[row].tokens == expected
    assert len({tuple(row.tokens) for row in written}) == 3


def test_token_probabilities_are_those_of_the_training_pass(generator: ReportGenerator) -> None:
    language, tokenizers = generator._loaded.model.language, generator._loaded.tokenizers
    prefix, mask = _prefix(generator, (0, 1))
    prompts = [tokenizers.lm_ids(text) for text in ("Edema\n", "Fracture, Edema\n")]
    reports = [
        tokenizers.lm_ids("The heart"),
        tokenizers.lm_ids("No pneumothorax."),
    ]
    got = token_probabilities(language, prefix, mask, prompts, reports)
    assert [len(row) for row in got] == [len(report) for report in reports]
    ids = torch.tensor([[*prompts[0], *reports[0]]])
    with torch.inference_mode():
        hidden = language(torch.cat([prefix[:1], language.embed(ids)], 1), torch.cat([mask[:1], torch.ones_like(ids, dtype=torch.bool)], 1))
        expected = language.logits(hidden).softmax(-1)[0, -len(reports[0]) - 1 : -1]
    assert got[0] == pytest.approx([float(row[token]) for row, token in zip(expected, reports[0], strict=True)], rel=1e-3)


@pytest.mark.parametrize(("width", "height"), [(128, 128), (80, 200), (200, 90)])
def test_attention_at_a_cell_lands_where_the_transform_took_it_from(
    generator: ReportGenerator, monkeypatch: pytest.MonkeyPatch, width: int, height: int
) -> None:
    x, y = round(0.7 * width), round(0.3 * height)
    dot = np.zeros((height, width), np.uint8)
    dot[y - 4 : y + 4, x - 4 : x + 4] = 255
    square = np.asarray(load_square(dot, 64)[0])
    row, column = (int(place) // 8 for place in np.unravel_index(square.argmax(), square.shape))
    encode = generator._model.encode

    def looking_at_the_dot(image: torch.Tensor):
        encoded = encode(image)
        attention = torch.full_like(encoded.attention_BGN, 0.0)
        attention[:, :, row * 8 + column] = 1.0
        return dataclasses.replace(encoded, attention_BGN=attention)

    monkeypatch.setattr(generator._model, "encode", looking_at_the_dot)
    # Without the grounding terms maps are the attention itself.
    config = generator._loaded.config
    losses = config.losses.model_copy(update={"grounding": config.losses.grounding.model_copy(update={"enabled": False})})
    generator._loaded = dataclasses.replace(generator._loaded, config=config.model_copy(update={"losses": losses}))
    draft = generator.generate([dataclasses.replace(picture(width=width, height=height), pixels=dot)], FAST)[0]
    image = map_on_picture(draft.anatomy_maps[5], draft.map_frame, width, height)
    ys, xs = np.nonzero(image > 0.97)
    cell = max(width, height) / 8
    assert abs(xs.mean() - x) <= cell
    assert abs(ys.mean() - y) <= cell


def test_sentences_get_their_place_and_their_words_matter(generator: ReportGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = generator._loaded.tokenizers.lm_ids(REPORT)
    monkeypatch.setattr(module, "decode", lambda *_: [Written(tokens, [0.5] * len(tokens))])
    draft = generator.generate([picture()], FAST)[0]
    assert [sentence.text for sentence in draft.sentences][:3] == [
        "There is a moderate left pleural effusion.",
        "The heart is mildly enlarged.",
        "No pneumothorax.",
    ]
    effusion, heart, air = draft.sentences[:3]
    assert (effusion.finding, effusion.status) == ("Pleural Effusion", "present")
    assert any("left" in node for node in effusion.anatomy)
    assert not any("right" in node for node in effusion.anatomy)
    assert (heart.finding, heart.anatomy) == ("Cardiomegaly", ("cardiac silhouette",))
    assert (air.finding, air.status) == ("Pneumothorax", "absent")
    assert effusion.box is not None
    assert effusion.box.x1 <= 96
    assert effusion.box.y1 <= 128
    assert not np.array_equal(effusion.evidence, heart.evidence)
    assert all(sentence.evidence.sum() == pytest.approx(1, abs=1e-4) for sentence in draft.sentences)
    assert all(sentence.confidence > 0 for sentence in draft.sentences)


def test_an_empty_text_still_gives_findings(generator: ReportGenerator) -> None:
    language = generator._loaded.model.language.model
    newline = generator._loaded.tokenizers.lm_ids("\n")[0]
    with torch.no_grad():  # a language model that says newline whatever it sees
        language.transformer.ln_f.weight.zero_()
        language.transformer.ln_f.bias.copy_(100 * language.transformer.wte.weight[newline])
    draft = generator.generate([picture()], GenerationOptions(num_beams=1, min_new_tokens=0))[0]
    assert draft.sentences == ()
    assert len(draft.findings) == 14
    assert evidence_sheet_png(picture().pixels, draft).startswith(b"\x89PNG")


def test_a_black_film_gives_numbers(generator: ReportGenerator) -> None:
    black = dataclasses.replace(picture(), pixels=np.zeros((128, 96), np.uint8))
    json.dumps(generator.generate([black], FAST)[0].to_json(), allow_nan=False)


def test_time_limit_is_an_error(generator: ReportGenerator) -> None:
    with pytest.raises(TimeLimitError, match="time_limit_s"):
        generator.generate([picture()], GenerationOptions(time_limit_s=1e-6))


def test_no_room_for_a_report_is_an_error(generator: ReportGenerator) -> None:
    language, tokenizers = generator._loaded.model.language, generator._loaded.tokenizers
    prefix, mask = _prefix(generator, (0,))
    with pytest.raises(GenerationError, match="max_positions"):
        decode(language, tokenizers, prefix, mask, [[5] * 200], GenerationOptions())


def test_a_checkpoint_without_generation_stage_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(GenerationError, match="generation"):
        ReportGenerator.load(tiny_model_folder(tmp_path / "model", ("contrastive",))).generate([picture()])


def test_damaged_weights_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(GenerationError, match="finite"):
        ReportGenerator.load(tiny_model_folder(tmp_path / "model", spoil=True)).generate([picture()])
