"""What we rely on in PEFT. A failure here says what moved upstream and which file of ours uses it."""

import peft
import torch
from peft import PeftModel
from peft.tuners import ia3, lora
from peft.tuners.lora import layer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

from tests.support.models import make
from tests.support.moved import assert_source_has
from tp_plugin.integrations.peft import backend, inject, load, save

PARTS = (backend, inject, load, save)


def test_a_linear_layer_calls_its_parts_on_what_it_is_given():
    why = "peft/methods.py shards A and B, and nothing else, for it"
    assert_source_has(lora.Linear.forward, "result = self.base_layer(x, *args, **kwargs)", why)
    assert_source_has(lora.Linear.forward, "result = result + lora_B(lora_A(dropout(x))) * scaling", why)
    assert_source_has(lora.Linear.get_delta_weight, "weight_B @ weight_A", why)


def test_an_embedding_looks_words_up_by_embed():
    why = "peft/methods.py overrides _embed"
    assert_source_has(lora.Embedding.forward, "after_A = self._embed(x, embedding_A", why)
    assert_source_has(lora.Embedding.forward, "adapter_output = (after_A @ embedding_B) * scaling", why)


def test_a_delta_of_experts_is_a_product_for_each():
    why = "peft/methods.py cuts A along the experts' inputs or B along their outputs"
    assert_source_has(layer.ParamWrapper.get_delta_factors, "weight_A.reshape(self.num_experts, -1,", why)
    assert_source_has(layer.ParamWrapper.get_delta_factors, "weight_B.reshape(weight_B.shape[0], -1,", why)
    assert_source_has(layer.ParamWrapper.update_layer, "self._did_swap_in_out_features = True", why)


def test_scales_multiply_inputs_or_outputs():
    why = "peft/methods.py cuts the factors like them"
    assert_source_has(ia3.Linear.forward, "interm = (x * ia3_scaling).to(previous_dtype)", why)
    assert_source_has(ia3.Linear.forward, "result = (result * ia3_scaling).to(result_dtype)", why)


def test_sizes_are_read_where_we_tell_full_ones():
    why = "peft/inject.py gives full sizes while adapters are made"
    from peft.tuners import tuners_utils

    source = tuners_utils._get_in_out_features
    assert_source_has(source, "in_features, out_features = module.in_features, module.out_features", why)
    assert_source_has(source, 'module.weight.ds_shape if hasattr(module.weight, "ds_shape")', why)
    assert_source_has(layer.ParamWrapper._get_in_out_features, 'getattr(param, "ds_shape", param.shape)', why)
    assert_source_has(PeftModel._setup_prompt_encoder, 'getattr(value, "ds_shape", None)', why)


def test_a_module_to_save_is_copied_and_called():
    why = "peft/inject.py makes the copy of a sharded module"
    assert_source_has(ModulesToSaveWrapper.update, "copy.deepcopy(self.original_module)", why)
    assert_source_has(ModulesToSaveWrapper.update, "new_linear.weight = tied_module.weight", why)
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
    assert variants == known | {"monteclora_config"}, "peft/support_matrix.py refuses each of these"


def test_trainable_parameters_are_printed_from_what_we_replace():
    why = "peft/backend.py answers with the numbers of the whole model"
    assert_source_has(PeftModel.print_trainable_parameters, "= self.get_nb_trainable_parameters()", why)
