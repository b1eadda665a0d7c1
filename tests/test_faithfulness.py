"""Faithfulness: what is removed, what it costs, and that nothing removed costs nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from evaluation_place import Place, make_place

from ssacl.data.dicom import read_picture
from ssacl.data.loader import open_split
from ssacl.data.shards import read_sample
from ssacl.data.storage import open_storage
from ssacl.data.transforms import load_square, normalise
from ssacl.evaluation import faithfulness as module
from ssacl.evaluation.faithfulness import faithfulness_scores
from ssacl.inference.generator import GenerationOptions, ReportGenerator
from ssacl.training.checkpoint import open_model

FAST = GenerationOptions(num_beams=1, max_new_tokens=24)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("faithfulness"))


def _picture(place: Place):
    storage = open_storage(str(place.data))
    return read_picture(read_sample(storage, open_split(storage, "test", purpose="evaluation")[0]).image)


def test_with_nothing_removed_the_model_is_given_its_own(place: Place) -> None:
    loaded, picture = open_model(str(place.model), "cpu"), _picture(place)
    generator = ReportGenerator(loaded, "cpu")
    image = torch.as_tensor(normalise(load_square(picture.pixels, loaded.config.model.vision.image_size_px)[0]))[None]
    with torch.inference_mode():
        encoded = loaded.model.encode(image)
        expected = generator.conditions(encoded, loaded.model.findings_read(encoded))
        seen, kept = module._seen_without(loaded.model, image, torch.zeros(1, 0, dtype=torch.long))
        given = generator.conditions(seen, loaded.model.findings_read(seen))
        assert torch.allclose(given.prefix, expected.prefix, atol=1e-5)
        assert given.prompts == expected.prompts
        assert kept.all()
        fewer, kept = module._seen_without(loaded.model, image, torch.tensor([[3, 7]]))
        assert (~kept).nonzero()[:, 1].tolist() == [3, 7]
        without = loaded.model.prefix(fewer, torch.ones(1, 25, dtype=torch.bool))[0]
        assert not torch.allclose(without[:, :25], expected.prefix[:, :25], atol=1e-4), "the leaves no longer see them"
    grid, side = loaded.config.model.vision.grid, loaded.config.model.vision.patch_size_px
    changed = (fewer.image_BCHW != image)[0].any(0).view(grid, side, grid, side).any(3).any(1)
    assert changed.flatten().nonzero().flatten().tolist() == [3, 7], "nor does the findings head, which reads the picture"


def test_a_sentence_that_rests_on_its_evidence_falls_more(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader for whom every removed patch costs what the sentence's map says of it."""
    loaded = open_model(str(place.model), "cpu")
    grid = loaded.config.model.vision.grid

    def reading(sign: float):
        def likelihoods(_generator: object, _loaded: object, _picture: object, draft: object, removals: list[np.ndarray]) -> np.ndarray:
            scores = [module._on_patches(sentence.evidence, grid) for sentence in draft.sentences]  # type: ignore[attr-defined]
            return np.array([[-sign * score[removed].sum() for score in scores] for removed in removals])

        return likelihoods

    monkeypatch.setattr(module, "_sentence_likelihoods", reading(1.0))
    faithful = faithfulness_scores(place.model, place.data, "test", limit=4, options=FAST)["all"]
    assert faithful["difference"] > 0
    assert faithful["interval"][0] > 0
    assert faithful["share_falling_more"] == 1.0
    monkeypatch.setattr(module, "_sentence_likelihoods", reading(-1.0))
    contrary = faithfulness_scores(place.model, place.data, "test", limit=4, options=FAST)["all"]
    assert contrary["interval"][1] < 0


def test_a_checkpoint_is_measured_from_end_to_end(place: Place) -> None:
    scores = faithfulness_scores(place.model, place.data, "test", limit=3, options=FAST)
    assert scores["all"]["num_films"] <= 3
    assert scores["all"]["num_sentences"] == sum(scores[kind]["num_sentences"] for kind in scores if kind != "all")
    assert np.isfinite(scores["all"]["drop_evidence"])
    low, high = scores["all"]["interval"]
    assert low <= scores["all"]["difference"] <= high


def test_sentence_likelihoods_add_up_to_that_of_the_report(place: Place) -> None:
    loaded, picture = open_model(str(place.model), "cpu"), _picture(place)
    generator = ReportGenerator(loaded, "cpu")
    (draft,) = generator.generate([picture], FAST)
    nothing = [np.zeros(0, np.int64)]
    by_sentence = module._sentence_likelihoods(generator, loaded, picture, draft, nothing)
    assert by_sentence.shape == (1, len(draft.sentences))
    assert (by_sentence < 0).all()
    removed = module._sentence_likelihoods(generator, loaded, picture, draft, [np.arange(10)])
    assert not np.allclose(removed, by_sentence, atol=1e-6), "the picture matters to the words"
