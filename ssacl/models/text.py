"""Text encoder: a BERT, pooled by dense + tanh over the first token (METHOD section 2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from ssacl.config import TextConfig
from ssacl.models.dropout import PLAIN_ATTENTION, use_cheap_dropout


class TextEncoder(nn.Module):
    """transformers' BertModel; the vocabulary head of its pre-training is neither built nor computed.

    Parameters
    ----------
    config
        Sizes.
    vocab_size
        The tokenizer's own size.
    pad_token_id
        Id whose embedding row starts at zero.
    """

    def __init__(self, config: TextConfig, vocab_size: int, pad_token_id: int = 0) -> None:
        super().__init__()
        settings = BertConfig(
            vocab_size=vocab_size,
            hidden_size=config.width,
            num_hidden_layers=config.depth,
            num_attention_heads=config.num_heads,
            intermediate_size=config.ffn_width,
            max_position_embeddings=config.max_tokens,
            hidden_dropout_prob=config.dropout,
            attention_probs_dropout_prob=config.dropout,
            pad_token_id=pad_token_id,
            # On a CPU the fused kernel's backward loses.
            attn_implementation="sdpa" if torch.cuda.is_available() else PLAIN_ATTENTION,
        )
        self.bert = BertModel(settings)
        use_cheap_dropout(self.bert)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """[R, L] token ids and bool mask -> pooled [R, T]. A row without tokens gives a finite vector that means nothing."""
        mask = mask.bool()
        # An empty row would be a softmax over nothing: let it look at its first slot.
        mask = torch.cat([torch.ones_like(mask[:, :1]), mask[:, 1:]], 1)
        pooled: Tensor = self.bert(input_ids=ids, attention_mask=mask.long()).pooler_output
        return pooled
