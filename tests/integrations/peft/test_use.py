"""Adapters on sharded models in use: merged, switched, combined, dropped out, counted."""

from __future__ import annotations

import contextlib
import io

import peft
import pytest
import torch
import torch.distributed as dist
from peft.utils.other import ModulesToSaveWrapper

from tests.support.adapters import DATA, adapt, close, gradients_of, logits_of, lora, shard, trained
from tests.support.batched_cases import launched, values
from tests.support.models import make
from tp_plugin.collectives import counted
from tp_plugin.integrations.transformers.parameters import full_count
from tp_plugin.param_info import info_of, layout_of

HERE = "tests.integrations.peft.test_use"


def merges_dora() -> None:
    """Merged, and taken apart again, as in one process; dropout included."""
    truth, ours = adapt(make("Llama"), "DoRA"), shard(adapt(make("Llama"), "DoRA"))
    start = logits_of(truth)
    for model in (truth, ours):
        model.merge_adapter()
    close(logits_of(ours), logits_of(truth))
    close(logits_of(ours), start)
    for model in (truth, ours):
        model.unmerge_adapter()
    gradients_of(ours, truth)


def _printed(model: torch.nn.Module) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        model.print_trainable_parameters()
    return said.getvalue()


def counts() -> None:
    """Numbers of parameters are the whole model's, adapted before sharding and after it, merged, and under ZeRO-3."""
    truth = adapt(make("Llama", heads=(6, 3)), "several")
    sizes = [sum(p.numel() for p in truth.parameters() if p.requires_grad or everything) for everything in (0, 1)]
    early = shard(adapt(make("Llama", heads=(6, 3)), "several"))
    late = adapt(shard(make("Llama", heads=(6, 3))), "several")
    parted = trained(adapt(make("Llama", heads=(6, 3)), "several"), 3).module
    for model in (early, late, parted):
        assert [full_count(model, trainable=trainable) for trainable in (True, False)] == sizes
        assert model.get_nb_trainable_parameters() == truth.get_nb_trainable_parameters() == tuple(sizes)
        assert _printed(model) == _printed(truth)
    status = [peft.get_model_status(model) for model in (truth, early, late)]
    assert len({(one.trainable_params, one.total_params) for one in status}) == 1
    merged = late.merge_and_unload()
    assert full_count(merged) == merged.num_parameters() == make("Llama", heads=(6, 3)).num_parameters()


def switches() -> None:
    """Without its adapters a model is the base; it generates, and another adapter trains, as in one process."""
    truth = adapt(make("Llama", heads=(6, 3)), "several")
    for ours in (
        shard(adapt(make("Llama", heads=(6, 3)), "several")),
        adapt(shard(make("Llama", heads=(6, 3))), "several"),
    ):
        base = make("Llama", heads=(6, 3))
        with ours.disable_adapter():
            close(logits_of(ours), logits_of(base))
        asked = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        words = [model.generate(input_ids=DATA["input_ids"], **asked) for model in (ours, truth, base)]
        assert torch.equal(words[0], words[1])
        assert not torch.equal(words[1], words[2]), "the adapter says nothing"
        for adapter in ("second", "default"):
            for model in (ours, truth):
                model.set_adapter(adapter)
            gradients_of(ours, truth)


def combines() -> None:
    """``add_weighted_adapter`` by sums and by concatenation, as in one process."""
    truth = adapt(make("Llama", heads=(6, 3)), "several")
    ours = shard(adapt(make("Llama", heads=(6, 3)), "several"))
    for kind in ("linear", "cat"):
        for model in (truth, ours):
            model.add_weighted_adapter(["default", "second"], [0.7, 0.4], kind, combination_type=kind)
            model.set_adapter(kind)
        close(logits_of(ours), logits_of(truth))


def scales_shared_rows() -> None:
    """IA3 on the output of a shared expert, which is partial where it is scaled."""
    asked = {"target_modules": ["shared_expert.down_proj"], "feedforward_modules": []}
    truth, early = (adapt(make("Qwen2Moe"), "IA3", **asked) for _ in range(2))
    gradients_of(shard(early), truth)
    gradients_of(adapt(shard(make("Qwen2Moe")), "IA3", **asked), truth)


def samples_words() -> None:
    """A prompt that begins as random words is the same words on ranks that were seeded differently."""
    config = peft.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM", prompt_tuning_init="SAMPLE_VOCAB")
    found = []
    for base, seed in ((make("Llama"), 0), (shard(make("Llama")), dist.get_rank())):
        torch.manual_seed(seed)
        found.append(peft.get_peft_model(base, config).prompt_encoder["default"].embedding.weight)
    assert torch.equal(*found)


def twins() -> None:
    """A late copy of a sharded module has its own sizes and knows what the module knows."""
    ours = adapt(shard(make("Llama", heads=(6, 3), tied=False)), "modules to save")
    found = 0
    for wrapper in ours.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            first, twin = wrapper.original_module, wrapper.modules_to_save["default"]
            for name in ("out_features", "in_features", "num_embeddings"):
                assert getattr(twin, name, None) == getattr(first, name, None), name
            assert vars(twin.weight).keys() == vars(first.weight).keys()
            assert info_of(twin.weight) == info_of(first.weight)
            assert not hasattr(twin.weight, "ds_shape")
            found += info_of(twin.weight).vocab is not None
    assert found == 1, "no head's copy"


def drops_out() -> None:
    """One mask for what is replicated, another on each rank for what is sharded; recomputation gives them again.

    Also with adapters that are put in after sharding, when no region has been told of their dropout.
    """
    for late in (False, True):
        torch.manual_seed(5)
        model = make("Llama", attention_dropout=0.3, intermediate_size=54)  # as many features on each rank
        model = shard(model) if late else model
        model = adapt(model, "every linear", lora_dropout=0.5)
        drop_right(model if late else shard(model))


def dropped(given: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """1 where an element was dropped, 0 where it was kept, -1 where it was 0 before (attention's own dropout)."""
    return torch.where(given == 0, -1, (out == 0).long())


def drop_right(model: torch.nn.Module) -> None:
    masks: dict[str, torch.Tensor] = {}
    model.train()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda m, a, out, name=name: masks.update({name: dropped(a[0], out)}))
    gradients = []
    for recomputed in (False, True):
        if recomputed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        model.zero_grad()
        torch.manual_seed(6)
        model(**DATA).loss.backward()
        gradients.append({name: param.grad for name, param in model.named_parameters() if param.requires_grad})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    for name, mask in masks.items():
        assert 0.3 < (mask == 1).float().mean() < 0.7, name
        others = [torch.empty_like(mask) for _ in range(2)]
        dist.all_gather(others, mask)
        known = (others[0] >= 0) & (others[1] >= 0)
        alike = torch.equal(*(other[known] for other in others))
        row = "o_proj" in name or "down_proj" in name
        assert alike != row, f"{name} drops {'alike' if row else 'otherwise'} on another rank"
    masked = [masks[name] for name in masks if "q_proj" in name or "k_proj" in name]
    assert not torch.equal(masked[0], masked[1])
    for name, gradient in gradients[0].items():
        param = dict(model.named_parameters())[name]
        if layout_of(param) is None:
            others = [torch.empty_like(gradient) for _ in range(2)]
            dist.all_gather(others, gradient)
            assert torch.equal(*others), f"replicas of {name} got other gradients"


def seeded_by_rank() -> None:
    """Adapters that each rank would begin otherwise begin alike, as those of the TP group's first rank."""

    def begun(model: torch.nn.Module, seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        return peft.get_peft_model(model, lora(target_modules="all-linear", init_lora_weights="gaussian"))

    rank = dist.get_rank()
    truth, early, late = begun(make("Llama"), 0), begun(make("Llama"), rank), begun(shard(make("Llama")), rank)
    for model in (late, shard(early)):
        for (name, param), (_, wanted) in zip(model.named_parameters(), truth.named_parameters(), strict=True):
            if "lora_A" in name:
                layout = layout_of(param)
                assert torch.equal(param, wanted if layout is None else layout.shard(wanted, rank)), name


def collectives() -> None:
    """What the adapters add to a step."""
    found = []
    for adapter in (None, "every linear"):
        model = make("Llama")
        model.requires_grad_(False)
        model.get_input_embeddings().weight.requires_grad_(True)
        model = shard(model if adapter is None else adapt(model, adapter), guard=False).train()
        with counted() as counter:
            model(**DATA).loss.backward()
        found.append(counter)
    before, after = found
    rows = DATA["input_ids"].numel()
    assert after.count("leave") - before.count("leave") == 2 * 2  # a row's A, in each of two layers
    assert after.nbytes("leave") - before.nbytes("leave") == 2 * 2 * rows * 4 * 4
    assert after.count("enter") == 3  # no door is added, and the first one has nothing frozen to tell
    assert after.count("partial gradient") == 2 * 5  # the A of each column
    assert after.nbytes("partial gradient") == 2 * 5 * 4 * 32 * 4


RIGHT = (
    "merges_dora",
    "switches",
    "drops_out",
    "seeded_by_rank",
    "collectives",
    "counts",
    "combines",
    "scales_shared_rows",
    "samples_words",
    "twins",
)


@pytest.mark.parametrize("name", RIGHT)
def test_adapters_act_as_in_one_process(name):
    values(launched(2, HERE, RIGHT), name)
