"""A checkpoint that brings its own modelling code: run on request only, then like any other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers

import tp_plugin
from tests.support.loaded import assert_same, tensors_of
from tests.support.ranks import ROOT, errors_on_ranks, on_ranks
from tp_plugin.param_info import layout_of

MARK = "ran"


@pytest.fixture
def folder(tmp_path):
    """A model at home with its code, which leaves a mark beside it when it runs."""
    from tests.support.custom_models import HomeConfig, HomeModel

    code = (ROOT / "tests/support/custom_models.py").read_text()
    torch.manual_seed(0)
    HomeModel(HomeConfig(hidden_size=64, num_layers=2)).save_pretrained(tmp_path / "home")
    mark = f"\n\nfrom pathlib import Path\nPath({str(tmp_path / MARK)!r}).touch()\n"
    (tmp_path / "home/modeling_home.py").write_text(code + mark)
    config = json.loads((tmp_path / "home/config.json").read_text())
    config["auto_map"] = {"AutoConfig": "modeling_home.HomeConfig", "AutoModelForCausalLM": "modeling_home.HomeModel"}
    (tmp_path / "home/config.json").write_text(json.dumps(config))
    return tmp_path


def load(folder):
    return tp_plugin.from_pretrained(folder / "home", tp_size=2)


def test_it_is_not_run_unasked(folder):
    errors = errors_on_ranks(2, load, folder, env={"HF_MODULES_CACHE": str(folder / "modules")})
    assert len(set(errors)) == 1
    assert (
        "brings modelling code of its own, which is not run unasked; read it, then pass trust_remote_code=True"
        in (errors[0])
    )
    assert not (folder / MARK).exists()


def trusted(folder: Path):
    """Loaded by slices and loaded whole; what is saved again, loaded by one process; which linears were sharded."""
    config = tp_plugin.TensorParallelConfig(tp_size=2)
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder / "home", trust_remote_code=True)
    start = {name: tensor.clone() for name, tensor in tensors_of(whole).items()}
    tp_plugin.shard_model(whole, config)
    ours = tp_plugin.from_pretrained(folder / "home", config=config, trust_remote_code=True)
    assert_same(whole, ours)
    tp_plugin.save_pretrained(ours, folder / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(folder / "saved", trust_remote_code=True)
    assert tensors_of(again).keys() == start.keys()
    assert all(torch.equal(tensor, start[name]) for name, tensor in tensors_of(again).items())
    dist.barrier()
    return type(again).__module__, sum(layout_of(param) is not None for param in ours.parameters())


def test_on_request_it_is_loaded_by_slices_and_saved_with_its_code(folder):
    found = on_ranks(2, trusted, folder, env={"HF_MODULES_CACHE": str(folder / "modules")})
    assert (folder / MARK).exists()
    assert (folder / "saved/modeling_home.py").exists()
    for module, sharded in found:
        assert module.startswith("transformers_modules.")
        assert sharded >= 2 * 7
