"""Options and uses that tp_plugin refuses: each a function that two ranks call."""

from __future__ import annotations

import copy

import torch
from torch import nn

from tests.support.adapters import adapt
from tests.support.configs import config_for
from tests.support.models import make
from tests.support.stepped import ClippedByTensor
from tests.support.train import engine_for, optimizer_for

CPU = {"device": "cpu"}


def initialise(model: nn.Module | None = None, stage: int = 1, optimizer="adamw", arguments=None, **config):
    model = make("Llama") if model is None else model
    optimizer = optimizer_for(model, optimizer) if isinstance(optimizer, str) else optimizer
    return engine_for(model, optimizer, config_for(2, stage) | config, **arguments or {})


def zero(**options) -> dict:
    return {"stage": 3, **options}


def offload_nvme_optimizer():
    initialise(zero_optimization=zero(offload_optimizer={"device": "nvme", "nvme_path": "/tmp"}))


def offload_nvme_param():
    initialise(zero_optimization=zero(offload_param={"device": "nvme", "nvme_path": "/tmp"}))


def zeropp_weights():
    initialise(zero_optimization=zero(zero_quantized_weights=True))


def zeropp_gradients():
    initialise(zero_optimization=zero(zero_quantized_gradients=True))


def hpz():
    initialise(zero_optimization=zero(zero_hpz_partition_size=2))


def mics():
    initialise(zero_optimization=zero(mics_shard_size=2))


def ulysses_mesh():
    initialise(arguments={"mesh_param": (1, 2)})


def ulysses_size():
    initialise(sequence_parallel_size=2, data_parallel_size=1)


def expert_parallel():
    initialise(expert_parallel={"enabled": True, "autoep_size": 2})


def pipeline():
    import deepspeed
    from deepspeed.pipe import PipelineModule

    deepspeed.init_distributed("gloo")
    model = PipelineModule(layers=[nn.Linear(4, 4), nn.Linear(4, 4)], num_stages=1)
    initialise(model, optimizer=None)


def deepcompile():
    initialise(compile={"deepcompile": True})


def zenflow():
    initialise(zero_optimization={"stage": 2, "zenflow": {"topk_ratio": 0.1}})


def twin_flow():
    initialise(zero_optimization=zero(offload_optimizer=CPU | {"ratio": 0.5}))


def superoffload():
    initialise(zero_optimization=zero(offload_optimizer=CPU | {"super_offload": True}))


def hybrid_engine():
    initialise(hybrid_engine={"enabled": True})


def data_efficiency():
    initialise(data_efficiency={"enabled": True})


def weight_quantization():
    initialise(weight_quantization={"post_init_quant": {}})


def muon_in_config():
    engine_for(make("Llama"), None, config_for(2, 1, optimizer={"type": "Muon", "params": {"lr": 1e-3}}))


def lamb_in_config():
    engine_for(make("Llama"), None, config_for(2, 1, optimizer={"type": "Lamb", "params": {"lr": 1e-3}}))


def one_bit_in_config():
    engine_for(make("Llama"), None, config_for(2, 0, optimizer={"type": "OneBitAdam", "params": {"lr": 1e-3}}))


def muon_of_torch():
    model = make("Llama")
    initialise(model, optimizer=torch.optim.Muon([p for p in model.parameters() if p.dim() == 2]))


def adafactor_of_torch():
    model = make("Llama")
    initialise(model, optimizer=torch.optim.Adafactor(model.parameters()))


def adafactor_of_transformers():
    from transformers.optimization import Adafactor

    model = make("Llama")
    initialise(model, optimizer=Adafactor(model.parameters()))


def fused_lamb():
    model = make("Llama")
    initialise(model, optimizer=type("FusedLamb", (torch.optim.SGD,), {})(model.parameters()))


def lora_fa_of_peft():
    from peft.optimizers import create_lorafa_optimizer

    model = adapt(make("Llama"), "every linear")
    initialise(model, optimizer=create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-3))


def adafactor_by_a_callable():
    initialise(stage=0, optimizer=lambda params: torch.optim.Adafactor(params))


def clipped_by_tensor():
    model = make("Llama")
    initialise(model, optimizer=ClippedByTensor(model.parameters()))


def clipped_by_tensor_in_a_callable():
    initialise(stage=0, optimizer=ClippedByTensor)


def use_kernels():
    model = make("Llama")
    model._use_kernels = True  # what transformers' set_use_kernels leaves behind; the kernels need a GPU
    initialise(model)


def zero_init():
    import deepspeed
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    with deepspeed.zero.Init(config_dict_or_path=config_for(2, 3)):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    initialise(model, stage=3)


def resize_after():
    model = initialise().module
    assert model.resize_token_embeddings(model.config.vocab_size) is model.get_input_embeddings()  # nothing to do
    model.resize_token_embeddings(140)


def gradient_hook():
    """As of who trains new tokens only."""
    model = make("Llama")
    model.get_input_embeddings().weight.register_hook(lambda grad: grad.index_fill(0, torch.arange(4), 0.0))
    initialise(model)


def deepcopy_after():
    copy.deepcopy(initialise().module)


def save_16bit_model():
    initialise().save_16bit_model("/nowhere")


def removed_by_deepspeed() -> list[str]:
    """Names that DeepSpeed itself refuses."""
    refused = []
    for name in ("sparse_gradients", "compression_training", "progressive_layer_drop", "elasticity"):
        try:
            initialise(**{name: {}})
        except Exception as failure:
            refused += [name] if "removed" in str(failure) else []
    return refused


REFUSED = {
    "offload_nvme_optimizer": r"offload_optimizer to NVMe.*set its device to cpu",
    "offload_nvme_param": r"offload_param to NVMe.*set its device to cpu",
    "zeropp_weights": r"ZeRO\+\+.*remove zero_optimization\.zero_quantized_weights",
    "zeropp_gradients": r"ZeRO\+\+.*remove zero_optimization\.zero_quantized_gradients",
    "hpz": r"hpZ.*remove zero_optimization\.zero_hpz_partition_size",
    "mics": r"MiCS.*remove zero_optimization\.mics_shard_size",
    "ulysses_mesh": r"Ulysses.*remove mesh_param",
    "ulysses_size": r"Ulysses.*remove sequence_parallel_size",
    "expert_parallel": r"expert parallelism.*remove expert_parallel\.enabled",
    "pipeline": r"pipeline parallelism.*pass the plain model",
    "deepcompile": r"DeepCompile.*remove compile\.deepcompile",
    "zenflow": r"ZenFlow.*remove zero_optimization\.zenflow",
    "twin_flow": r"Twin-Flow's second optimizer.*remove zero_optimization\.offload_optimizer\.ratio",
    "superoffload": r"SuperOffload.*remove zero_optimization\.offload_optimizer\.super_offload",
    "hybrid_engine": r"hybrid engine.*remove hybrid_engine\.enabled",
    "data_efficiency": r"data efficiency.*remove data_efficiency\.enabled",
    "weight_quantization": r"weight quantisation.*remove weight_quantization",
    "muon_in_config": r"the optimizer Muon.*use an elementwise one",
    "lamb_in_config": r"the optimizer Lamb.*use an elementwise one",
    "one_bit_in_config": r"the 1-bit optimizer OneBitAdam.*use AdamW",
    "muon_of_torch": r"the optimizer Muon.*use an elementwise one",
    "adafactor_of_torch": r"the optimizer Adafactor.*use an elementwise one",
    "adafactor_of_transformers": r"the optimizer Adafactor.*use an elementwise one",
    "fused_lamb": r"the optimizer FusedLamb.*use an elementwise one",
    "lora_fa_of_peft": r"the optimizer LoraFAOptimizer.*use an elementwise one",
    "adafactor_by_a_callable": r"the optimizer Adafactor.*use an elementwise one",
    "clipped_by_tensor": r"the optimizer ClippedByTensor is not elementwise.*use an elementwise one",
    "clipped_by_tensor_in_a_callable": r"the optimizer ClippedByTensor is not elementwise",
    "use_kernels": r"use_kernels=True.*load it without",
    "zero_init": r"built under deepspeed\.zero\.Init.*build it outside of deepspeed\.zero\.Init",
    "resize_after": r"resize_token_embeddings\(140\).*resize before sharding",
    "gradient_hook": r"embed_tokens\.weight' has a gradient hook.*remove it",
    "deepcopy_after": r"cannot be copied.*copy before sharding",
    "save_16bit_model": r"use tp_plugin\.save_pretrained",
}
