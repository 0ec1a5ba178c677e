"""from_pretrained: to the bit what transformers loads and shard_model cuts, and only what a rank holds is read."""

from __future__ import annotations

import contextlib
import functools
import shutil
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers as hf
from safetensors.torch import load_file, save_file
from transformers.integrations import HfDeepSpeedConfig

import tp_plugin
from tests.support import custom_models, moe, zoo
from tests.support.batched_cases import launched, values
from tests.support.configs import config_for
from tests.support.loaded import assert_same, readers
from tests.support.matrix import LIMITS, assert_within, run_cases
from tests.support.models import FAMILIES, make
from tests.support.ranks import on_ranks
from tests.support.train import engine_for, optimizer_for
from tp_plugin.sharding import state_of

MODELS = (*FAMILIES, *zoo.ZOO, *moe.SIZES, *moe.MORE)


@contextlib.contextmanager
def folder_for(model: hf.PreTrainedModel, **options) -> Iterator[str]:
    """A checkpoint of ``model``, written by the first rank."""
    name = [tempfile.mkdtemp()]
    dist.broadcast_object_list(name)
    if dist.get_rank() == 0:
        model.save_pretrained(name[0], **options)
    dist.barrier()
    try:
        yield name[0]
    finally:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(name[0])


def both(kind, folder: str, config: tp_plugin.TensorParallelConfig, **options):
    """``folder`` loaded by transformers and sharded, and by us, from one state of the random generator."""
    torch.manual_seed(5)
    whole = kind.from_pretrained(folder, **options)
    tp_plugin.shard_model(whole, config)
    torch.manual_seed(5)
    return whole, tp_plugin.from_pretrained(folder, config=config, model_class=kind, **options)


def held(model) -> int:
    """Bytes of a rank's parameters and persistent buffers, tied ones once."""
    unique = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in unique.values())


def equal(name: str) -> None:
    """One model of the zoo, tied and packed and converted as it is."""
    model = zoo.build(name) if name in zoo.ZOO else make(name)
    with folder_for(model) as folder:
        with readers() as opened:
            whole, ours = both(type(model), folder, tp_plugin.TensorParallelConfig(tp_size=2, infer="trusted"))
        assert_same(whole, ours)
        (reader,) = opened
        assert reader.bytes_read == held(ours), f"{reader.bytes_read} bytes were read"


def each(function, names) -> dict[str, str]:
    """``function`` of every name; "" or what it raised."""
    found = {}
    for name in names:
        try:
            function(name)
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc(limit=-4)
    return found


def all_equal():
    return each(equal, MODELS)


@functools.cache
def equality():
    return on_ranks(2, all_equal, timeout_s=600)


@pytest.mark.parametrize("name", MODELS)
def test_equals_loading_the_whole_and_sharding_it(name):
    assert [found[name] for found in equality()] == ["", ""]


# ---- what may be odd about a checkpoint ------------------------------------------------------------------------------


def against_transformers(kind, model, *, change=None, tp=None, read=None, save=None, **options):
    """Both ways of loading what ``change`` makes of a checkpoint of ``model``; ``read``: bytes, if not what is held."""
    with folder_for(model, **save or {}) as folder:
        if change is not None and dist.get_rank() == 0:
            change(Path(folder))
        dist.barrier()
        config = tp_plugin.TensorParallelConfig(tp_size=tp or dist.get_world_size(), infer="off")
        with readers() as opened:
            whole, ours = both(kind, folder, config, **options)
        assert_same(whole, ours)
        assert opened[-1].bytes_read == (held(ours) if read is None else read(ours, opened[-1]))
    return ours


def rewrite(folder: Path, change) -> None:
    """``change(state dict)`` of a checkpoint in one file."""
    state = load_file(folder / "model.safetensors")
    save_file(change(state) or state, folder / "model.safetensors", metadata={"format": "pt"})


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


def compared(model, _) -> int:
    """What is held, and this rank's share of the rows of the embedding and of the head, which were compared."""
    return held(model) + 2 * ((131 + (dist.get_rank() == 0)) // 2) * 32 * 4


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


ODD = (
    "many_files", "cast_to_bfloat16", "bfloat16_as_saved", "kept_in_fp32", "a_pickle", "a_pickle_of_tied",
    "both_of_tied_and_equal", "both_of_tied_and_different", "only_the_head_of_tied", "without_the_base_prefix",
    "with_the_base_prefix", "a_new_classification_head", "parameters_missing", "a_new_head_that_is_tied",
    "nothing_of_what_is_tied", "vocabulary_started_anew", "of_the_hub", "info_is_returned_too",
    "from_config_under_zero3", "two_models_under_zero3", "generation_config", "a_rank_alone",
    "rules_that_were_inferred",
)  # fmt: skip
WIDE = ("kv_heads_on_several_ranks", "seeded_differently")


@pytest.mark.parametrize("name", ODD)
def test_an_odd_checkpoint_is_loaded_as_transformers_does(name):
    values(launched(2, __name__, ODD), name)


@pytest.mark.parametrize("name", WIDE)
def test_four_ranks_load_their_slices(name):
    values(launched(4, __name__, WIDE), name)


# ---- training --------------------------------------------------------------------------------------------------------

CASES: dict[tuple[int, int], list[dict]] = {
    (2, 2): [
        *[{"family": "Qwen3", "stage": stage, "way": "load", "heads": (6, 3)} for stage in (0, 1, 2, 3)],
        {"family": "Mixtral", "stage": 1, "way": "load"},
        {"family": "gpt2", "stage": 3, "way": "load"},
        {"family": "Llama", "stage": 3, "way": "zero3 order"},
        {"family": "Qwen2", "stage": 3, "way": "zero3 order", "tied": True},
        {"family": "Qwen2Moe", "stage": 3, "way": "zero3 order", "gradients": False},
        {"family": "t5", "stage": 3, "way": "zero3 order"},
    ],
    (4, 2): [
        {"family": "Qwen3", "stage": 3, "way": "zero3 order"},
        {"family": "Llama", "stage": 2, "way": "load", "tied": True},
    ],
    (4, 4): [
        {"family": "Qwen2", "stage": 3, "way": "zero3 order", "heads": (8, 2)},
        {"family": "Llama", "stage": 1, "way": "load", "heads": (4, 1)},
    ],
}


@functools.cache
def trained(world: int, tp: int) -> list:
    return on_ranks(world, run_cases, tp, CASES[world, tp], timeout_s=600)


PARAMETERS = [(world, tp, index) for (world, tp), cases in CASES.items() for index in range(len(cases))]


@pytest.mark.parametrize(("world", "tp", "index"), PARAMETERS, ids=lambda value: str(value))
def test_what_was_loaded_by_slices_trains_like_one_process(world, tp, index):
    assert_within(LIMITS, [results[index] for results in trained(world, tp)])
