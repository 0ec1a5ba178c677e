"""What Trainer's training goes through before and while the guard of the first step compares."""

from __future__ import annotations

import functools
import random
import tempfile

import numpy
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin
from transformers import AttentionInterface, Trainer, TrainingArguments
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import tp_plugin
from tests.support import tiny
from tests.support.guarded_trainer import DEEPSPEED, UNCHECKED, trained, trainer_of
from tests.support.ranks import errors_on_ranks, on_ranks
from tests.support.trainer_cases import config_of
from tp_plugin.layers import RowParallelLinear
from tp_plugin.step_guard.differences import TRAINERS_LOSS


class OtherRows(tiny.Samples):
    def __getitem__(self, index):
        return super().__getitem__((index + dist.get_rank()) % self.count)


def losses():
    seen, said, trainer = trained()
    return seen, said, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_generators_are_brought_in_step_first():
    (seen, said, found), other = on_ranks(2, losses, env=DEEPSPEED)
    assert found == other[2]
    assert len(found) == 2
    assert max(seen["loss"], seen["logits"]) < 1e-5
    assert UNCHECKED not in said


def other_batches():
    trainer_of(OtherRows(8)).train()


def test_other_rows_on_one_rank_are_named_before_anything_is_computed():
    errors = errors_on_ranks(2, other_batches, env=DEEPSPEED)
    assert all("got different batches" in error and "seed every shuffle() and split" in error for error in errors)


class Keeping(Trainer):
    """A loss that keeps a record, logs, and writes into its inputs."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.record = []

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        assert num_items_in_batch is not None
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.record.append(len(inputs["input_ids"]))
        self._last = loss * 1
        self.log({"mine": float(loss)})
        inputs["labels"].fill_(-100)
        return loss / num_items_in_batch


def keeping():
    seen, said, trainer = trained(Keeping)
    own = [entry for entry in trainer.state.log_history if "mine" in entry]
    return (
        seen,
        said,
        trainer.record,
        len(own),
        [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    )


def test_a_loss_of_ones_own_is_given_all_and_leaves_no_trace():
    for seen, said, record, own, found in on_ranks(2, keeping, env=DEEPSPEED):
        assert UNCHECKED not in said
        assert max(seen["loss"], seen["logits"]) < 1e-5
        assert record == [4, 4]
        assert own == 2
        assert all(loss > 0 for loss in found), "labels of the training batch were written over"


class Adding(Trainer):
    """A term of one's own beside the loss that the model gives."""

    term = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = outputs.loss + 0.01 * TERMS[self.term](self.accelerator.unwrap_model(model))
        return (loss, outputs) if return_outputs else loss


def orthogonal(model):
    weight = model.model.layers[0].self_attn.q_proj.weight
    return (weight @ weight.T - torch.eye(len(weight))).pow(2).sum()


TERMS = {
    "orthogonal": orthogonal,
    "norm of each": lambda model: sum(param.norm() for name, param in model.named_parameters() if "proj" in name),
    "weight decay": lambda model: sum(param.pow(2).sum() for param in model.parameters()),
    "final norm": lambda model: model.model.norm.weight.pow(2).sum(),
    "norm of norms": lambda model: sum(p.norm() for name, p in model.named_parameters() if "layernorm" in name),
}
WRONG = ["orthogonal", "norm of each", "weight decay"]
ADDED = [(term, 1, False) for term in TERMS]
ADDED += [("norm of each", 1, True), ("norm of norms", 1, True), ("orthogonal", 3, False), ("norm of each", 3, False)]


def adding():
    """By case: what the guard compared, and what it raised."""
    found = {}
    for term, stage, half in ADDED:
        Adding.term, seen = term, {}
        try:
            seen, _, _ = trained(Adding, stage=stage, attention="eager" if half else None)
            found[term, stage, half] = seen, ""
        except tp_plugin.TensorParallelError as refused:
            found[term, stage, half] = seen, str(refused)
        except RuntimeError as other:
            found[term, stage, half] = seen, f"RuntimeError: {other}"
    return found


@functools.cache
def added():
    return on_ranks(2, adding, env=DEEPSPEED)


@pytest.mark.parametrize("case", ADDED, ids=lambda case: f"{case[0]}-ZeRO-{case[1]}{'-bf16' * case[2]}")
def test_a_term_beside_the_models_loss_is_compared(case):
    for found in added():
        seen, refused = found[case]
        assert bool(refused) == (case[0] in WRONG), found[case]
        if refused:
            assert "without tensor parallelism differs: the trainer's loss" in refused
            assert "let it use the model's outputs" in refused
        else:
            assert max(seen[TRAINERS_LOSS], seen["loss"], seen["logits"]) < 1e-5


class Gathering(Trainer):
    """On the first replica the loss of a piece of a batch fails before all replicas exchange a number."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if dist.get_rank() < 2 and len(inputs["input_ids"]) < 4:
            raise ValueError("image features and image tokens do not match")
        self.accelerator.gather_for_metrics(loss.detach())
        return loss


def gathering():
    seen, said, _ = trained(Gathering)
    return seen, said


def test_a_loss_that_gathers_and_fails_on_one_replica_hangs_nobody():
    for seen, said in on_ranks(4, gathering, env=DEEPSPEED, timeout_s=120):
        assert UNCHECKED not in said, "the whole batch can be computed"
        assert max(seen["loss"], seen["logits"]) < 1e-5


def half_only(module, query, key, value, *args, **kwargs):
    """As FlashAttention, which is no kernel for single precision."""
    if query.dtype == torch.float32:
        raise RuntimeError("FlashAttention only supports fp16 and bf16 data types")
    return sdpa_attention_forward(module, query, key, value, *args, **kwargs)


def louder(module, _args, output):
    return output * 1.5 if isinstance(module, RowParallelLinear) else None


def half(stage, wrong):
    AttentionInterface.register("half_only", half_only)
    try:
        if wrong:
            torch.nn.modules.module.register_module_forward_hook(louder)
        seen, said, trainer = trained(stage=stage, attention="half_only")
        return seen, said, trainer.model.config._attn_implementation
    finally:
        AttentionInterface._global_mapping.pop("half_only", None)


@pytest.mark.parametrize("stage", [1, 3])
def test_attention_in_half_precision_only_is_put_aside(stage):
    for seen, said, attention in on_ranks(2, half, stage, False, env=DEEPSPEED):
        assert UNCHECKED not in said
        assert max(seen["loss"], seen["logits"]) < 1e-5
        assert "coarse loss" in seen
        assert attention == "half_only"


def test_and_what_is_wrong_beside_it_is_caught():
    errors = errors_on_ranks(2, half, 1, True, env=DEEPSPEED)
    assert all("computed again without tensor parallelism differs: the trainer's loss" in error for error in errors)


def shuffled_without_a_seed(way):
    """The order that this rank gives its data set, by each library, as soon as the degree is known."""
    numpy.random.seed(dist.get_rank())
    random.seed(dist.get_rank())
    torch.manual_seed(dist.get_rank())
    tp_plugin.register()
    if way == "TrainingArguments":
        TrainingArguments(output_dir=tempfile.mkdtemp(), deepspeed=config_of(1), report_to="none")
    elif way == "Accelerator":
        Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config_of(1)))
    else:
        tp_plugin.shard_model(tiny.model(), tp_plugin.TensorParallelConfig(tp_size=2, quiet=True))
    return numpy.random.permutation(32).tolist(), random.sample(range(32), 32), torch.randperm(32).tolist()


@pytest.mark.parametrize("way", ["TrainingArguments", "Accelerator", "shard_model"])
def test_a_data_set_that_is_shuffled_without_a_seed_is_one_on_a_group(way):
    first, second = on_ranks(2, shuffled_without_a_seed, way, env=DEEPSPEED)
    assert first == second
