"""Batches: shapes, determinism, prompts, laterality, entities and sentences."""

import dataclasses
import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ssacl.anatomy import FINDING_INDEX, FINDINGS, LEAF_INDEX, LEAVES, FindingStatus
from ssacl.config import AugmentConfig, DataConfig, VisionConfig
from ssacl.data.collate import MAX_SENTENCES, Collator
from ssacl.data.records import Batch, Sample
from ssacl.data.tokenization import Tokenizers, train_tokenizers
from ssacl.errors import DataError, ImageError

STILL = AugmentConfig(rotate_deg=0, scale=(1, 1), shift=0, brightness=0)
VISION = VisionConfig(image_size_px=32, patch_size_px=8, width=12, num_heads=2, decoder_width=12, decoder_num_heads=2)
FINDING_TEXT = "Small right pleural effusion. Possible left lower lobe pneumonia. The heart is normal in size. No pneumothorax."


def sample(key: str, findings: str = FINDING_TEXT, impression: str = "", **more: object) -> Sample:
    pixels = np.zeros((40, 40), np.uint8)
    pixels[:, :10] = 200
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return Sample(key=key, image=buffer.getvalue(), image_format="png", findings=findings, impression=impression, **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tokenizers() -> Tokenizers:
    return train_tokenizers([FINDING_TEXT, FINDING_TEXT.replace("right", "left"), "Normal chest."], 400, 400)


def collator(tokenizers: Tokenizers, training: bool = True, seed: int = 0, **data: object) -> Collator:
    return Collator(DataConfig(**{"augment": STILL, **data}), VISION, tokenizers, seed, training)  # type: ignore[arg-type]


def same(first: Batch, second: Batch) -> bool:
    pairs = ((getattr(first, item.name), getattr(second, item.name)) for item in dataclasses.fields(Batch))
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


def test_shapes_and_types(tokenizers: Tokenizers) -> None:
    batch = collator(tokenizers)([sample("a"), sample("b", "", ""), sample("c", "Normal chest.")], 0)
    assert batch.image.shape == (3, 3, 32, 32)
    assert batch.image.dtype == batch.mask_noise.dtype == batch.warp.dtype == torch.float32
    assert batch.mask_noise.shape == (3, 16)
    assert batch.leaf_mask.shape == (3, 25)
    assert batch.entities.shape == (3, 25, 14)
    assert batch.labels.shape == (3, 14)
    assert batch.has_text.tolist() == batch.has_labels.tolist() == [True, False, True]
    for name in ("text_mask", "prompt_mask", "report_mask", "sentence_mask", "leaf_mask", "has_text", "sentence_leaves"):
        assert getattr(batch, name).dtype == torch.bool
    for name in ("text_ids", "prompt_ids", "report_ids", "labels", "entities", "sentence_row", "warp_padding"):
        assert getattr(batch, name).dtype == torch.int64
    assert batch.text_ids[:, 0].tolist() == [2, 2, 2]
    assert not batch.report_mask[1].any()
    assert not batch.prompt_mask[1].any()
    assert batch.leaf_mask[1].all()
    assert batch.keys == ("a", "b", "c")


def test_a_row_depends_on_seed_epoch_and_key_only(tokenizers: Tokenizers) -> None:
    make = collator(tokenizers, augment=AugmentConfig())
    alone, together = make([sample("a")], 3), collator(tokenizers, augment=AugmentConfig())([sample("b"), sample("a")], 3)
    for name in ("image", "mask_noise", "warp", "warp_padding", "labels", "leaf_mask", "entities"):
        assert torch.equal(getattr(alone, name)[0], getattr(together, name)[1])
    assert alone.text_ids[0][alone.text_mask[0]].tolist() == together.text_ids[1][together.text_mask[1]].tolist()
    assert same(make([sample("a")], 3), alone)
    assert not torch.equal(make([sample("a")], 4).mask_noise, alone.mask_noise)
    assert not torch.equal(collator(tokenizers, seed=1)([sample("a")], 3).mask_noise, alone.mask_noise)


def test_evaluation_is_plain_and_the_same_in_every_epoch(tokenizers: Tokenizers) -> None:
    make = collator(tokenizers, training=False, augment=AugmentConfig(flip="naive"))
    batch = make([sample("a")], 0)
    assert same(batch, make([sample("a")], 7))
    assert tokenizers.lm.decode(batch.report_ids[0]) == FINDING_TEXT + "\n"
    assert tokenizers.lm.decode(batch.prompt_ids[0]) == "Pneumonia, Pleural Effusion\n"
    assert batch.text_ids[0].tolist() == tokenizers.text_ids(FINDING_TEXT)
    assert batch.image[0, 0, 16, 2] > batch.image[0, 0, 16, 28]
    sided = collator(tokenizers, training=False, entity_prompt_sides=True)([sample("a"), sample("b", "Bilateral pleural effusions.")], 0)
    assert tokenizers.lm.decode(sided.prompt_ids[0]) == "left Pneumonia, right Pleural Effusion\n"
    assert tokenizers.lm.decode(sided.prompt_ids[1][sided.prompt_mask[1]]) == "Pleural Effusion\n"
    cut = collator(tokenizers, training=False, lm_max_tokens=2)([sample("a")], 0)
    assert (cut.report_ids.shape[1], cut.prompt_ids.shape[1]) == (2, 2), "validation fits where training did"


def test_prompt_coin_policy_and_no_finding(tokenizers: Tokenizers) -> None:
    samples = [sample(str(index)) for index in range(200)]
    share = collator(tokenizers, entity_prompt_share=0.5)(samples, 0).prompt_mask.any(1).float().mean()
    assert 0.35 < share < 0.65
    assert collator(tokenizers, entity_prompt_share=0.0)(samples[:9], 0).prompt_mask.sum() == 0
    by_batch = collator(tokenizers, entity_prompt_share=0.5, entity_prompt_coin="batch")
    tossed = [by_batch(samples[i : i + 4], 0).prompt_mask.any(1) for i in range(0, 200, 4)]
    assert all(bool(rows.all()) or not bool(rows.any()) for rows in tossed)
    assert 0.25 < torch.stack(tossed).float().mean() < 0.75
    plain = collator(tokenizers, training=False, uncertain="absent")([sample("a"), sample("b", "Normal chest.")], 0)
    prompts = [tokenizers.lm.decode(ids[mask]) for ids, mask in zip(plain.prompt_ids, plain.prompt_mask, strict=True)]
    assert prompts == ["Pleural Effusion\n", "No Finding\n"]
    groups = plain.leaf_mask[0]
    assert groups[LEAF_INDEX["abdomen"]]
    assert not groups[LEAF_INDEX["spine"]]
    assert plain.leaf_mask[1].all()


def test_given_labels_win_over_the_text(tokenizers: Tokenizers) -> None:
    labels = [int(FindingStatus.ABSENT)] * 14
    labels[FINDING_INDEX["Fracture"]] = int(FindingStatus.PRESENT)
    batch = collator(tokenizers, training=False)([sample("a", labels=tuple(labels)), sample("b", "", "", labels=tuple(labels))], 0)
    assert tokenizers.lm.decode(batch.prompt_ids[0][batch.prompt_mask[0]]) == "Fracture\n"
    assert batch.has_labels.tolist() == [True, True]
    assert batch.has_text.tolist() == [True, False]
    with pytest.raises(DataError, match="has 3 labels, expected 14"):
        collator(tokenizers)([sample("a", labels=(0, 1, 2))], 0)


def test_training_cuts_reports_and_text(tokenizers: Tokenizers) -> None:
    batch = collator(tokenizers, lm_max_tokens=5, text_max_tokens=7, shuffle_sentences=False)([sample("a")], 0)
    assert batch.report_ids.shape[1] == 5
    assert tokenizers.newline_id not in batch.report_ids
    assert batch.text_ids.shape[1] == 7
    whole = collator(tokenizers)([sample("a")], 0).report_ids[0]
    assert whole[-1] == tokenizers.newline_id


def test_contrastive_text_is_shuffled_and_cut(tokenizers: Tokenizers) -> None:
    make = collator(tokenizers)
    texts = {tokenizers.text.decode(make([sample("a")], epoch).text_ids[0].tolist()) for epoch in range(12)}
    assert len(texts) > 6
    lengths = {text.count(".") for text in texts}
    assert lengths == {2, 3, 4}


def test_entities_and_sentences(tokenizers: Tokenizers) -> None:
    batch = collator(tokenizers, training=False)([sample("a")], 0)
    status = {(LEAVES[leaf], FINDINGS[name]): int(value) for (leaf, name), value in np.ndenumerate(batch.entities[0].numpy()) if value != 3}
    assert status["right costophrenic angle", "Pleural Effusion"] == FindingStatus.PRESENT
    assert status["left lower lung zone", "Pneumonia"] == FindingStatus.PRESENT
    assert status["right atrium", "Cardiomegaly"] == FindingStatus.ABSENT
    assert status["left apical zone", "Pneumothorax"] == FindingStatus.ABSENT
    assert ("left costophrenic angle", "Pleural Effusion") not in status
    for policy, wanted in (("absent", FindingStatus.ABSENT), ("ignore", FindingStatus.UNCERTAIN)):
        other = collator(tokenizers, training=False, uncertain=policy)([sample("a")], 0)
        assert other.entities[0, LEAF_INDEX["left lower lung zone"], FINDING_INDEX["Pneumonia"]] == wanted
    effusion, pneumonia = FINDING_INDEX["Pleural Effusion"], FINDING_INDEX["Pneumonia"]
    assert batch.sentence_finding.tolist() == [effusion, pneumonia, 14, 14]
    assert batch.sentence_leaves[1].nonzero().flatten().tolist() == [LEAF_INDEX["left lower lung zone"]]
    assert batch.sentence_ids[0][batch.sentence_mask[0]].tolist() == tokenizers.text_ids("Small right pleural effusion.")


def test_sentences_are_bounded_and_may_be_none(tokenizers: Tokenizers) -> None:
    many = "No effusion. " * 20 + "Right apical pneumothorax."
    batch = collator(tokenizers)([sample("a", many), sample("b")], 0)
    assert (batch.sentence_row == 0).sum() == MAX_SENTENCES
    assert FINDING_INDEX["Pneumothorax"] in batch.sentence_finding
    none = collator(tokenizers)([sample("a", "Normal chest.")], 0)
    assert none.sentence_ids.shape[0] == none.sentence_leaves.shape[0] == 0


def _flipping(tokenizers: Tokenizers, kind: str, text: str) -> tuple[Batch, bool]:
    """The first epoch in which the picture is mirrored (or the last tried), and whether it was."""
    make = collator(tokenizers, augment=STILL.model_copy(update={"flip": kind}), shuffle_sentences=False, entity_prompt_share=1.0)
    for epoch in range(30):
        batch = make([sample("a", text)], epoch)
        if batch.image[0, 0, 16, 28] > batch.image[0, 0, 16, 2]:
            return batch, True
    return batch, False


def test_laterality_flip_turns_picture_words_and_places_together(tokenizers: Tokenizers) -> None:
    batch, flipped = _flipping(tokenizers, "laterality_swap", FINDING_TEXT)
    assert flipped
    mirrored = FINDING_TEXT.replace("right", "LEFT").replace("left", "right").replace("LEFT", "left")
    plain = collator(tokenizers, training=False)([sample("a", mirrored)], 0)
    assert torch.equal(batch.report_ids, plain.report_ids)
    assert torch.equal(batch.entities, plain.entities)
    assert torch.equal(batch.sentence_leaves, plain.sentence_leaves)
    assert torch.equal(batch.labels, plain.labels)
    assert torch.equal(batch.text_ids, plain.text_ids)


def test_naive_flip_turns_the_picture_alone_and_unmirrorable_text_stays(tokenizers: Tokenizers) -> None:
    batch, flipped = _flipping(tokenizers, "naive", FINDING_TEXT)
    plain = collator(tokenizers, training=False)([sample("a")], 0)
    assert flipped
    assert torch.equal(batch.report_ids, plain.report_ids)
    assert torch.equal(batch.entities, plain.entities)
    assert not _flipping(tokenizers, "laterality_swap", "RML opacity.")[1]
    assert not _flipping(tokenizers, "none", FINDING_TEXT)[1]


def test_warp_ranges(tokenizers: Tokenizers) -> None:
    batch = collator(tokenizers)([sample(str(index)) for index in range(100)], 0)
    reach = torch.tensor([np.deg2rad(15.0), 0.25, 0.3, 0.3])
    assert (batch.warp.abs() <= reach + 1e-6).all()
    assert (batch.warp.abs().amax(0) > 0.8 * reach).all()
    assert set(batch.warp_padding.tolist()) == {0, 1, 2}


def test_damaged_picture(tokenizers: Tokenizers) -> None:
    with pytest.raises(ImageError):
        collator(tokenizers)([dataclasses.replace(sample("a"), image=b"xx")], 0)
    with pytest.raises(DataError, match="no samples"):
        collator(tokenizers)([], 0)
