"""Recipes of fine-tuning runs: frozen dataclasses, and a strict reader that turns YAML into them.

A recipe names the model, the data and the options of training. Tensor parallelism and ZeRO come from the DeepSpeed
config alone.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tp_plugin.errors import TensorParallelError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelRecipe:
    """The model to train.

    Attributes:
        path: a hub id, or a directory in HF format.
        dtype: how its weights are loaded: ``float32``, ``bfloat16``, ``float16``, or ``auto`` (as they were saved).
        attn_implementation: as in ``from_pretrained``; None leaves the choice to transformers.
        revision: a branch, tag or commit of the hub repository.
        trust_remote_code: run model code that comes with the weights.
        text_only: of a multimodal checkpoint, train and save the language model alone.
        build: a model config (``model_type`` and its options). When ``path`` does not exist, a model of this shape with
            random weights is written there first; its vocabulary is the tokenizer's.
    """

    path: str
    dtype: str = "auto"
    attn_implementation: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    text_only: bool = False
    build: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerRecipe:
    """The tokenizer.

    Attributes:
        path: a hub id or a directory; None takes the model's.
        build_vocab_size: when the path does not exist, train a byte-level BPE of this many tokens on the data first.
    """

    path: str | None = None
    build_vocab_size: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataRecipe:
    """The text, split into blocks of ``sequence_length`` tokens. Name exactly one of the three sources.

    Attributes:
        text_files: patterns of text files, a file a document; ``{stdlib}`` is the folder of Python's standard library.
        jsonl_files: patterns of files with a JSON object a line.
        dataset: a dataset name on the hub or a directory, for ``datasets.load_dataset``.
        dataset_config: the dataset's configuration name.
        split: its split.
        text_field: the field of a JSON line or a dataset row that has the text.
        sequence_length: tokens a block. Documents are shuffled, joined by the end-of-text token and split;
            the remainder at the end is dropped.
        validation_fraction: share of the blocks that is held out, at least one block unless 0.
    """

    text_files: list[str] | None = None
    jsonl_files: list[str] | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    split: str = "train"
    text_field: str = "text"
    sequence_length: int = 1024
    validation_fraction: float = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """Options of ``transformers.TrainingArguments``, under its names and with its meaning.

    ``max_steps`` goes before ``num_train_epochs`` when positive; ``save_steps: 0`` saves at the end only. ``extra``
    takes any other option of TrainingArguments by name.
    """

    learning_rate: float = 1e-5
    lr_scheduler_type: str = "cosine"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    optim: str = "adamw_torch"
    num_train_epochs: float = 1.0
    max_steps: int = -1
    per_device_train_batch_size: int = 1
    per_device_eval_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    activation_checkpointing: bool = False
    bf16: bool = False
    fp16: bool = False
    logging_steps: int = 10
    save_steps: int = 0
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleRecipe:
    """The sample from the finished model, and the check of the export.

    Attributes:
        prompt: the text to continue; None generates nothing.
        max_new_tokens: how far.
        check_blocks: on how many held-out blocks (at most 512 tokens of each) the exported model, loaded by plain
            transformers in a process of its own, must give the sharded model's loss. 0 checks nothing.
    """

    prompt: str | None = None
    max_new_tokens: int = 64
    check_blocks: int = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """One fine-tuning run. Paths are relative to the directory the launcher was started in.

    Attributes:
        output_dir: where checkpoints and, at the end, the HF model directory go.
        deepspeed: the DeepSpeed config for launchers that name none themselves (``deepspeed``, ``torchrun``). Under
            ``accelerate launch`` the config named in the accelerate YAML is the one that counts.
        seed: of a built model's weights, of the order of documents, and of the Trainer.
    """

    output_dir: str
    model: ModelRecipe
    data: DataRecipe
    tokenizer: TokenizerRecipe = TokenizerRecipe()
    training: TrainingRecipe = TrainingRecipe()
    sample: SampleRecipe = SampleRecipe()
    deepspeed: str | None = None
    seed: int = 0


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file.

    Args:
        path: a YAML file.
        overrides: ``dotted.key=value`` each, the value in YAML.

    Raises:
        TensorParallelError: unreadable file, unknown or missing key, wrong type, or options that exclude each other;
            one sentence that names the key and the file.
    """
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as failure:
        raise TensorParallelError(f"cannot read the recipe {str(path)!r}: {failure}") from failure
    if not isinstance(content, dict):
        raise TensorParallelError(f"the recipe {str(path)!r} must be a mapping of keys, got {content!r}.")
    for override in overrides:
        _override(content, override)
    recipe = typing.cast(Recipe, _read(Recipe, content, "", str(path)))
    _check(recipe, str(path))
    return recipe


def _override(content: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key or key.startswith("-"):
        raise TensorParallelError(f"cannot read the override {override!r}; write it as dotted.key=value.")
    *sections, last = key.split(".")
    for section in sections:
        if content.get(section) is None:
            content[section] = {}
        content = content[section]
        if not isinstance(content, dict):
            raise TensorParallelError(f"cannot apply the override {override!r}: {section!r} is not a section.")
    try:
        content[last] = yaml.safe_load(value)
    except yaml.YAMLError as failure:
        raise TensorParallelError(f"cannot read the value of the override {override!r}: {failure}") from failure


def _read(kind: type, content: Any, where: str, file: str) -> Any:
    """``content`` as the dataclass ``kind``; ``where`` is the dotted prefix of its keys."""
    if not isinstance(content, dict):
        raise TensorParallelError(
            f"{where.rstrip('.')!r} in the recipe {file!r} must be a section of keys, got {content!r}."
        )
    hints = typing.get_type_hints(kind)
    for key in content:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            hint = f"did you mean {where + near[0]!r}?" if near else f"valid keys here: {', '.join(hints)}."
            raise TensorParallelError(f"unknown key {where + str(key)!r} in the recipe {file!r}; {hint}")
    for field in dataclasses.fields(kind):
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if needed and field.name not in content:
            raise TensorParallelError(f"the recipe {file!r} lacks the key {where + field.name!r}.")
    return kind(**{key: _value(hints[key], value, where + key, file) for key, value in content.items()})


def _value(hint: Any, value: Any, key: str, file: str) -> Any:
    """``value`` checked against a type hint; whole numbers and texts like ``1e-4`` pass for a float."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and types.NoneType in options:
        return None
    (kind,) = (option for option in options if option is not types.NoneType)
    if dataclasses.is_dataclass(kind):
        return _read(typing.cast(type, kind), value, key + ".", file)
    if kind == list[str] and isinstance(value, str):
        return [value]
    if kind == list[str] and isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return value
    if kind == dict[str, Any] and isinstance(value, Mapping):
        return dict(value)
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    if kind in (int, str, bool) and isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    name = {list[str]: "a text or a list of texts", dict[str, Any]: "a mapping", str: "a text", bool: "true or false"}
    wanted = name.get(kind, {int: "a whole number", float: "a number"}.get(kind, str(kind)))
    raise TensorParallelError(f"{key!r} in the recipe {file!r} must be {wanted}, got {value!r}.")


def _check(recipe: Recipe, file: str) -> None:
    data = recipe.data
    sources = [name for name in ("text_files", "jsonl_files", "dataset") if getattr(data, name) is not None]
    wrong = ""
    if len(sources) != 1:
        wrong = f"needs exactly one of data.text_files, data.jsonl_files and data.dataset, got {sources or 'none'}"
    elif data.sequence_length < 2:
        wrong = f"has data.sequence_length {data.sequence_length}, which must be at least 2"
    elif not 0 <= data.validation_fraction < 1:
        wrong = f"has data.validation_fraction {data.validation_fraction}, which must lie in [0, 1)"
    elif recipe.model.dtype not in ("auto", "float32", "bfloat16", "float16"):
        wrong = f"has model.dtype {recipe.model.dtype!r}, which must be auto, float32, bfloat16 or float16"
    elif recipe.model.build is not None and "model_type" not in recipe.model.build:
        wrong = "lacks the key 'model.build.model_type', such as llama"
    elif recipe.sample.check_blocks and not data.validation_fraction:
        wrong = "checks the export on held-out blocks and holds none out; set sample.check_blocks: 0"
    if wrong:
        raise TensorParallelError(f"the recipe {file!r} {wrong}.")
    _check_extra(recipe.training, file)


def _check_extra(training: TrainingRecipe, file: str) -> None:
    from transformers import TrainingArguments

    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    reserved = {"output_dir", "deepspeed", "seed", "use_cpu", "fsdp", "fsdp_config"}
    own = {field.name for field in dataclasses.fields(training)}
    for key in training.extra:
        if key in reserved or key in own:
            raise TensorParallelError(
                f"'training.extra.{key}' in the recipe {file!r} is set elsewhere: "
                + (f"write 'training.{key}'." if key in own else "by the recipe's own keys or the launcher's config.")
            )
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean 'training.extra.{near[0]}'?" if near else "see transformers.TrainingArguments."
            raise TensorParallelError(f"unknown key 'training.extra.{key}' in the recipe {file!r}; {hint}")
