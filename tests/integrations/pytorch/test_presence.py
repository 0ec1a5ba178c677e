"""A rank that runs without tp_plugin is named before the others wait for it."""

from __future__ import annotations

import os
from unittest import mock

import torch.distributed as dist

import tp_plugin
from tests.support.ranks import on_ranks
from tp_plugin.errors import TensorParallelError
from tp_plugin.integrations.pytorch import presence
from tp_plugin.mesh import ParallelMesh


def one_host_without(registered: tuple[bool, ...], late: bool = False) -> str:
    """What a rank says at its first mesh; ranks not ``registered`` do something else meanwhile."""
    rank = int(os.environ["RANK"])
    if registered[rank] and not late:
        tp_plugin.register()
    dist.init_process_group("gloo")
    if registered[rank] and late:
        tp_plugin.register()
    try:
        with mock.patch.object(presence, "PATIENCE_S", 2.0):
            if registered[rank] or late:
                ParallelMesh.create(2)
    except TensorParallelError as refused:
        return str(refused)
    finally:
        tp_plugin.unregister()
    return ""


def test_ranks_without_it_are_named_by_the_others():
    said = on_ranks(4, one_host_without, (True, True, False, False), group=False)
    sentence = "ranks 2, 3 of this job run without tp_plugin; start it alike on every host, by -m tp_plugin.run, "
    assert said[:2] == [f"{sentence}tp-plugin exec or TP_PLUGIN=1."] * 2
    assert said[2:] == [""] * 2


def test_all_ranks_with_it_go_on():
    assert on_ranks(2, one_host_without, (True, True), group=False) == [""] * 2


def test_a_script_may_register_later():
    assert on_ranks(2, one_host_without, (True, False), late=True, group=False) == [""] * 2
