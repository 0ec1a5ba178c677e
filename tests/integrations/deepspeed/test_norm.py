"""The norm under offload, of a shard whose part another rank counts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tp_plugin.integrations.deepspeed.norm import _offloaded
from tp_plugin.layout import ShardLayout


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_it_lies_where_deepspeeds_own_lies(device):
    """Gradients are in buffers of the CPU; DeepSpeed adds norms in place, on the device of the first of them."""
    param = torch.nn.Parameter(torch.zeros(4, 4))
    param.tp_layout = ShardLayout.units((6, 4), 0, 2, [[0, 1], [1, 2]])  # type: ignore[attr-defined]
    params = [param]
    optimizer = SimpleNamespace(
        model_parallel_rank=1, get_param_id=lambda param: 0, grad_position={0: [0, 0, 0, 16]},
        norm_for_param_grads={0: torch.tensor(4.0, device=device)}, params_in_partition=[params], first_offset=[0],
        single_partition_of_fp32_groups=[SimpleNamespace(grad=torch.ones(16))],
    )  # fmt: skip
    _offloaded(lambda self, params: None)(optimizer, params)
    counted = optimizer.norm_for_param_grads[0]
    assert counted.device.type == device
    if device == "cpu":
        assert counted.item() == pytest.approx(8**0.5)
