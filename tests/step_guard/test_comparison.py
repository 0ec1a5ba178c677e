"""The guard's own runs: beside ZeRO-3's prefetching, over replicas, when one rank fails alone, under autocast."""

from __future__ import annotations

import contextlib
import io
import weakref
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import tp_plugin
from tests.support.guarded import compared, engine_of, steps
from tests.support.models import batch, make
from tests.support.ranks import on_ranks, outcomes
from tests.support.train import loss_of, micro_batches
from tp_plugin import peers
from tp_plugin.param_info import layout_of
from tp_plugin.step_guard import comparison, differences, fp32_rerun, sample_batch
from tp_plugin.step_guard.guard import guard_of

PREFETCHING = {
    "zero_optimization": {
        "stage": 3,
        "stage3_prefetch_bucket_size": 3000,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 10**6,
        "stage3_max_reuse_distance": 0,  # so that parameters for the backward pass are on their way after a forward
    }
}


def checked_when_parameters_are_fetched_ahead(**options):
    """Asked for after steps in which ZeRO-3 learnt the order of the parameters; losses of it and of one not asked."""
    losses = []
    for asked in (True, False):
        engine = engine_of("Llama", 3, PREFETCHING | {"tp_plugin": {"check_replicas_every": 2}}, **options)
        losses.append([])
        for step in range(5):
            seen = {}
            if asked and step == 3:
                tp_plugin.check_next_step(engine)
            for pieces in micro_batches(step, 1):
                with compared(seen):
                    loss = loss_of(engine, pieces[0], step)
                engine.backward(loss)
                engine.step()
                losses[-1].append(loss.item())
            assert bool(seen) == (step == 0 or (asked and step == 3))
    return losses


SHARED_HEADS = {"heads": (6, 3), "adapter": "biases"}  # which are gathered to be compared


@pytest.mark.parametrize("options", [{}, SHARED_HEADS], ids=["full", "shared heads and PEFT"])
def test_it_waits_for_parameters_that_are_fetched_ahead(options):
    for asked, alone in on_ranks(2, checked_when_parameters_are_fetched_ahead, **options):
        assert asked == alone


def batches_seen(stage):
    """What the loss was computed on in the guard's runs on this rank, whose replicas have batches of their own."""
    engine = engine_of("Llama", stage)
    seen = []

    def loss(model, inputs):
        seen.append(inputs["input_ids"].clone())
        return model(**inputs).loss

    guard_of(engine).examine(loss, batch(dist.get_rank() // 2, 2))
    assert len(seen) == 2
    assert torch.equal(*seen)
    return seen[0].tolist()


@pytest.mark.parametrize("stage", [1, 3])
def test_replicas_that_gather_parameters_together_read_the_same(stage):
    first, second, third, fourth = on_ranks(4, batches_seen, stage)
    assert first == second
    assert third == fourth
    assert (first == third) == (stage == 3)


def one_rank_fails(stage, how):
    """The loss raises on rank 1: in the sharded run, in the plain one, or on anything but the whole batch."""
    engine = engine_of("Llama", stage)
    rows = batch(0, 3)["input_ids"].shape[0]
    assert rows > sample_batch.ROWS
    guard, runs, rank = guard_of(engine), [], dist.get_rank()  # in a plain run a rank is told that of its replica

    def loss(model, inputs):
        runs.append(len(inputs["input_ids"]))
        found = model(**inputs).loss
        plain = layout_of(model.lm_head.weight) is None
        if rank == 1 and (plain == (how == "plain") if how != "cut" else runs[-1] < rows):
            raise ValueError("not that batch")
        return found

    with contextlib.redirect_stderr(io.StringIO()) as said:
        guard.examine(loss, batch(0, 3))
        steps(engine, 2)
    return runs, said.getvalue()


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("how", ["sharded", "plain", "cut"])
def test_a_loss_that_one_rank_cannot_compute_again_hangs_nobody(stage, how):
    (runs, said), (others, unsaid) = on_ranks(2, one_rank_fails, stage, how, timeout_s=100)
    assert runs == others
    warning = "could not be computed again without tensor parallelism (ValueError: not that batch [on rank 1])"
    assert (warning in said) == (how != "cut")
    assert warning not in unsaid


def one_rank_fails_in_a_layer(out_of_memory):
    """Rank 1 raises between two collectives of the model, where its peer waits for it."""
    engine = engine_of("Llama", 1)

    def fail(*_):
        if dist.get_rank() == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.") if out_of_memory else RuntimeError("a broken kernel")

    engine.module.model.layers[1].mlp.act_fn.register_forward_hook(fail)
    with mock.patch.object(peers, "PATIENCE_S", 2.0), mock.patch.object(peers, "SAID_AFTER_S", 0.5):
        steps(engine, 1)


@pytest.mark.parametrize("out_of_memory", [False, True])
def test_a_rank_that_fails_while_its_peer_waits_in_a_layer_says_so_and_ends(out_of_memory):
    peer, failed = outcomes(2, one_rank_fails_in_a_layer, out_of_memory, timeout_s=100)
    kind, error = ("OutOfMemoryError", "CUDA out of memory") if out_of_memory else ("RuntimeError", "a broken kernel")
    assert (failed["kind"], failed["error"].rstrip(".")) == (kind, error), "its own, not that of a process group"
    said = f"rank 1 failed in the check of the first step ({kind}: {error}) and waits up to 2 s for the others"
    assert said in failed["log"]
    assert "Connection closed by peer" in peer["error"], "the end of its peer ended it, before its group's timeout"


def keeps_nothing():
    """Whether activations are alive behind the forward of each run, where training would keep them."""
    engine = engine_of("Llama", 1)
    alive = []

    def loss(model, inputs):
        seen = []
        act = model.model.layers[0].mlp.act_fn
        handle = act.register_forward_hook(lambda _m, _a, output: seen.append(weakref.ref(output)))
        found = model(**inputs).loss
        handle.remove()
        alive.append(seen[0]() is not None)
        return found

    guard_of(engine).examine(loss, batch(0, 2))
    loss(engine.module.train(), batch(0, 2))
    return alive


def test_nothing_is_kept_for_a_backward():
    for *alive, trained in on_ranks(2, keeps_nothing):
        assert alive == [False, False]
        assert trained


class Opaque:
    """An input that is no tensor, as a cache or a block mask."""


def unchecked(how):
    engine = engine_of("Llama", 1)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        if how == "opaque":
            steps(engine, 2, use_cache=Opaque())
        else:

            def loss(model, inputs):
                model(**inputs)
                raise torch.OutOfMemoryError("too little memory")

            guard_of(engine).examine(loss, batch(0, 2))
            steps(engine, 1)
    return said.getvalue()


@pytest.mark.parametrize("how", ["opaque", "memory"])
def test_what_is_not_checked_is_said_once(how):
    first, second = on_ranks(2, unchecked, how)
    assert first.count("its loss was not checked") == 1
    assert ("too little memory" in first) == (how == "memory")
    assert "not checked" not in second


def under_autocast(dtype):
    """Relative differences of the sharded runs and the exact plain one, and of that from one process in float32."""
    extra = {"bf16": {"enabled": True}} if dtype == torch.bfloat16 else {}
    engine = engine_of("Llama", 1, extra)
    found, plain = {}, {}
    original = comparison.first_mismatch

    def difference(ours, exact, *, coarse=False):
        plain.update(exact)
        return original(ours, exact, coarse=coarse)

    comparison.first_mismatch = difference
    with compared(found), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        guard_of(engine).examine(lambda model, inputs: model(**inputs), batch(0, 2))
    truth = make("Llama")
    if dtype == torch.bfloat16:
        truth = truth.bfloat16().float()
    with torch.no_grad():
        logits = truth.eval()(**batch(0, 2)).logits[: sample_batch.ROWS, -differences.POSITIONS :]
    return found | {"truth": differences.relative(plain["logits"], logits)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_is_compared_in_single_precision(dtype):
    for found in on_ranks(2, under_autocast, dtype):
        assert found["truth"] < 1e-5
        assert found["logits"] < 1e-5
        assert found["loss"] < 1e-5
        assert 1e-4 < found["coarse logits"] < 5e-2


@pytest.fixture
def settings():
    places = (*fp32_rerun.PRODUCTS, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
    before = [place.fp32_precision for place in places]
    yield lambda: [place.fp32_precision for place in places]
    for place, value in zip(places, before, strict=True):
        place.fp32_precision = value


@pytest.mark.parametrize("how", ["nobody", "transformers", "torch", "matmul"])
def test_products_of_float32_are_exact_meanwhile(settings, how):
    """However tf32 was asked for; the two interfaces of PyTorch must not be mixed."""
    model = torch.nn.Linear(1, 1)
    assert not fp32_rerun.rounds(model)
    if how == "torch":
        torch.set_float32_matmul_precision("high")
    elif how == "matmul":
        torch.backends.cuda.matmul.allow_tf32 = True
    elif how == "transformers":
        torch.backends.fp32_precision = "tf32"
    asked = settings()
    assert fp32_rerun.rounds(model) == (how != "nobody")
    with fp32_rerun.in_single_precision([model]):
        assert not fp32_rerun.rounds(model)
        with torch.backends.cudnn.flags(enabled=False):
            pass  # as around every CTC loss
        assert not torch.backends.cuda.matmul.allow_tf32
        assert not {"tf32", "bf16"} & set(settings())
    assert settings() == asked
    if how in ("torch", "matmul"):
        assert torch.get_float32_matmul_precision() == "high"
        torch.set_float32_matmul_precision("highest")
