"""Adapters on sharded models in use: saved, loaded, merged, switched, dropped out; and what is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from peft.utils.other import ModulesToSaveWrapper
from peft.utils.save_and_load import load_peft_weights
from safetensors.torch import load_file

import tp_plugin
from tests.support.adapters import adapt
from tests.support.cases import launched, sentence, values
from tests.support.models import batch, make
from tests.support.train import config_for, engine_for, loss_of, micro_batches, optimizer_for, relative
from tp_plugin.collectives import counted
from tp_plugin.integrations.peft import save
from tp_plugin.integrations.peft.allowed import TYPES, config_obstacle
from tp_plugin.integrations.transformers.parameters import whole_count
from tp_plugin.sharding import state_of

HERE = "tests.integrations.peft.test_use"
DATA = batch(9, 2)


def shard(model: torch.nn.Module, **options) -> torch.nn.Module:
    tp_plugin.shard_model(model, tp_plugin.TensorParallelConfig(tp_size=2, quiet=True, **options))
    return model


def trained(model: torch.nn.Module, stage: int):
    """An engine around ``model``, two steps on."""
    engine = engine_for(model, optimizer_for(model, "adamw"), config_for(2, stage))
    for step in (0, 1):
        for pieces in micro_batches(step, 1):
            engine.backward(loss_of(engine, pieces[0], step))
            engine.step()
    return engine


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> torch.Tensor:
    """Of a fixed batch, in evaluation, on every rank."""
    model.eval()
    found = model(input_ids=DATA["input_ids"]).logits
    model.train()
    return found


@contextlib.contextmanager
def shared_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as own:
        box = [own]
        dist.broadcast_object_list(box)
        yield Path(box[0])
        dist.barrier()


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    error = relative(ours, theirs)
    assert error < 1e-5, error


# ---- saving and loading ----------------------------------------------------------------------------------------------


def saved_and_loaded(family: str, adapter: str, stage: int, late: bool = True, **options) -> None:
    """Train, save; plain PEFT in one process, and a sharded model, give the logits of the trained one."""
    with shared_folder() as folder:
        engine = trained(adapt(make(family, **options), adapter), stage)
        wanted = logits_of(engine)
        tp_plugin.save_pretrained(engine, folder / "by us")
        engine.module.save_pretrained(str(folder / "by peft"))
        files = [load_file(folder / name / "adapter_model.safetensors") for name in ("by us", "by peft")]
        assert files[0].keys() == files[1].keys()
        assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
        plain = adapt(make(family, **options), adapter)
        shapes = {name: tensor.shape for name, tensor in peft.get_peft_model_state_dict(plain).items()}
        assert {name: tensor.shape for name, tensor in files[0].items()} == shapes
        close(logits_of(peft.PeftModel.from_pretrained(make(family, **options), folder / "by us")), wanted)
        if not late:
            close(logits_of(shard(peft.PeftModel.from_pretrained(make(family, **options), folder / "by us"))), wanted)
            return
        ours = peft.PeftModel.from_pretrained(shard(make(family, **options)), folder / "by us")
        close(logits_of(ours), wanted)
        ours.load_adapter(folder / "by us", "again")
        ours.set_adapter("again")
        close(logits_of(ours), wanted)


def saves_zero_1() -> None:
    saved_and_loaded("Llama", "vocabulary", 1, tied=False)


def saves_zero_3() -> None:
    saved_and_loaded("Llama", "modules to save", 3, tied=False)


def saves_experts() -> None:
    saved_and_loaded("Mixtral", "experts", 2)


def saves_scales() -> None:
    saved_and_loaded("Llama", "IA3", 1)


def saves_prompt() -> None:
    saved_and_loaded("Llama", "prompt", 1)


def saves_dora() -> None:
    saved_and_loaded("Llama", "DoRA", 1, late=False)


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


def merges() -> None:
    """``merge_and_unload`` of a sharded model, exported: one process's merged model; and its doors are right again."""
    with shared_folder() as folder:
        truth = adapt(make("Llama", heads=(6, 3), tied=False), "vocabulary").merge_and_unload()
        for name, model in {
            "before": shard(adapt(make("Llama", heads=(6, 3), tied=False), "vocabulary")),
            "after": adapt(shard(make("Llama", heads=(6, 3), tied=False)), "vocabulary"),
        }.items():
            merged = model.merge_and_unload()
            tp_plugin.save_pretrained(merged, folder / name)
            plain = transformers.AutoModelForCausalLM.from_pretrained(folder / name)
            for key, tensor in truth.state_dict().items():
                close(plain.state_dict()[key], tensor)
            gradients_of(merged.requires_grad_(True), truth.requires_grad_(True))


def gradients_of(ours: torch.nn.Module, truth: torch.nn.Module) -> None:
    """Every gradient of a step of the sharded model against the truth's."""
    rank = state_of(ours).mesh.tp_rank
    for model in (ours, truth):
        model.zero_grad(set_to_none=True)
        model(**DATA).loss.backward()
    expected = {name: param.grad for name, param in truth.named_parameters()}
    for name, param in ours.named_parameters():
        wanted = expected[name]
        assert (param.grad is None) == (wanted is None), name
        if wanted is not None:
            layout = getattr(param, "tp_layout", None)
            wanted = wanted if layout is None else layout.shard(wanted, rank)
            assert relative(param.grad, wanted, 1e-6) < 1e-4, name


def full_state() -> None:
    """Names and tensors of the unsharded PEFT model, base and adapters."""
    for late in (False, True):
        truth = adapt(make("Qwen2", heads=(4, 1)), "every linear").state_dict()
        base = make("Qwen2", heads=(4, 1))
        model = adapt(shard(base), "every linear") if late else shard(adapt(base, "every linear"))
        found = tp_plugin.full_state_dict(model)
        if dist.get_rank() == 0:
            assert list(found) == list(truth)
            assert all(torch.equal(found[name], truth[name]) for name in truth)
        record = state_of(model)
        assert set(record.layouts) <= set(dict(model.get_base_model().named_parameters(remove_duplicate=False)))
        assert 0.4 < record.fraction() < 0.8


def by_transformers() -> None:
    """``add_adapter``, ``save_pretrained`` and ``load_adapter`` of transformers itself."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    with shared_folder() as folder:
        models = []
        for sharded in (False, True):
            torch.manual_seed(3)
            models.append(make("Llama"))
            models[-1].add_adapter(config)
            if sharded:
                shard(models[-1])
        truth, ours = models
        close(logits_of(ours), logits_of(truth))
        gradients_of(ours, truth)
        if dist.get_rank() == 0:
            truth.save_pretrained(folder)
        dist.barrier()
        loaded = shard(make("Llama"))
        loaded.load_adapter(str(folder), "given")
        close(logits_of(loaded), logits_of(truth))


def keeps_the_base() -> None:
    """Adapters of ``add_adapter`` are saved beside the base, which stays."""
    with shared_folder() as folder:
        if dist.get_rank() == 0:
            make("Llama").save_pretrained(folder)
        dist.barrier()
        before = {path.name for path in folder.iterdir()}
        ours = make("Llama")
        ours.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
        shard(ours).save_pretrained(folder)
        assert {path.name for path in folder.iterdir()} - before == {"adapter_config.json", "adapter_model.safetensors"}
        assert before <= {path.name for path in folder.iterdir()}, "the base is gone"
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
        close(logits_of(loaded), logits_of(ours))


def state_dicts() -> None:
    """``state_dict=`` of shards is refused, under each of their names; a full one is saved as PEFT saves it."""
    adapted = shard(adapt(make("Llama", tied=False), "modules to save"))
    plain, rank = shard(make("Llama")), dist.get_rank()
    with shared_folder() as folder:
        for model, state in (
            (adapted, dict(adapted.named_parameters())),
            (adapted, {f"module.{name}": param for name, param in adapted.named_parameters()}),
            (adapted, peft.get_peft_model_state_dict(adapted)),
            (plain, dict(plain.named_parameters())),
            (plain, plain.state_dict()),
        ):
            with pytest.raises(tp_plugin.TensorParallelError, match=r"this rank's shard .* tp_plugin.full_state_dict"):
                model.save_pretrained(folder / "shards", state_dict=state)
            assert not (folder / "shards").exists()
        for name, model in (("adapted", adapted), ("plain", plain)):
            tp_plugin.save_pretrained(model, folder / name)
            state = tp_plugin.full_state_dict(model)
            model.save_pretrained(folder / f"{name} given", is_main_process=rank == 0, state_dict=state)
            dist.barrier()
            model.save_pretrained(folder / f"{name} given", state_dict=state)  # where the main process is not told
            dist.barrier()
            file = "adapter_model.safetensors" if name == "adapted" else "model.safetensors"
            ours, given = load_file(folder / name / file), load_file(folder / f"{name} given" / file)
            assert ours.keys() == given.keys()
            assert all(torch.equal(ours[key], given[key]) for key in ours)


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
        assert [whole_count(model, trainable=trainable) for trainable in (True, False)] == sizes
        assert model.get_nb_trainable_parameters() == truth.get_nb_trainable_parameters() == tuple(sizes)
        assert _printed(model) == _printed(truth)
    status = [peft.get_model_status(model) for model in (truth, early, late)]
    assert len({(one.trainable_params, one.total_params) for one in status}) == 1
    merged = late.merge_and_unload()
    assert whole_count(merged) == merged.num_parameters() == make("Llama", heads=(6, 3)).num_parameters()


def decides_once() -> None:
    """What an adapter's file holds is rank 0's decision, and what fails there all ranks learn of."""
    model = shard(adapt(make("Llama"), "every linear"))
    true = save.get_peft_model_state_dict

    def unwell(*args, **options):
        raise OSError("the Hub is away")

    try:
        with shared_folder() as folder:
            if dist.get_rank() == 1:
                save.get_peft_model_state_dict = unwell
            tp_plugin.save_pretrained(model, folder)
            assert load_file(folder / "adapter_model.safetensors").keys() == true(model).keys()
        save.get_peft_model_state_dict = unwell if dist.get_rank() == 0 else true
        with pytest.raises(tp_plugin.TensorParallelError, match="OSError: the Hub is away"):
            tp_plugin.save_pretrained(model, "nowhere")
    finally:
        save.get_peft_model_state_dict = true


def unreadable() -> None:
    """An adapter that one rank cannot read is refused on every rank before it is put in anywhere."""
    says = pytest.raises(tp_plugin.TensorParallelError, match=r"reading the adapter .* failed")
    with shared_folder() as folder:
        tp_plugin.save_pretrained(shard(adapt(make("Llama"), "every linear")), folder)
        (folder / "no weights").mkdir(exist_ok=True)
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.copy(folder / "adapter_config.json", folder / "no weights")
        dist.barrier()
        for bad in ("nothing", "no weights"):
            where = folder / bad if dist.get_rank() == 1 else folder
            model = shard(make("Llama"))
            with says:
                peft.PeftModel.from_pretrained(model, where)
            with says:
                model.load_adapter(str(where), "given")
            assert not any("lora" in name for name, _ in model.named_parameters())
            model = peft.PeftModel.from_pretrained(model, folder)
            with says:
                model.load_adapter(where, "again")
            assert list(model.peft_config) == ["default"]


def options_of_peft() -> None:
    """An adapter of the same name is loaded over the one there; what PEFT would then do to shards is refused first."""
    with shared_folder() as folder:
        tp_plugin.save_pretrained(shard(adapt(make("Llama"), "every linear")), folder)
        wanted = load_file(folder / "adapter_model.safetensors")
        model = peft.PeftModel.from_pretrained(shard(make("Llama")), folder)
        held = {name: (id(param), vars(param).keys()) for name, param in model.named_parameters()}
        for name, param in model.named_parameters():
            param.data.mul_(0 if "lora" in name else 1)

        def refused(says: str, call, *args, **options) -> None:
            with pytest.raises(tp_plugin.TensorParallelError, match=says):
                call(*args, **options)

        state = load_peft_weights(folder, device="cpu")
        empty = {"low_cpu_mem_usage": True}
        mismatched = {"ignore_mismatched_sizes": True}
        for options, says in ((empty, "low_cpu_mem_usage=True"), (mismatched, "ignore_mismatched_sizes=True")):
            refused(says, model.load_adapter, folder, "default", **options)
            refused(says, model.load_adapter, folder, "new", **options)
            refused(says, peft.set_peft_model_state_dict, model, state, **options)
            other = shard(make("Llama"))
            refused(says, peft.PeftModel.from_pretrained, other, folder, **options)
            assert not any("lora" in name for name, _ in other.named_parameters())
        assert list(model.peft_config) == ["default"]
        model.load_adapter(folder, "default")
        assert held == {name: (id(param), vars(param).keys()) for name, param in model.named_parameters()}
        tp_plugin.save_pretrained(model, folder / "again")
        again = load_file(folder / "again" / "adapter_model.safetensors")
        assert again.keys() == wanted.keys()
        assert all(torch.equal(again[name], wanted[name]) for name in wanted)


# ---- several adapters, dropout, collectives --------------------------------------------------------------------------


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
            assert vars(twin.weight).keys() - {"tp_summed"} == vars(first.weight).keys() - {"tp_summed"}
            assert not hasattr(twin.weight, "ds_shape")
            found += hasattr(twin.weight, "tp_vocab")
    assert found == 1, "no head's copy"


def drops_out() -> None:
    """One mask for what is replicated, another on each rank for what is sharded; recomputation gives them again."""
    masks: dict[str, torch.Tensor] = {}
    torch.manual_seed(5)
    model = shard(adapt(make("Llama", attention_dropout=0.3), "every linear", lora_dropout=0.5)).train()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda m, a, out, name=name: masks.update({name: (out == 0) & (a[0] != 0)}))
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
        assert 0.3 < mask.float().mean() < 0.7, name
        others = [torch.empty_like(mask) for _ in range(2)]
        if "down_proj" in name:  # 27 and 26 of 53 features
            mask = mask[..., :26].contiguous()
            others = [torch.empty_like(mask) for _ in range(2)]
        dist.all_gather(others, mask)
        row = "o_proj" in name or "down_proj" in name
        assert torch.equal(*others) != row, f"{name} drops {'alike' if row else 'otherwise'} on another rank"
    masked = [masks[name] for name in masks if "q_proj" in name or "k_proj" in name]
    assert not torch.equal(masked[0], masked[1])
    for name, gradient in gradients[0].items():
        param = dict(model.named_parameters())[name]
        if not hasattr(param, "tp_layout"):
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
                layout = getattr(param, "tp_layout", None)
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


# ---- refused ---------------------------------------------------------------------------------------------------------


def lora(**options) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | options)


def refuse_dora() -> None:
    shard(peft.get_peft_model(make("Llama", heads=(6, 3)), lora(target_modules=["k_proj"], use_dora=True)))


def refuse_dora_zero_3() -> None:
    model = peft.get_peft_model(make("Llama"), lora(use_dora=True))
    engine = engine_for(model, optimizer_for(model, "adamw"), config_for(2, 3) | {"tp_plugin": {"guard": False}})
    engine(**DATA)


def refuse_variant() -> None:
    shard(peft.get_peft_model(make("Llama"), lora(alora_invocation_tokens=[1, 2])))


def refuse_dora_late() -> None:
    peft.get_peft_model(shard(make("Llama")), lora(use_dora=True))


def refuse_loha() -> None:
    shard(peft.get_peft_model(make("Llama"), peft.LoHaConfig(target_modules=["q_proj"])))


def refuse_loha_late() -> None:
    peft.get_peft_model(shard(make("Llama")), peft.LoHaConfig(target_modules=["q_proj"]))


def refuse_prefix() -> None:
    config = peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    shard(peft.get_peft_model(make("Llama"), config))


def refuse_prefix_late() -> None:
    config = peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    peft.get_peft_model(shard(make("Llama")), config)


def refuse_tokens() -> None:
    shard(peft.get_peft_model(make("Llama"), lora(trainable_token_indices=[1, 2])))


def refuse_block() -> None:
    shard(peft.get_peft_model(make("Llama"), lora(modules_to_save=["mlp"])))


def refuse_block_late() -> None:
    peft.get_peft_model(shard(make("Llama")), lora(modules_to_save=["mlp"]))


def refuse_pissa_late() -> None:
    peft.get_peft_model(shard(make("Llama")), lora(init_lora_weights="pissa"))


def refuse_empty_late() -> None:
    peft.get_peft_model(shard(make("Llama")), lora(), low_cpu_mem_usage=True)


def refuse_tied_adapters() -> None:
    config = lora(target_modules=["embed_tokens"], ensure_weight_tying=True)
    shard(peft.get_peft_model(make("Qwen3", tied=True), config))


def refuse_inside() -> None:
    shard(torch.nn.Sequential(peft.get_peft_model(make("Llama"), lora())))


def refuse_head_bias() -> None:
    shard(peft.get_peft_model(make("Llama"), lora(target_modules=["lm_head"], lora_bias=True)))


def refuse_after_zero_3() -> None:
    model = make("Llama")
    engine = engine_for(model, optimizer_for(model, "adamw"), config_for(2, 3))
    peft.get_peft_model(engine.module, lora())


def refuse_expert_bias() -> None:
    config = lora(target_parameters=["mlp.experts.down_proj_bias"])
    shard(peft.get_peft_model(make("GptOss"), config))


def refuse_singular_values() -> None:
    ours = shard(adapt(make("Llama"), "several"))
    ours.add_weighted_adapter(["default", "second"], [0.7, 0.4], "both")


def refuse_shared_scales() -> None:
    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    shard(peft.get_peft_model(make("Llama", heads=(6, 3)), config))


SAYS = {
    "refuse_dora": "uses more than once",
    "refuse_dora_late": "put it in before sharding",
    "refuse_dora_zero_3": "use ZeRO 2 or less",
    "refuse_variant": "alora_invocation_tokens",
    "refuse_loha": "PEFT type LOHA",
    "refuse_loha_late": "PEFT type LOHA",
    "refuse_prefix": "PEFT type PREFIX_TUNING",
    "refuse_prefix_late": "PEFT type PREFIX_TUNING",
    "refuse_tokens": "modules_to_save instead",
    "refuse_block": "sharded inside",
    "refuse_block_late": "sharded inside",
    "refuse_pissa_late": "before sharding",
    "refuse_empty_late": "low_cpu_mem_usage",
    "refuse_tied_adapters": "ensure_weight_tying",
    "refuse_inside": "give tp_plugin the PeftModel itself",
    "refuse_head_bias": "set lora_bias=False",
    "refuse_after_zero_3": "before deepspeed.initialize",
    "refuse_expert_bias": "leave it out of target_parameters",
    "refuse_singular_values": "combination_type='svd'",
    "refuse_shared_scales": "key/value heads that ranks share",
}
RIGHT = (
    *("saves_zero_1", "saves_zero_3", "saves_experts", "saves_scales", "saves_prompt", "saves_dora", "merges"),
    *("merges_dora", "full_state", "by_transformers", "switches", "drops_out", "seeded_by_rank", "collectives"),
    *("keeps_the_base", "state_dicts", "counts", "decides_once", "unreadable", "combines", "scales_shared_rows"),
    *("samples_words", "twins", "options_of_peft"),
)


@pytest.mark.parametrize("name", RIGHT)
def test_right(name):
    values(launched(2, HERE, (*RIGHT, *SAYS)), name)


def saves_prompt_zero_3(adapter: str) -> None:
    """The prompt is partitioned over two data-parallel ranks, and rank 0 alone writes; training goes on after."""
    with shared_folder() as folder:
        engine = engine_for(model := adapt(make("Llama"), adapter), optimizer_for(model, "adamw"), config_for(1, 3))
        for step in (0, 1):
            for pieces in micro_batches(step, 2):
                engine.backward(loss_of(engine, pieces[dist.get_rank()], step))
                engine.step()
            tp_plugin.save_pretrained(engine, folder / str(step))
        wanted = logits_of(engine)
        dist.barrier()
        close(logits_of(peft.PeftModel.from_pretrained(make("Llama"), folder / "1")), wanted)


@pytest.mark.parametrize("adapter", ["prompt", "prompt encoder"])
def test_prompt_that_zero_3_parted_is_saved(adapter):
    values(launched(2, HERE, ("saves_prompt_zero_3",), (adapter,)), "saves_prompt_zero_3")


@pytest.mark.parametrize("name", SAYS)
def test_refused(name):
    assert SAYS[name] in sentence(launched(2, HERE, (*RIGHT, *SAYS)), name)


@pytest.mark.parametrize("kind", [kind for kind in peft.PeftType if kind not in TYPES])
def test_types_that_nobody_tried_are_refused(kind):
    config = dataclasses.replace(peft.PeftConfig(), peft_type=kind)
    assert f"PEFT type {kind.value}" in (config_obstacle("default", config) or "")
