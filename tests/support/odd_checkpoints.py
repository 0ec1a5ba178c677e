"""Checkpoints with something odd about them, loaded by slices and by transformers: each a function that ranks call."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import transformers as hf
from safetensors.torch import load_file
from transformers.integrations import HfDeepSpeedConfig

import tp_plugin
from tests.support import custom_models, zoo
from tests.support.configs import config_for
from tests.support.loaded import assert_same
from tests.support.models import make
from tests.support.sliced import against_transformers, both, compared, folder_for, held, rewrite
from tests.support.train import engine_for, optimizer_for
from tp_plugin.sharding import state_of


def many_files():
    against_transformers(hf.LlamaForCausalLM, make("Llama"), save={"max_shard_size": "20KB"})


def cast_to_bfloat16():
    def twice(model, _):
        return 2 * held(model)

    ours = against_transformers(hf.Qwen3ForCausalLM, make("Qwen3"), dtype=torch.bfloat16, read=twice)
    assert ours.dtype == torch.bfloat16


def bfloat16_as_saved():
    ours = against_transformers(hf.MixtralForCausalLM, make("Mixtral").bfloat16())
    assert ours.dtype == torch.bfloat16


def kept_in_fp32():
    """T5 keeps its ``wo`` in fp32 in half precision: the dtype is a parameter's own."""
    against_transformers(
        hf.T5ForConditionalGeneration, zoo.build("t5"), dtype=torch.float16, read=lambda _, r: r.bytes_read
    )


def a_pickle():
    def change(folder):
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()

    against_transformers(hf.LlamaForCausalLM, make("Llama"), change=change)


def a_pickle_of_tied():
    def change(folder):
        state = load_file(folder / "model.safetensors")
        torch.save(state | {"lm_head.weight": state["model.embed_tokens.weight"]}, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()

    against_transformers(hf.LlamaForCausalLM, make("Llama", tied=True), change=change, read=compared)


def both_of_tied_and_equal():
    def change(state):
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()

    ours = against_transformers(
        hf.LlamaForCausalLM, make("Llama", tied=True), change=lambda folder: rewrite(folder, change), read=compared
    )
    assert ours.lm_head.weight is ours.model.embed_tokens.weight


def both_of_tied_and_different():
    """In the last row alone, which one rank compares and another holds."""

    def change(state):
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        state["lm_head.weight"][-1] += 1

    ours = against_transformers(
        hf.LlamaForCausalLM, make("Llama", tied=True), change=lambda folder: rewrite(folder, change), read=compared
    )
    assert ours.lm_head.weight is not ours.model.embed_tokens.weight


def only_the_head_of_tied():
    def change(state):
        state["lm_head.weight"] = state.pop("model.embed_tokens.weight")

    against_transformers(hf.LlamaForCausalLM, make("Llama", tied=True), change=lambda folder: rewrite(folder, change))


def loaded_only(*new):
    """Bytes of what is held, without the parameters of these names, which the files lack."""

    def read(model, _):
        tensors = model.state_dict(keep_vars=True)
        lacked = {id(tensors[name]) for name in new}
        return sum(
            tensor.nbytes for key, tensor in {id(one): one for one in tensors.values()}.items() if key not in lacked
        )

    return read


def without_the_base_prefix():
    """A base model's checkpoint for a causal LM: names get a prefix, the head is new, drawn and cut."""
    model = make("Llama").model
    against_transformers(hf.LlamaForCausalLM, model, read=loaded_only("lm_head.weight"))


def with_the_base_prefix():
    """A causal LM's checkpoint for its base model: names lose a prefix, the head is unexpected."""
    against_transformers(hf.LlamaModel, make("Llama"))


def a_new_classification_head():
    against_transformers(
        hf.GPT2ForSequenceClassification, zoo.build("gpt2"), num_labels=5, read=loaded_only("score.weight")
    )


def parameters_missing():
    """A whole layer's: sharded and replicated, weights and biases, drawn as transformers draws them."""
    gone = []

    def change(state):
        for name in [name for name in state if ".layers.1." in name]:
            del state[name]
            gone.append(name)

    model = make("Llama")
    names = [name for name, _ in model.named_parameters() if ".layers.1." in name]
    against_transformers(
        hf.LlamaForCausalLM, model, change=lambda folder: rewrite(folder, change), read=loaded_only(*names)
    )


def a_new_head_that_is_tied():
    """Its weight is the embedding's shard when its bias, new and whole, is met."""
    model = zoo.build("bert")
    new = [name for name, _ in model.named_parameters() if name.startswith("cls.")]
    ours = against_transformers(hf.BertForMaskedLM, model.bert, read=loaded_only(*new))
    assert ours.cls.predictions.decoder.weight is ours.bert.embeddings.word_embeddings.weight


def nothing_of_what_is_tied():
    """Embedding and head are both new, and one."""

    def change(state):
        del state["model.embed_tokens.weight"]

    ours = against_transformers(
        hf.LlamaForCausalLM,
        make("Llama", tied=True),
        change=lambda folder: rewrite(folder, change),
        read=loaded_only("model.embed_tokens.weight"),
    )
    assert ours.lm_head.weight is ours.model.embed_tokens.weight


def vocabulary_started_anew():
    names = ("model.embed_tokens.weight", "lm_head.weight")
    against_transformers(
        hf.LlamaForCausalLM, make("Llama"), vocab_size=140, ignore_mismatched_sizes=True, read=loaded_only(*names)
    )


def of_the_hub():
    """A repository in the cache, by a tag that is not the default."""
    with folder_for(make("Llama"), max_shard_size="40KB") as folder, tempfile.TemporaryDirectory() as own:
        cache = [own]
        dist.broadcast_object_list(cache)
        repository = Path(cache[0], "models--someone--small")
        if dist.get_rank() == 0:
            shutil.copytree(folder, repository / "snapshots" / ("a" * 40))
            (repository / "refs").mkdir()
            (repository / "refs" / "tagged").write_text("a" * 40)
        dist.barrier()
        config = tp_plugin.TensorParallelConfig(tp_size=2)
        options = {"cache_dir": cache[0], "revision": "tagged"}
        whole, ours = both(hf.LlamaForCausalLM, "someone/small", config, **options)
        assert_same(whole, ours)
        dist.barrier()


def seeded_differently():
    """A new head is the first rank's on all ranks, data-parallel ones too."""
    with folder_for(make("Llama").model) as folder:
        torch.manual_seed(dist.get_rank())
        ours = tp_plugin.from_pretrained(folder, tp_size=2, model_class=hf.LlamaForCausalLM)
        head = tp_plugin.full_state_dict(ours).get("lm_head.weight")
        if dist.get_rank() == 0:
            torch.manual_seed(0)
            expected = hf.LlamaForCausalLM.from_pretrained(folder)
            assert torch.equal(head, expected.lm_head.weight)
        shards: list = [None] * dist.get_world_size()
        dist.all_gather_object(shards, ours.lm_head.weight.detach())
        assert all(torch.equal(shards[rank], shards[rank % 2]) for rank in range(dist.get_world_size()))


def info_is_returned_too():
    with folder_for(make("Llama").model) as folder:
        ours, info = tp_plugin.from_pretrained(folder, model_class=hf.LlamaForCausalLM, output_loading_info=True)
        assert info["missing_keys"] == {"lm_head.weight"}
        assert state_of(ours) is not None


def generation_config():
    model = make("Llama")
    model.generation_config.max_new_tokens = 7
    with folder_for(model) as folder:
        assert tp_plugin.from_pretrained(folder).generation_config.max_new_tokens == 7


def kv_heads_on_several_ranks():
    for heads in ((8, 2), (4, 1), (12, 3)):
        against_transformers(hf.Qwen2ForCausalLM, make("Qwen2", heads=heads), tp=4)


def a_rank_alone():
    """tp 1: transformers' model, our classes."""
    against_transformers(hf.LlamaForCausalLM, make("Llama"), tp=1)


def from_config_under_zero3():
    """Whole, as without ZeRO; a directly built model too. Either is sharded later."""
    tp_plugin.register()
    config = make("Llama").config
    alive = HfDeepSpeedConfig(config_for(2, 3))
    torch.manual_seed(3)
    model = hf.AutoModelForCausalLM.from_config(config)
    direct = hf.LlamaForCausalLM(config)
    assert alive.is_zero3()
    torch.manual_seed(3)
    del alive
    expected = hf.AutoModelForCausalLM.from_config(config)
    for name, param in expected.named_parameters():
        assert torch.equal(model.get_parameter(name), param)
    assert direct.lm_head.weight.shape == (131, 32)
    assert state_of(model) is None
    engine = engine_for(model.train(), optimizer_for(model, "adamw"), config_for(2, 3))
    assert state_of(engine.module) is not None


def two_models_under_zero3():
    """A policy and its reference; the config stays alive, and other stages are left alone."""
    tp_plugin.register()
    with folder_for(make("Llama")) as folder:
        alive = HfDeepSpeedConfig(config_for(2, 3))
        first, second = (hf.LlamaForCausalLM.from_pretrained(folder) for _ in range(2))
        assert_same(first, second)
        assert alive.is_zero3()
        del alive
        alive = HfDeepSpeedConfig(config_for(2, 1))
        assert state_of(hf.LlamaForCausalLM.from_pretrained(folder)) is None
        del alive


def rules_that_were_inferred():
    """They stand trial with weights that have not been read, which leaves the random generator as it was."""
    model = custom_models.HomeModel(custom_models.HomeConfig(num_layers=2))
    with folder_for(model) as folder:
        config = tp_plugin.TensorParallelConfig(tp_size=2, quiet=True)
        whole, ours = both(custom_models.HomeModel, folder, config)
        assert_same(whole, ours)
        assert "stack.0.mixer.wq" in state_of(ours).plan.inferred()
