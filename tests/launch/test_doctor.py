"""``tp-plugin doctor``: every part of the report, a feature that is lost, a version without a test."""

import json

import pytest
from transformers import GenerationMixin

import tp_plugin
from tests.support.moved import pretended
from tp_plugin.integrations.features import broken_features
from tp_plugin.integrations.rooms import ROOMS
from tp_plugin.integrations.versions import TESTED
from tp_plugin.launch.cli import EXIT, main


@pytest.fixture(autouse=True)
def unregistered():
    tp_plugin.unregister()
    yield
    for room in ROOMS:
        room.check()
    assert not list(broken_features())


def report(capsys, *options):
    code = main(["doctor", "--json", *options])
    return code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_sound_environment(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "of mine")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    code, lines = report(capsys)
    assert code == 0
    assert {line["part"] for line in lines} == {
        *("libraries", "features", "devices", "compilers", "variables", "self-test")
    }
    assert not [line for line in lines if line["state"] == "lost"]
    found = {line["subject"]: line for line in lines}
    assert found["two ranks"]["text"].startswith("a small Llama on two CPU ranks against one process: equal (loss ")
    assert found["HF_TOKEN"]["text"] == "(hidden)"
    assert found["NCCL_DEBUG"]["text"] == "INFO"


def test_a_lost_feature_and_a_new_version(capsys, monkeypatch):
    monkeypatch.delattr(GenerationMixin, "_valid_auto_compile_criteria")
    with pretended("transformers", "5.99.0"):
        code, lines = report(capsys, "--no-test")
    assert code == EXIT["refused"]
    (lost,) = (line for line in lines if line["state"] == "lost")
    assert lost["text"].startswith("tp_plugin refuses generate() of a sharded model with transformers 5.99.0: ")
    (new,) = (line for line in lines if line["state"] == "new")
    tested = ", ".join(TESTED["transformers"])
    assert new["text"] == f"5.99.0; tests ran with {tested}, so the guard cannot be switched off"


def test_a_table_for_people(capsys):
    assert main(["doctor", "--no-test"]) == 0
    out = capsys.readouterr().out
    assert "\nfeatures\n  ok    torch " in out
