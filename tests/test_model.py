"""The composed model: the `paper` wiring against its slow reference, read-only queries, stages, and the errors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from paper_reference import reference_losses
from small_model import random_batch, small_config, small_model, small_tokenizers, without_text

from ssacl.anatomy import FINDINGS, LEAVES, NO_FINDING, FindingStatus, leaf_mask
from ssacl.errors import ConfigError
from ssacl.models.findings import findings_loss, infer_anatomy, infer_sides
from ssacl.models.phrase import phrase_attention
from ssacl.models.ssacl import RAMPED, SSACL, STAGES
from ssacl.models.vision import position_table


def train_only(model: SSACL, config, stage: str, freeze_encoder: bool = False) -> list[str]:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for group in model.parameter_groups(config.optim, stage, freeze_encoder):
        for parameter in group["params"]:
            parameter.requires_grad_(True)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize("recursive", [True, False])
def test_paper_wiring_equals_the_slow_reference(recursive: bool) -> None:
    config = small_config(losses__recursive_anatomy=recursive, losses__grounding={"enabled": False})
    model, batch = small_model(config), random_batch(3, config)
    ours = model(batch, "joint").named()
    reference = reference_losses(model, batch, recursive)
    assert ours.keys() == reference.keys()
    trained = [parameter for name, parameter in model.named_parameters() if not name.startswith(("region.", "findings_head."))]
    for name, value in reference.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
        mine = torch.autograd.grad(ours[name], trained, retain_graph=True, materialize_grads=True)
        theirs = torch.autograd.grad(value, trained, retain_graph=True, materialize_grads=True)
        scale = max(float(grad.abs().max()) for grad in theirs)
        assert scale > 0
        worst = max(float((one - other).abs().max()) for one, other in zip(mine, theirs, strict=True))
        assert worst <= 1e-5 * scale + 1e-7, name


@pytest.mark.parametrize("wiring", ["paper", "official"])
def test_queries_are_read_only(wiring: str) -> None:
    config = small_config(model__wiring=wiring, model__vision__decoder_width=24, losses__grounding={"enabled": False})
    encoder, batch = small_model(config).encoder, random_batch(2, config)
    queries = torch.randn(5, 24)
    some, other = encoder(batch.image, queries, keep_contexts=True), encoder(batch.image, queries[[3]])
    torch.testing.assert_close(some.patches_BVD, other.patches_BVD)
    torch.testing.assert_close(some.queries_BKD[:, [3]], other.queries_BKD)
    without = encoder(batch.image)
    same = torch.allclose(some.patches_BVD, without.patches_BVD, atol=1e-6)
    assert same == (wiring == "paper")
    asked, attention = encoder.probe(queries.expand(2, -1, -1), some.contexts_BLTD)
    torch.testing.assert_close(asked, some.queries_BKD)
    torch.testing.assert_close(attention, some.attention_BKV[:, :5])


@pytest.mark.parametrize("tokens", [4, 400])
def test_fused_and_plain_attention_agree(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    from ssacl.models import vision

    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 2, tokens, 8).unbind(0)
    mask = torch.rand(tokens, tokens) < 0.5
    mask |= torch.eye(tokens, dtype=torch.bool)
    results = []
    for limit in (0, 10**6):
        monkeypatch.setattr(vision, "_SDPA_TOKENS", limit)
        results.append(vision._attend(query, key, value, mask))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", ["whole", "some_text", "no_text"])
def test_every_trained_parameter_takes_part_in_every_batch(stage: str, kind: str) -> None:
    config = small_config()
    model, batch = small_model(config), random_batch(3, config, sentences_per_row=0 if kind == "no_text" else 2)
    if kind != "whole":
        batch = without_text(batch, [0, 1, 2] if kind == "no_text" else [1])
        batch = replace(batch, has_labels=batch.has_text)
    names = train_only(model, config, stage)
    losses = model(batch, stage)
    losses.total.backward()
    assert bool(losses.total.isfinite())
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in names), name
        assert parameter.grad is None or bool(parameter.grad.isfinite().all()), name


def test_total_is_the_recorded_weighted_sum_and_the_ramp_touches_geometry_only() -> None:
    config = small_config(losses__grounding={"order": 2.0}, losses__global_contrastive=0.3)
    model, batch = small_model(config), random_batch(3, config)
    full, half = model(batch, "joint", 1.0), model(batch, "joint", 0.5)
    for losses in (full, half):
        named = losses.named()
        assert named.keys() == losses.weights.keys()
        torch.testing.assert_close(losses.total, sum(losses.weights[name] * value for name, value in named.items()))
    for name, weight in full.weights.items():
        assert half.weights[name] == (weight / 2 if name.removeprefix("grounding/") in RAMPED else weight)
    assert full.weights["global_contrastive"] == 0.3
    assert full.weights["grounding/order"] == 2.0


def test_learned_balance_changes_nothing_at_its_start_and_learns() -> None:
    batch_config = small_config(losses__grounding={"enabled": False})
    fixed = small_model(batch_config)
    learned = small_model(small_config(losses__grounding={"enabled": False}, losses__balance="uncertainty"))
    with torch.no_grad():
        learned.balance.log_variance.zero_()
    learned.load_state_dict(fixed.state_dict(), strict=False)
    batch = random_batch(3, batch_config)
    total = learned(batch, "contrastive").total
    torch.testing.assert_close(total, fixed(batch, "contrastive").total)
    total.backward()
    assert int((learned.balance.log_variance.grad != 0).sum()) == 4


def test_frozen_encoder_keeps_its_weights_out_of_generation() -> None:
    config = small_config()
    model = small_model(config)
    names = train_only(model, config, "generation", freeze_encoder=True)
    assert {name.split(".")[0] for name in names} == {"language", "opt_proj"}
    model(random_batch(2, config), "generation").total.backward()
    assert all((parameter.grad is not None) == (name in names) for name, parameter in model.named_parameters())


def test_frozen_encoder_has_no_dropout_in_training() -> None:
    config = small_config()
    model = small_model(config).train()
    train_only(model, config, "findings")
    batch = random_batch(2, config)
    with torch.no_grad():
        assert float(model(batch, "findings").total) == float(model(batch, "findings").total)
    train_only(model, config, "contrastive")
    assert float(model(batch, "contrastive").total.detach()) != float(model(batch, "contrastive").total.detach())


def test_text_stage_reads_no_film_and_words_keep_their_positions() -> None:
    config = small_config()
    model, batch = small_model(config).eval(), random_batch(3, config)
    loss = model(batch, "text").language_model
    assert torch.equal(loss, model(replace(batch, image=torch.randn_like(batch.image)), "text").language_model)
    first, scores = len(LEAVES) + 1 + config.model.vision.num_patches, []
    for prompt, asked, report, said in zip(batch.prompt_ids, batch.prompt_mask, batch.report_ids, batch.report_mask, strict=True):
        ids = torch.cat([prompt[asked], report[said]])
        logits = model.language.model(ids[None], position_ids=first + torch.arange(len(ids))[None]).logits[0]
        # The report's own tokens; where there is no prompt, nothing comes before its first.
        start = max(1, int(asked.sum()))
        scores.append(torch.nn.functional.cross_entropy(logits[start - 1 : -1], ids[start:], reduction="none"))
    torch.testing.assert_close(loss, torch.cat(scores).mean(), rtol=1e-5, atol=1e-6)
    assert train_only(model, config, "text") == [name for name, _ in model.named_parameters() if name.startswith("language.")]


def test_language_rates_and_decay_of_the_groups() -> None:
    config = small_config(optim={"lr": 1.0, "lm_lr_scale": 0.25, "weight_decay": 0.5})
    model = small_model(config)
    language = {id(parameter) for parameter in model.language.parameters()}
    seen: set[int] = set()
    for group in model.parameter_groups(config.optim, "joint"):
        for parameter in group["params"]:
            assert group["lr"] == (0.25 if id(parameter) in language else 1.0)
            assert group["weight_decay"] == (0.0 if parameter.ndim <= 1 else 0.5)
            assert id(parameter) not in seen
            seen.add(id(parameter))
    assert seen == {id(value) for name, value in model.named_parameters() if not name.startswith("findings_head.")}


def test_losses_stay_finite_and_close_under_bfloat16() -> None:
    config = small_config()
    model, batch = small_model(config), random_batch(3, config)
    exact = model(batch, "joint").named()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(batch, "joint")
    losses.total.backward()
    assert losses.total.dtype == torch.float32
    for name, value in losses.named().items():
        assert value.dtype == torch.float32, name
        assert float(value.detach()) == pytest.approx(float(exact[name].detach()), rel=0.1, abs=0.02), name
    assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters() if parameter.grad is not None)


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    grads = []
    for recompute in (False, True):
        config = small_config(model__activation_checkpointing=recompute)
        model = small_model(config)
        model(random_batch(2, config), "contrastive").total.backward()
        grads.append(model.encoder.patch_embed.weight.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("grounding", [True, False])
def test_two_phrases_of_one_image_give_two_maps(grounding: bool) -> None:
    config = small_config(losses__grounding={"enabled": grounding})
    model, batch = small_model(config), random_batch(1, config)
    text = small_tokenizers().text
    maps = []
    with torch.inference_mode():
        encoded = model.encode(batch.image)
        torch.testing.assert_close(encoded.attention_BGN.sum(-1), torch.ones(1, 32))
        for phrase in ("left lower lung zone effusion", "right clavicle"):
            ids = torch.tensor([[text.token_to_id("[CLS]"), *text.encode(phrase).ids]])
            maps.append(phrase_attention(model, encoded, ids, torch.ones_like(ids, dtype=torch.bool)))
    for each in maps:
        assert each.shape == (1, config.model.vision.num_patches)
        assert float(each.sum()) == pytest.approx(1.0, abs=1e-5)
        assert bool((each >= 0).all())
    assert float((maps[0] - maps[1]).abs().max()) > 1e-6


def test_prefix_masks_class_and_other_leaves() -> None:
    config = small_config()
    model, batch = small_model(config), random_batch(2, config)
    embeds, mask = model.prefix(model.encode(batch.image), batch.leaf_mask)
    patches = config.model.vision.num_patches
    assert embeds.shape == (2, len(LEAVES) + 1 + patches, config.model.language.width)
    assert torch.equal(mask[:, : len(LEAVES)], batch.leaf_mask)
    assert not bool(mask[:, len(LEAVES)].any())
    assert bool(mask[:, len(LEAVES) + 1 :].all())


def test_leaf_slots_say_which_findings_show_there_once_trained_to() -> None:
    config = small_config(model__findings_in_prefix=True)
    model, batch = small_model(config), random_batch(1, config)
    bias = model.findings_head.leaf_bias
    with torch.inference_mode():
        encoded = model.encode(batch.image)

        def prefixes() -> list[torch.Tensor]:
            made = []
            for more in (0.0, 9.0):
                bias.data[3, 5] += more
                made.append(model.prefix(encoded, batch.leaf_mask)[0])
            bias.data[3, 5] -= 9.0
            return made

        assert torch.equal(*prefixes()), "starts at zero: an imported model's prefix is unchanged"
        torch.nn.init.normal_(model.leaf_findings.weight)
        plain, told = prefixes()
    changed = (plain != told).any(-1)[0]
    assert changed.nonzero()[:, 0].tolist() == [3]
    assert small_model(small_config()).leaf_findings is None


def test_findings_lead_to_anatomy() -> None:
    probabilities = torch.zeros(len(FINDINGS))
    assert infer_anatomy(probabilities, {}) == ([NO_FINDING], (), [True] * len(LEAVES))
    probabilities[FINDINGS.index("Cardiomegaly")] = 0.4
    probabilities[FINDINGS.index(NO_FINDING)] = 0.9
    assert infer_anatomy(probabilities, {})[0] == [NO_FINDING]
    entities, groups, mask = infer_anatomy(probabilities, {"Cardiomegaly": 0.4})
    assert (entities, groups, mask) == (["Cardiomegaly"], ("mediastinum",), leaf_mask(["mediastinum"]))


def test_sides_of_findings_from_the_leaves() -> None:
    logits = torch.full((len(LEAVES), len(FINDINGS)), -6.0)
    for leaf, finding, logit in (
        ("left lower lung zone", "Pleural Effusion", 2.0),
        ("right lower lung zone", "Pleural Effusion", -1.0),
        ("left mid lung zone", "Edema", 2.0),
        ("right mid lung zone", "Edema", 1.5),
        ("right atrium", "Cardiomegaly", 3.0),
        ("right mid lung zone", "Cardiomegaly", -1.0),
    ):
        logits[LEAVES.index(leaf), FINDINGS.index(finding)] = logit
    sides = infer_sides(logits)
    assert (sides["Pleural Effusion"], sides["Edema"], sides["Cardiomegaly"]) == ((False, True), (True, True), (False, False))
    assert NO_FINDING not in sides


def test_uncertain_policy_and_unlabelled_rows() -> None:
    labels = torch.full((2, len(FINDINGS)), int(FindingStatus.UNMENTIONED))
    labels[0, 0] = FindingStatus.UNCERTAIN
    logits = torch.zeros(2, len(FINDINGS))
    logits[0, 0] = 2.0
    only_first = torch.tensor([True, False])
    rest = 13 * torch.tensor(2.0).log()
    wrong, right = torch.nn.functional.softplus(torch.tensor([2.0, -2.0]))
    for policy, expected in (("present", (rest + right) / 14), ("absent", (rest + wrong) / 14), ("ignore", rest / 13)):
        torch.testing.assert_close(findings_loss(logits, labels, only_first, policy), expected)


@pytest.mark.parametrize("exponents", ["mae", "official"])
def test_position_table_tells_every_place_apart(exponents: str) -> None:
    table = position_table(24, 4, exponents)[0]
    assert table.shape == (17, 24)
    assert not bool(table[0].any())
    assert float(torch.cdist(table[1:], table[1:]).fill_diagonal_(9).min()) > 1e-3
    torch.testing.assert_close(table[1 : 1 + 4, :12], table[5 : 5 + 4, :12])


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"model__text__vocab_size": 5}, "model.text.vocab_size"),
        ({"model__language__vocab_size": 5}, "model.language.vocab_size"),
        ({"data__text_max_tokens": 17}, "model.text.max_tokens"),
        ({"model__language__name_or_path": "no/such/folder"}, "model.language.name_or_path"),
        ({"model__wiring": "official"}, "losses.grounding.enabled"),
        ({"model__wiring": "official", "losses__grounding": {"enabled": False}}, "decoder_width"),
    ],
)
def test_contradictions_name_the_key(changes: dict, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        small_model(small_config(**changes))


def test_wrong_stage_image_size_and_length_are_named() -> None:
    config = small_config()
    model, batch = small_model(config), random_batch(2, config)
    with pytest.raises(ConfigError, match="contrastive"):
        model(batch, "pretraining")
    with pytest.raises(ConfigError, match="image_size_px"):
        model(replace(batch, image=batch.image[..., :24, :24]), "contrastive")
    long = replace(batch, report_ids=batch.report_ids.repeat(1, 9), report_mask=batch.report_mask.repeat(1, 9))
    with pytest.raises(ConfigError, match="max_positions"):
        model(long, "generation")
