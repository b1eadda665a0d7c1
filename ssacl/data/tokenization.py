"""The two tokenizers of a model: WordPiece for the text encoder, byte-level BPE for the language model.

They are trained from the corpus, or loaded from a folder or object storage that holds `wordpiece.json` and `language_model/` (a Hugging
Face tokenizer). Loading a GPT-2 or another causal LM's own tokenizer works the same way: put its files under `language_model/`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, processors
from torch import Tensor

from ssacl.data.vocabulary import WordCounts
from ssacl.errors import CheckpointError, ConfigError, DataError, GenerationError

if TYPE_CHECKING:
    from ssacl.data.storage import Storage

logger = logging.getLogger(__name__)

TEXT_FILE = "wordpiece.json"
LM_FOLDER = "language_model"
LM_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")
"""Files that a Hugging Face tokenizer may consist of; the first is always there, the LM's weights are none of ours."""
MIN_TEXT_VOCAB, MIN_LM_VOCAB = 100, 300
"""The smallest vocabularies that training makes; bytes alone are 256."""


class AbsentLanguageTokenizer:
    """Stands for the language model's tokenizer where a checkpoint came without it: sizes can be asked, text cannot.

    Raises
    ------
    GenerationError
        Anything that would need the vocabulary is asked for.
    """

    bos_token_id = eos_token_id = pad_token_id = pad_token = None

    def __len__(self) -> int:
        return 0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise GenerationError(
            "This checkpoint has no tokenizer of its language model, so that it can neither write nor learn to write text: import it again "
            "with `ssacl checkpoint import ... --language-model DIR`."
        )


class Tokenizers:
    """The pair that a model is trained with.

    Parameters
    ----------
    text
        `tokenizers.Tokenizer`; must know [PAD], [UNK] and [CLS]. Encoding with special tokens puts [CLS] in front.
    lm
        `transformers.PreTrainedTokenizerFast`; a missing pad token becomes the end-of-text token. Or an `AbsentLanguageTokenizer`.

    Raises
    ------
    CheckpointError
        A special token is missing, or the newline, which ends prompts and reports, is not one token of `lm`.
    """

    def __init__(self, text: Any, lm: Any) -> None:
        missing = [token for token in ("[PAD]", "[UNK]", "[CLS]") if text.token_to_id(token) is None]
        if missing:
            raise CheckpointError(f"{TEXT_FILE} has no {', '.join(missing)}; train tokenizers with `ssacl data tokenizer`.")
        if text.post_processor is None:
            text.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", text.token_to_id("[CLS]"))])
        text.no_padding()
        text.no_truncation()
        self.text = text
        self.lm = lm
        if self.has_language:
            self._prepare_language(lm)

    def _prepare_language(self, lm: Any) -> None:
        if lm.pad_token is None:
            if lm.eos_token is None:
                raise CheckpointError(
                    f"The tokenizer in {LM_FOLDER}/ has neither a pad nor an end-of-text token; set one in its configuration."
                )
            lm.pad_token = lm.eos_token
        lm.backend_tokenizer.no_padding()
        lm.backend_tokenizer.no_truncation()
        newline = lm.backend_tokenizer.encode("\n", add_special_tokens=False).ids
        if len(newline) != 1 or newline[0] == lm.pad_token_id:
            raise CheckpointError(
                f"The tokenizer in {LM_FOLDER}/ writes a newline as {len(newline)} tokens; reports need one token that ends them."
            )
        self._newline_id: int = newline[0]

    @property
    def has_language(self) -> bool:
        """False when only the text encoder's tokenizer is known."""
        return not isinstance(self.lm, AbsentLanguageTokenizer)

    @property
    def newline_id(self) -> int:
        return self._newline_id if self.has_language else int(self.lm.newline_id)

    @property
    def text_pad_id(self) -> int:
        return int(self.text.token_to_id("[PAD]"))

    @property
    def lm_pad_id(self) -> int:
        return int(self.lm.pad_token_id if self.has_language else self.lm.lm_pad_id)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over both vocabularies and rules: equal for tokenizers that encode alike, whatever their formatting on disk."""
        # Truncation and padding are set per call, so they are no part of what a checkpoint depends on.
        used = (self.text, self.lm.backend_tokenizer) if self.has_language else (self.text,)
        trees = [json.loads(tokenizer.to_str()) for tokenizer in used]
        for tree in trees:
            tree.pop("truncation", None)
            tree.pop("padding", None)
        if self.has_language:
            trees.append({"pad": self.lm_pad_id, "newline": self.newline_id})
        return hashlib.sha256(json.dumps(trees, sort_keys=True).encode()).hexdigest()

    def text_ids(self, text: str, max_tokens: int | None = None) -> list[int]:
        """Ids of `text` with a leading [CLS], cut to `max_tokens`."""
        ids: list[int] = self.text.encode(text).ids
        return ids[:max_tokens]

    def lm_ids(self, text: str) -> list[int]:
        """Ids of `text` for the language model, no special tokens, no cut."""
        # The wrapper's own encode() sets truncation on the shared object: two loader threads would clash.
        ids: list[int] = self.lm.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def leaf_names_ids(self, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Names without [CLS] (as released), padded to the longest: ids [M, L] int64, mask [M, L] bool."""
        rows = [self.text.encode(name, add_special_tokens=False).ids for name in names]
        return pad(rows, self.text_pad_id)

    def save(self, folder: str | Path) -> None:
        """Write `wordpiece.json` and, where there is a language tokenizer, `language_model/`; each file appears whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".tokenizers-") as name:
            work = Path(name)
            self.text.save(str(work / TEXT_FILE))
            if self.has_language:
                (folder / LM_FOLDER).mkdir(exist_ok=True)
                self.lm.save_pretrained(str(work / LM_FOLDER))
            os.replace(work / TEXT_FILE, folder / TEXT_FILE)
            if not self.has_language:
                return
            for path in sorted((work / LM_FOLDER).iterdir()):
                os.replace(path, folder / LM_FOLDER / path.name)

    @classmethod
    def load(cls, source: str | Path | Storage, *, text_only: bool = False) -> Tokenizers:
        """Read what `save` wrote, from a folder, an s3:// prefix, or an open storage.

        `text_only` (a local folder) reads `wordpiece.json` alone: whatever needs the language tokenizer then fails by name.

        Raises
        ------
        DataError
            No tokenizers there.
        CheckpointError
            The files are damaged, or see the class.
        StorageError
            The storage cannot be reached.
        """
        if not isinstance(source, str | Path):
            return cls._download(source)
        if isinstance(source, str) and "://" in source:
            from ssacl.data.storage import open_storage

            return cls._download(open_storage(source))
        folder = Path(source)
        if not (folder / TEXT_FILE).is_file() or not (text_only or (folder / LM_FOLDER).is_dir()):
            raise DataError(f"No tokenizers in {folder} ({TEXT_FILE} and {LM_FOLDER}/); train them with `ssacl data tokenizer`.")
        from transformers import PreTrainedTokenizerFast

        try:
            text = Tokenizer.from_file(str(folder / TEXT_FILE))
            lm = (
                AbsentLanguageTokenizer()
                if text_only
                else PreTrainedTokenizerFast.from_pretrained(str(folder / LM_FOLDER), local_files_only=True)
            )
        # The Rust side raises bare Exception for a damaged file.
        except Exception as error:
            raise CheckpointError(f"The tokenizers in {folder} cannot be read; train them again with `ssacl data tokenizer`.") from error
        return cls(text, lm)

    @classmethod
    def _download(cls, storage: Storage) -> Tokenizers:
        from ssacl.data.storage import MissingObjectError

        with tempfile.TemporaryDirectory(prefix="ssacl-tokenizers-") as name:
            folder = Path(name)
            (folder / LM_FOLDER).mkdir()
            for key in (TEXT_FILE, *(f"{LM_FOLDER}/{file}" for file in LM_FILES)):
                try:
                    (folder / key).write_bytes(storage.read(key))
                except MissingObjectError as error:
                    if key in (TEXT_FILE, f"{LM_FOLDER}/{LM_FILES[0]}"):
                        raise DataError(
                            f"No tokenizers at {storage.url} ({key} is missing); train them with `ssacl data tokenizer`."
                        ) from error
            return cls.load(folder)

    def upload(self, storage: Storage) -> None:
        """Write the same files to an open storage, `wordpiece.json` last."""
        with tempfile.TemporaryDirectory(prefix="ssacl-tokenizers-") as name:
            self.save(name)
            for path in sorted((Path(name) / LM_FOLDER).iterdir()):
                storage.upload(f"{LM_FOLDER}/{path.name}", path)
            storage.upload(TEXT_FILE, Path(name) / TEXT_FILE)


def train_tokenizers(texts: Iterable[str], text_vocab_size: int = 30000, lm_vocab_size: int = 50257) -> Tokenizers:
    """Train both from report texts, read once. The same texts give the same tokenizers, in whatever order they come.

    Small corpora give smaller vocabularies than asked for. Leaf names and finding names are added to the corpus, so that no query is
    spelled in single letters.

    Raises
    ------
    ConfigError
        A vocabulary is too small to hold single characters.
    DataError
        No text at all.
    """
    from ssacl.anatomy import FINDINGS, NODES

    for name, size, least in (("text", text_vocab_size, MIN_TEXT_VOCAB), ("lm", lm_vocab_size, MIN_LM_VOCAB)):
        if size < least:
            raise ConfigError(f"{name}_vocab_size is {size}; expected at least {least}, so that it holds more than single characters.")
    counts = WordCounts()
    number = counts.add(texts)
    if not number:
        raise DataError(
            "There is no report text to train tokenizers from; ingest studies with reports, or give tokenizers with data.tokenizer_url."
        )
    counts.add([", ".join(FINDINGS), ", ".join(NODES)] * 3)
    text, lm = counts.wordpiece(text_vocab_size), counts.byte_pairs(lm_vocab_size)
    logger.info("tokenizers trained on %d reports: %d text tokens, %d language-model tokens", number, text.get_vocab_size(), len(lm))
    return Tokenizers(text, lm)


def pad(rows: Sequence[Sequence[int]], pad_id: int, min_length: int = 1) -> tuple[Tensor, Tensor]:
    """Right-pad id lists to the longest: ids [B, L] int64, mask [B, L] bool; L is at least `min_length`."""
    length = max([min_length, *(len(row) for row in rows)])
    ids = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(rows), length), dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[index, : len(row)] = True
    return ids, mask
