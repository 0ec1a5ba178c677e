"""tp-plugin: tensor parallelism x ZeRO for HuggingFace models, in DeepSpeed's AutoTP slot.

    import tp_plugin
    tp_plugin.register()        # then deepspeed.initialize, accelerate launch, Trainer: all as before

with ``"tensor_parallel": {"autotp_size": N}`` in the DeepSpeed config.
"""

from tp_plugin.config import TensorParallelConfig
from tp_plugin.errors import TensorParallelError
from tp_plugin.face import check_next_step, from_pretrained, register, save_pretrained, shard_model, unregister
from tp_plugin.layout import ShardLayout
from tp_plugin.mesh import ParallelMesh
from tp_plugin.plans import Plan
from tp_plugin.weights import full_state_dict

__all__ = [
    "ParallelMesh",
    "Plan",
    "ShardLayout",
    "TensorParallelConfig",
    "TensorParallelError",
    "check_next_step",
    "from_pretrained",
    "full_state_dict",
    "register",
    "save_pretrained",
    "shard_model",
    "unregister",
]
