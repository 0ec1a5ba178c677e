"""Every file under recipes/, against the library that will read it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import types
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env

import tp_plugin
from tests.support.models import batch, make
from tests.support.ranks import ROOT, on_ranks
from tests.support.train import engine_for
from tp_plugin.integrations.deepspeed import config as ds_config
from tp_plugin.integrations.deepspeed.config import without_tripwire
from tp_plugin.launch.recipe import load_recipe
from tp_plugin.plans import plan_for
from tp_plugin.sharding import state_of

RECIPES = ROOT / "recipes"
TRAIN = sorted(RECIPES.rglob("train.yaml"))
TRL = sorted([*RECIPES.rglob("sft_*.yaml"), *RECIPES.rglob("dpo_*.yaml")])
ACCELERATE = sorted(RECIPES.glob("accelerate/*.yaml")) + [RECIPES / "quickstart/accelerate.yaml"]
DEEPSPEED = sorted(RECIPES.rglob("*.json"))
# of other programs, which tests/clients starts with them
PROGRAMS = sorted(path for name in ("llamafactory", "ms-swift", "axolotl") for path in RECIPES.glob(f"{name}/*.yaml"))

# The published dimensions, so that nothing is downloaded.
ARCHITECTURES = {
    "meta-llama/Llama-3.1-8B": lambda: transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    ),
    "Qwen/Qwen3-8B": lambda: transformers.Qwen3Config(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=False,
    ),
    "google/gemma-3-4b-pt": lambda: transformers.Gemma3TextConfig(
        vocab_size=262208,
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=34,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
    ),
}
PARAMETERS = {"meta-llama/Llama-3.1-8B": 8.03e9, "Qwen/Qwen3-8B": 8.19e9, "google/gemma-3-4b-pt": 3.88e9}


def name_of(path: Path) -> str:
    return str(path.relative_to(RECIPES))


def test_no_file_is_left_unchecked():
    files = {path for path in RECIPES.rglob("*") if path.is_file()}
    assert files == {*TRAIN, *TRL, *ACCELERATE, *DEEPSPEED, *PROGRAMS, RECIPES / "README.md"}


def test_the_table_names_every_recipe_and_spread():
    listed = set(re.findall(r"\]\(([\w./-]+)\)", (RECIPES / "README.md").read_text()))
    spreads = [*ACCELERATE[:-1], *(file for file in DEEPSPEED if file.parent.name == "deepspeed")]
    for path in (*TRAIN, *TRL, *PROGRAMS, *spreads):
        assert name_of(path) in listed
    for target in listed:
        assert (RECIPES / target).exists(), target


@pytest.mark.parametrize("path", PROGRAMS, ids=name_of)
def test_a_recipe_of_another_program_names_itself_and_a_spread(path):
    text = path.read_text()
    config = yaml.safe_load(text)
    assert f" recipes/{path.parent.name}/{path.name}\n" in text  # the launch line
    assert config["deepspeed"] in ("recipes/deepspeed/tp2_zero1.json", "zero1")
    assert config.get("tensor_parallel_size", config.get("deepspeed_autotp_size", 2)) == 2


@pytest.mark.parametrize("path", TRAIN, ids=name_of)
def test_recipe_is_accepted_and_names_an_existing_deepspeed_config(path):
    recipe = load_recipe(path)
    assert recipe.deepspeed is not None
    assert ROOT / recipe.deepspeed in DEEPSPEED
    assert not recipe.model.trust_remote_code
    assert recipe.model.build is not None or recipe.model.path in ARCHITECTURES


@pytest.mark.parametrize("path", TRL, ids=name_of)
def test_recipe_of_trl_has_only_keys_that_its_script_knows(path):
    """integration/test_trl.py runs every one of them."""
    import trl

    kind = path.stem.split("_")[0]
    config = {"sft": trl.SFTConfig, "dpo": trl.DPOConfig}[kind]
    known = {field.name for one in (trl.ScriptArguments, config, trl.ModelConfig) for field in dataclasses.fields(one)}
    text = path.read_text()
    given = yaml.safe_load(text)
    assert set(given) <= known
    assert given["model_name_or_path"] in ARCHITECTURES
    assert f"-m tp_plugin.run -m trl.scripts.{kind} --config {path.relative_to(ROOT)}" in text
    assert given["lora_dropout"] == 0, "masks of sharded inputs are not those of one process"


@pytest.mark.parametrize("path", ACCELERATE, ids=name_of)
def test_accelerate_config_is_accepted_and_fits_its_deepspeed_config(path):
    config = load_config_from_file(str(path))
    assert config.distributed_type.value == "DEEPSPEED"
    file = ROOT / config.deepspeed_config["deepspeed_config_file"]
    assert file in DEEPSPEED
    assert "needs tp_plugin.register()" in config.deepspeed_config["zero3_init_flag"]
    assert config.parallelism_config == {}, "tp comes from the DeepSpeed config alone"
    assert "mixed_precision" not in path.read_text(), "refused by accelerate next to a DeepSpeed config file"
    degree, stage = degree_and_stage(json.loads(file.read_text()))
    assert config.num_processes % degree == 0
    if file.parent.name == "deepspeed":
        assert path.stem == file.stem == f"tp{degree}_zero{stage}"
        assert config.num_processes // degree > 1, "ZeRO needs data-parallel ranks to partition over"


def degree_and_stage(config: dict) -> tuple[int, int]:
    return config["tensor_parallel"]["autotp_size"], config["zero_optimization"]["stage"]


@pytest.mark.parametrize("path", DEEPSPEED, ids=name_of)
def test_deepspeed_config_is_ours_and_complete(path):
    config = json.loads(path.read_text())
    ours = tp_plugin.TensorParallelConfig.from_deepspeed(path)
    assert ours.tp_size == config["tensor_parallel"]["autotp_size"] > 1
    assert isinstance(config["tp_plugin"], dict)
    assert "train_batch_size" not in config
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"):
        assert config[key] == "auto", "Trainer fills it in"
    (tripwire,) = config["tensor_parallel"]["partition_config"]["layer_specs"]
    assert "tp_plugin.register()" in tripwire["partition_type"]


def without_compiling():
    """Stock DeepSpeed on a CPU compiles its shared-memory collective; nothing here communicates through it."""
    return mock.patch("deepspeed.comm.torch.build_shm_op", return_value=None)


def read_by_deepspeed(path: str) -> tuple[int, int, float]:
    from deepspeed.runtime.config import DeepSpeedConfig

    with without_compiling():
        read = DeepSpeedConfig(filled(path))
    return read.tensor_parallel_config.autotp_size, read.zero_optimization_stage, read.gradient_clipping


def filled(path: str) -> dict:
    """The config as Trainer hands it to DeepSpeed."""
    config = json.loads(Path(path).read_text())
    numbers = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2, "gradient_clipping": 0.5}
    return config | numbers | {"bf16": {"enabled": False}}


@pytest.mark.parametrize("path", DEEPSPEED, ids=name_of)
def test_deepspeed_reads_what_we_mean(path):
    degree, stage = degree_and_stage(json.loads(path.read_text()))
    assert on_ranks(1, read_by_deepspeed, str(path), group=True) == [(degree, stage, 0.5)]


def degree_of_an_engine(path: str) -> int:
    tp_plugin.register()
    engine = engine_for(
        make("Llama"), None, filled(path) | {"optimizer": {"type": "Adam", "params": {"torch_adam": True}}}
    )
    engine.backward(engine(**batch(0, 2)).loss)
    engine.step()
    return state_of(engine.module).mesh.tp_size


def test_a_spread_makes_an_engine():
    assert on_ranks(2, degree_of_an_engine, str(RECIPES / "deepspeed" / "tp2_zero1.json")) == [2, 2]


def test_the_tripwire_is_left_out_where_deepspeed_knows_no_rules(monkeypatch):
    old = type("TPTrainingConfig", (), {"model_fields": {"autotp_size": types.SimpleNamespace(alias=None)}})
    config = json.loads((RECIPES / "deepspeed" / "tp2_zero1.json").read_text())
    assert without_tripwire(config) is config
    monkeypatch.setattr(ds_config.autotp, "TPTrainingConfig", old)
    assert without_tripwire(config) == config | {"tensor_parallel": {"autotp_size": 2}}
    ds_config.refuse_section(config["tensor_parallel"])
    config["tensor_parallel"]["partition_config"]["layer_specs"].append({"patterns": ["y"], "partition_type": "row"})
    with pytest.raises(tp_plugin.TensorParallelError, match="knows no 'partition_config'"):
        ds_config.refuse_section(without_tripwire(config)["tensor_parallel"])


def read_by_accelerate(path: str) -> tuple[str, bool]:
    """What accelerate says of a config in a process without us, and the flag it reads in one with us."""
    with mock.patch("accelerate.commands.launch.deepspeed_launcher") as started:
        launch_command(launch_command_parser().parse_args(["--config_file", path, "train.py"]))
    environment = prepare_deepspeed_cmd_env(started.call_args.args[0])[1]
    with mock.patch.dict(os.environ, {key: environment[key] for key in environment if key.startswith("ACCELERATE_")}):
        with pytest.raises(ValueError, match="invalid truth value") as caught:
            DeepSpeedPlugin()
        tp_plugin.register()
        return str(caught.value), DeepSpeedPlugin().zero3_init_flag


def test_unpatched_accelerate_trips_over_its_config_before_anything_else():
    """As ``trl sft --accelerate_config`` starts a script."""
    ((said, flag),) = on_ranks(1, read_by_accelerate, str(ACCELERATE[0]))
    assert "needs tp_plugin.register() before anything else, as -m tp_plugin.run before the script does" in said
    assert flag is False


def complaint_unregistered(path: str, autotp_size: int) -> str:
    import deepspeed

    config = filled(path)
    config["tensor_parallel"]["autotp_size"] = autotp_size
    model = make("Llama")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with without_compiling(), pytest.raises(ValueError, match="tp_plugin") as caught:
        deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return str(caught.value)


@pytest.mark.parametrize("path", DEEPSPEED, ids=name_of)
def test_unpatched_deepspeed_trips_over_the_recipe(path):
    for sentence in on_ranks(2, complaint_unregistered, str(path), 2):
        assert "needs tp_plugin.register()" in sentence


@pytest.mark.parametrize("tp_size", [2, 4, 8])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_plan_of_the_published_architecture(name, tp_size):
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(ARCHITECTURES[name]())
    assert model.num_parameters() == pytest.approx(PARAMETERS[name], rel=2e-3), "not the published dimensions"
    if name == "google/gemma-3-4b-pt" and tp_size == 8:
        assert model.config.num_key_value_heads < tp_size, "its key/value heads are held by two ranks each"
    plan = plan_for(model, tp_size)
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    sharded = {n for n, placement in plan.placements.items() if placement.layouts}
    assert linears | {"model.embed_tokens"} <= sharded
