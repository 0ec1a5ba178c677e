"""What works with tensor parallelism, what is refused, what is warned of: the rows of docs/compatibility.md."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import re
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

import tp_plugin
from tests.support import unsupported_options
from tests.support.batched_cases import launched, sentence, values
from tests.support.errors import replica_error
from tests.support.matrix import LIMITS, assert_within, run_cases
from tests.support.models import batch, make
from tests.support.ranks import on_ranks
from tests.support.tables import rows_of, wrong_names
from tests.support.train import optimizer_for
from tests.support.unsupported_options import CPU, REFUSED, initialise

ROOT = Path(__file__).parents[1]

# ---- trains like one process -----------------------------------------------------------------------------------------

MIXED = {"family": "Qwen2", "heads": (6, 3)}  # at tp 2 a rank's shard holds KV heads of its own and a replica
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


# ---- single cases on two ranks, tp 2 ---------------------------------------------------------------------------------


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
    *("two_hosts", "one_host"),
)


@pytest.fixture(scope="module")
def single() -> list[dict]:
    return launched(2, __name__, WORKS)


@pytest.fixture(scope="module")
def refused() -> list[dict]:
    return launched(2, unsupported_options.__name__, (*REFUSED, "removed_by_deepspeed"))


@pytest.mark.parametrize("name", REFUSED)
def test_an_unsupported_option_is_refused_on_every_rank(refused, name):
    assert re.search(REFUSED[name], sentence(refused, name))


@pytest.mark.parametrize(
    ("name", "limit"), [("reference_fp32", 1e-5), ("reference_bf16", 2e-2), ("reference_fp16", 3e-3)]
)
def test_a_reference_model_without_optimizer(single, name, limit):
    for same, error in values(single, name):
        assert same
        assert error < limit


def test_what_deepspeed_has_removed_it_refuses(refused):
    for found in values(refused, "removed_by_deepspeed"):
        assert found == ["sparse_gradients", "compression_training", "progressive_layer_drop", "elasticity"]


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
    return [row for row in rows_of(ROOT / "docs/compatibility.md") if row[0] != "With"]


def test_every_row_says_what_happens_and_names_its_tests():
    assert len(rows()) > 30
    for feature, state, *_, tests in rows():
        assert state in ("works", "refused", "warned", "not run"), feature
        assert state == "not run" or "`" in tests, f"{feature} names no test"


def test_every_test_the_table_names_exists():
    for feature, *_, tests in rows():
        assert not wrong_names(tests), f"{feature}: {wrong_names(tests)}"


def test_every_refusal_is_in_the_table():
    named = {
        case
        for row in rows()
        for case in re.findall(
            r"test_compatibility\.py::test_an_unsupported_option_is_refused_on_every_rank\[(\w+)\]", row[-1]
        )
    }
    assert named == set(REFUSED)
