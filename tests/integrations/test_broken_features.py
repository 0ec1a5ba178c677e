"""Features of which a name has moved are refused in training; the rest of the training equals one process."""

from __future__ import annotations

import contextlib
import io
import re

import pytest
from transformers import GenerationMixin

import tp_plugin
from tests.support.batched_cases import launched, sentence, values
from tests.support.guarded import engine_of, steps
from tests.support.models import make
from tests.support.moved import pretended
from tests.support.ranks import on_ranks
from tests.support.train import batch
from tp_plugin.errors import TensorParallelError
from tp_plugin.integrations.features import Feature, forget_moved
from tp_plugin.integrations.room import Room
from tp_plugin.integrations.versions import TESTED
from tp_plugin.step_guard.guard import guard_of


def trained_without(owner, name, stage=1, **options):
    """An engine registered without a name of another library, after a step; its loss before is that of one process."""
    tp_plugin.unregister()
    delattr(owner, name)
    engine = engine_of("Llama", stage, **options)
    inputs = batch(0, 2)
    if not options:
        ours, truth = engine(**inputs).loss.item(), make("Llama")(**inputs).loss.item()
        assert abs(ours - truth) < 1e-5 * truth, (ours, truth)
    steps(engine, 1)
    return engine


def generates():
    engine = trained_without(GenerationMixin, "_valid_auto_compile_criteria")
    engine.module.generate(batch(0, 2)["input_ids"][:, :4], max_new_tokens=2)


def saves_a_checkpoint():
    from deepspeed.runtime.engine import DeepSpeedEngine

    trained_without(DeepSpeedEngine, "zero_partial_offload").save_checkpoint("nowhere")


def saves_the_model():
    from transformers.utils import hub

    tp_plugin.save_pretrained(trained_without(hub, "create_and_tag_model_card"), "nowhere")


def saves_the_model_itself():
    from transformers.utils import hub

    trained_without(hub, "create_and_tag_model_card").module.save_pretrained("nowhere")


def loads_by_slices():
    from transformers import modeling_utils

    trained_without(modeling_utils, "log_state_dict_report")
    tp_plugin.from_pretrained("nowhere", tp_size=2)


def adapts():
    from peft.tuners.lora import Embedding

    trained_without(Embedding, "_embed", adapter="several")


def trains_without_adapters():
    from peft.tuners.lora import Embedding

    trained_without(Embedding, "_embed")
    return True


CASES = {
    "generates": r"tp_plugin refuses generate\(\) of a sharded model with transformers .* is gone \(it would capture "
    r"collectives in CUDA graphs\); save the model and generate in one process, or install a version of transformers",
    "saves_a_checkpoint": "tp_plugin refuses saving and loading checkpoints of a sharded engine with deepspeed .*"
    "zero_partial_offload is gone",
    "saves_the_model": r"tp_plugin refuses saving a sharded model \(save_pretrained\) with transformers",
    "saves_the_model_itself": r"tp_plugin refuses saving a sharded model \(save_pretrained\) with transformers",
    "loads_by_slices": "tp_plugin refuses loading a model by slices with transformers",
    "adapts": "tp_plugin refuses adapters in a sharded model with peft .*_embed is gone.*; train without adapters, or",
}


@pytest.mark.parametrize("case", CASES)
def test_a_broken_feature_is_refused_and_the_rest_trains(case):
    # each in processes of its own: the name stays away
    assert re.search(CASES[case], sentence(launched(2, __name__, (case,)), case))


def test_models_without_adapters_train_where_adapters_are_refused():
    case = "trains_without_adapters"
    assert values(launched(2, __name__, (case,)), case) == [True, True]


# ---- a name that our own import needs -------------------------------------------------------------------------------


def test_an_import_that_fails_costs_the_parts_feature(tmp_path, monkeypatch):
    package = tmp_path / "rooms_of_a_test"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "first.py").write_text("from torch import gone_from_torch\n")
    (package / "second.py").write_text("import torch\ntorch.gone_from_torch\n")
    monkeypatch.syspath_prepend(tmp_path)
    one, other = Feature("a use", "torch"), Feature("another use", "torch", needed=True)
    room = Room("rooms_of_a_test", {"first": one})
    room.install()
    assert "cannot import name 'gone_from_torch' from 'torch'" in (one.broken or "")
    room = Room("rooms_of_a_test", {"second": other})
    with pytest.raises(TensorParallelError, match=r"refuses another use with torch .* no attribute 'gone_from_torch'"):
        room.install()
    forget_moved("torch")


# ---- versions without a test ----------------------------------------------------------------------------------------


def on_an_untested_version():
    tp_plugin.unregister()
    with contextlib.redirect_stderr(io.StringIO()) as said:
        with pretended("transformers", "5.99.0"):
            engine = engine_of("Llama", 1, {"tp_plugin": {"guard": False}})
            tp_plugin.register()
        due = guard_of(engine).due[True]
        steps(engine, 1)
    return due, guard_of(engine).compared, said.getvalue()


def test_a_version_without_a_test_is_said_once_and_keeps_the_guard_on():
    for rank, (due, compared, said) in enumerate(on_ranks(2, on_an_untested_version)):
        assert due
        assert compared
        tested = ", ".join(TESTED["transformers"])
        line = f"no test ran with transformers 5.99.0 (tested: {tested}): the names that tp_plugin relies on are"
        assert said.count(line) == (rank == 0)
