"""Both tokenizers: training, saving, loading, and what the model relies on."""

import random
import tracemalloc
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from ssacl.anatomy import FINDINGS, LEAVES, NODES
from ssacl.data.storage import open_storage
from ssacl.data.tokenization import Tokenizers, pad, train_tokenizers
from ssacl.data.vocabulary import WordCounts
from ssacl.errors import CheckpointError, ConfigError, DataError

SHARED = Path(__file__).parents[2] / "shared"
TEXTS = [
    f"There is a {size} {side} pleural effusion. The heart is {heart}. No pneumothorax, {number} mm nodule."
    for size in ("small", "moderate", "large")
    for side in ("right", "left")
    for heart in ("normal", "enlarged", "not enlarged")
    for number in (2, 12)
]


@pytest.fixture(scope="module")
def tokenizers() -> Tokenizers:
    return train_tokenizers(TEXTS, text_vocab_size=400, lm_vocab_size=500)


def test_special_tokens_and_case(tokenizers: Tokenizers) -> None:
    assert [tokenizers.text.token_to_id(token) for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")] == [0, 1, 2, 3, 4]
    assert tokenizers.text_ids("Heart") == tokenizers.text_ids("heart")
    assert tokenizers.text_ids("heart")[0] == 2
    assert len(tokenizers.text_ids("the heart is normal " * 20, max_tokens=10)) == 10


def test_language_model_side(tokenizers: Tokenizers) -> None:
    text = "Small left pleural effusion.\nÄrzte 2.5 cm ___\n"
    ids = tokenizers.lm_ids(text)
    assert tokenizers.lm.decode(ids) == text
    assert ids.count(tokenizers.newline_id) == 2
    assert tokenizers.lm_ids("\n") == [tokenizers.newline_id]
    assert tokenizers.lm.eos_token_id == tokenizers.lm_pad_id != tokenizers.newline_id


def test_training_is_deterministic_and_ignores_order(tokenizers: Tokenizers) -> None:
    shuffled = random.Random(3).sample(TEXTS, len(TEXTS))
    assert train_tokenizers(shuffled, 400, 500).fingerprint == tokenizers.fingerprint
    assert train_tokenizers(TEXTS[:6], 400, 500).fingerprint != tokenizers.fingerprint
    assert train_tokenizers(TEXTS, 300, 400).text.get_vocab_size() <= 300


def test_it_learns_what_training_on_the_texts_themselves_learns(tokenizers: Tokenizers) -> None:
    """Counted words against the trainers' own reading of the same texts."""
    names = [", ".join(FINDINGS), ", ".join(NODES)] * 3
    whole = Tokenizer(models.BPE())
    whole.pre_tokenizer = tokenizers.lm.backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    whole.train_from_iterator([f"{text}\n" for text in (*TEXTS, *names)], trainer=trainer)
    assert whole.get_vocab().keys() == tokenizers.lm.get_vocab().keys()


def test_texts_are_read_once_and_not_kept() -> None:
    texts = (f"Opacity {number % 300} in the left lung. " * 40 for number in range(200))
    counts = WordCounts()
    tracemalloc.start()
    try:
        assert counts.add(texts) == 200
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # 260 kB of text, 206 distinct words; what one text needs while it is cut into words is most of the peak.
    assert peak < 130_000
    assert counts.byte_pairs(400).backend_tokenizer.encode(" Opacity").tokens == ["ĠOpacity"]


def test_round_trips(tokenizers: Tokenizers, tmp_path: Path) -> None:
    tokenizers.save(tmp_path / "folder")
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["language_model", "wordpiece.json"]
    tokenizers.upload(open_storage(tmp_path / "stored"))
    for loaded in (
        Tokenizers.load(tmp_path / "folder"),
        Tokenizers.load(str(tmp_path / "folder")),
        Tokenizers.load(open_storage(tmp_path / "stored")),
    ):
        assert loaded.fingerprint == tokenizers.fingerprint
        assert loaded.text_ids(TEXTS[0]) == tokenizers.text_ids(TEXTS[0])
        assert loaded.lm_ids(TEXTS[0]) == tokenizers.lm_ids(TEXTS[0])
        assert loaded.lm_pad_id == tokenizers.lm_pad_id


def test_leaf_names_have_no_cls_and_are_padded_to_the_longest(tokenizers: Tokenizers) -> None:
    ids, mask = tokenizers.leaf_names_ids(LEAVES)
    assert ids.shape == mask.shape == (25, mask.sum(1).max())
    assert (ids[:, 0] != 2).all()
    assert (ids[~mask] == tokenizers.text_pad_id).all()
    assert not (ids == 1).any()


def test_named_errors(tokenizers: Tokenizers, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="ssacl data tokenizer"):
        Tokenizers.load(tmp_path)
    with pytest.raises(DataError, match="is missing"):
        Tokenizers.load(open_storage(tmp_path / "empty"))
    with pytest.raises(DataError, match="no report text"):
        train_tokenizers(["", "  "])
    with pytest.raises(ConfigError, match="text_vocab_size is 0; expected at least 100"):
        train_tokenizers(TEXTS, 0)
    with pytest.raises(ConfigError, match="lm_vocab_size is 256"):
        train_tokenizers(TEXTS, 400, 256)
    tokenizers.save(tmp_path)
    (tmp_path / "wordpiece.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Tokenizers.load(tmp_path)


def test_the_released_style_wordpiece_loads(tokenizers: Tokenizers) -> None:
    path = SHARED / "parity" / "small_wordpiece.json"
    if not path.exists():
        pytest.skip("needs ../shared/parity, which only a full checkout has")
    mixed = Tokenizers(Tokenizer.from_file(str(path)), tokenizers.lm)
    assert mixed.text_ids("clear")[0] == mixed.text.token_to_id("[CLS]") == 2
    ids, _ = mixed.leaf_names_ids(["right upper lung zone", "trachea"])
    assert ids[0].tolist() == [129, 142, 116, 145]


def test_pad() -> None:
    ids, mask = pad([[5, 6], [], [7]], pad_id=9)
    assert ids.tolist() == [[5, 6], [9, 9], [7, 9]]
    assert mask.tolist() == [[True, True], [False, False], [True, False]]
    assert pad([[], []], pad_id=0)[0].shape == (2, 1)
