"""Exports: full tensors on rank 0, an HF directory that plain transformers loads, training that goes on unchanged."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import tempfile
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file

import tp_plugin
from benchmarks.live_bytes import LiveBytes
from tests.support.configs import config_for
from tests.support.exports import exported, packed, steps, wide
from tests.support.models import make
from tests.support.ranks import errors_on_ranks, on_ranks
from tests.support.resume import BF16, BF16_OPTIMIZER
from tests.support.train import engine_for, optimizer_for
from tp_plugin.errors import meet
from tp_plugin.integrations.transformers import export
from tp_plugin.weights import stream
from tp_plugin.weights.staging import Staging

CASES = {
    "Qwen2 tied ZeRO-0": ("Qwen2", True, 0, {}),  # half precision without ZeRO is refused
    "Gemma2 tied ZeRO-2": ("Gemma2", None, 2, {}),
    "Qwen3 tied ZeRO-3, some kept whole": ("Qwen3", True, 3, {"zero": {"stage3_param_persistence_threshold": 40}}),
    "Qwen2 bf16 ZeRO-1": ("Qwen2", False, 1, BF16),
    "Llama bf16 ZeRO-3": ("Llama", False, 3, BF16),
    "BF16_Optimizer": ("Qwen2", False, 1, BF16_OPTIMIZER),
}


def all_exports():
    found = {}
    with tempfile.TemporaryDirectory() as own:
        shared = [own]
        dist.broadcast_object_list(shared)
        for name, case in CASES.items():
            try:
                exported(*case, f"{shared[0]}/{name.replace(' ', '-')}")
                found[name] = ""
            except Exception as failure:
                found[name] = f"{type(failure).__name__}: {failure}"
        dist.barrier()
    return found


@functools.cache
def outcomes():
    return on_ranks(4, all_exports)


@pytest.mark.parametrize("name", CASES)
def test_export_reloads_plainly_and_training_goes_on(name):
    assert [found[name] for found in outcomes()] == [""] * 4


def memory_of_exports():
    """By ZeRO stage: the most bytes of tensors this rank held beside its own during an export, by the bucket's.

    "wrong" lists tensors of the first rank's files that are not the model's: most of them came in several buckets.
    """
    found: dict = {"wrong": []}
    bucket = 64 << 10
    for stage in (1, 3):
        model = wide()
        engine = engine_for(model, optimizer_for(model, "adamw"), config_for(2, stage))
        steps(engine, [0])
        written = export._written

        def measured(*args, stage=stage, engine=engine, written=written):
            own = [getattr(param, "ds_tensor", param) for param in engine.module.parameters()]
            with LiveBytes().ignore(*own, *engine.module.buffers()) as seen:
                error = written(*args)
            found[stage] = seen.peak / bucket
            return error

        with tempfile.TemporaryDirectory() as own, pytest.MonkeyPatch.context() as patch:
            shared = [own]
            dist.broadcast_object_list(shared)
            patch.setattr(stream, "BUCKET", bucket)
            patch.setattr(export, "_written", measured)
            tp_plugin.save_pretrained(engine, shared[0])
            whole, saved = tp_plugin.full_state_dict(engine), files_of(shared[0])
            found["wrong"] += [name for name, tensor in whole.items() if not torch.equal(tensor, saved[name])]
            dist.barrier()
    return found


def files_of(folder: str) -> dict[str, torch.Tensor]:
    """The tensors of a saved model."""
    return {name: value for path in Path(folder).glob("*.safetensors") for name, value in load_file(path).items()}


def test_a_rank_holds_a_few_buckets_beside_its_shard():
    found = on_ranks(4, memory_of_exports)
    assert [rank["wrong"] for rank in found] == [[]] * 4
    writer, peer, *others = [rank[1] for rank in found]
    assert 1 < writer <= 2.5, "gathered shards and the full rows made of them"
    assert 0 < peer <= 1.001, "what is sent, and whether it is"
    assert all(other < 0.1 for other in others), "they have nothing to do"
    # a rank's part of the embedding, whole over data parallelism, is four buckets
    assert all(rank[3] < 3 + 4 for rank in found), found


def numbered():
    """Two saves over one another: which rank wrote which file, the files after each, and what is wrong."""
    wrong, wrote = [], []
    model = wide()
    whole = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = model.num_parameters()
    tp_plugin.shard_model(model, tp_plugin.TensorParallelConfig(tp_size=2, quiet=True))
    with tempfile.TemporaryDirectory() as own, pytest.MonkeyPatch.context() as patch:
        shared = [own]
        dist.broadcast_object_list(shared)
        folder = Path(shared[0]) / "a"

        class Noted(export.SafetensorsFile):
            def __init__(self, path, *args):
                wrote.append(Path(path).name)
                super().__init__(path, *args)

        patch.setattr(export, "SafetensorsFile", Noted)
        for options in ({"max_shard_size": "500KB"}, {}, {"max_shard_size": "500KB", "variant": "other"}):
            if "max_shard_size" in options:
                model.save_pretrained(folder, is_main_process=dist.get_rank() == 0, **options)
            else:
                tp_plugin.save_pretrained(model, folder)
            if dist.get_rank() == 0:
                loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, variant=options.get("variant"))
                if not all(torch.equal(value, whole[name]) for name, value in loaded.state_dict().items()):
                    wrong.append("values")
                for index in folder.glob("*.index*.json"):
                    if json.loads(index.read_text())["metadata"]["total_parameters"] != parameters:
                        wrong.append("total_parameters")
            wrote.append(sorted(path.name for path in folder.iterdir() if "safetensors" in path.name))
            dist.barrier()
    return wrote, wrong


def test_numbered_files_are_spread_over_ranks_and_stale_ones_removed():
    found = on_ranks(4, numbered)
    assert [wrong for _, wrong in found] == [[]] * 4
    listings = [entry for entry in found[0][0] if isinstance(entry, list)]
    first, second, third = listings
    assert first[-1] == "model.safetensors.index.json"
    assert len(first) > 5
    assert second == ["model.safetensors"], "files of the earlier save stayed"
    assert set(second) < set(third), "another variant's files are not ours to remove"
    for rank, (wrote, _) in enumerate(found):
        files = wrote[: wrote.index(first)]
        assert files, f"rank {rank} wrote nothing"
    written = [name for wrote, _ in found for name in wrote[: wrote.index(first)]]
    assert sorted(written) == first[:-1], "each file by one rank"


def computed(stage):
    """Whether every file's tensors are what they have to be, of a model that was trained, on rank 0."""
    model = packed()
    engine = engine_for(model, optimizer_for(model, "adamw"), config_for(2, stage))
    steps(engine, [0])
    expected = tp_plugin.full_state_dict(engine)
    with tempfile.TemporaryDirectory() as own:
        shared = [own]
        dist.broadcast_object_list(shared)
        tp_plugin.save_pretrained(engine, shared[0], max_shard_size="500KB")
        if dist.get_rank() != 0:
            dist.barrier()
            return {}
        found = files_of(own)
        dist.barrier()
    for layer in range(6):
        name = f"model.layers.{layer}.mlp"
        halves = [expected.pop(f"{name}.{half}_proj.weight") for half in ("gate", "up")]
        expected[f"{name}.gate_up_proj.weight"] = torch.cat(halves)
    assert found.keys() == expected.keys()
    return {name: torch.equal(tensor, expected[name]) for name, tensor in found.items()}


@pytest.mark.parametrize("stage", [1, 3])
def test_what_transformers_computes_on_saving_is_computed(stage):
    found, _ = on_ranks(2, computed, stage)
    assert any("gate_up" in name for name in found)
    assert all(found.values()), found


def one_comes_late():
    if dist.get_rank() == 1:
        time.sleep(1.5)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        meet("save_pretrained", patience=0.3)
    return said.getvalue()


def test_a_file_that_is_missing_or_not_listed_yet(tmp_path, monkeypatch):
    """Other hosts wrote weights, which this one's listing of the directory may not show."""
    (tmp_path / "config.json").write_text("old")
    (tmp_path / "model.safetensors").write_text("old")
    with Staging(tmp_path) as staging:
        for name in ("config.json", "model.safetensors"):
            (staging.path / name).write_text("new")
        with pytest.raises(FileNotFoundError, match="model-00002"):
            export.replace_model(staging, {"model.safetensors", "model-00002-of-00002.safetensors"})
        assert {path.read_text() for path in tmp_path.glob("*.*") if path.is_file()} == {"old"}
        true = Path.rglob
        monkeypatch.setattr(Path, "rglob", lambda self, *a: (path for path in true(self, *a) if path.suffix == ".json"))
        export.replace_model(staging, {"model.safetensors"})
    assert {path.read_text() for path in tmp_path.glob("*.*")} == {"new"}


def test_a_rank_that_waits_says_for_what():
    first, second = on_ranks(2, one_comes_late)
    assert "rank 0 waits in save_pretrained" in first
    assert not second


def save_nowhere():
    model = make("Llama")
    tp_plugin.shard_model(model)
    tp_plugin.save_pretrained(model, "/proc/no/such/place")


def test_a_failed_export_is_raised_on_every_rank():
    errors = errors_on_ranks(2, save_nowhere)
    assert len(set(errors)) == 1
    assert "writing '/proc/no/such/place' failed" in errors[0]
