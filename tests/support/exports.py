"""Exports of a sharded model and of the plain one, to be compared."""

from __future__ import annotations

import torch
import torch.distributed as dist
import transformers
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from transformers import core_model_loading

import tp_plugin
from tests.support.configs import config_for
from tests.support.models import batch, make
from tests.support.resume import BF16_OPTIMIZER, worst_difference
from tests.support.train import engine_for, loss_of, micro_batches, optimizer_for
from tp_plugin.integrations.deepspeed.checkpoint.optimizer_fragments import checkpoint_layout
from tp_plugin.integrations.zero3 import partition_data
from tp_plugin.sharding import state_of

TP = 2


def steps(engine, numbers):
    """Losses of a few steps; each data-parallel rank has data of its own."""
    losses, dp, place = [], dist.get_world_size() // TP, dist.get_rank() // TP
    for number in numbers:
        for pieces in micro_batches(number, dp):
            loss = loss_of(engine, pieces[place], number)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    return losses


def parts(engine):
    """What this rank holds of each parameter; under ZeRO-3 without the padding, which nobody sets."""
    return {
        name: partition_data(param) if hasattr(param, "ds_id") else param.detach()
        for name, param in engine.module.named_parameters()
    }


def put_together(engine):
    """Full tensors by name, made on every rank of what all ranks hold and of nothing that an export uses."""
    tp, every = state_of(engine.module).mesh, [None] * dist.get_world_size()
    dist.all_gather_object(every, parts(engine))
    whole = {}
    for name, param in engine.module.named_parameters():
        layout = checkpoint_layout(param, tp)
        shards = []
        for rank in range(TP):
            mine = [every[other][name] for other in range(rank, len(every), TP)]
            shard = torch.cat(mine) if hasattr(param, "ds_id") else mine[0]
            shards.append(shard.view(layout.local_shape(rank)))
        whole[name] = layout.unshard(shards)
    return whole


def reloads(folder, state, expected, ids, logits):
    """Plain transformers makes of ``folder`` what was trained, and ``state`` is the same."""
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=logits.dtype).eval()
    found = reloaded.state_dict()
    assert set(found) == set(state)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), f"{name} in the directory"
        assert torch.equal(state[name], tensor), f"{name} of full_state_dict"
    head, embedding = reloaded.get_output_embeddings().weight, reloaded.get_input_embeddings().weight
    assert (head is embedding) == reloaded.config.tie_word_embeddings
    with torch.no_grad():
        error = (reloaded(input_ids=ids).logits - logits).abs().max() / logits.abs().max()
    assert error < (2e-2 if logits.dtype == torch.bfloat16 else 1e-5), error


def exported(family, tied, stage, extra, folder):
    """Train two steps, export, reload plainly, train on; the same without the export in between."""

    def engine():
        model = make(family, tied=tied)
        return engine_for(model, optimizer_for(model, "adamw"), config_for(TP, stage, **extra))

    plain, run = engine(), engine()
    assert isinstance(run.optimizer, BF16_Optimizer) == (extra is BF16_OPTIMIZER)
    assert steps(plain, [0, 1]) == steps(run, [0, 1])
    identities = [id(p) for p in run.module.parameters()]
    whole = [getattr(p, "ds_status", None) for p in run.module.parameters()]
    state = tp_plugin.full_state_dict(run)
    tp_plugin.save_pretrained(run, folder)
    assert identities == [id(p) for p in run.module.parameters()]
    assert whole == [getattr(p, "ds_status", None) for p in run.module.parameters()], "what ZeRO-3 keeps whole"
    assert (state == {}) == (dist.get_rank() != 0)
    expected = put_together(plain)
    run.eval()
    data = batch(9, 2)
    with torch.no_grad():
        logits = run(input_ids=data["input_ids"]).logits
    run.train()
    problem = [""]
    if dist.get_rank() == 0:
        try:
            reloads(folder, state, expected, data["input_ids"], logits)
        except Exception as failure:  # the others are told of it, and do not wait
            problem = [f"{type(failure).__name__}: {failure}"]
    dist.broadcast_object_list(problem)
    assert not problem[0], problem[0]
    assert steps(run, range(2, 4)) == steps(plain, range(2, 4)), "the export changed training"
    theirs = parts(plain)
    assert all(torch.equal(part, theirs[name]) for name, part in parts(run).items()), "or the weights"
    for ran, number in ((run, "run"), (plain, "plain")):
        ran.save_checkpoint(f"{folder}-{number}", tag="end")
    assert worst_difference(f"{folder}-run/end", f"{folder}-plain/end") == (0.0, ""), "or the optimizer's state"


def wide(**options):
    """A model of a few MB, none of whose tensors is most of it."""
    return make("Llama", vocab_size=1000, intermediate_size=256, num_hidden_layers=6, heads=(16, 8), **options)


def packed():
    """A model whose checkpoint has gate and up in one tensor, put together again by the rank that writes it."""
    model = wide()
    model._weight_conversions = [
        core_model_loading.WeightConverter(
            source_patterns="mlp.gate_up_proj.weight",
            target_patterns=["mlp.gate_proj.weight", "mlp.up_proj.weight"],
            operations=[core_model_loading.Chunk(dim=0)],
        )
    ]
    return model
