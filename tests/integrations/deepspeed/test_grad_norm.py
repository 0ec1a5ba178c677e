"""The norm under offload, of a shard whose part another rank counts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from tp_plugin.integrations.deepspeed.grad_norm import _complete_grad_norm_calculation_for_cpu_offload
from tp_plugin.layout import ShardLayout
from tp_plugin.param_info import update_info


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_it_lies_where_deepspeeds_own_lies(device):
    """Gradients are in buffers of the CPU; DeepSpeed adds norms in place, on the device of the first of them."""
    param = torch.nn.Parameter(torch.zeros(4, 4))
    update_info(param, layout=ShardLayout.units((6, 4), 0, 2, [[0, 1], [1, 2]]))
    params = [param]
    optimizer = SimpleNamespace(
        model_parallel_rank=1, get_param_id=lambda param: 0, grad_position={0: [0, 0, 0, 16]},
        norm_for_param_grads={0: torch.tensor(4.0, device=device)}, params_in_partition=[params], first_offset=[0],
        single_partition_of_fp32_groups=[SimpleNamespace(grad=torch.ones(16))],
    )  # fmt: skip
    _complete_grad_norm_calculation_for_cpu_offload(lambda self, params: None, optimizer, params)
    counted = optimizer.norm_for_param_grads[0]
    assert counted.device.type == device
    if device == "cpu":
        assert counted.item() == pytest.approx(8**0.5)


def test_gradients_on_their_way_to_the_cpu_are_waited_for(monkeypatch):
    """A copy into pinned memory that does not block is over when the device has been waited for."""
    param = torch.nn.Parameter(torch.zeros(4, 4))
    update_info(param, layout=ShardLayout.units((6, 4), 0, 2, [[0, 1], [1, 2]]))
    buffer = torch.full((16,), float("nan"))
    monkeypatch.setattr(type(get_accelerator()), "synchronize", lambda *_: buffer.fill_(1.0))
    optimizer = SimpleNamespace(
        model_parallel_rank=1, get_param_id=lambda param: 0, grad_position={0: [0, 0, 0, 16]},
        norm_for_param_grads={0: torch.tensor(4.0)}, params_in_partition=[[param]], first_offset=[0],
        single_partition_of_fp32_groups=[SimpleNamespace(grad=buffer)],
    )  # fmt: skip
    _complete_grad_norm_calculation_for_cpu_offload(
        lambda self, params: None, optimizer, optimizer.params_in_partition[0]
    )
    assert optimizer.norm_for_param_grads[0].item() == pytest.approx(8**0.5)
