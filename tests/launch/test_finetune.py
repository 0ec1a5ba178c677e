"""The recipe of ``tp_plugin.finetune``: what it accepts, what it refuses, what it makes of text and models.

Whole runs are in integration/test_quickstart.py.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from tests.support.examples import LLAMA
from tests.support.ranks import errors_on_ranks, on_ranks
from tests.support.texts import TEXTS
from tp_plugin.config import TensorParallelConfig
from tp_plugin.errors import TensorParallelError
from tp_plugin.launch.data import documents
from tp_plugin.launch.export_check import visit_plainly
from tp_plugin.launch.finetune import _size, finetune, main
from tp_plugin.launch.model import build_model, build_tokenizer, load_model
from tp_plugin.launch.recipe import DataRecipe, ModelRecipe, TrainingRecipe, load_recipe

MINIMAL = {"output_dir": "out", "model": {"path": "m"}, "data": {"text_files": "*.txt"}}


def write(path: Path, **changes) -> Path:
    """A minimal recipe in ``path/recipe.yaml`` with sections replaced or (None) removed."""
    content = {key: value for key, value in (MINIMAL | changes).items() if value is not None}
    file = path / "recipe.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


# ---- what a recipe accepts -------------------------------------------------------------------------------------------


def test_minimal_recipe_and_its_defaults(tmp_path):
    recipe = load_recipe(write(tmp_path))
    assert recipe.data.text_files == ["*.txt"]
    assert recipe.training.max_grad_norm == 1.0
    assert recipe.model.trust_remote_code is False


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path):
    file = write(tmp_path)
    file.write_text(file.read_text() + "training:\n  learning_rate: 1e-4\n  weight_decay: 0\n")
    training = load_recipe(file).training
    assert training.learning_rate == 1e-4
    assert isinstance(training.weight_decay, float)


def test_overrides_reach_sections_that_the_file_lacks(tmp_path):
    recipe = load_recipe(
        write(tmp_path), ["training.max_steps=5", "sample.prompt=def", "seed=3", "data.text_files=[a, b]"]
    )
    assert (recipe.training.max_steps, recipe.sample.prompt, recipe.seed) == (5, "def", 3)
    assert recipe.data.text_files == ["a", "b"]


@pytest.mark.parametrize(
    ("changes", "overrides", "sentence"),
    [
        ({"training": {"learning_rat": 1}}, [], "unknown key 'training.learning_rat' .* 'training.learning_rate'"),
        ({"modle": {}}, [], "unknown key 'modle' .* did you mean 'model'"),
        ({}, ["sample.promt=x"], "unknown key 'sample.promt' .* 'sample.prompt'"),
        ({"output_dir": None}, [], "lacks the key 'output_dir'"),
        ({"model": {}}, [], "lacks the key 'model.path'"),
        ({"model": "gpt"}, [], "'model' .* must be a section of keys, got 'gpt'"),
        ({}, ["seed=soon"], "'seed' .* must be a whole number, got 'soon'"),
        ({}, ["seed=true"], "'seed' .* must be a whole number, got True"),
        ({}, ["training.bf16=1"], "'training.bf16' .* must be true or false, got 1"),
        ({}, ["training.learning_rate=fast"], "'training.learning_rate' .* must be a number, got 'fast'"),
        ({}, ["model.build=small"], "'model.build' .* must be a mapping, got 'small'"),
        ({}, ["model.build={hidden_size: 8}"], "lacks the key 'model.build.model_type'"),
        ({}, ["data.text_files=[1]"], "'data.text_files' .* must be a text or a list of texts"),
        ({}, ["data.dataset=wiki"], "exactly one of .* got .'text_files', 'dataset'."),
        ({}, ["data.sequence_length=1"], "must be at least 2"),
        ({}, ["data.validation_fraction=1.5"], r"must lie in \[0, 1\)"),
        ({}, ["data.validation_fraction=0"], "set sample.check_blocks: 0"),
        ({}, ["model.dtype=float8"], "model.dtype 'float8', which must be"),
        (
            {},
            ["training.extra={adam_beta3: 1}"],
            "unknown key 'training.extra.adam_beta3' .* 'training.extra.adam_beta",
        ),
        ({}, ["training.extra={bf16: true}"], "write 'training.bf16'"),
        ({}, ["training.extra={deepspeed: x}"], "'training.extra.deepspeed' .* is set elsewhere"),
        ({}, ["--max_steps"], "write it as dotted.key=value"),
        ({}, ["seed.x=1"], "unknown key|not a section|must be"),
    ],
)
def test_refused_in_one_sentence_that_names_the_key(tmp_path, changes, overrides, sentence):
    with pytest.raises(TensorParallelError, match=sentence) as caught:
        load_recipe(write(tmp_path, **changes), overrides)
    assert "\n" not in str(caught.value)


def test_unreadable_recipe_is_named(tmp_path):
    with pytest.raises(TensorParallelError, match=r"cannot read the recipe .*nowhere.yaml"):
        load_recipe(tmp_path / "nowhere.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(TensorParallelError, match=r"must be a mapping"):
        load_recipe(tmp_path / "list.yaml")


def test_training_options_are_training_arguments_with_our_types():
    theirs = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    ours = {field.name for field in dataclasses.fields(TrainingRecipe)} - {"extra"}
    assert ours <= theirs


def test_command_line_says_the_sentence_and_fails(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as caught:
        main([str(write(tmp_path, modle={})), "--local_rank=1"])
    assert "unknown key 'modle'" in str(caught.value)
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as caught:
        main([str(write(tmp_path))])
    assert "accelerate launch, deepspeed or torchrun" in str(caught.value)


# ---- which DeepSpeed config counts, and failures that every rank must learn of ---------------------------------------


def run(recipe_file: str, *overrides: str) -> None:
    finetune(load_recipe(recipe_file, overrides))


def test_a_degree_that_does_not_divide_the_world_is_refused_on_every_rank(tmp_path):
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({"tensor_parallel": {"autotp_size": 2}}))
    for sentence in errors_on_ranks(3, run, str(write(tmp_path)), f"deepspeed={config}"):
        assert "world size 3 is not divisible by tp_size 2" in sentence


def test_missing_text_is_refused_on_every_rank(tmp_path):
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({"tensor_parallel": {"autotp_size": 2}}))
    options = [f"deepspeed={config}", f"data.text_files={tmp_path}/*.none", "tokenizer.build_vocab_size=300"]
    for sentence in errors_on_ranks(2, run, str(write(tmp_path)), *options, f"model.path={tmp_path}/m"):
        assert "data.text_files: no file matches" in sentence


def test_no_deepspeed_config_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED", raising=False)
    with pytest.raises(TensorParallelError, match=r"add 'deepspeed: path/to/config.json' to the recipe"):
        run(str(write(tmp_path)))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.delenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", raising=False)
    with pytest.raises(TensorParallelError, match=r"accelerate's config names no DeepSpeed config"):
        run(str(write(tmp_path)), "deepspeed=x.json")


# ---- text ------------------------------------------------------------------------------------------------------------


def test_built_tokenizer_is_deterministic_and_loses_nothing(tokenizer, tmp_path):
    build_tokenizer(str(tmp_path), 287, TEXTS)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 287
    assert again.get_vocab() == tokenizer.get_vocab()
    for text in (*TEXTS, "héllo\n\t  世界 🙂", "    if x :\n"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    with pytest.raises(TensorParallelError, match=r"must be more than 257"):
        build_tokenizer(str(tmp_path), 200, TEXTS)
    with pytest.raises(TensorParallelError, match=r"the text yields only"):
        build_tokenizer(str(tmp_path), 100_000, TEXTS)


def test_json_lines_and_datasets_give_their_text_field(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"body": text, "id": n}) + "\n\n" for n, text in enumerate(TEXTS)))
    assert list(documents(DataRecipe(jsonl_files=[str(file)], text_field="body"))) == TEXTS
    with pytest.raises(TensorParallelError, match=r"'text' is no text in .*rows.jsonl:1, which holds: body, id"):
        list(documents(DataRecipe(jsonl_files=[str(file)])))
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text(file.read_text())
    assert list(documents(DataRecipe(dataset=str(folder), text_field="body"))) == TEXTS


# ---- models ----------------------------------------------------------------------------------------------------------


def test_built_model_is_reproducible_and_fits_the_tokenizer(tokenizer, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        build_model(str(tmp_path / name), LLAMA, tokenizer, seed=seed)
    a, b, c = (load_model(ModelRecipe(path=str(tmp_path / name))) for name in "abc")
    assert a.config.vocab_size == len(tokenizer) == a.lm_head.weight.shape[0]
    assert a.config.eos_token_id == tokenizer.eos_token_id
    assert torch.equal(a.lm_head.weight, b.lm_head.weight)
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)
    with pytest.raises(TensorParallelError, match=r"'model.build' describes no model"):
        build_model(str(tmp_path / "d"), LLAMA | {"model_type": "lama"}, tokenizer, seed=0)


def rows_of_a_rank(folder: str) -> tuple[int, int]:
    model = load_model(ModelRecipe(path=folder), TensorParallelConfig(tp_size=2))
    return len(model.lm_head.weight), _size(model)


def test_on_ranks_each_loads_its_slices(tokenizer, tmp_path):
    build_model(str(tmp_path), LLAMA, tokenizer, seed=0)
    whole = load_model(ModelRecipe(path=str(tmp_path)))
    found = on_ranks(2, rows_of_a_rank, str(tmp_path))
    assert sum(rows for rows, _ in found) == len(whole.lm_head.weight)
    assert [size for _, size in found] == [whole.num_parameters()] * 2


def test_checkpoint_that_lacks_weights_is_refused(tokenizer, tmp_path):
    build_model(str(tmp_path), LLAMA, tokenizer, seed=0)
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    state = {name: tensor for name, tensor in model.state_dict().items() if "down_proj" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(TensorParallelError, match=r"lacks 1 weights of LlamaForCausalLM, .*down_proj"):
        load_model(ModelRecipe(path=str(tmp_path)))


def test_text_only_takes_the_language_model_of_a_multimodal_checkpoint(tmp_path):
    """google/gemma-3-4b-pt is one; loaded by its text config alone, transformers leaves every weight random."""
    text = {key: value for key, value in LLAMA.items() if key != "model_type"} | {"vocab_size": 99, "head_dim": 8}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14}, mm_tokens_per_image=4
    )
    whole = transformers.Gemma3ForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path / "whole")
    with pytest.raises(TensorParallelError, match=r"set model.text_only: true"):
        load_model(ModelRecipe(path=str(tmp_path / "whole")))
    taken = load_model(ModelRecipe(path=str(tmp_path / "whole"), text_only=True)).eval()
    taken.save_pretrained(tmp_path / "text")
    saved = load_model(ModelRecipe(path=str(tmp_path / "text"))).eval()
    assert type(taken) is type(saved) is transformers.Gemma3ForCausalLM
    assert taken.lm_head.weight is taken.model.embed_tokens.weight
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        expected = whole(input_ids=ids, token_type_ids=torch.zeros_like(ids)).logits
        assert torch.equal(taken(input_ids=ids).logits, expected)
        assert torch.equal(saved(input_ids=ids).logits, expected)


def test_export_that_is_not_the_trained_model_is_reported(tokenizer, tmp_path):
    build_model(str(tmp_path), LLAMA, tokenizer, seed=0)
    tokenizer.save_pretrained(tmp_path)
    model = load_model(ModelRecipe(path=str(tmp_path))).eval()
    ids = torch.arange(2, 18).view(2, 8)
    with torch.no_grad():
        rows = [model(input_ids=row[None], labels=row[None]) for row in ids]
    reference = {
        "input_ids": ids,
        "loss": torch.stack([row.loss for row in rows]),
        "logits": torch.cat([row.logits for row in rows]),
    }
    recipe = load_recipe(write(tmp_path), [f"output_dir={tmp_path}", "sample.prompt=lorem", "sample.max_new_tokens=8"])
    report, complaint = visit_plainly(recipe, reference)
    assert complaint is None
    assert "logits differ by at most 0.0e+00" in report
    assert "a sample from it:\nlorem" in report

    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    model.save_pretrained(tmp_path)
    assert "the exported model is not the trained one" in str(visit_plainly(recipe, reference)[1])
    (tmp_path / "model.safetensors").unlink()
    assert "plain transformers cannot load" in str(visit_plainly(recipe, reference)[1])
