"""Pieces of the accelerate integration that need no second process."""

import pytest
import torch
import torch.distributed.device_mesh as device_mesh
from accelerate import Accelerator

from tp_plugin.errors import TensorParallelError
from tp_plugin.integrations.accelerate import data_parallel, degree, gather


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, 1),
        ({"tensor_parallel": {}}, 1),
        ({"tensor_parallel": {"autotp_size": 0}}, 1),
        ({"tensor_parallel": {"autotp_size": 4}}, 4),
        (None, 1),
    ],
)
def test_the_degree_of_a_config(config, expected):
    assert degree.degree_in(config) == expected


def test_a_mesh_is_reused_only_where_it_fits(monkeypatch):
    monkeypatch.setattr(device_mesh, "init_device_mesh", lambda *args, **kwargs: "new")
    original = device_mesh.init_device_mesh
    with data_parallel._reused("old", 2):
        assert device_mesh.init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)) == "old"
        assert device_mesh.init_device_mesh("cpu", (4,), mesh_dim_names=("tp",)) == "new"
        assert device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp")) == "new"
    assert device_mesh.init_device_mesh is original
    with data_parallel._reused(None, 2):
        assert device_mesh.init_device_mesh is original


@pytest.mark.parametrize("rank", range(4))
def test_a_stream_is_cut_by_groups(rank):
    """Two groups of two, three rows each; accelerate asks for the rows of rank ``rank``."""
    took = data_parallel._share(
        lambda data, part, **_: data[part], 2, list(range(6)), slice(rank * 3, rank * 3 + 3), rank
    )
    assert took == ([0, 1, 2] if rank < 2 else [3, 4, 5])


def test_a_failing_export_is_no_value_error(monkeypatch):
    """Trainer.save_model takes a ValueError for a missing option and goes on without writing weights."""

    def fails(model):
        raise TensorParallelError("a peer is gone")

    monkeypatch.setattr(gather, "state_of", lambda model: object())
    monkeypatch.setattr(gather, "full_state_dict", fails)
    with pytest.raises(RuntimeError, match="a peer is gone"):
        gather._get_state_dict(Accelerator.get_state_dict, None, torch.nn.Linear(1, 1))
