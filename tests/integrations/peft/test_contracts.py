"""What we rely on in PEFT. A failure here says what moved upstream and which file of ours uses it."""

import importlib.metadata
import tomllib

import peft
import pytest
import torch
from peft import PeftModel
from peft.tuners import ia3, lora
from peft.tuners.lora import layer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from transformers import Trainer
from transformers.integrations.peft import PeftAdapterMixin

from tests.integrations.moved import assert_names_are_watched, assert_source_has
from tests.support.models import make
from tests.support.ranks import ROOT
from tp_plugin.integrations.contract import out_of_range
from tp_plugin.integrations.peft import counts, late, library, load, save

PARTS = (counts, late, library, load, save)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__.split(".")[-1])
def test_every_name_is_where_we_expect_it(part):
    part.check_contracts()


@pytest.mark.parametrize(
    ("part", "owner", "name"),
    [
        (counts, PeftModel, "get_nb_trainable_parameters"),
        (late, BaseTuner, "inject_adapter"),
        (late, PeftModel, "_setup_prompt_encoder"),
        (library, PeftModel, "get_base_model"),
        (library, BaseTunerLayer, "get_base_layer"),
        (library, lora.Embedding, "_embed"),
        (library, layer, "ParamWrapper"),
        (library, lora, "Linear"),
        (library, ia3, "IA3Layer"),
        (late, lora.LoraModel, "add_weighted_adapter"),
        (load, PeftAdapterMixin, "load_adapter"),
        (load, PeftModel, "from_pretrained"),
        (load, PeftModel, "load_adapter"),
        (load, PeftModel, "_split_kwargs"),
        (save, PeftModel, "get_prompt_embedding_to_save"),
        (save, Trainer, "save_model"),
    ],
)
def test_a_name_that_moves_is_named(monkeypatch, part, owner, name):
    assert_names_are_watched(monkeypatch, part, owner, name)


def test_a_version_out_of_range_is_said_and_the_installed_one_is_in_it(monkeypatch):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (range_,) = extras["peft"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda _name: [f'{range_}; extra == "peft"'])
    assert out_of_range("peft", extra="peft") is None
    true = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.0" if name == "peft" else true(name))
    assert "not tested with peft 9.0" in (out_of_range("peft", extra="peft") or "")


def test_a_linear_layer_calls_its_parts_on_what_it_is_given():
    why = "peft/lay.py shards A and B, and nothing else, for it"
    assert_source_has(lora.Linear.forward, "result = self.base_layer(x, *args, **kwargs)", why)
    assert_source_has(lora.Linear.forward, "result = result + lora_B(lora_A(dropout(x))) * scaling", why)
    assert_source_has(lora.Linear.get_delta_weight, "weight_B @ weight_A", why)


def test_an_embedding_looks_words_up_by_embed():
    why = "peft/lay.py overrides _embed"
    assert_source_has(lora.Embedding.forward, "after_A = self._embed(x, embedding_A", why)
    assert_source_has(lora.Embedding.forward, "adapter_output = (after_A @ embedding_B) * scaling", why)


def test_a_delta_of_experts_is_a_product_for_each():
    why = "peft/lay.py cuts A along the experts' inputs or B along their outputs"
    assert_source_has(layer.ParamWrapper.get_delta_factors, "weight_A.reshape(self.num_experts, -1,", why)
    assert_source_has(layer.ParamWrapper.get_delta_factors, "weight_B.reshape(weight_B.shape[0], -1,", why)
    assert_source_has(layer.ParamWrapper.update_layer, "self._did_swap_in_out_features = True", why)


def test_scales_multiply_inputs_or_outputs():
    why = "peft/lay.py cuts the factors like them"
    assert_source_has(ia3.Linear.forward, "interm = (x * ia3_scaling).to(previous_dtype)", why)
    assert_source_has(ia3.Linear.forward, "result = (result * ia3_scaling).to(result_dtype)", why)


def test_sizes_are_read_where_we_tell_full_ones():
    why = "peft/late.py gives full sizes while adapters are made"
    from peft.tuners import tuners_utils

    source = tuners_utils._get_in_out_features
    assert_source_has(source, "in_features, out_features = module.in_features, module.out_features", why)
    assert_source_has(source, 'module.weight.ds_shape if hasattr(module.weight, "ds_shape")', why)
    assert_source_has(layer.ParamWrapper._get_in_out_features, 'getattr(param, "ds_shape", param.shape)', why)
    assert_source_has(PeftModel._setup_prompt_encoder, 'getattr(value, "ds_shape", None)', why)


def test_a_module_to_save_is_copied_and_called():
    why = "peft/late.py makes the copy of a sharded module"
    assert_source_has(ModulesToSaveWrapper.update, "copy.deepcopy(self.original_module)", why)
    wrapper = ModulesToSaveWrapper(torch.nn.Linear(2, 2), "default")
    assert isinstance(wrapper, AuxiliaryTrainingWrapper)
    assert list(wrapper.modules_to_save) == ["default"]
    assert isinstance(wrapper.original_module, torch.nn.Linear)


def test_layers_keep_their_parts_where_we_look():
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"])
    model = peft.get_peft_model(make("Llama"), config)
    linear = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert type(linear) is lora.Linear
    for name in ("lora_A", "lora_B", "lora_dropout", "lora_bias"):
        assert "default" in getattr(linear, name)
    assert (list(linear.lora_variant), list(linear.lora_embedding_A)) == ([], [])
    embedding = model.get_submodule("base_model.model.model.embed_tokens")
    assert type(embedding) is lora.Embedding
    assert tuple(embedding.lora_embedding_A["default"].shape) == (2, 131)


def test_variants_of_lora_say_so_in_their_config():
    import dataclasses

    variants = {f.name for f in dataclasses.fields(peft.LoraConfig) if f.metadata.get("is_lora_variant")}
    known = {"use_dora", "alora_invocation_tokens", "arrow_config", "use_bdlora", "velora_config", "kasa_config"}
    assert variants == known | {"monteclora_config"}, "peft/allowed.py refuses each of these"


def test_trainable_parameters_are_printed_from_what_we_replace():
    why = "peft/counts.py answers with the numbers of the whole model"
    assert_source_has(PeftModel.print_trainable_parameters, "= self.get_nb_trainable_parameters()", why)
