"""ZeRO-3's names for parameters are in one file, which answers before DeepSpeed is imported."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch

import tp_plugin
from tp_plugin import partitioned
from tp_plugin.integrations import zero3

NAMES = re.compile(r"\bds_(id|tensor|shape|numel|status|process_group)\b|GatheredParameters|checkpoint_event_")


def test_no_other_file_has_a_name_of_zero3_parameters():
    package = Path(tp_plugin.__file__).parent
    found = {path for path in package.rglob("*.py") if NAMES.search(path.read_text())}
    assert found == {Path(zero3.__file__)}


def test_a_plain_parameter_is_not_partitioned():
    model = torch.nn.Linear(3, 2)
    assert not partitioned.has_partitioned(model)
    assert partitioned.shard_shape(model.weight) == (2, 3)
    assert partitioned.own_partition(model.weight) is model.weight
    with partitioned.prefetched_released(torch.optim.SGD(model.parameters())), partitioned.prefetched_released(None):
        pass
    for optimizer in (torch.optim.SGD(model.parameters()), None):
        partitioned.forget_fetch_order(optimizer)


def test_a_partitioned_parameter_is_recognised_without_deepspeed():
    code = (
        "import sys, torch; from tp_plugin.partitioned import is_partitioned\n"
        "param = torch.nn.Parameter(torch.empty(0)); param.ds_id = 0\n"
        "assert is_partitioned(param) and 'deepspeed' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_shown_shape_is_taken_back():
    param = torch.nn.Parameter(torch.empty(2, 3))
    with zero3.shapes_shown({param: (4, 3)}):
        assert zero3.shard_shape(param) == (4, 3)
    assert zero3.shard_shape(param) == (2, 3)
