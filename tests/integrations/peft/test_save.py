"""Adapters of sharded models saved and loaded, by us, by PEFT and by transformers; and what is refused there."""

from __future__ import annotations

import shutil

import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from peft.utils.save_and_load import load_peft_weights
from safetensors.torch import load_file

import tp_plugin
from tests.support.adapters import adapt, close, gradients_of, logits_of, shard, shared_folder, trained
from tests.support.batched_cases import launched, values
from tests.support.configs import config_for
from tests.support.models import make
from tests.support.train import engine_for, loss_of, micro_batches, optimizer_for
from tp_plugin.integrations.peft import save
from tp_plugin.sharding import state_of

HERE = "tests.integrations.peft.test_save"


def saved_and_loaded(family: str, adapter: str, stage: int, late: bool = True, again: bool = True, **options) -> None:
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
        if not again:
            return
        ours.load_adapter(folder / "by us", "again")
        ours.set_adapter("again")
        close(logits_of(ours), wanted)


def saves_zero_1() -> None:
    saved_and_loaded("Llama", "vocabulary", 1, tied=False)


def saves_zero_3() -> None:
    saved_and_loaded("Llama", "modules to save", 3, tied=False)


def saves_tied() -> None:
    """One copy that embedding and head share: saved, loaded, merged, and put in before sharding and after.

    PEFT 0.21 forgets the head's copy where a second such adapter is loaded, in one process too.
    """
    saved_and_loaded("Qwen3", "tied to save", 3, again=False, tied=True)
    with shared_folder() as folder:
        truth = adapt(make("Qwen3", tied=True), "tied to save").merge_and_unload()
        for name, model in {
            "before": shard(adapt(make("Qwen3", tied=True), "tied to save")),
            "after": adapt(shard(make("Qwen3", tied=True)), "tied to save"),
        }.items():
            copies = [model.get_base_model().model.embed_tokens, model.get_base_model().lm_head]
            first, second = (wrapper.modules_to_save["default"].weight for wrapper in copies)
            assert first is second
            tp_plugin.save_pretrained(model.merge_and_unload(), folder / name)
            close(logits_of(transformers.AutoModelForCausalLM.from_pretrained(folder / name)), logits_of(truth))


def saves_experts() -> None:
    saved_and_loaded("Mixtral", "experts", 2)


def saves_scales() -> None:
    saved_and_loaded("Llama", "IA3", 1)


def saves_prompt() -> None:
    saved_and_loaded("Llama", "prompt", 1)


def saves_dora() -> None:
    saved_and_loaded("Llama", "DoRA", 1, late=False)


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


RIGHT = (
    "saves_zero_1", "saves_zero_3", "saves_tied", "saves_experts", "saves_scales", "saves_prompt", "saves_dora",
    "merges", "full_state", "by_transformers", "keeps_the_base", "state_dicts", "decides_once", "unreadable",
    "options_of_peft",
)  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_adapters_are_saved_and_loaded_as_in_one_process(name):
    values(launched(2, HERE, RIGHT), name)
