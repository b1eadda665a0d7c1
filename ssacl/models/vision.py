"""Patch encoder with read-only queries, and the pixel decoder (METHOD section 2; MAE, arXiv 2111.06377).

Shape letters: B images, N patches of the grid, V visible patches (N in the unmasked pass), K readers (queries and, in the `official`
wiring, the class token), T tokens, H heads, D width, Q pixel values of a patch.

A reader attends to itself and to the visible patches, and nothing attends to a reader. So the patches are computed once, without the
readers, and a reader's attention is one row of [itself, patches]: no mask, no patch-side cost.
"""
# ruff: noqa: N815 (fields carry shape letters)

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ssacl.config import VisionConfig

_SDPA_TOKENS = 120
"""On a CPU the fused kernel wins from about this many tokens in float32 (197 tokens: 29 against 35 ms), and never in bfloat16 (40
against 14 ms), forward and backward measured together."""


@dataclass(frozen=True)
class Latent:
    """What one encoder pass gives, after the last norm."""

    queries_BKD: Tensor
    cls_BD: Tensor
    patches_BVD: Tensor
    attention_BKV: Tensor
    """Last block's attention of the readers to the patches, mean over heads, float32; without the reader's share for itself. In the
    `official` wiring the class token's row is the last one."""
    local_BVD: Tensor
    """Patches after the middle block: still local, as pooled region features want them."""
    contexts_BLTD: Tensor | None = None
    """Inputs of the L blocks, without readers; kept on request, so that further queries can be asked without another pass."""


class Attention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BTD: Tensor, num_readers: int, first_patch: int, mask_TT: Tensor | None) -> tuple[Tensor, Tensor | None]:
        B, T, D = x_BTD.shape
        q, k, v = self.qkv(x_BTD).view(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        end = T - num_readers
        weights = None
        out = _attend(q[:, :, :end], k[:, :, :end], v[:, :, :end], mask_TT) if end else q
        if num_readers:
            read, weights = _read(q[:, :, end:], k, v, first_patch, end)
            out = torch.cat([out, read], 2) if end else read
        projected: Tensor = self.proj(out.transpose(1, 2).reshape(B, T, D))
        return projected, weights


def _attend(q: Tensor, k: Tensor, v: Tensor, mask_TT: Tensor | None) -> Tensor:
    if q.is_cuda or (q.dtype == torch.float32 and q.shape[2] >= _SDPA_TOKENS):
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask_TT)
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if mask_TT is not None:
        logits = logits.masked_fill(~mask_TT, -torch.inf)
    attended: Tensor = logits.softmax(-1) @ v
    return attended


def _read(q_BHKd: Tensor, k: Tensor, v: Tensor, first: int, end: int) -> tuple[Tensor, Tensor]:
    """Readers' attention over [itself, patches]; the weights come in float32, [B, H, K, 1 + V]."""
    q = q_BHKd * q_BHKd.shape[-1] ** -0.5
    own = (q * k[:, :, end:]).sum(-1, keepdim=True)
    logits = torch.cat([own, q @ k[:, :, first:end].transpose(-2, -1)], -1)
    weights = logits.softmax(-1, dtype=torch.float32)
    used = weights.to(v.dtype)
    return used[..., :1] * v[:, :, end:] + used[..., 1:] @ v[:, :, first:end], weights


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.fc2(functional.gelu(self.fc1(x)))
        return mixed


class Block(nn.Module):
    """Pre-norm transformer block over [context | readers]."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(
        self, x_BTD: Tensor, num_readers: int = 0, first_patch: int = 0, mask_TT: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        attended, weights = self.attn(self.norm1(x_BTD), num_readers, first_patch, mask_TT)
        x_BTD = x_BTD + attended
        return x_BTD + self.mlp(self.norm2(x_BTD)), weights


class VisionEncoder(nn.Module):
    """ViT over the visible patches, with read-only queries.

    `class_reads` (the `official` wiring): when queries are present the class token is a reader too; without queries, and in the `paper`
    wiring always, it is an ordinary token of the context.
    """

    def __init__(self, config: VisionConfig, class_reads: bool, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.class_reads, self.activation_checkpointing = class_reads, activation_checkpointing
        self.patch_embed = nn.Conv2d(3, config.width, config.patch_size_px, config.patch_size_px)
        self.cls_token = nn.Parameter(torch.randn(1, 1, config.width) * 0.02)
        self.register_buffer("pos_embed", position_table(config.width, config.grid, config.position_table))
        self.blocks = nn.ModuleList(Block(config.width, config.num_heads, config.mlp_ratio) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.local_depth = max(1, config.depth // 2)
        _initialise(self)

    pos_embed: Tensor

    def forward(
        self, image_BCHW: Tensor, queries_KD: Tensor | None = None, keep_BV: Tensor | None = None, keep_contexts: bool = False
    ) -> Latent:
        """Encode [B, 3, S, S]; `keep_BV` are the indices of the visible patches (all without it).

        Queries are [K, D], the same for every image.
        """
        B = image_BCHW.shape[0]
        patches = self.patch_embed(image_BCHW.to(self.patch_embed.weight.dtype)).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]
        if keep_BV is not None:
            patches = patches.gather(1, keep_BV[..., None].expand(-1, -1, patches.shape[-1]))
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(B, -1, -1)
        readers = [] if queries_KD is None else [queries_KD.to(patches.dtype).expand(B, -1, -1)]
        class_reads = self.class_reads and bool(readers)
        first = 0 if class_reads else 1
        x = torch.cat([patches, *readers, cls] if class_reads else [cls, patches, *readers], 1)
        end = first + patches.shape[1]
        num_readers = x.shape[1] - end
        contexts: list[Tensor] = []
        local = patches
        weights: Tensor | None = None
        for depth, block in enumerate(self.blocks, 1):
            if keep_contexts:
                contexts.append(x[:, :end])
            if self.activation_checkpointing and torch.is_grad_enabled():
                x, weights = checkpoint(block, x, num_readers, first, use_reentrant=False)
            else:
                x, weights = block(x, num_readers, first)
            if depth == self.local_depth:
                local = x[:, first:end]
        x = self.norm(x)
        attention = x.new_zeros(B, 0, end - first) if weights is None else weights[..., 1:].mean(1)
        queries = x[:, end : x.shape[1] - 1] if class_reads else x[:, end:]
        cls_out = x[:, -1] if class_reads else x[:, 0]
        return Latent(queries, cls_out, x[:, first:end], attention, local, torch.stack(contexts, 1) if keep_contexts else None)

    def probe(self, queries_BKD: Tensor, contexts_BLTD: Tensor) -> tuple[Tensor, Tensor]:
        """Ask further queries of an encoded image: exactly what they would have given in the pass that kept the contexts.

        Returns outputs [B, K, D] and the last block's attention to the patches [B, K, N], mean over heads.
        """
        num_readers = queries_BKD.shape[1]
        first = 0 if self.class_reads else 1
        readers, weights = queries_BKD.to(contexts_BLTD.dtype), None
        for block, context in zip(self.blocks, contexts_BLTD.unbind(1), strict=True):
            x, weights = block(torch.cat([context, readers], 1), num_readers, first)
            readers = x[:, -num_readers:]
        assert weights is not None
        return self.norm(readers), weights[..., 1:].mean(1)


class VisionDecoder(nn.Module):
    """MAE decoder: latent tokens -> pixels of every patch, or of single nodes of the anatomy graph."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.decoder_width
        self.embed = nn.Linear(config.width, width)
        self.mask_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.register_buffer("pos_embed", position_table(width, config.grid, config.position_table))
        self.blocks = nn.ModuleList(Block(width, config.decoder_num_heads, config.mlp_ratio) for _ in range(config.decoder_depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pred = nn.Linear(width, 3 * (config.patch_size_px * config.target_scale) ** 2)
        _initialise(self)

    pos_embed: Tensor

    def forward(self, cls_BD: Tensor, patches_BVD: Tensor, keep_BV: Tensor) -> Tensor:
        """Features of the full grid, [B, N, width], from the visible patches; `pred` makes pixels of them."""
        visible = self.embed(torch.cat([cls_BD[:, None], patches_BVD], 1))
        B, _, width = visible.shape
        num_patches = self.pos_embed.shape[1] - 1
        index = keep_BV[..., None].expand(-1, -1, width)
        grid = self.mask_token.to(visible.dtype).expand(B, num_patches, -1).scatter(1, index, visible[:, 1:])
        return self.refine(torch.cat([visible[:, :1], grid], 1) + self.pos_embed)[:, 1:]

    def refine(self, x_BTD: Tensor, mask_TT: Tensor | None = None) -> Tensor:
        """Blocks and norm over embedded tokens; `mask_TT` (bool) says which token may look at which."""
        for block in self.blocks:
            x_BTD, _ = block(x_BTD, mask_TT=mask_TT)
        normed: Tensor = self.norm(x_BTD)
        return normed


def patchify(image_BCHW: Tensor, patch_size_px: int) -> Tensor:
    """[B, 3, S, S] -> [B, N, Q]: values of a patch ordered row, column, channel."""
    B, C, S, _ = image_BCHW.shape
    grid = S // patch_size_px
    cells = image_BCHW.reshape(B, C, grid, patch_size_px, grid, patch_size_px)
    return cells.permute(0, 2, 4, 3, 5, 1).reshape(B, grid * grid, -1)


def position_table(width: int, grid: int, exponents: str) -> Tensor:
    """Fixed 2-D sin-cos table [1, 1 + grid^2, width], class position (zeros) first.

    Half of the width codes the column, half the row, each as sines then cosines. `exponents`: "mae" has frequencies 10000^-(2i/d) as in
    Attention Is All You Need, "official" has 10000^-(i/(2d)), as in the release; d is the width of one axis. Odd rests stay zero.
    """
    axis = width // 2
    num = axis // 2
    exponent = torch.arange(num, dtype=torch.float64) / (num if exponents == "mae" else 2 * axis)
    frequency = torch.exp(-math.log(10000.0) * exponent)
    place = torch.arange(grid, dtype=torch.float64)[:, None] * frequency
    code = torch.cat([place.sin(), place.cos()], 1)
    table = torch.zeros(1 + grid * grid, width)
    code_column, code_row = code.repeat(grid, 1), code.repeat_interleave(grid, 0)
    table[1:, : 4 * num] = torch.cat([code_column, code_row], 1).float()
    return table[None]


def _initialise(module: nn.Module) -> None:
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.xavier_uniform_(child.weight)
            nn.init.zeros_(child.bias)
        elif isinstance(child, nn.Conv2d):
            nn.init.xavier_uniform_(child.weight.view(child.weight.shape[0], -1))
