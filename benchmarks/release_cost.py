"""The release's work, done the release's way: what `train_step --wiring release` measures the others against.

The same five losses as the `official` wiring, from the same weights, by the operations that the public release executes: four encoder
passes; queries in one sequence with class token and patches, under an attention mask through an unfused softmax; both vocabulary heads over
all tokens; leaf names and reports padded to 100 tokens; one decoder call for every inner node and one for its children. A test holds its
losses against those of `official`, so that it is neither more nor less than the same computation.

Each of `SAVINGS` can be taken by itself, for `benchmarks/speed_steps.py`; with all of them the losses are still the same.

Shape letters: B images, N patches, V visible patches, K queries, T tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import NewGELUActivation

from benchmarks.train_flops import RELEASE_TEXT_TOKENS
from ssacl.anatomy import CHILDREN, INNER_NODES, LEAVES, NODE_INDEX
from ssacl.config import LossConfig, ModelConfig
from ssacl.data.records import Batch
from ssacl.data.tokenization import Tokenizers
from ssacl.losses import published
from ssacl.models.language import pack_text
from ssacl.models.restoration import LEAF_NODES, inner_node_pixels, restore_inner_nodes
from ssacl.models.ssacl import SSACL
from ssacl.models.vision import Block, patchify

SAVINGS = {
    "one_unmasked_pass": "one unmasked pass with 32 nodes serves leaves, nodes and patches",
    "no_spare_logits": "no vocabulary logits where no loss reads them",
    "no_padding": "leaf names as long as the longest of them, not 100 tokens",
    "batched_nodes": "all inner nodes in one decoder call",
    "fused_attention": "fused attention in place of products and a softmax",
}
"""What the release's work can do without -> in words."""


class ReleaseWork(nn.Module):
    """An `official` model and the work that the release does with it, but for `without`, some of `SAVINGS`."""

    def __init__(self, config: ModelConfig, losses: LossConfig, tokenizers: Tokenizers, without: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self.without = without
        self.model = SSACL(config, losses, tokenizers)
        text = config.text
        self.mlm_head = nn.Sequential(
            nn.Linear(text.width, text.width), nn.GELU(), nn.LayerNorm(text.width), nn.Linear(text.width, text.vocab_size)
        )
        for block in self.model.language.model.transformer.h:
            block.mlp.act = NewGELUActivation()
        for body in (self.model.text.bert, self.model.language.model):
            if "fused_attention" not in without:
                body.set_attn_implementation("eager")
            for module in list(body.modules()):
                for name, child in module.named_children():
                    if isinstance(child, nn.Dropout):
                        setattr(module, name, nn.Dropout(child.p))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The five losses by name."""
        model = self.model
        leaves_MD = model.bert_proj(self._text(model.leaf_ids, model.leaf_ids_mask))
        text_BT = self._text(batch.text_ids, batch.text_mask)
        nodes_GD = model.graph_means @ leaves_MD
        keep, removed = published.split_patches(batch.mask_noise, model.losses.mask_ratio)
        plain = self._encode(batch.image, None, keep)
        num_leaves, num_nodes = len(LEAF_NODES), len(nodes_GD)
        whole = self._encode(batch.image, nodes_GD, None)
        if "one_unmasked_pass" in self.without:
            unmasked = torch.cat([whole[:, list(LEAF_NODES)], whole[:, num_nodes:]], 1)
        else:
            # A pass of its own, though its leaves and patches are those of the other.
            unmasked = self._encode(batch.image, leaves_MD, None)
        masked = self._encode(batch.image, nodes_GD, keep)
        visible = torch.zeros_like(batch.mask_noise).scatter(1, keep, 1.0)
        scale_B = functional.softplus(model.visibility(visible)[:, 0].float())
        latent_BVT = model.img_mlp(plain[:, 1:])
        losses = model.losses
        return {
            "image_reconstruction": self._reconstruction(batch.image, plain, keep, removed),
            "global_contrastive": published.global_contrastive(latent_BVT.mean(1), text_BT, scale_B, batch.has_text, model.tau),
            "anatomy_reconstruction": self._anatomy(masked[:, :num_nodes], whole[:, :num_nodes]),
            "anatomical_consistency": published.anatomical_consistency(
                unmasked[:, :num_leaves], text_BT, batch.has_text, model.tau, losses.soft_target_share, losses.soft_target
            ),
            "language_model": self._language(batch, unmasked),
        }

    def _text(self, ids: Tensor, mask: Tensor) -> Tensor:
        short = 0 if "no_padding" in self.without else RELEASE_TEXT_TOKENS - ids.shape[1]
        ids, mask = functional.pad(ids, (0, short)), functional.pad(mask, (0, short))
        output = self.model.text.bert(input_ids=ids, attention_mask=mask.long())
        if "no_spare_logits" not in self.without:
            self.mlm_head(output.last_hidden_state)
        pooled: Tensor = output.pooler_output
        return pooled

    def _encode(self, image: Tensor, queries_KD: Tensor | None, keep_BV: Tensor | None) -> Tensor:
        """Latent tokens [B, K + 1 + V, D], ordered queries, class token, patches."""
        encoder, B = self.model.encoder, image.shape[0]
        patches = encoder.patch_embed(image).flatten(2).transpose(1, 2) + encoder.pos_embed[:, 1:]
        if keep_BV is not None:
            patches = patches.gather(1, keep_BV[..., None].expand(-1, -1, patches.shape[-1]))
        x = torch.cat([(encoder.cls_token + encoder.pos_embed[:, :1]).expand(B, -1, -1), patches], 1)
        seen = None
        if queries_KD is not None:
            num_readers = len(queries_KD) + 1
            x = torch.cat([queries_KD.to(x.dtype).expand(B, -1, -1), x], 1)
            seen = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
            seen[:, num_readers:] = True
        for block in encoder.blocks:
            x = self._block(block, x, seen)
        latent: Tensor = encoder.norm(x)
        return latent

    def _decode(self, x: Tensor) -> Tensor:
        decoder = self.model.decoder
        for block in decoder.blocks:
            x = self._block(block, x, None)
        pixels: Tensor = decoder.pred(decoder.norm(x))
        return pixels

    def _reconstruction(self, image: Tensor, latent: Tensor, keep: Tensor, removed: Tensor) -> Tensor:
        decoder, vision = self.model.decoder, self.model.config.vision
        visible = decoder.embed(latent)
        grid = decoder.mask_token.to(visible.dtype).expand(len(image), vision.num_patches, -1)
        grid = grid.scatter(1, keep[..., None].expand(-1, -1, visible.shape[-1]), visible[:, 1:])
        pixels = self._decode(torch.cat([visible[:, :1], grid], 1) + decoder.pos_embed)[:, 1:]
        error_BN = (pixels.float() - patchify(image, vision.patch_size_px)).square().mean(-1)
        mask_BN = torch.zeros_like(error_BN).scatter(1, removed, 1.0)
        return (error_BN * mask_BN).sum() / mask_BN.sum()

    def _anatomy(self, masked_BGD: Tensor, whole_BGD: Tensor) -> Tensor:
        decoder = self.model.decoder
        if "batched_nodes" in self.without:
            parents = inner_node_pixels(decoder, whole_BGD)
            return published.anatomy_reconstruction(restore_inner_nodes(decoder, masked_BGD, recursive=False), parents)
        terms = []
        for node in INNER_NODES:
            children = masked_BGD[:, [NODE_INDEX[child] for child in CHILDREN[node]]]
            restored = self._decode(decoder.embed(torch.cat([children.mean(1, keepdim=True), children], 1)))[:, 0]
            parent = self._decode(decoder.embed(whole_BGD[:, NODE_INDEX[node]][:, None]))[:, 0]
            terms.append((restored.float() - parent.detach().float()).square().mean())
        return torch.stack(terms).mean()

    def _language(self, batch: Batch, latent: Tensor) -> Tensor:
        model = self.model
        prefix = model.opt_proj(latent)
        text = pack_text(batch, gapless=False)
        leaves = batch.leaf_mask
        ones = leaves.new_ones(len(leaves), prefix.shape[1] - len(LEAVES) - 1)
        mask = torch.cat([leaves, torch.zeros_like(leaves[:, :1]), ones, text.mask_BL], 1)
        hidden = model.language(torch.cat([prefix, model.language.embed(text.ids_BL).to(prefix.dtype)], 1), mask)
        target = torch.cat([mask.new_zeros(prefix.shape[:2]), text.is_report_BL], 1)
        if "no_spare_logits" in self.without:
            return published.language_model(model.language.logits(hidden[:, :-1][target[:, 1:]]), text.ids_BL[text.is_report_BL], False)
        ids = functional.pad(text.ids_BL, (prefix.shape[1], 0)).masked_fill(~target, -100)
        logits = model.language.logits(hidden)[:, :-1].float()
        return functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=-100)

    def _block(self, block: Block, x: Tensor, seen_TT: Tensor | None) -> Tensor:
        attention = block.attn
        B, T, D = x.shape
        q, k, v = attention.qkv(block.norm1(x)).reshape(B, T, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        if "fused_attention" in self.without:
            mixed = functional.scaled_dot_product_attention(q, k, v, seen_TT)
        else:
            logits = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
            if seen_TT is not None:
                logits = logits.masked_fill(~seen_TT, -torch.inf)
            mixed = logits.softmax(-1) @ v
        x = x + attention.proj(mixed.transpose(1, 2).reshape(B, T, D))
        output: Tensor = x + block.mlp(block.norm2(x))
        return output
