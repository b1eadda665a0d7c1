"""Attention of a phrase's own words to the patches, for words that the lexicon does not place.

Shape letters: B images, N patches, M = 25 leaves, T text width, L tokens.
"""

from __future__ import annotations

from torch import Tensor, nn

from ssacl.models.encoded import Encoded
from ssacl.models.restoration import LEAF_NODES
from ssacl.models.ssacl import SSACL

PHRASE_TEMPERATURE = 0.1
"""The temperature under which phrases and regions are contrasted in training."""


def phrase_attention(model: SSACL, encoded: Encoded, phrase_ids: Tensor, phrase_mask: Tensor) -> Tensor:
    """Where each image shows its phrase: [B, N] float32, each row sums to 1.

    `phrase_ids` and `phrase_mask` are [B, L], with a leading [CLS], one phrase per image. With grounding trained (`region_text`), the
    phrase picks leaves by its similarity with their regions and patches by its similarity with their features; without, it is one
    more read-only query through every block.
    """
    phrase_BT = model.text(phrase_ids, phrase_mask)
    ground = model.losses.grounding
    if not (ground.enabled and ground.region_text > 0):
        assert encoded.contexts_BLTD is not None, "phrases need what `encode` gives"
        _, attention = model.encoder.probe(model.bert_proj(phrase_BT)[:, None], encoded.contexts_BLTD)
        attention = attention[:, 0]
    else:
        phrase = nn.functional.normalize(phrase_BT.float(), dim=-1)[:, :, None]
        leaf_BM = (nn.functional.normalize(encoded.region_BMD.float(), dim=-1) @ phrase)[..., 0] / PHRASE_TEMPERATURE
        patch_BN = (nn.functional.normalize(model.region(encoded.local_BND).float(), dim=-1) @ phrase)[..., 0]
        prior_BN = (leaf_BM.softmax(-1)[:, None] @ encoded.attention_BGN[:, list(LEAF_NODES)])[:, 0]
        attention = prior_BN * (patch_BN / PHRASE_TEMPERATURE).softmax(-1)
    return attention / attention.sum(-1, keepdim=True).clamp_min(1e-12)
