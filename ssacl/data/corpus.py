"""The text of a data set's training split, and the tokenizers trained from it."""

from __future__ import annotations

from collections.abc import Iterator

from ssacl.config import DataConfig
from ssacl.data.loader import open_split
from ssacl.data.reports import training_text
from ssacl.data.shards import read_sample
from ssacl.data.storage import Storage, open_storage
from ssacl.data.tokenization import Tokenizers, train_tokenizers


def training_reports(storage: Storage) -> Iterator[str]:
    """Every report of the training split, as the default sections give it; samples without one are passed over."""
    for entry in open_split(storage, "train", purpose="training"):
        text = training_text(read_sample(storage, entry), DataConfig().sections)
        if text:
            yield text


def train_dataset_tokenizers(data_url: str, out_url: str | None, text_vocab_size: int, lm_vocab_size: int) -> Tokenizers:
    """Train both tokenizers from the training reports and store them, beside the data set unless `out_url` says where.

    Reports are read one after the other and not kept: see `vocabulary.WordCounts`.

    Raises
    ------
    DataError
        The training split has no report.
    ConfigError
        A vocabulary is too small.
    """
    storage = open_storage(data_url)
    tokenizers = train_tokenizers(training_reports(storage), text_vocab_size, lm_vocab_size)
    tokenizers.upload(open_storage(out_url) if out_url else storage)
    return tokenizers
