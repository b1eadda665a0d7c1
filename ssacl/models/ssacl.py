"""SSACL: the composition of encoders, decoders and heads; one forward that returns named losses (METHOD sections 2-5).

Shape letters: B images, N patches, V visible patches, G = 32 nodes, M = 25 leaves, F = 14 findings, D vision width, T text width,
W language width, S sentences.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ssacl.anatomy import FINDINGS, LEAVES
from ssacl.config import Config, LossConfig, ModelConfig, OptimConfig
from ssacl.data.records import Batch
from ssacl.errors import ConfigError
from ssacl.losses import Losses, published
from ssacl.losses.balance import Balance
from ssacl.losses.grounding import GroundingInputs, grounding_losses
from ssacl.losses.warp import warp_images
from ssacl.models.divided import full_shape
from ssacl.models.encoded import Encoded
from ssacl.models.findings import RegionHead
from ssacl.models.findings_head import FindingsBatch, FindingsHead, FindingsInputs, FindingsRead, head_loss, register
from ssacl.models.language import LanguageDecoder, pack_text, report_logits
from ssacl.models.restoration import LEAF_NODES, graph_means, inner_node_pixels, restore_inner_nodes
from ssacl.models.text import TextEncoder
from ssacl.models.vision import Latent, VisionDecoder, VisionEncoder, patchify

if TYPE_CHECKING:
    from ssacl.data.tokenization import Tokenizers

logger = logging.getLogger(__name__)

STAGES = ("contrastive", "text", "generation", "joint", "findings")
_RECOMPILE_LIMIT = 32
RAMPED = (
    *("equivariance", "centroid", "slots", "compactness", "order"),
    *("layout_chart", "pose_range", "mean_layout", "shape", "hierarchy"),
)
"""Geometric grounding terms: their weights rise over the first steps of a stage."""


class SSACL(nn.Module):
    """The whole model.

    Parameters
    ----------
    config
        Sizes and wiring.
    losses
        Weights and variants.
    tokenizers
        Text and language tokenizers; their sizes are the vocabulary sizes (in the `official` wiring: those of `config`, as its checkpoints
        have them).
    uncertain
        What an uncertain finding counts as in the findings stage (`DataConfig.uncertain`).

    Raises
    ------
    ConfigError
        A tokenizer is larger than the configuration allows, or options contradict each other.
    """

    leaf_ids: Tensor
    leaf_ids_mask: Tensor
    graph_means: Tensor

    def __init__(self, config: ModelConfig, losses: LossConfig, tokenizers: Tokenizers, uncertain: str = "present") -> None:
        super().__init__()
        self.config, self.losses, self.uncertain = config, losses, uncertain
        self.official = config.wiring == "official"
        vision, text = config.vision, config.text
        _check(config, losses)
        self.encoder = VisionEncoder(vision, class_reads=self.official, activation_checkpointing=config.activation_checkpointing)
        self.decoder = VisionDecoder(vision)
        vocab_size = tokenizers.text.get_vocab_size()
        if vocab_size > text.vocab_size:
            raise ConfigError(
                f"The text tokenizer has {vocab_size} tokens, model.text.vocab_size allows {text.vocab_size}: raise it, or train a smaller "
                "tokenizer with `ssacl data tokenizer`."
            )
        # A released checkpoint may have more rows than its tokenizer has words.
        self.text = TextEncoder(text, text.vocab_size if self.official else vocab_size, tokenizers.text.token_to_id("[PAD]") or 0)
        self.language = LanguageDecoder(config.language, tokenizers.lm, exact_vocab=self.official)
        if config.activation_checkpointing:
            self.language.recompute_activations()
        self.img_mlp = nn.Linear(vision.width, text.width)
        self.bert_proj = nn.Linear(text.width, vision.width)
        self.opt_proj = nn.Linear(vision.width, self.language.width)
        self.visibility = nn.Linear(vision.num_patches, 1)
        self.tau = nn.Parameter(torch.tensor(float(losses.initial_tau)))
        self.balance = Balance(losses.balance == "uncertainty")
        self.region = RegionHead(vision.width, text.width)
        self.findings_head = FindingsHead(vision.width, config.findings_from_pooled or self.official)
        self.leaf_findings = None
        if config.findings_in_prefix and not self.official:
            self.leaf_findings = nn.Linear(len(FINDINGS), vision.width, bias=False)
            nn.init.zeros_(self.leaf_findings.weight)
        ids, mask = _leaf_tokens(tokenizers.text, text.max_tokens)
        self.register_buffer("leaf_ids", ids, persistent=False)
        self.register_buffer("leaf_ids_mask", mask, persistent=False)
        self.register_buffer("graph_means", graph_means(), persistent=False)
        self._fixed_queries_GD: Tensor | None = None

    @classmethod
    def from_config(cls, config: Config, tokenizers: Tokenizers) -> SSACL:
        """Build from the whole configuration.

        Raises
        ------
        ConfigError
            See the class; also when texts or reports may be longer than the encoders' positions.
        """
        if config.data.text_max_tokens > config.model.text.max_tokens:
            raise ConfigError(
                f"data.text_max_tokens {config.data.text_max_tokens} exceeds model.text.max_tokens {config.model.text.max_tokens}: "
                "lower the first or raise the second."
            )
        model = cls(config.model, config.losses, tokenizers, config.data.uncertain)
        slots, room = len(LEAVES) + 1 + config.model.vision.num_patches + 2 * config.data.lm_max_tokens, model.language.max_positions
        if slots > room:
            logger.warning("Prefix, longest prompt and longest report may need %d slots, the language model has %d positions.", slots, room)
        return model

    # Training

    def forward(self, batch: Batch | FindingsBatch, stage: str, ramp: float = 1.0) -> Losses:
        """The losses of `stage` on this rank's rows; `ramp` (0..1) scales the geometric grounding terms.

        "contrastive": L_ir, L_cl, L_ar, L_ac and grounding. "text": L_lm on prompts and reports without films. "generation": L_lm. "joint":
        all of them. "findings": the findings head on the frozen encoder (a `FindingsBatch` brings the encoder's part along). Parameters
        that a stage does not train must not require gradients (`parameter_groups` names those that it does).

        Raises
        ------
        ConfigError
            `stage` is none of these.
        """
        if stage not in STAGES:
            raise ConfigError(f"'{stage}' is not a stage; expected one of: {', '.join(STAGES)}.")
        if isinstance(batch, FindingsBatch):
            loss = self._findings_loss(self.findings_head(batch.inputs), batch)
            return Losses(total=loss, weights={"findings": 1.0}, findings=loss)
        if batch.image.shape[-1] != self.config.vision.image_size_px:
            raise ConfigError(
                f"The images are {batch.image.shape[-1]} px wide, the model was built for model.vision.image_size_px "
                f"{self.config.vision.image_size_px}: give the collator the same value."
            )
        if stage == "text":
            loss, weight = self._language_model(batch, None), self.losses.language_model
            return Losses(total=weight * loss, weights={"language_model": weight}, language_model=loss)
        frozen = not self.encoder.cls_token.requires_grad
        with torch.set_grad_enabled(torch.is_grad_enabled() and not (frozen and stage in ("generation", "findings"))):
            queries_GD = self.node_queries()
            encoded = self._encoded(batch.image, self.encoder(batch.image, queries_GD))
        named: dict[str, Tensor] = {}
        weights: dict[str, float] = {}
        grounding: dict[str, Tensor] = {}
        if stage in ("contrastive", "joint"):
            named, grounding = self._contrastive(batch, queries_GD, encoded)
        if stage in ("generation", "joint"):
            named["language_model"] = self._language_model(batch, encoded)
        if stage == "findings":
            named["findings"] = self._findings_loss(self.findings_read(encoded), batch)
        for name in named:
            weights[name] = 1.0 if name == "findings" else float(getattr(self.losses, name))
        for name in grounding:
            weights[f"grounding/{name}"] = float(getattr(self.losses.grounding, name)) * (ramp if name in RAMPED else 1.0)
        total = self.balance({**named, **{f"grounding/{name}": value for name, value in grounding.items()}}, weights)
        return Losses(total=total, grounding=grounding, weights=weights, **named)

    def _contrastive(self, batch: Batch, queries_GD: Tensor, encoded: Encoded) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        losses, ground = self.losses, self.losses.grounding
        keep_BV, removed_BR = published.split_patches(batch.mask_noise, losses.mask_ratio)
        image = batch.image
        if ground.enabled and ground.equivariance > 0:
            image = warp_images(image, batch.warp, batch.warp_padding)
        masked = self.encoder(image, queries_GD, keep_BV)
        # The released class token changes with the queries, so that its reconstruction pass cannot be shared.
        plain = self.encoder(image, None, keep_BV) if self.official else masked
        text_BT = self.text(batch.text_ids, batch.text_mask)
        visible_BN = torch.zeros_like(batch.mask_noise).scatter(1, keep_BV, 1.0)
        scale_B = nn.functional.softplus(self.visibility(visible_BN)[:, 0].float())
        named = {
            "image_reconstruction": self._image_reconstruction(image, plain, keep_BV, removed_BR),
            "global_contrastive": published.global_contrastive(
                self.img_mlp(plain.patches_BVD).mean(1), text_BT, scale_B, batch.has_text, self.tau
            ),
            "anatomy_reconstruction": published.anatomy_reconstruction(
                restore_inner_nodes(self.decoder, masked.queries_BKD, losses.recursive_anatomy and not self.official),
                inner_node_pixels(self.decoder, encoded.nodes_BGD),
            ),
            "anatomical_consistency": published.anatomical_consistency(
                encoded.leaves_BMD,
                text_BT,
                batch.has_text,
                self.tau,
                losses.soft_target_share,
                losses.soft_target,
                losses.soft_target_temperature,
            ),
        }
        return named, self._grounding(batch, encoded, masked, keep_BV) if ground.enabled else {}

    def _image_reconstruction(self, image: Tensor, latent: Latent, keep_BV: Tensor, removed_BR: Tensor) -> Tensor:
        vision = self.config.vision
        features = self.decoder(latent.cls_BD, latent.patches_BVD, keep_BV)
        pixels = self.decoder.pred(features.gather(1, removed_BR[..., None].expand(-1, -1, features.shape[-1])))
        if vision.target_scale > 1:
            image = nn.functional.interpolate(image, scale_factor=float(vision.target_scale), mode="bicubic", align_corners=False)
        target = patchify(image, vision.patch_size_px * vision.target_scale)
        target = target.gather(1, removed_BR[..., None].expand(-1, -1, target.shape[-1]))
        return published.image_reconstruction(pixels, target, self.losses.normalised_pixels)

    def _grounding(self, batch: Batch, encoded: Encoded, masked: Latent, keep_BV: Tensor) -> dict[str, Tensor]:
        ground = self.losses.grounding
        sentences = None
        if ground.region_text > 0:
            # A rank without a sentence still takes part in the contrast over ranks, in its backward pass too.
            none = encoded.region_BMD.flatten(0, 1)[:0]
            sentences = self.text(batch.sentence_ids, batch.sentence_mask) if len(batch.sentence_ids) else none
        terms = grounding_losses(
            ground,
            GroundingInputs(
                attention_BGN=encoded.attention_BGN,
                grid=self.config.vision.grid,
                masked_attention_BGV=masked.attention_BKV,
                visible_BV=keep_BV,
                warp=batch.warp,
                region_BMD=encoded.region_BMD,
                sentences_SD=sentences,
                sentence_row=batch.sentence_row,
                sentence_leaves=batch.sentence_leaves,
                sentence_finding=batch.sentence_finding,
                entity_logits_BMF=encoded.entities_BMF,
                image_logits_BF=self.region.image_logits(encoded.patch_findings_BNF),
                entities=batch.entities,
                has_text=batch.has_text,
            ),
        )
        return terms

    def _findings_loss(self, read: FindingsRead, batch: Batch | FindingsBatch) -> Tensor:
        return head_loss(read, batch.labels, batch.has_labels, batch.entities, batch.has_text, self.uncertain)

    def _language_model(self, batch: Batch, encoded: Encoded | None) -> Tensor:
        """L_lm behind the film's prefix, or without a film."""
        text = pack_text(batch, gapless=not self.official)
        prefix = None if encoded is None else self.prefix(encoded, batch.leaf_mask)
        logits, tokens = report_logits(self.language, text, prefix, len(LEAVES) + 1 + self.config.vision.num_patches)
        return published.language_model(logits, tokens, global_mean=not self.official)

    def compile_blocks(self) -> None:
        """Compile each transformer block of the encoder and the pixel decoder, in place: names and state dict stay as they are.

        Blocks of one shape share their code, so that the wait at the first step is that of a few blocks, not of the whole step.
        """
        # One for each number of tokens, readers and mask, in both modes: more than torch's default of 8.
        torch._dynamo.config.recompile_limit = max(_RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
        for block in (*self.encoder.blocks, *self.decoder.blocks):
            block.compile()

    # Inference

    def node_queries(self) -> Tensor:
        """[G, D]: leaf queries from the leaf names, inner nodes as means of their children (METHOD section 3).

        Names are encoded without dropout, because one noisy query would be wrong in the same way for every image of the batch; the
        `official` wiring keeps the release's dropout while the encoder trains.
        """
        if self._fixed_queries_GD is not None:
            return self._fixed_queries_GD
        training = self.text.training
        self.text.train(training and self.official and self.encoder.cls_token.requires_grad)
        leaves_MD = self.bert_proj(self.text(self.leaf_ids, self.leaf_ids_mask))
        self.text.train(training)
        queries: Tensor = self.graph_means.to(leaves_MD.dtype) @ leaves_MD
        return queries

    def fix_queries(self) -> None:
        """Keep the node queries as they are now, for a model that will not be trained: the leaf names are then read once."""
        with torch.no_grad():
            self._fixed_queries_GD = self.node_queries()

    def encode(self, image_BCHW: Tensor, keep_BV: Tensor | None = None) -> Encoded:
        """Encode normalised images [B, 3, S, S] with the 32 node queries: all patches, or those of `keep_BV`. Call it in eval mode."""
        return self._encoded(image_BCHW, self.encoder(image_BCHW, self.node_queries(), keep_BV, keep_contexts=True))

    def _encoded(self, image: Tensor, latent: Latent) -> Encoded:
        nodes = latent.queries_BKD
        attention = latent.attention_BKV[:, : nodes.shape[1]]
        attention = attention / attention.sum(-1, keepdim=True).clamp_min(1e-8)
        leaf_nodes = list(LEAF_NODES)
        local = latent.local_BVD
        region = self.region(attention[:, leaf_nodes].to(local.dtype) @ local)
        patch_findings = self.region.patch_findings(local, latent.patches_BVD)
        entities = self.region.entity_logits(patch_findings, attention[:, leaf_nodes])
        pooled = torch.cat([latent.patches_BVD.mean(1), latent.cls_BD], -1)
        return Encoded(
            nodes,
            nodes[:, leaf_nodes],
            latent.cls_BD,
            latent.patches_BVD,
            attention,
            pooled,
            region,
            local,
            patch_findings,
            entities,
            image,
            latent.contexts_BLTD,
        )

    def prefix(self, encoded: Encoded, leaf_mask_BM: Tensor) -> tuple[Tensor, Tensor]:
        """The language model's prefix [B, M + 1 + N, W] and its mask (bool): kept leaves and all patches, never the class token.

        Positions run over all slots, masked ones included: in generation give `position_ids` = 0, 1, 2, ... over the whole row.
        """
        leaves_BMD = encoded.leaves_BMD
        if self.leaf_findings is not None:
            with torch.no_grad():
                shown_BMF = self.findings_read(encoded).leaves_BMF.sigmoid()
            leaves_BMD = leaves_BMD + self.leaf_findings(shown_BMF.to(leaves_BMD.dtype))
        tokens = torch.cat([leaves_BMD, encoded.cls_BD[:, None], encoded.patches_BND], 1)
        leaf_mask = leaf_mask_BM.bool()
        patches = leaf_mask.new_ones(len(leaf_mask), encoded.patches_BND.shape[1])
        return self.opt_proj(tokens), torch.cat([leaf_mask, torch.zeros_like(leaf_mask[:, :1]), patches], 1)

    def findings_read(self, encoded: Encoded) -> FindingsRead:
        """Findings of the films, of their leaves, and of the cells of the atlas' frame; what the head reads has no gradient."""
        read: FindingsRead = self.findings_head(self.findings_inputs(encoded))
        return read

    def findings_inputs(self, encoded: Encoded) -> FindingsInputs:
        """What the findings head reads, without gradients: the encoder is frozen where the head is trained."""
        attention = encoded.attention_BGN[:, list(LEAF_NODES)] if self.losses.grounding.enabled else None
        with torch.no_grad():
            registered = register(encoded.image_BCHW, attention)
        return FindingsInputs(registered, encoded.pooled_BD.detach())

    def parameter_groups(self, optim: OptimConfig, stage: str, freeze_encoder: bool = False) -> list[dict[str, Any]]:
        """AdamW groups of the parameters that `stage` trains, with `lr` and `weight_decay` (none on tensors of one dimension or less).

        `freeze_encoder` leaves the encoder and the queries out of the generation stage.
        """
        image = [self.encoder, self.text, self.bert_proj]
        contrastive = [*image, self.decoder, self.img_mlp, self.visibility, self.balance]
        ground = self.losses.grounding
        if ground.enabled and (ground.region_text > 0 or ground.entities > 0):
            contrastive.append(self.region)
        language = [self.language, self.opt_proj, *([] if self.leaf_findings is None else [self.leaf_findings])]
        modules: dict[str, list[nn.Module]] = {
            "contrastive": contrastive,
            "text": [self.language],
            "generation": language if freeze_encoder else [*language, *image],
            "joint": [*contrastive, *language],
            "findings": [self.findings_head],
        }
        if stage not in modules:
            raise ConfigError(f"'{stage}' is not a stage; expected one of: {', '.join(STAGES)}.")
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        singles = [self.tau] if stage in ("contrastive", "joint") else []
        for module in modules[stage]:
            is_language = module is self.language
            lr = optim.lr * (optim.lm_lr_scale if is_language else 1.0)
            for parameter in self.language.trainable() if is_language else module.parameters():
                groups.setdefault((lr, 0.0 if len(full_shape(parameter)) <= 1 else optim.weight_decay), []).append(parameter)
        for parameter in singles:
            groups.setdefault((optim.lr, 0.0), []).append(parameter)
        return [{"params": parameters, "lr": lr, "weight_decay": decay} for (lr, decay), parameters in groups.items()]


def _check(config: ModelConfig, losses: LossConfig) -> None:
    if config.wiring != "official":
        return
    if losses.grounding.enabled:
        raise ConfigError("model.wiring official has no grounding extension: set losses.grounding.enabled=false, or model.wiring=paper.")
    if config.vision.decoder_width != config.vision.width:
        raise ConfigError(
            f"model.wiring official needs model.vision.decoder_width {config.vision.decoder_width} equal to model.vision.width "
            f"{config.vision.width}."
        )


def _leaf_tokens(tokenizer: Any, max_tokens: int) -> tuple[Tensor, Tensor]:
    """Ids [M, L] and mask of the leaf names, without [CLS] (as released), padded to the longest name only."""
    rows = []
    for leaf in LEAVES:
        encoding = tokenizer.encode(leaf, add_special_tokens=False)
        rows.append([token for token, used in zip(encoding.ids, encoding.attention_mask, strict=True) if used][:max_tokens])
    longest = max(len(row) for row in rows)
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in rows])
    return ids, mask
