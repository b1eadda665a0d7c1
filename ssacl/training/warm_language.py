"""A language decoder taught on report texts alone, before it ever sees a film: transformers' Trainer over rows "newline, report, newline".

What comes out is a folder for `model.language.name_or_path`, with the tokenizers that belong to it.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssacl.config import LanguageConfig
from ssacl.data.reports import Sections, split_sections, training_text
from ssacl.data.tokenization import Tokenizers, pad, train_tokenizers
from ssacl.errors import ConfigError, DataError, StorageError, TrainingError
from ssacl.models.language import LanguageDecoder
from ssacl.training.sealed import new_folder, seal

logger = logging.getLogger(__name__)

TOKENIZERS = "tokenizers"
_CSV_FIELD_LIMIT = 2**20
_SAMPLE_LENGTH = 80


@dataclass(frozen=True)
class WarmOptions:
    """How the decoder is taught."""

    num_epochs: int = 10
    lr: float = 1e-3
    batch_size: int = 32
    max_tokens: int = 256
    """Longer reports are cut."""
    validation_share: float = 0.1
    """Share of the distinct texts that are never learned; perplexity is measured on them."""
    num_samples: int = 5
    seed: int = 0
    vocab_size: int = 4000
    """Of the tokenizers, where none are given."""
    language: LanguageConfig = field(default_factory=LanguageConfig)

    def __post_init__(self) -> None:
        if not 0 < self.validation_share < 1 or min(self.num_epochs, self.batch_size, self.num_samples, self.vocab_size) < 1:
            raise ConfigError("validation_share lies between 0 and 1; epochs, batch size, samples and vocabulary are at least 1.")
        if self.max_tokens < 3 or self.lr <= 0:
            raise ConfigError("max_tokens is at least 3 (a row is newline, report, newline), and lr is above 0.")

    def to_json(self) -> dict[str, Any]:
        """A plain tree."""
        return asdict(self) | {"language": self.language.model_dump(mode="json")}


@dataclass(frozen=True)
class WarmOutcome:
    """Perplexities are per token of the validation texts; samples are free text, drawn from the model."""

    perplexity_before: float
    perplexity_after: float
    samples_before: tuple[str, ...]
    samples_after: tuple[str, ...]
    num_train: int
    num_validation: int
    num_tokens: int
    """Tokens of one epoch."""


def read_report_texts(path: str | Path, findings: str = "findings", impression: str = "impression") -> list[str]:
    """Distinct report texts of a CSV file with the two columns, or of the `.txt` files below a folder, as training reads them.

    Raises
    ------
    DataError
        The columns are missing, a file is not UTF-8, or there is no text.
    StorageError
        It cannot be read.
    """
    source = Path(path)
    try:
        if source.is_dir():
            parts = [split_sections(file.read_text(encoding="utf-8")) for file in sorted(source.rglob("*.txt"))]
        else:
            parts = _rows(source, findings, impression)
    except OSError as error:
        raise StorageError(f"The texts at {source} cannot be read: {error.strerror}.") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{source} does not hold UTF-8 texts or CSV: {error}.") from error
    texts = list(dict.fromkeys(text for part in parts if (text := training_text(part))))
    if not texts:
        raise DataError(f"There is no report text in {source}: give a CSV file with findings and impression, or a folder of .txt files.")
    return texts


def _rows(path: Path, findings: str, impression: str) -> list[Sections]:
    csv.field_size_limit(_CSV_FIELD_LIMIT)
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        missing = {findings, impression} - set(reader.fieldnames or ())
        if missing:
            raise DataError(f"{path} has no column {', '.join(sorted(missing))}; name its columns with --findings and --impression.")
        return [Sections(" ".join((row[findings] or "").split()), " ".join((row[impression] or "").split())) for row in reader]


def warm_language(
    texts: Sequence[str],
    out_folder: str | Path,
    options: WarmOptions,
    tokenizers: Tokenizers | None = None,
    progress: Callable[[int, str], None] | None = None,
    start: Callable[[int, int], None] | None = None,
) -> WarmOutcome:
    """Teach a decoder; the folder appears when it is done, and the same call goes on at the last epoch after an interruption.

    Parameters
    ----------
    tokenizers
        Where they are given already; trained from the texts that are learned if not.
    start, progress
        Called with the number of optimizer steps and of those done before, and after each step with 1 and its loss.

    Raises
    ------
    ConfigError
        The tokenizer does not fit `options.language`.
    DataError
        Too few texts to split.
    TrainingError
        The loss is not finite.
    StorageError
        The disk is full or refuses.
    """
    train, held_out = split_texts(texts, options.validation_share)
    tokenizers = tokenizers or train_tokenizers(train, options.vocab_size, options.vocab_size)
    torch.manual_seed(options.seed)
    decoder = LanguageDecoder(options.language, tokenizers.lm)
    decoder.require_room(options.max_tokens)
    rows = [_row(text, tokenizers, options.max_tokens) for text in train]
    validation = [_row(text, tokenizers, options.max_tokens) for text in held_out]
    before = perplexity(decoder, validation, options.batch_size, tokenizers.lm_pad_id)
    samples_before = _samples(decoder, tokenizers, options)
    epochs = _teach(decoder, rows, tokenizers.lm_pad_id, Path(out_folder), options, tokenizers.fingerprint, progress, start)
    after = perplexity(decoder, validation, options.batch_size, tokenizers.lm_pad_id)
    if not math.isfinite(after):
        raise TrainingError("The language model's loss is not finite any more: lower --lr.")
    num_tokens = sum(len(row) - 1 for row in rows)
    outcome = WarmOutcome(before, after, samples_before, _samples(decoder, tokenizers, options), len(train), len(held_out), num_tokens)
    with new_folder(Path(out_folder)) as work:
        decoder.model.save_pretrained(work)
        tokenizers.save(work / TOKENIZERS)
        seal(work, {"kind": "language", "texts_sha256": _digest(texts), "options": options.to_json(), "figures": asdict(outcome)})
    shutil.rmtree(epochs, ignore_errors=True)
    return outcome


def perplexity(decoder: LanguageDecoder, rows: Sequence[Sequence[int]], batch_size: int, pad_id: int) -> float:
    """exp of the mean negative log-likelihood of every token but each row's first."""
    model, total, count = decoder.model.eval(), 0.0, 0
    with torch.inference_mode():
        for first in range(0, len(rows), batch_size):
            ids, mask = (part.to(model.device) for part in pad(rows[first : first + batch_size], pad_id))
            scores = model(input_ids=ids, attention_mask=mask.long()).logits[:, :-1].float().log_softmax(-1)
            chosen = scores.gather(2, ids[:, 1:, None])[..., 0]
            total -= float((chosen * mask[:, 1:]).sum())
            count += int(mask[:, 1:].sum())
    return math.exp(min(total / max(count, 1), 700.0))


def _teach(
    decoder: LanguageDecoder,
    rows: list[list[int]],
    pad_id: int,
    out_folder: Path,
    options: WarmOptions,
    fingerprint: str,
    progress: Callable[[int, str], None] | None,
    start: Callable[[int, int], None] | None,
) -> Path:
    """Fit the decoder; gives the folder of its last epoch, from which the same call goes on."""
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        ids, mask = pad([item["input_ids"] for item in batch], pad_id)
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}

    class Tell(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if start is not None:
                start(state.max_steps, state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if progress is not None:
                progress(1, f"loss {state.log_history[-1]['loss']:.3f}" if state.log_history else "")

    # Its name follows from all that shapes the weights: other options never go on from these epochs.
    key = json.dumps([options.to_json(), fingerprint, _digest(map(str, rows))])
    work = out_folder.absolute().parent / f".{out_folder.name}.{hashlib.sha256(key.encode()).hexdigest()[:12]}.epochs"
    trainer = Trainer(
        decoder.model,
        TrainingArguments(
            output_dir=str(work),
            num_train_epochs=options.num_epochs,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.lr,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            weight_decay=0.05,
            # Rows of like length together: the longest report is three times the median.
            train_sampling_strategy="group_by_length",
            save_strategy="epoch",
            save_total_limit=1,
            logging_steps=10,
            report_to="none",
            disable_tqdm=True,
            seed=options.seed,
            remove_unused_columns=False,
            use_cpu=not torch.cuda.is_available(),
        ),
        data_collator=collate,
        train_dataset=[{"input_ids": row} for row in rows],
        callbacks=[Tell()],
    )
    # It prints its logs to stdout, where a command's result belongs.
    trainer.remove_callback(PrinterCallback)
    last = get_last_checkpoint(str(work)) if work.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    return work


def _samples(decoder: LanguageDecoder, tokenizers: Tokenizers, options: WarmOptions) -> tuple[str, ...]:
    """Texts drawn from the model, top 50 tokens at a time."""
    model = decoder.model.eval()
    newline = tokenizers.newline_id
    first = torch.full((options.num_samples, 1), newline, dtype=torch.long, device=model.device)
    torch.manual_seed(options.seed)
    drawn = model.generate(
        input_ids=first,
        attention_mask=torch.ones_like(first),
        do_sample=True,
        top_k=50,
        max_new_tokens=min(_SAMPLE_LENGTH, options.max_tokens - 1),
        eos_token_id=newline,
        pad_token_id=tokenizers.lm_pad_id,
    )
    return tuple(" ".join(text.split()) for text in tokenizers.lm.batch_decode(drawn[:, 1:], skip_special_tokens=True))


def _row(text: str, tokenizers: Tokenizers, max_tokens: int) -> list[int]:
    newline = tokenizers.newline_id
    return [newline, *tokenizers.lm_ids(text)[: max_tokens - 2], newline]


def split_texts(texts: Sequence[str], share: float) -> tuple[list[str], list[str]]:
    """Texts to learn and texts to measure on, by a hash of the words: texts that differ in case or stops alone lie on one side.

    Raises
    ------
    DataError
        One side is empty.
    """
    held_out: list[str] = []
    train: list[str] = []
    for text in dict.fromkeys(texts):
        words = "".join(letter for letter in text.lower() if letter.isalnum())
        place = int(hashlib.sha256(words.encode()).hexdigest()[:8], 16) / 2**32
        (held_out if place < share else train).append(text)
    if not held_out or not train:
        raise DataError(f"{len(texts)} distinct texts leave nothing to learn or nothing to measure on; give more texts.")
    return train, held_out


def _digest(texts: Any) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()
