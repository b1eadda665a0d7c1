"""Language decoder: any Hugging Face causal LM that takes `inputs_embeds`; the image enters as a prefix (METHOD section 4.5)."""
# ruff: noqa: N815 (fields carry shape letters)

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssacl.config import LanguageConfig
from ssacl.data.records import Batch
from ssacl.errors import ConfigError
from ssacl.models.divided import build_language_model, full_shape
from ssacl.models.dropout import PLAIN_ATTENTION, use_cheap_dropout


class LanguageDecoder(nn.Module):
    """A causal LM of which the training step uses body and vocabulary head apart.

    Positions run over all slots, masked ones included, in training and must do so in generation: pass `position_ids` there.

    `exact_vocab` gives a model from scratch `config.vocab_size` rows, however small the tokenizer. Built inside `divided_language_model`,
    its weights are divided over the ranks (ZeRO 3); LoRA's adapters, small, stay whole.

    Raises
    ------
    ConfigError
        The tokenizer does not fit the vocabulary, or the local folder cannot be read.
    """

    def __init__(self, config: LanguageConfig, tokenizer: Any, exact_vocab: bool = False) -> None:
        super().__init__()
        self.model = _pretrained(config, tokenizer) if config.name_or_path else _from_scratch(config, tokenizer, exact_vocab)
        use_cheap_dropout(self.model)
        self.lora = config.lora_rank > 0
        if self.lora:
            _add_lora(self.model, config.lora_rank)
        self.width: int = full_shape(self.model.get_input_embeddings().weight)[1]
        self.max_positions = int(getattr(self.model.config, "max_position_embeddings", config.max_positions))

    def recompute_activations(self) -> None:
        """Recompute the blocks in the backward pass, to save memory."""
        self.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})

    def embed(self, ids: Tensor) -> Tensor:
        """[B, L] token ids -> [B, L, W] input embeddings."""
        embedded: Tensor = self.model.get_input_embeddings()(ids)
        return embedded

    def require_room(self, num_slots: int) -> None:
        """Raise the ConfigError of a row of more slots than the model has positions."""
        if num_slots > self.max_positions:
            raise ConfigError(
                f"Prefix, prompt and report need {num_slots} slots, the language model has {self.max_positions}: raise "
                "model.language.max_positions, or lower data.lm_max_tokens or the number of patches."
            )

    def forward(self, embeds_BLW: Tensor, mask_BL: Tensor, positions_BL: Tensor | None = None) -> Tensor:
        """Hidden states [B, L, W] before the vocabulary head.

        Positions run over all slots; where some were left out, `positions_BL` (int64) says which places the others had.
        """
        length = embeds_BLW.shape[1]
        self.require_room(length)
        positions = torch.arange(length, device=embeds_BLW.device)[None] if positions_BL is None else positions_BL
        body = self.model.base_model
        hidden: Tensor = body(
            inputs_embeds=embeds_BLW, attention_mask=mask_BL.long(), position_ids=positions, use_cache=False
        ).last_hidden_state
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits of the given hidden states only."""
        scores: Tensor = self.model.get_output_embeddings()(hidden)
        return scores

    def trainable(self) -> list[nn.Parameter]:
        """Parameters that a stage trains: the adapters with LoRA, everything without."""
        return [value for name, value in self.named_parameters() if not self.lora or "lora_" in name]


@dataclass(frozen=True)
class PackedText:
    """Prompt and report as one row of slots behind the prefix."""

    ids_BL: Tensor
    mask_BL: Tensor
    """bool: slots that hold a token."""
    is_report_BL: Tensor
    """bool: slots whose token the loss reads."""


def pack_text(batch: Batch, gapless: bool) -> PackedText:
    """Prompt and report side by side.

    `gapless` (`paper`): the report follows its row's prompt at once, pads stand last. Without (`official`): the prompts are padded to the
    batch's longest and the report starts behind the pads.
    """
    ids = torch.cat([batch.prompt_ids, batch.report_ids], 1)
    mask = torch.cat([batch.prompt_mask, batch.report_mask], 1)
    is_report = torch.cat([torch.zeros_like(batch.prompt_mask), batch.report_mask], 1)
    if gapless:
        order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)
        ids, mask, is_report = ids.gather(1, order), mask.gather(1, order), is_report.gather(1, order)
    return PackedText(ids, mask, is_report)


def report_logits(
    decoder: LanguageDecoder, text: PackedText, prefix: tuple[Tensor, Tensor] | None, num_prefix: int
) -> tuple[Tensor, Tensor]:
    """Vocabulary logits [R, V] and ids [R] of the report tokens that a slot comes before, row by row.

    Parameters
    ----------
    prefix
        The film's slots [B, P, W] with their mask [B, P]; none: the words stand alone, at the positions that they have behind a film.
    num_prefix
        P.

    Raises
    ------
    ConfigError
        A row needs more slots than the decoder has positions.
    """
    ids, mask, is_report = text.ids_BL, text.mask_BL, text.is_report_BL
    embeds, first = decoder.embed(ids), num_prefix
    decoder.require_room(num_prefix + ids.shape[1])
    if prefix is None:
        # A row without words looks at its own pad, as there is nothing else: so every parameter takes part in every batch.
        mask = mask | nn.functional.pad(~mask.any(1, keepdim=True), (0, mask.shape[1] - 1))
    else:
        embeds, mask = torch.cat([prefix[0], embeds.to(prefix[0].dtype)], 1), torch.cat([prefix[1], mask], 1)
        ids, is_report = (nn.functional.pad(each, (num_prefix, 0)) for each in (ids, is_report))
        first = 0
    # A token is predicted by the slot before it; no other slot's vocabulary logits are computed.
    predicts = nn.functional.pad(is_report[:, 1:], (0, 1))
    # Slots that no other looks at and that predict nothing (dropped leaves, class token, pads) need not be computed either.
    used = mask | predicts
    slots = (~used).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(used.sum(1).max())]
    kept = embeds.gather(1, slots[..., None].expand(-1, -1, embeds.shape[-1]))
    hidden = decoder(kept, mask.gather(1, slots), first + slots)
    return decoder.logits(hidden[predicts.gather(1, slots)]), ids[:, 1:][is_report[:, 1:]]


def _from_scratch(config: LanguageConfig, tokenizer: Any, exact_vocab: bool) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    vocab_size = len(tokenizer)
    if vocab_size > config.vocab_size:
        raise ConfigError(
            f"The language tokenizer has {vocab_size} tokens, model.language.vocab_size allows {config.vocab_size}: raise it, or train a "
            "smaller tokenizer with `ssacl data tokenizer`."
        )
    settings = GPT2Config(
        # The same function as GPT-2's gelu_new in one kernel; and on a CPU the fused attention's backward loses.
        activation_function="gelu_pytorch_tanh",
        attn_implementation="sdpa" if torch.cuda.is_available() else PLAIN_ATTENTION,
        vocab_size=config.vocab_size if exact_vocab else vocab_size,
        n_positions=config.max_positions,
        n_embd=config.width,
        n_layer=config.depth,
        n_head=config.num_heads,
        resid_pdrop=config.dropout,
        embd_pdrop=config.dropout,
        attn_pdrop=config.dropout,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return build_language_model(lambda: GPT2LMHeadModel(settings))


def _pretrained(config: LanguageConfig, tokenizer: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    if not Path(config.name_or_path).is_dir():
        raise ConfigError(
            f"model.language.name_or_path '{config.name_or_path}' is not a folder: download the model first and give the folder with its "
            "config.json, model.safetensors and tokenizer."
        )
    try:
        if torch.get_default_device().type == "meta":
            # Shapes alone are asked for: no weight is read.
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config.name_or_path, local_files_only=True))
        model = AutoModelForCausalLM.from_pretrained(config.name_or_path, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"No causal language model in safetensors form can be read from '{config.name_or_path}'.") from error
    vocab_size = full_shape(model.get_input_embeddings().weight)[0]
    if len(tokenizer) > vocab_size:
        raise ConfigError(
            f"The language tokenizer has {len(tokenizer)} tokens, the model in '{config.name_or_path}' has {vocab_size}: use the tokenizer "
            "that belongs to this model."
        )
    return model


def _add_lora(model: Any, rank: int) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError("model.language.lora_rank needs the package peft: install ssacl[train].") from error
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, task_type="CAUSAL_LM"), model)
