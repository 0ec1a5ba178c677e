"""What works with tensor parallelism, what is refused, what is warned of: the rows of docs/compatibility.md."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import io
import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

import tp_plugin
from tests.support.adapters import adapt
from tests.support.batched_cases import launched, sentence, values
from tests.support.configs import ACCUMULATION, CLIP, config_for
from tests.support.errors import replica_error
from tests.support.matrix import LIMITS, assert_within, run_cases
from tests.support.models import batch, make
from tests.support.ranks import on_ranks
from tests.support.stepped import ClippedByTensor
from tests.support.train import STEPS, engine_for, loss_of, micro_batches, optimizer_for
from tp_plugin.param_info import layout_of

ROOT = Path(__file__).parents[1]

# ---- trains like one process -----------------------------------------------------------------------------------------

MIXED = {"family": "Qwen2", "heads": (6, 3)}  # at tp 2 a rank's shard holds KV heads of its own and a replica
CPU = {"device": "cpu"}
EQUAL: dict[tuple[int, str], dict[str, dict]] = {
    (2, "slot"): {
        "offload_param": {"stage": 3, "zero": {"offload_param": CPU}},
        "offload_both": {"stage": 3, "zero": {"offload_param": CPU, "offload_optimizer": CPU}},
        "overlap_comm": {"stage": 2, "zero": {"contiguous_gradients": False, "overlap_comm": True}},
        "no_reduce_scatter": {"stage": 1, "zero": {"reduce_scatter": False}},
        "recompute_reentrant": {"stage": 1, "checkpointing": True},
        "recompute": {"stage": 3, "checkpointing": False},
        "eager_attention": {"stage": 2, "attn_implementation": "eager"},
    },
    (4, "slot"): {
        "offload_both_dp2": {"stage": 3, "zero": {"offload_param": CPU, "offload_optimizer": CPU}},
        # DeepSpeed's safe_get_full_grad does not find its way among gradients in that order
        "round_robin": {"stage": 2, "zero": {"round_robin_gradients": True}, "gradients": False},
        **{f"seeded_by_rank_zero{stage}": {"stage": stage, "seeded": "by rank"} for stage in (0, 1, 3)},
    },
    (4, "early"): {
        **{f"early_zero{stage}": {"stage": stage} for stage in (0, 3)},
        "early_seeded_by_rank": {"stage": 2, "seeded": "by rank"},
    },
    (4, "mpu"): {f"mpu_zero{stage}": {"stage": stage} for stage in (0, 1, 2, 3)}
    | {"mpu_offload": {"stage": 2, "offload": True}},
}


@functools.cache
def compared(world: int, way: str) -> list[list[dict[str, float] | str]]:
    """A launch for each way, since a process in which DeepSpeed has made its groups is another one for ``mpu=``."""
    cases = [MIXED | {"way": way} | case for case in EQUAL[world, way].values()]
    return on_ranks(world, run_cases, 2, cases, timeout_s=600)


@pytest.mark.parametrize(
    ("world", "way", "name"), [pytest.param(*key, name, id=name) for key, cases in EQUAL.items() for name in cases]
)
def test_equals_one_process(world, way, name):
    index = list(EQUAL[world, way]).index(name)
    assert_within(LIMITS, [found[index] for found in compared(world, way)])


# ---- half precision --------------------------------------------------------------------------------------------------

HALF: dict[str, tuple[torch.dtype, int, dict]] = {
    **{f"bf16_zero{stage}": (torch.bfloat16, stage, {"bf16": {"enabled": True}}) for stage in (1, 2, 3)},
    "bf16_fp32_accumulation": (
        *(torch.bfloat16, 1),
        {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    ),
    "autocast_bf16": (torch.bfloat16, 1, {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}),
    **{
        f"fp16_zero{stage}": (torch.float16, stage, {"fp16": {"enabled": True, "initial_scale_power": 12}})
        for stage in (1, 2, 3)
    },
}


def plain(dtype: torch.dtype, scale: float = 1.0) -> dict:
    """One process: a model in ``dtype``, its gradients accumulated in it, a master copy in fp32 that SGD moves.

    The master starts from the rounded model, as DeepSpeed's does.
    """
    model = make("Qwen2", heads=(6, 3)).to(dtype)
    master = copy.deepcopy(model).float()
    start = [p.detach().clone() for p in master.parameters()]
    optimizer = optimizer_for(master, "sgd")
    losses, norms = [], []
    for step in range(STEPS):
        total = 0.0
        for pieces in micro_batches(step, 1):
            loss = loss_of(model, pieces[0], step) / ACCUMULATION
            (loss * scale).backward()
            total += loss.item()
        for ours, theirs in zip(master.parameters(), model.parameters(), strict=True):
            ours.grad, theirs.grad = theirs.grad.float() / scale, None
        norms.append(torch.nn.utils.clip_grad_norm_(master.parameters(), CLIP).item())
        optimizer.step()
        with torch.no_grad():
            for ours, theirs in zip(master.parameters(), model.parameters(), strict=True):
                theirs.copy_(ours)
        losses.append(total)
    moved = torch.cat([(p.detach() - s).flatten() for p, s in zip(master.parameters(), start, strict=True)])
    return {"losses": torch.tensor(losses), "norms": torch.tensor(norms), "moved": moved}


def sharded_half(stage: int, config: dict) -> dict:
    from deepspeed.utils import safe_get_full_fp32_param

    model = make("Qwen2", heads=(6, 3))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine = engine_for(model, optimizer_for(model, "sgd"), config_for(2, stage, **copy.deepcopy(config)))
    start = {name: p.to(next(model.parameters()).dtype).float() for name, p in start.items()}
    losses, norms = [], []
    for step in range(STEPS):
        total = 0.0
        for pieces in micro_batches(step, 1):
            loss = loss_of(engine, pieces[0], step)
            engine.backward(loss)
            engine.step()
            total += loss.item() / ACCUMULATION
        losses.append(total)
        norms.append(float(engine.get_global_grad_norm()))
    moved = {}
    rank = engine.module.tp_sharding.mesh.tp_rank
    for name, param in engine.module.named_parameters():
        layout = layout_of(param)
        whole = start[name] if layout is None else layout.shard(start[name], rank)
        moved[name] = (layout, safe_get_full_fp32_param(param).reshape(whole.shape) - whole)
    return {
        "losses": torch.tensor(losses),
        "norms": torch.tensor(norms),
        "moved": moved,
        "skipped": engine.skipped_steps,
        "replicas": replica_error(engine),
        "dtype": str(next(engine.module.parameters()).dtype),
    }


def train_in_half() -> dict:
    return {name: sharded_half(stage, config) for name, (_, stage, config) in HALF.items()}


def whole_update(ranks: list[dict]) -> torch.Tensor:
    names = ranks[0]["moved"]
    layouts = {name: names[name][0] for name in names}
    pieces = {name: [found["moved"][name][1] for found in ranks] for name in names}
    whole = [pieces[n][0] if layouts[n] is None else layouts[n].unshard(pieces[n]) for n in names]
    return torch.cat([tensor.flatten() for tensor in whole])


@pytest.fixture(scope="module")
def half() -> list[dict]:
    return on_ranks(2, train_in_half, timeout_s=600)


@pytest.fixture(scope="module")
def truths() -> dict[torch.dtype, dict]:
    return {dtype: plain(dtype, 4096.0 if dtype == torch.float16 else 1.0)
            for dtype in (torch.float32, torch.bfloat16, torch.float16)}  # fmt: skip


@pytest.mark.parametrize("name", HALF)
def test_half_precision_is_as_exact_as_one_process(half, truths, name):
    """|ours - fp32 truth| <= 2 |one process in the same precision - fp32 truth|, and an eighth of a rounding error.

    The latter for losses and norms, three numbers each: one process may be lucky with them.
    """
    dtype, _, config = HALF[name]
    ranks = [found[name] for found in half]
    ours = ranks[0] | {"moved": whole_update(ranks)}
    exact, rounded = truths[torch.float32], truths[dtype]
    for key in ("losses", "norms", "moved"):
        error, plain_error = ((found[key] - exact[key]).norm() / exact[key].norm() for found in (ours, rounded))
        luck = 0 if key == "moved" else torch.finfo(dtype).eps / 8
        assert error <= 2 * plain_error + luck, f"{key}: {error} and in one process {plain_error}"
    assert all(found["replicas"] == 0 and found["skipped"] == 0 for found in ranks)
    assert ranks[0]["dtype"] == ("torch.float32" if "torch_autocast" in config else str(dtype))


def one_rank_overflows(stage: int) -> tuple[int, float, float, bool]:
    """An infinite gradient in one rank's shard, in the first step: skipped steps, scale before and after, moved?"""
    model = make("Qwen2", heads=(6, 3))
    weight = model.model.layers[0].mlp.up_proj.weight
    config = config_for(2, stage, fp16={"enabled": True, "initial_scale_power": 8, "hysteresis": 1})
    engine = engine_for(model, optimizer_for(model, "sgd"), config)
    if dist.get_rank() == 1:
        weight.register_hook(lambda grad: grad * (float("inf") if engine.global_steps == 0 else 1.0))
    scales = [engine.optimizer.cur_scale]
    for step in range(2):
        for pieces in micro_batches(step, 1):
            engine.backward(loss_of(engine, pieces[0], step))
            engine.step()
        scales.append(engine.optimizer.cur_scale)
    return engine.skipped_steps, scales[1] / scales[0], scales[2] / scales[1], replica_error(engine) == 0


def overflow_at_all_stages() -> list:
    return [one_rank_overflows(stage) for stage in (1, 2, 3)]


def test_an_overflow_on_one_rank_skips_the_step_on_all():
    for found in on_ranks(2, overflow_at_all_stages):
        assert found == [(1, 0.5, 1.0, True)] * 3


# ---- single cases on two ranks, tp 2 ---------------------------------------------------------------------------------


def initialise(model: nn.Module | None = None, stage: int = 1, optimizer="adamw", arguments=None, **config):
    model = make("Llama") if model is None else model
    optimizer = optimizer_for(model, optimizer) if isinstance(optimizer, str) else optimizer
    return engine_for(model, optimizer, config_for(2, stage) | config, **arguments or {})


def zero(**options) -> dict:
    return {"stage": 3, **options}


def offload_nvme_optimizer():
    initialise(zero_optimization=zero(offload_optimizer={"device": "nvme", "nvme_path": "/tmp"}))


def offload_nvme_param():
    initialise(zero_optimization=zero(offload_param={"device": "nvme", "nvme_path": "/tmp"}))


def zeropp_weights():
    initialise(zero_optimization=zero(zero_quantized_weights=True))


def zeropp_gradients():
    initialise(zero_optimization=zero(zero_quantized_gradients=True))


def hpz():
    initialise(zero_optimization=zero(zero_hpz_partition_size=2))


def mics():
    initialise(zero_optimization=zero(mics_shard_size=2))


def ulysses_mesh():
    initialise(arguments={"mesh_param": (1, 2)})


def ulysses_size():
    initialise(sequence_parallel_size=2, data_parallel_size=1)


def expert_parallel():
    initialise(expert_parallel={"enabled": True, "autoep_size": 2})


def pipeline():
    import deepspeed
    from deepspeed.pipe import PipelineModule

    deepspeed.init_distributed("gloo")
    model = PipelineModule(layers=[nn.Linear(4, 4), nn.Linear(4, 4)], num_stages=1)
    initialise(model, optimizer=None)


def deepcompile():
    initialise(compile={"deepcompile": True})


def zenflow():
    initialise(zero_optimization={"stage": 2, "zenflow": {"topk_ratio": 0.1}})


def twin_flow():
    initialise(zero_optimization=zero(offload_optimizer=CPU | {"ratio": 0.5}))


def superoffload():
    initialise(zero_optimization=zero(offload_optimizer=CPU | {"super_offload": True}))


def hybrid_engine():
    initialise(hybrid_engine={"enabled": True})


def data_efficiency():
    initialise(data_efficiency={"enabled": True})


def weight_quantization():
    initialise(weight_quantization={"post_init_quant": {}})


def muon_in_config():
    engine_for(make("Llama"), None, config_for(2, 1, optimizer={"type": "Muon", "params": {"lr": 1e-3}}))


def lamb_in_config():
    engine_for(make("Llama"), None, config_for(2, 1, optimizer={"type": "Lamb", "params": {"lr": 1e-3}}))


def one_bit_in_config():
    engine_for(make("Llama"), None, config_for(2, 0, optimizer={"type": "OneBitAdam", "params": {"lr": 1e-3}}))


def muon_of_torch():
    model = make("Llama")
    initialise(model, optimizer=torch.optim.Muon([p for p in model.parameters() if p.dim() == 2]))


def adafactor_of_torch():
    model = make("Llama")
    initialise(model, optimizer=torch.optim.Adafactor(model.parameters()))


def adafactor_of_transformers():
    from transformers.optimization import Adafactor

    model = make("Llama")
    initialise(model, optimizer=Adafactor(model.parameters()))


def fused_lamb():
    model = make("Llama")
    initialise(model, optimizer=type("FusedLamb", (torch.optim.SGD,), {})(model.parameters()))


def lora_fa_of_peft():
    from peft.optimizers import create_lorafa_optimizer

    model = adapt(make("Llama"), "every linear")
    initialise(model, optimizer=create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-3))


def adafactor_by_a_callable():
    initialise(stage=0, optimizer=lambda params: torch.optim.Adafactor(params))


def clipped_by_tensor():
    model = make("Llama")
    initialise(model, optimizer=ClippedByTensor(model.parameters()))


def clipped_by_tensor_in_a_callable():
    initialise(stage=0, optimizer=ClippedByTensor)


def use_kernels():
    model = make("Llama")
    model._use_kernels = True  # what transformers' set_use_kernels leaves behind; the kernels need a GPU
    initialise(model)


def zero_init():
    import deepspeed
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    with deepspeed.zero.Init(config_dict_or_path=config_for(2, 3)):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    initialise(model, stage=3)


def resize_after():
    model = initialise().module
    assert model.resize_token_embeddings(model.config.vocab_size) is model.get_input_embeddings()  # nothing to do
    model.resize_token_embeddings(140)


def gradient_hook():
    """As of who trains new tokens only."""
    model = make("Llama")
    model.get_input_embeddings().weight.register_hook(lambda grad: grad.index_fill(0, torch.arange(4), 0.0))
    initialise(model)


def deepcopy_after():
    copy.deepcopy(initialise().module)


def save_16bit_model():
    initialise().save_16bit_model("/nowhere")


def removed_by_deepspeed() -> list[str]:
    """Names that DeepSpeed itself refuses."""
    refused = []
    for name in ("sparse_gradients", "compression_training", "progressive_layer_drop", "elasticity"):
        try:
            initialise(**{name: {}})
        except Exception as failure:
            refused += [name] if "removed" in str(failure) else []
    return refused


REFUSED = {
    "offload_nvme_optimizer": r"offload_optimizer to NVMe.*set its device to cpu",
    "offload_nvme_param": r"offload_param to NVMe.*set its device to cpu",
    "zeropp_weights": r"ZeRO\+\+.*remove zero_optimization\.zero_quantized_weights",
    "zeropp_gradients": r"ZeRO\+\+.*remove zero_optimization\.zero_quantized_gradients",
    "hpz": r"hpZ.*remove zero_optimization\.zero_hpz_partition_size",
    "mics": r"MiCS.*remove zero_optimization\.mics_shard_size",
    "ulysses_mesh": r"Ulysses.*remove mesh_param",
    "ulysses_size": r"Ulysses.*remove sequence_parallel_size",
    "expert_parallel": r"expert parallelism.*remove expert_parallel\.enabled",
    "pipeline": r"pipeline parallelism.*pass the plain model",
    "deepcompile": r"DeepCompile.*remove compile\.deepcompile",
    "zenflow": r"ZenFlow.*remove zero_optimization\.zenflow",
    "twin_flow": r"Twin-Flow's second optimizer.*remove zero_optimization\.offload_optimizer\.ratio",
    "superoffload": r"SuperOffload.*remove zero_optimization\.offload_optimizer\.super_offload",
    "hybrid_engine": r"hybrid engine.*remove hybrid_engine\.enabled",
    "data_efficiency": r"data efficiency.*remove data_efficiency\.enabled",
    "weight_quantization": r"weight quantisation.*remove weight_quantization",
    "muon_in_config": r"the optimizer Muon.*use an elementwise one",
    "lamb_in_config": r"the optimizer Lamb.*use an elementwise one",
    "one_bit_in_config": r"the 1-bit optimizer OneBitAdam.*use AdamW",
    "muon_of_torch": r"the optimizer Muon.*use an elementwise one",
    "adafactor_of_torch": r"the optimizer Adafactor.*use an elementwise one",
    "adafactor_of_transformers": r"the optimizer Adafactor.*use an elementwise one",
    "fused_lamb": r"the optimizer FusedLamb.*use an elementwise one",
    "lora_fa_of_peft": r"the optimizer LoraFAOptimizer.*use an elementwise one",
    "adafactor_by_a_callable": r"the optimizer Adafactor.*use an elementwise one",
    "clipped_by_tensor": r"the optimizer ClippedByTensor is not elementwise.*use an elementwise one",
    "clipped_by_tensor_in_a_callable": r"the optimizer ClippedByTensor is not elementwise",
    "use_kernels": r"use_kernels=True.*load it without",
    "zero_init": r"built under deepspeed\.zero\.Init.*build it outside of deepspeed\.zero\.Init",
    "resize_after": r"resize_token_embeddings\(140\).*resize before sharding",
    "gradient_hook": r"embed_tokens\.weight' has a gradient hook.*remove it",
    "deepcopy_after": r"cannot be copied.*copy before sharding",
    "save_16bit_model": r"use tp_plugin\.save_pretrained",
}


def reference_model(dtype: torch.dtype, **precision) -> tuple[bool, float]:
    """Initialised twice at stage 0 without an optimizer: the same model object, and its error against the truth."""
    model = make("Llama")
    for _ in range(2):
        engine = initialise(model, stage=0, optimizer=None, **precision)
    engine.eval()
    data = {"input_ids": batch(0, 2)["input_ids"]}
    with torch.no_grad():
        ours, truth = engine(**data).logits.float(), make("Llama").to(dtype)(**data).logits.float()
    return engine.module is model, float((ours - truth).norm() / truth.norm())


def reference_fp32():
    return reference_model(torch.float32)


def reference_bf16():
    return reference_model(torch.bfloat16, bf16={"enabled": True})


def reference_fp16():
    return reference_model(torch.float16, fp16={"enabled": True})


def neftune_losses(model: nn.Module, step) -> list[float]:
    from transformers.integrations.neftune import activate_neftune

    activate_neftune(make_inner(model), 5.0)
    return [step(batch(number, 2)) for number in range(3)]


def make_inner(model: nn.Module) -> nn.Module:
    return model.module if hasattr(model, "module") else model


def neftune():
    """Losses of three steps with the ranks seeded differently, replica error, and the losses of one process."""
    engine = initialise(stage=1, gradient_accumulation_steps=1, gradient_clipping=0.0)

    def ours(data):
        loss = engine(**data).loss
        engine.backward(loss)
        engine.step()
        return loss.item()

    model = make("Llama")
    optimizer = optimizer_for(model, "adamw")

    def theirs(data):
        optimizer.zero_grad()
        loss = model(**data).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    torch.manual_seed(1000 + dist.get_rank())
    found = neftune_losses(engine, ours)
    torch.manual_seed(1000)
    truth = neftune_losses(model, theirs)
    model.eval()
    still = model(**batch(0, 2)).loss.item()
    return found, replica_error(engine), truth, still


def neftune_out_of_step():
    engine = initialise(stage=1)  # compares at every second forward

    def step(data):
        if dist.get_rank() == 1:
            torch.rand(1)
        return engine(**data).loss.item()

    neftune_losses(engine, step)


def resize_before(directory: str = "") -> tuple[float, int]:
    import tempfile

    from transformers import AutoModelForCausalLM

    model = make("Llama", tied=True)
    model.resize_token_embeddings(141)
    truth = copy.deepcopy(model)
    engine = initialise(model)
    where = [tempfile.mkdtemp()]
    dist.broadcast_object_list(where)
    tp_plugin.save_pretrained(engine, where[0])
    loaded = AutoModelForCausalLM.from_pretrained(where[0])
    data = {"input_ids": batch(0, 2, vocabulary=141)["input_ids"]}
    engine.eval()
    with torch.no_grad():
        ours = engine(**data).logits
        assert torch.allclose(ours, truth(**data).logits, atol=1e-5)
        return float((ours - loaded(**data).logits).abs().max()), loaded.config.vocab_size


def printed_at_start(way: str, host: str) -> str:
    with mock.patch("socket.gethostname", return_value=host), contextlib.redirect_stderr(io.StringIO()) as out:
        model = make("Llama")
        if way == "early":
            tp_plugin.shard_model(model, tp_plugin.TensorParallelConfig(tp_size=2))
        for _ in range(2):
            initialise(model, tp_plugin={})
    return out.getvalue()


def two_hosts():
    return [printed_at_start(way, f"host{dist.get_rank()}") for way in ("slot", "early")]


def one_host():
    return [printed_at_start(way, "host") for way in ("slot", "early")]


WORKS = (
    *("reference_fp32", "reference_bf16", "reference_fp16", "neftune", "neftune_out_of_step", "resize_before"),
    *("two_hosts", "one_host", "removed_by_deepspeed"),
)


@pytest.fixture(scope="module")
def single() -> list[dict]:
    return launched(2, __name__, (*REFUSED, *WORKS))


@pytest.mark.parametrize("name", REFUSED)
def test_an_unsupported_option_is_refused_on_every_rank(single, name):
    assert re.search(REFUSED[name], sentence(single, name))


@pytest.mark.parametrize(
    ("name", "limit"), [("reference_fp32", 1e-5), ("reference_bf16", 2e-2), ("reference_fp16", 3e-3)]
)
def test_a_reference_model_without_optimizer(single, name, limit):
    for same, error in values(single, name):
        assert same
        assert error < limit


def test_what_deepspeed_has_removed_it_refuses(single):
    for refused in values(single, "removed_by_deepspeed"):
        assert refused == ["sparse_gradients", "compression_training", "progressive_layer_drop", "elasticity"]


def test_neftune_noise_is_one_noise(single):
    for found, replicas, truth, still in values(single, "neftune"):
        assert found == pytest.approx(truth, rel=1e-5)
        assert replicas == 0
        assert abs(found[0] / still - 1) > 1e-4, "there was no noise"


def test_neftune_out_of_step_is_noticed(single):
    assert "random generators of a tensor-parallel group are no longer in step" in sentence(
        single, "neftune_out_of_step"
    )


def test_resize_token_embeddings_before_sharding(single):
    assert values(single, "resize_before") == [(0.0, 141)] * 2 or all(
        error < 1e-5 and size == 141 for error, size in values(single, "resize_before")
    )


def test_a_group_that_spans_hosts_is_warned_of(single):
    for warned, silent in zip(values(single, "two_hosts")[0], values(single, "one_host")[0], strict=True):
        assert (
            warned.count("WARNING: the tensor-parallel group of rank 0 spans 2 hosts") == 1
        )  # though initialised twice
        assert "Choose autotp_size at most the number of GPUs of a host" in warned
        assert "WARNING" not in silent
        assert silent.count("tp=2 dp=1 ZeRO-1") == 1


# ---- the table -------------------------------------------------------------------------------------------------------


def rows() -> list[list[str]]:
    lines = (ROOT / "docs/compatibility.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [row for row in cells if not set("".join(row)) <= set("-: ") and row[0] != "With"]


def test_every_row_says_what_happens_and_names_its_tests():
    assert len(rows()) > 30
    for feature, state, *_, tests in rows():
        assert state in ("works", "refused", "warned", "not run"), feature
        assert state == "not run" or "`" in tests, f"{feature} names no test"


def ids(test: Any) -> set[str]:
    """The names of a parametrised test's cases."""
    values = [value for mark in test.pytestmark for value in mark.args[1]]
    return {str(getattr(value, "id", None) or value) for value in values}


def test_every_test_the_table_names_exists():
    for feature, *_, tests in rows():
        for path, function, _, case in re.findall(r"`([\w/]+\.py)::(\w+)(\[([\w-]+)\])?`", tests):
            module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
            assert hasattr(module, function), f"{feature}: {path} has no {function}"
            assert not case or case in ids(getattr(module, function)), f"{feature}: {function} has no case {case}"
        assert "`" not in re.sub(r"`[\w/]+\.py::\w+(\[[\w-]+\])?`", "", tests), f"{feature}: cannot read {tests}"


def test_every_refusal_is_in_the_table():
    named = {
        case
        for row in rows()
        for case in re.findall(
            r"test_compatibility\.py::test_an_unsupported_option_is_refused_on_every_rank\[(\w+)\]", row[-1]
        )
    }
    assert named == set(REFUSED)
