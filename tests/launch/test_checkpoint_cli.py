"""``tp-plugin inspect`` and ``tp-plugin export``, on checkpoints that ranks have trained."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file

import tp_plugin
from tests.support import resume
from tests.support.ranks import on_ranks
from tests.support.resume import BF16
from tp_plugin.launch.cli import EXIT, main
from tp_plugin.weights.manifest import Manifest

ROOT = tempfile.TemporaryDirectory()
MAMBA2 = {"intermediate_size": 64, "num_heads": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8}
CASES = {
    "tied": (3, {"family": "Qwen3", "heads": (4, 2), "tied": True}),
    "bf16": (1, {"family": "Llama", "heads": (4, 2), "tied": False, "extra": BF16}),
    "experts": (1, {"family": "Mixtral", "heads": (4, 2), "tied": False}),
    "fused experts": (2, {"family": "GptOss", "heads": (4, 2), "tied": False}),
    "packed": (2, {"family": "phi3"}),
    "buffers": (1, {"family": "bart"}),
    "an infinite number in the config": (1, {"family": "Mamba2", "heads": (4, 2), "tied": False} | MAMBA2),
}


def folder(name: str) -> Path:
    return Path(ROOT.name, name.replace(" ", "_"))


def train_and_save(root: str) -> None:
    """Each case one step, then as a checkpoint and by ``save_pretrained``."""
    for name, (stage, options) in CASES.items():
        engine = resume.engine_of(2, stage, **options)
        resume.train(engine, 2, (0,), options["family"])
        place = Path(root, name.replace(" ", "_"))
        engine.save_checkpoint(place / "checkpoint-1")
        tp_plugin.save_pretrained(engine, place / "expected", max_shard_size="30KB")
        dist.barrier()
        if dist.get_rank() == 0:
            (place / "checkpoint-1" / "tokenizer.json").write_text("{}")


@functools.cache
def trained() -> None:
    on_ranks(2, train_and_save, ROOT.name)


@pytest.mark.parametrize("name", CASES)
def test_an_export_is_what_save_pretrained_wrote(name, tmp_path, capsys):
    trained()
    assert main(["export", str(folder(name) / "checkpoint-1"), str(tmp_path), "--max-shard-size", "30KB"]) == 0
    assert "written as" in capsys.readouterr().out
    expected = folder(name) / "expected"
    names = sorted(path.name for path in expected.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "tokenizer.json"])
    assert sum(file.endswith(".safetensors") for file in names) > 1, "more than one shard"
    for file in names:
        if file.endswith(".json"):
            assert json.loads((tmp_path / file).read_text()) == json.loads((expected / file).read_text())
            continue
        ours, theirs = load_file(tmp_path / file), load_file(expected / file)
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert ours[key].dtype == tensor.dtype
            assert torch.equal(ours[key], tensor), key
    model_class = getattr(transformers, json.loads((tmp_path / "config.json").read_text())["architectures"][0])
    _, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report


def test_an_export_reads_a_damaged_checkpoint_no_further(tmp_path, capsys):
    trained()
    content = bytearray(next(folder("tied").glob("checkpoint-1/*/rank_00001.safetensors")).read_bytes())
    manifest = Manifest.load(next(folder("tied").glob("checkpoint-1/global_step1")))
    copy = tmp_path / "copy"
    copy.mkdir()
    content[-5] ^= 1
    (copy / "manifest.json").write_bytes(manifest.dump())
    for path in folder("tied").glob("checkpoint-1/global_step1/*.safetensors"):
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "rank_00001.safetensors").write_bytes(content)
    assert main(["export", str(copy), str(tmp_path / "out")]) == EXIT["refused"]
    assert "the content of rank_00001.safetensors has changed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["inspect", str(copy)]) == EXIT["broken"]
    assert "DAMAGED: the checkpoint" in capsys.readouterr().out


def test_inspect_tells_shape_step_sizes_and_health(capsys):
    trained()
    assert main(["inspect", str(folder("bf16") / "checkpoint-1")]) == 0
    out = capsys.readouterr().out
    assert "LlamaForCausalLM after 1 steps, of tp=2 dp=1 ZeRO-1" in out
    assert "parameters in bfloat16" in out
    assert "AdamW, kept for each element: weight, exp_avg, exp_avg_sq, with its learning rate schedule" in out
    assert out.rstrip().endswith("WHOLE")
    assert main(["inspect", "--json", str(folder("bf16") / "checkpoint-1")]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["step"], said["tp"], said["whole"], said["files"]) == (1, 2, True, 2)
    assert said["parameters"] == said["trained"] > 10_000


def test_what_is_no_checkpoint_is_told(tmp_path, capsys):
    for command in (["inspect", str(tmp_path)], ["export", str(tmp_path), str(tmp_path / "out")]):
        assert main(command) == EXIT["refused"]
        assert "there is no whole checkpoint of tp_plugin's at" in capsys.readouterr().err


def test_a_checkpoint_that_is_not_complete_is_not_answered_by_one_beside_it(tmp_path, capsys):
    trained()
    shutil.copytree(folder("tied") / "checkpoint-1", tmp_path / "checkpoint-1")
    shutil.copytree(folder("tied") / "checkpoint-1", tmp_path / "checkpoint-6")
    next(tmp_path.glob("checkpoint-6/*/manifest.json")).unlink()
    (tmp_path / "checkpoint-6" / "latest").unlink()
    for command in (["inspect"], ["export"]):
        more = [str(tmp_path / "out")] if command == ["export"] else []
        assert main([*command, str(tmp_path / "checkpoint-6"), *more]) == EXIT["refused"]
        said = capsys.readouterr().err
        assert f"no whole checkpoint of tp_plugin's at '{tmp_path}/checkpoint-6'; the newest beside it is" in said
        assert main([*command, str(tmp_path), *more]) == 0, "of the folder of both the whole one counts"
        assert "checkpoint-1" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["../checkpoint-1/global_step1", "..", "/etc", ""])
def test_a_latest_that_names_something_else_is_refused(tmp_path, capsys, name):
    trained()
    shutil.copytree(folder("tied") / "checkpoint-1", tmp_path / "checkpoint-1")
    (tmp_path / "checkpoint-6").mkdir()
    (tmp_path / "checkpoint-6" / "latest").write_text(name)
    assert main(["inspect", str(tmp_path / "checkpoint-6")]) == EXIT["refused"]
    assert "does not name a folder in" in capsys.readouterr().err
