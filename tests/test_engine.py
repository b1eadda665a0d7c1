"""One optimizer step: plain torch and DeepSpeed agree, resume exactly, and stop by name on a loss that is not finite."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from training_set import tiny_config, write_training_set

from ssacl.config import Config
from ssacl.data.collate import Collator
from ssacl.data.records import Batch
from ssacl.data.shards import ShardIndex, read_sample
from ssacl.data.storage import open_storage
from ssacl.data.tokenization import Tokenizers
from ssacl.errors import CheckpointError, ConfigError, TrainingError
from ssacl.models.ssacl import SSACL
from ssacl.training.engine import Engine, make_engine
from ssacl.training.stages import WARMUP_START_LR, StagePlan, fit_batch, plan_stages

STAGES = [{"kind": kind, "num_steps": 10} for kind in ("contrastive", "generation", "findings", "joint")]
NO_DROPOUT = {"dropout": 0.0}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_training_set(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def batches(data: Path) -> list[Batch]:
    config = _config(data)
    storage = open_storage(str(data))
    samples = [read_sample(storage, entry) for entry in ShardIndex.load(storage).samples("train")]
    collator = Collator(config.data, config.model.vision, Tokenizers.load(data), 0, True)
    return [collator(samples[start : start + 4], 0) for start in range(0, 20, 4)]


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    # The variable goes with the group: whoever finds it takes its process for one of several.
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("LOCAL_RANK", "0")
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        yield
        dist.destroy_process_group()


def _config(data: Path, **engine) -> Config:
    config = tiny_config(data, "unused", engine={"kind": "torch", "micro_batch_size": 4, **engine}, run={"stages": STAGES})
    text, language = (part.model_copy(update=NO_DROPOUT) for part in (config.model.text, config.model.language))
    return config.model_copy(update={"model": config.model.model_copy(update={"text": text, "language": language})})


def _plan(config: Config, kind: str) -> StagePlan:
    return next(plan for plan in plan_stages(config, 5) if plan.kind == kind)


def _engine(data: Path, kind: str = "contrastive", **engine) -> tuple[SSACL, Engine]:
    config = _config(data, **engine)
    torch.manual_seed(0)
    model = SSACL.from_config(config, Tokenizers.load(data))
    return model, make_engine(model, config, _plan(config, kind))


@pytest.mark.parametrize("kind", ["contrastive", "generation", "findings", "joint"])
def test_a_stage_changes_what_it_trains_and_nothing_else(data, batches, kind):
    model, engine = _engine(data, kind)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    for _ in range(2):
        values = engine.step(batches[:1], 1.0)
    assert all(math.isfinite(value) for value in values.values())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed <= trained
    assert engine.num_trained == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    # Biases that start at an optimum may stand still; most must move.
    assert len(changed) > 0.8 * len(trained)
    if kind == "findings":
        assert all(name.startswith("findings_head") for name in trained)


def test_every_trained_parameter_has_a_gradient(data, batches):
    """DDP and ZeRO wait for ever for one that has none."""
    for kind in ("contrastive", "generation", "findings", "joint"):
        model, engine = _engine(data, kind)
        engine.step(batches[:1], 1.0)
        missing = [name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None]
        assert missing == [], kind


def test_accumulation_averages_micro_batches(data, batches):
    _, engine = _engine(data, "findings", accumulation_steps=2)
    values = engine.step(batches[:2], 1.0)
    _, single = _engine(data, "findings")
    parts = [single.evaluate(batch, 1.0)["total"] for batch in batches[:2]]
    assert values["total"] == pytest.approx(sum(parts) / 2, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_deepspeed_gives_the_plain_loops_losses(data, batches, process_group, zero_stage):
    for kind in ("contrastive", "generation", "findings"):
        _, plain = _engine(data, kind)
        _, deep = _deep(data, kind, zero_stage)
        for step in range(3):
            one, other = plain.step(batches[step : step + 1], 1.0), deep.step(batches[step : step + 1], 1.0)
            assert other == pytest.approx(one, rel=1e-4, abs=1e-6), (kind, step)
        one, other = plain.full_state(), deep.full_state()
        assert {name: tensor.shape for name, tensor in one.items()} == {name: tensor.shape for name, tensor in other.items()}
        # As a whole: AdamW turns the noise in gradients that are zero by symmetry (key biases) into full steps.
        difference = sum(float((tensor - other[name]).square().sum()) for name, tensor in one.items())
        assert difference < 1e-6 * sum(float(tensor.square().sum()) for tensor in one.values())
        deep.close()


@pytest.mark.parametrize("engine_kind", ["torch", "deepspeed"])
def test_save_and_load_continue_bit_for_bit(data, batches, process_group, tmp_path, engine_kind):
    def make() -> Engine:
        return _engine(data)[1] if engine_kind == "torch" else _deep(data, "contrastive", 2)[1]

    first = make()
    for step in range(2):
        first.step(batches[step : step + 1], 1.0)
    copies = first.save(tmp_path)
    expected = [first.step(batches[step : step + 1], 1.0) for step in (2, 3)]
    # Late, as the run writes them: they are of the moment of `save`, whatever the weights have become.
    copies.write()
    first.close()
    second = make()
    second.load(tmp_path)
    assert [second.step(batches[step : step + 1], 1.0) for step in (2, 3)] == expected
    second.close()


def test_a_checkpoint_goes_on_under_another_zero_stage_or_is_refused_by_name(data, batches, process_group, tmp_path):
    _, first = _deep(data, "generation", 1)
    for step in range(2):
        first.step(batches[step : step + 1], 1.0)
    first.save(tmp_path).write()
    expected = [first.step(batches[step : step + 1], 1.0) for step in (2, 3)]
    first.close()
    model, second = _deep(data, "generation", 2)
    # What the stage does not train comes from the checkpoint as well.
    model.decoder.mask_token.data.zero_()
    second.load(tmp_path)
    assert bool(model.decoder.mask_token.any())
    for step, values in zip((2, 3), expected, strict=True):
        assert second.step(batches[step : step + 1], 1.0) == pytest.approx(values, rel=1e-5)
    second.close()
    _, without = _deep(data, "generation", 0)
    with pytest.raises(CheckpointError, match=r"engine\.zero_stage=1.*Set it back"):
        without.load(tmp_path)
    without.close()
    (shard,) = (tmp_path / "deepspeed").glob("*optim_states.pt")
    shard.write_bytes(shard.read_bytes()[:1000])
    _, third = _deep(data, "generation", 2)
    with pytest.raises(CheckpointError, match=r"cannot be spread over .*run\.name"):
        third.load(tmp_path)
    third.close()


def test_a_checkpoint_of_the_other_engine_is_refused(data, process_group, tmp_path):
    for engine in (_engine(data)[1], _deep(data, "contrastive", 2)[1]):
        with pytest.raises(CheckpointError, match=r"engine\.kind"):
            engine.load(tmp_path)
        engine.close()


def test_a_loss_that_is_not_finite_stops_before_the_weights_move(data, batches):
    model, engine = _engine(data)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    poisoned = dataclasses.replace(batches[0], image=batches[0].image * math.nan)
    with pytest.raises(TrainingError, match=r"step 0 of stage 'contrastive': .*image_reconstruction.*optim\.lr"):
        engine.step([poisoned], 1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_bf16_stays_near_fp32_and_keeps_float32_weights(data, batches):
    _, exact = _engine(data)
    model, rough = _engine(data, precision="bf16")
    one, other = exact.step(batches[:1], 1.0)["total"], rough.step(batches[:1], 1.0)["total"]
    assert other == pytest.approx(one, rel=0.05)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_full_device_says_what_to_lower(data, batches):
    model, engine = _engine(data)

    def run_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    model.encoder.register_forward_pre_hook(run_out)
    for call in (lambda: engine.step(batches[:1], 1.0), lambda: engine.evaluate(batches[0], 1.0)):
        with pytest.raises(TrainingError, match=r"micro_batch_size 4\. Lower it.*activation_checkpointing.*offload"):
            call()


def test_a_batch_that_cannot_be_dealt_out_is_named(data):
    config = _config(data, global_batch_size=12, accumulation_steps=2)
    assert fit_batch(config, 3).engine.micro_batch_size == 2
    assert fit_batch(_config(data), 3).engine.micro_batch_size == 4
    with pytest.raises(ConfigError, match=r"global_batch_size 12 .* 4 train workers .* 8 parts\. Set it to 8"):
        fit_batch(config, 4)


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"kind": "torch", "offload": "cpu"}, "kind=deepspeed"),
        ({"kind": "deepspeed", "zero_stage": 0, "offload": "cpu"}, "zero_stage 1, 2 or 3"),
        ({"kind": "deepspeed", "precision": "fp16"}, "loss scale"),
        ({"kind": "deepspeed", "zero_stage": 3, "precision": "fp16"}, "loss scale"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(data, engine, message):
    with pytest.raises(ConfigError, match=message):
        _config(data, **engine)


def test_offload_and_recomputed_activations_give_the_same_steps(data, batches, process_group):
    def run(zero_stage: int, recompute: bool, **engine) -> tuple[list[dict[str, float]], int]:
        config = _config(data, kind="deepspeed", zero_stage=zero_stage, accumulation_steps=2, **engine)
        config = config.model_copy(update={"model": config.model.model_copy(update={"activation_checkpointing": recompute})})
        torch.manual_seed(0)
        model = SSACL.from_config(config, Tokenizers.load(data))
        calls: list[int] = []
        for part in (model.encoder.blocks[0], model.language.model.transformer.h[0].mlp):
            # Before the part: a recomputation may end without running what comes behind it.
            part.register_forward_pre_hook(lambda *_: calls.append(1))
        made = make_engine(model, config, _plan(config, "joint"))
        values = [made.step(batches[start : start + 2], 1.0) for start in (0, 2)]
        made.close()
        return values, len(calls)

    plain, num_calls = run(2, False)
    offloaded, _ = run(2, False, offload="cpu")
    recomputed, more_calls = run(1, True)
    for one, other in zip(plain * 2, offloaded + recomputed, strict=True):
        assert other == pytest.approx(one, rel=1e-5)
    assert more_calls == 2 * num_calls


def test_fp16_on_a_cpu_is_a_named_error(data):
    with pytest.raises(ConfigError, match="precision"):
        _engine(data, precision="fp16")


def test_learning_rate_warms_up_and_ends_at_zero(data):
    plan = dataclasses.replace(_plan(_config(data), "contrastive"), num_steps=100, warmup_steps=10, ramp_steps=20)
    rates = [plan.learning_rate(step, 1e-3) for step in range(101)]
    assert rates[0] == WARMUP_START_LR
    assert rates[10] == max(rates) == 1e-3
    assert rates[100] == 0
    assert all(a <= b for a, b in itertools.pairwise(rates[:11]))
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert [plan.ramp(step) for step in (0, 10, 20, 90)] == [0, 0.5, 1, 1]


def test_epochs_become_steps_and_too_short_an_epoch_is_named(data):
    config = tiny_config(
        data, "unused", run={"stages": [{"kind": "joint", "num_epochs": 1.5, "lr": 0.5}]}, engine={"accumulation_steps": 2}
    )
    (plan,) = plan_stages(config, 40)
    assert (plan.num_steps, plan.optim.lr) == (30, 0.5)
    with pytest.raises(ConfigError, match=r"engine\.accumulation_steps"):
        plan_stages(config, 1)


def _deep(data: Path, kind: str, zero_stage: int) -> tuple[SSACL, Engine]:
    config = _config(data)
    config = config.model_copy(update={"engine": config.engine.model_copy(update={"kind": "deepspeed", "zero_stage": zero_stage})})
    torch.manual_seed(0)
    model = SSACL.from_config(config, Tokenizers.load(data))
    return model, make_engine(model, config, _plan(config, kind))
