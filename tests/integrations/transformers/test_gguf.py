"""GGUF files: converted once into an ordinary directory, and refused with that advice where a model is sharded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tp_plugin
from tests.support.models import batch, make
from tests.support.ranks import on_ranks
from tp_plugin.config import TensorParallelConfig
from tp_plugin.errors import TensorParallelError
from tp_plugin.integrations.transformers.gguf import convert
from tp_plugin.launch.cli import EXIT, main

FILE = "tiny.gguf"
NO_BIAS = {"attention_bias": False, "mlp_bias": False}
NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a projection in llama.cpp's order, where the two halves of a head's rotation alternate."""
    rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).transpose(1, 2)
    return rows.reshape(weight.shape)


def write(folder: Path) -> Any:
    """Write a small Llama in fp32, of which ``Q8_0`` quantises the matrices of the MLP; return the model."""
    model = make("Llama", hidden_size=64, head_dim=16, intermediate_size=96, tied=False, **NO_BIAS)
    config = model.config
    file = gguf.GGUFWriter(folder / FILE, "llama")
    file.add_context_length(config.max_position_embeddings)
    file.add_embedding_length(config.hidden_size)
    file.add_block_count(config.num_hidden_layers)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_head_count(config.num_attention_heads)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_rope_freq_base(config.rope_parameters["rope_theta"])
    file.add_vocab_size(config.vocab_size)
    words = [f"w{number}" for number in range(config.vocab_size - 1)] + ["w0w1"]
    file.add_tokenizer_model("gpt2")
    file.add_token_list(words)
    file.add_token_types([1] * len(words))
    file.add_token_merges(["w0 w1"])
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    for name, weight in model.state_dict().items():
        stem = name.removesuffix(".weight")
        if stem in ("model.embed_tokens", "lm_head", "model.norm"):
            theirs = {"model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm"}[stem]
        else:
            layer, _, part = stem.removeprefix("model.layers.").partition(".")
            theirs = f"blk.{layer}.{NAMES[part]}"
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(NAMES[part])
            weight = interleaved(weight, heads) if heads else weight
        data = weight.float().numpy()
        if ".ffn_" in theirs and data.ndim == 2:
            quantised = gguf.quants.quantize(data, gguf.GGMLQuantizationType.Q8_0)
            file.add_tensor(f"{theirs}.weight", quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            file.add_tensor(f"{theirs}.weight", data)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return model


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("gguf")
    return folder, write(folder)


@pytest.fixture(scope="module")
def converted(written: tuple[Path, Any]) -> Path:
    folder, _ = written
    assert main(["convert-gguf", str(folder), FILE, str(folder / "out"), "--dtype", "float32"]) == 0
    return folder / "out"


def test_a_converted_file_is_the_model_and_carries_no_quantisation(written, converted):
    _, model = written
    found, info = AutoModelForCausalLM.from_pretrained(converted, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not hasattr(found.config, "quantization_config")
    for name, weight in model.state_dict().items():
        ours = found.state_dict()[name]
        if ".mlp." in name:
            assert 0 < (ours - weight).abs().max() <= weight.abs().max() / 127, "eight bits a number"
        else:
            assert torch.equal(ours, weight), name
    assert AutoTokenizer.from_pretrained(converted).convert_tokens_to_ids("w17") == 17


def loss_of(path: str) -> float:
    model = tp_plugin.from_pretrained(path, config=TensorParallelConfig(tp_size=2, quiet=True))
    return model.eval()(**batch(0, 2)).loss.item()


def test_a_sharded_model_loads_what_was_converted(converted):
    plain = AutoModelForCausalLM.from_pretrained(converted).eval()(**batch(0, 2)).loss.item()
    assert on_ranks(2, loss_of, str(converted)) == pytest.approx([plain] * 2, rel=1e-6)


def refusals(folder: str) -> list[str]:
    """What this rank says of a file to load by slices, and of a model that transformers has loaded from it."""
    config = TensorParallelConfig(tp_size=2)
    with pytest.raises(TensorParallelError) as by_slices:
        tp_plugin.from_pretrained(folder, config=config, gguf_file=FILE)
    with pytest.raises(TensorParallelError) as whole:
        tp_plugin.shard_model(AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE), config)
    return [str(by_slices.value), str(whole.value)]


def test_every_rank_is_told_to_convert(written):
    folder, _ = written
    for by_slices, whole in on_ranks(2, refusals, str(folder)):
        advice = f"convert it once: tp-plugin convert-gguf {folder} {FILE} DIRECTORY, and load the directory."
        assert advice in by_slices
        assert "the model is quantised (gguf)" in whole
        assert "tp-plugin convert-gguf" in whole


@pytest.mark.parametrize(
    ("file", "said"), [("other.gguf", "there is no file"), ("text.gguf", "cannot read 'text.gguf'")]
)
def test_bad_input_leaves_the_directory_as_it_was(written, tmp_path, capsys, file, said):
    folder, _ = written
    (folder / "text.gguf").write_text("not a model")
    (tmp_path / "config.json").write_text("kept")
    assert main(["convert-gguf", str(folder), file, str(tmp_path)]) == EXIT["refused"]
    assert said in capsys.readouterr().err
    assert (tmp_path / "config.json").read_text() == "kept"
    with pytest.raises(TensorParallelError, match=said):
        convert(str(folder), file, tmp_path, torch.float32)
