"""Extensions from outside the package: the files of docs/extending.md beside a user's model, on two ranks."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tp_plugin
from tests.support.batched_cases import launched, sentence, values
from tests.support.models import batch, make
from tests.support.ranks import ROOT
from tests.support.train import config_for, engine_for, optimizer_for, relative
from tp_plugin.launch.cli import EXIT, main
from tp_plugin.param_info import layout_of

HERE = "tests.test_extending"
PAGE = (ROOT / "docs/extending.md").read_text()
FILES = dict(re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", PAGE, re.S))
CASES = (
    "unknown_family",
    "trains_family",
    "trains_packing",
    "unknown_adapter",
    "trains_adapter",
    "saves_adapter",
    "after",
    "drops",
)
MOVED = ("other_version", "trains_moved")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What a user has: the model and the files of the page."""
    place = tmp_path_factory.mktemp("user")
    shutil.copy(ROOT / "tests/support/acme_model.py", place)
    for name, text in FILES.items():
        (place / name).write_text(text)
    return place


def results(folder: Path) -> list[dict]:
    return launched(2, HERE, CASES + MOVED, (str(folder),))


def imported(folder: str, name: str) -> Any:
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(name)


def model_of(folder: str, name: str) -> torch.nn.Module:
    module = imported(folder, "acme_model")
    torch.manual_seed(0)
    return module.FusedModel(module.FusedConfig()) if name == "fused" else module.AcmeModel(module.AcmeConfig())


def errors(truth: torch.nn.Module, ours: torch.nn.Module, **block: Any) -> dict[str, float]:
    """Two steps of ``ours`` on two ranks against ``truth`` in one process: losses, and parameters after them."""
    config = config_for(2, 1, gradient_accumulation_steps=1)
    config["tp_plugin"] |= {"infer": "off", **block}
    engine, optimizer = engine_for(ours, optimizer_for(ours, "sgd"), config), optimizer_for(truth, "sgd")
    found = {"loss": 0.0, "parameter": 0.0}
    for step in range(2):
        data = batch(step, 2)
        loss, wanted = engine(**data).loss, truth(**data).loss
        engine.backward(loss)
        engine.step()
        wanted.backward()
        torch.nn.utils.clip_grad_norm_(truth.parameters(), config["gradient_clipping"])
        optimizer.step()
        optimizer.zero_grad()
        found["loss"] = max(found["loss"], relative(loss, wanted))
    expected = truth.state_dict()
    for name, param in tp_plugin.full_state_dict(engine).items():
        found["parameter"] = max(found["parameter"], relative(param, expected[name], 1e-6))
    return found


# ---- a family and a packed layout ---------------------------------------------------------------------------------


def unknown_family(folder: str) -> None:
    whole = {"words": "replicated", "head": "replicated"}
    options = tp_plugin.TensorParallelConfig(tp_size=2, quiet=True, infer="off", plan=whole)
    tp_plugin.shard_model(model_of(folder, "acme"), options)


def trains_family(folder: str) -> dict[str, float]:
    imported(folder, "acme_family")
    ours = model_of(folder, "acme")
    return errors(model_of(folder, "acme"), ours) | {"left": _whole_linears(ours)}


def trains_packing(folder: str) -> dict[str, float]:
    imported(folder, "acme_packing")
    plan = json.loads(Path(folder, "ds.json").read_text())["tp_plugin"]["plan"]
    ours = model_of(folder, "fused")
    return errors(model_of(folder, "fused"), ours, plan=plan) | {"left": _whole_linears(ours)}


def _whole_linears(model: torch.nn.Module) -> float:
    """Linear layers whose weight is not sharded."""
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    return float(sum(layout_of(module.weight) is None for module in linears))


# ---- an adapter method --------------------------------------------------------------------------------------------


def adapted(**options: Any) -> torch.nn.Module:
    import peft

    config = peft.LoHaConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_weights=False, **options)
    torch.manual_seed(5)
    return peft.get_peft_model(make("Llama"), config)


def unknown_adapter(folder: str) -> None:
    tp_plugin.shard_model(adapted(), tp_plugin.TensorParallelConfig(tp_size=2, quiet=True))


def trains_adapter(folder: str) -> dict[str, float]:
    imported(folder, "loha")
    ours = adapted()
    found = errors(adapted(), ours)
    outputs = [param for name, param in ours.named_parameters() if "hada_w1_a" in name]
    return found | {"left": float(sum(layout_of(param) is None for param in outputs))}


def saves_adapter(folder: str) -> dict[str, float]:
    """Errors of the logits: of plain PEFT with what was saved, of the sharded model with what was loaded into it."""
    import peft
    import torch.distributed as dist

    imported(folder, "loha")
    ours, truth, out = adapted(), adapted(), f"{folder}/adapter"
    tp_plugin.shard_model(ours, tp_plugin.TensorParallelConfig(tp_size=2, quiet=True))
    assert ours.get_nb_trainable_parameters() == truth.get_nb_trainable_parameters()
    ours.save_pretrained(out)
    dist.barrier()
    with torch.no_grad():
        for name, param in ours.named_parameters():
            if "hada" in name:
                param.zero_()
    peft.set_peft_model_state_dict(ours, peft.utils.load_peft_weights(out, device="cpu"))
    plain = peft.PeftModel.from_pretrained(make("Llama"), out)
    with torch.no_grad():
        wanted, *found = (model.eval()(**batch(0, 2)).logits for model in (truth, plain, ours))
    return {name: relative(value, wanted) for name, value in zip(("saved", "loaded"), found, strict=True)}


def after(folder: str) -> None:
    import peft

    model = make("Llama")
    tp_plugin.shard_model(model, tp_plugin.TensorParallelConfig(tp_size=2, quiet=True))
    peft.get_peft_model(model, peft.LoHaConfig(r=4, target_modules=["q_proj"]))


def drops(folder: str) -> None:
    tp_plugin.shard_model(adapted(rank_dropout=0.5), tp_plugin.TensorParallelConfig(tp_size=2, quiet=True))


# ---- a library's new minor ----------------------------------------------------------------------------------------


def other_version(folder: str) -> None:
    """From here on the engine of DeepSpeed calls a method by another name."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    tp_plugin.unregister()
    old, new = "_apply_autotp_partitioning", "_shard_by_autotp"
    setattr(DeepSpeedEngine, new, vars(DeepSpeedEngine)[old])
    delattr(DeepSpeedEngine, old)
    caller = DeepSpeedEngine._configure_tensor_parallel
    names = tuple(new if name == old else name for name in caller.__code__.co_names)
    caller.__code__ = caller.__code__.replace(co_names=names)
    tp_plugin.register()


def trains_moved(folder: str) -> dict[str, float]:
    from deepspeed.runtime.engine import DeepSpeedEngine

    imported(folder, "new_deepspeed")
    original = DeepSpeedEngine._shard_by_autotp
    ours = make("Llama")
    found = errors(make("Llama"), ours) | {"left": _whole_linears(ours)}
    tp_plugin.unregister()
    assert DeepSpeedEngine._shard_by_autotp is DeepSpeedEngine._apply_autotp_partitioning is original
    return found


# ---- what must hold -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["trains_family", "trains_packing", "trains_adapter", "trains_moved"])
def test_an_extension_trains_equal_to_one_process(folder, name):
    for rank, found in enumerate(values(results(folder), name)):
        assert found.pop("left") == 0, f"rank {rank}: something stayed in full"
        assert all(error < 1e-4 for error in found.values()), f"rank {rank}: {found}"


def test_adapters_of_a_registered_method_are_saved_counted_and_loaded_in_full(folder):
    for rank, found in enumerate(values(results(folder), "saves_adapter")):
        assert all(error < 1e-6 for error in found.values()), f"rank {rank}: {found}"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unknown_family", "nothing of AcmeModel would be sharded"),
        ("unknown_adapter", "is of PEFT type LOHA, which tensor parallelism does not support"),
        ("after", "whose layers PEFT makes as small as the shards of this model; put the adapter in before sharding"),
        ("drops", r"LoHa on 'model\.layers\.0\..*' drops at random"),
    ],
)
def test_what_is_not_taught_is_refused(folder, name, message):
    assert re.search(message, sentence(results(folder), name))


def test_a_name_that_has_moved_is_refused_until_it_is_declared(folder):
    for found in results(folder):
        kind, message = found["other_version"]
        assert kind == "TensorParallelError"
        assert "tp_plugin refuses sharding the model of an engine with deepspeed" in message
        assert "DeepSpeedEngine._apply_autotp_partitioning is gone (it is the slot we shard models in)" in message


@pytest.mark.parametrize(("name", "extension"), [("acme", "acme_family"), ("acme_fused", "acme_packing")])
def test_the_command_line_tries_an_extension(folder, tmp_path, capsys, name, extension):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": name}))
    imports = [arg for file in ("acme_model", extension) for arg in ("--import", str(folder / f"{file}.py"))]
    config = ["--deepspeed-config", str(folder / "ds.json")] if name == "acme_fused" else ["--tp", "2"]
    assert main(["check", str(tmp_path), *config, *imports]) == EXIT["equal"]
    out = capsys.readouterr().out
    assert "(yours)" in out if name == "acme_fused" else "(family)" in out
    assert main(["plan", str(tmp_path), *config, *imports]) == 0


def test_every_file_of_the_page_is_used():
    assert sorted(FILES) == ["acme_family.py", "acme_packing.py", "ds.json", "loha.py", "new_deepspeed.py"]
