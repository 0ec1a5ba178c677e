"""Exports: full tensors on rank 0, an HF directory that plain transformers loads, training that goes on unchanged."""

from __future__ import annotations

import functools
import tempfile

import pytest
import torch
import torch.distributed as dist
import transformers

import tp_plugin
from tests.support.models import batch, make
from tests.support.ranks import errors_on_ranks, on_ranks
from tests.support.train import config_for, engine_for, loss_of, micro_batches, optimizer_for

CASES = {
    "Llama untied ZeRO-1": ("Llama", False, 1, {}),
    "Qwen3 tied ZeRO-3": ("Qwen3", True, 3, {}),
    "Gemma2 tied ZeRO-2": ("Gemma2", None, 2, {}),
    "Qwen2 tied ZeRO-0": ("Qwen2", True, 0, {}),
    "Qwen2 bf16 ZeRO-1": ("Qwen2", False, 1, {"bf16": {"enabled": True}}),
    "Llama bf16 ZeRO-3": ("Llama", False, 3, {"bf16": {"enabled": True}}),
}


def steps(engine, numbers):
    """Losses of a few steps."""
    losses = []
    for number in numbers:
        for pieces in micro_batches(number, 1):
            loss = loss_of(engine, pieces[0], number)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    return losses


def exported(family, tied, stage, extra, folder):
    """Train two steps, export, reload plainly, train on; the same without the export in between."""

    def engine():
        model = make(family, tied=tied)
        return engine_for(model, optimizer_for(model, "adamw"), config_for(2, stage, **extra))

    plain, run = engine(), engine()
    steps(plain, [0, 1])
    steps(run, [0, 1])
    identities = [id(p) for p in run.module.parameters()]
    state = tp_plugin.full_state_dict(run)
    tp_plugin.save_pretrained(run, folder)
    assert identities == [id(p) for p in run.module.parameters()]
    assert (state == {}) == (dist.get_rank() != 0)
    run.eval()
    data = batch(9, 2)
    with torch.no_grad():
        logits = run(input_ids=data["input_ids"]).logits
    run.train()
    if dist.get_rank() == 0:
        reloaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=logits.dtype).eval()
        assert set(reloaded.state_dict()) == set(state)
        assert {name: value.shape for name, value in reloaded.state_dict().items()} == {
            name: value.shape for name, value in state.items()
        }
        head, embedding = reloaded.get_output_embeddings().weight, reloaded.get_input_embeddings().weight
        assert (head is embedding) == reloaded.config.tie_word_embeddings
        with torch.no_grad():
            error = (reloaded(input_ids=data["input_ids"]).logits - logits).abs().max() / logits.abs().max()
        assert error < (2e-2 if "bf16" in extra else 1e-5), error
    assert steps(run, [2, 3]) == steps(plain, [2, 3]), "the export changed training"


def all_exports():
    found = {}
    with tempfile.TemporaryDirectory() as own:
        shared = [own]
        dist.broadcast_object_list(shared)
        for name, case in CASES.items():
            try:
                exported(*case, f"{shared[0]}/{name.replace(' ', '-')}")
                found[name] = ""
            except Exception as failure:
                found[name] = f"{type(failure).__name__}: {failure}"
        dist.barrier()
    return found


@functools.cache
def outcomes():
    return on_ranks(2, all_exports)


@pytest.mark.parametrize("name", CASES)
def test_export_reloads_plainly_and_training_goes_on(name):
    assert [found[name] for found in outcomes()] == ["", ""]


def save_nowhere():
    model = make("Llama")
    tp_plugin.shard_model(model)
    tp_plugin.save_pretrained(model, "/proc/no/such/place")


def test_a_failed_export_is_raised_on_every_rank():
    errors = errors_on_ranks(2, save_nowhere)
    assert len(set(errors)) == 1
    assert "writing '/proc/no/such/place' failed" in errors[0]
