"""The command ``tp-plugin``."""

from __future__ import annotations

import json

import pytest
from transformers import AutoConfig, LlamaConfig

from tests.support.custom_models import HomeConfig, HomeModel
from tp_plugin.launch.cli import EXIT, main
from tp_plugin.layers.region import Region
from tp_plugin.model_check import resolve_model


def test_plan_prints_the_plan(capsys):
    assert main(["plan", "llama", "--tp", "2"]) == 0
    out = capsys.readouterr().out
    assert "model.layers.*.self_attn.q_proj" in out
    assert "x32   (HF plan)" in out


def test_plan_says_what_was_inferred(capsys):
    assert main(["plan", "speech_to_text", "--tp", "2"]) == 0
    assert "inferred rules are tried" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["LlamaConfig", "llama", "directory", "LlamaForSequenceClassification"])
def test_check_takes_a_class_a_type_or_a_directory(name, capsys, tmp_path):
    if name == "directory":
        LlamaConfig(num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, hidden_size=96).save_pretrained(
            tmp_path
        )
        name = str(tmp_path)
    assert main(["check", name, "--tp", "2"]) == 0
    out = capsys.readouterr().out
    assert "EQUAL" in out
    assert "gradient relative error" in out
    assert "compared: loss, logits, gradient of the model's own loss" in out
    assert "the fullest rank holds 5" in out


def test_check_fails_where_sharding_is_wrong(capsys, monkeypatch):
    monkeypatch.setattr(Region, "attach_input", lambda self, column: None)
    assert main(["check", "llama", "--tp", "2"]) == EXIT["differs"]
    assert "DIFFERS: sharded and unsharded differ (gradient" in capsys.readouterr().out


def test_check_refuses_what_cannot_be_sharded(capsys, tmp_path):
    config = AutoConfig.for_model("llama", num_attention_heads=7, num_key_value_heads=1, hidden_size=7 * 16)
    config.save_pretrained(tmp_path)
    assert main(["check", str(tmp_path), "--tp", "2"]) == EXIT["refused"]
    assert "REFUSED" in (out := capsys.readouterr().out)
    assert "7 query and 1 key/value heads cannot be sharded 2 ways" in out


def test_check_says_which_rules_would_do(capsys, monkeypatch):
    """A model whose attention mixes its heads: inference takes it for a plain one, and the trial does not."""
    monkeypatch.setattr(
        resolve_model,
        "resolve_model",
        lambda *_, **__: resolve_model.ResolvedModel(HomeModel, HomeConfig(mixing=True), "x"),
    )
    assert main(["check", "x", "--tp", "2"]) == EXIT["differs"]
    out = capsys.readouterr().out
    rules = dict.fromkeys(sorted(f"stack.*.mixer.{name}" for name in ("wk", "wo", "wq", "wv")), "replicated")
    assert f"passes with these rules of your own: {json.dumps({'plan': rules})}" in out


def test_unknown_names_are_told(capsys):
    assert main(["check", "lama", "--tp", "2"]) == EXIT["refused"]
    assert "'lama' is neither a class of transformers" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["check", "llama"], ["plan", "llama", "--tp", "0"], []])
def test_a_command_line_that_makes_no_sense(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "usage: tp-plugin" in capsys.readouterr().err


def test_the_version_and_the_help_of_every_command(capsys):
    for arguments, text in (
        (["--version"], "tp-plugin "),
        (["--help"], "check every architecture of the installed transformers"),
        *(([name, "--help"], "usage: tp-plugin") for name in ("plan", "check", "coverage", "inspect", "export")),
    ):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 0
        assert text in capsys.readouterr().out


def test_rules_are_printed_edited_and_tried(capsys, tmp_path):
    assert main(["plan", "gpt2", "--as-rules"]) == 0
    config = json.loads(capsys.readouterr().out) | {"tensor_parallel": {"autotp_size": 2}}
    config["tp_plugin"]["plan"]["transformer.h.*.mlp.*"] = "replicated"
    for name in ("c_fc", "c_proj"):
        del config["tp_plugin"]["plan"][f"transformer.h.*.mlp.{name}"]
    (tmp_path / "ds.json").write_text(json.dumps(config))
    assert main(["check", "gpt2", "--deepspeed-config", str(tmp_path / "ds.json")]) == EXIT["equal"]
    out = capsys.readouterr().out
    assert "transformer.h.*.attn.c_attn  column           x12   (yours)" in out
    assert "transformer.h.*.mlp.c_fc.weight" in out.split("replicated on every rank")[1]


def test_options_of_the_config_count(capsys, tmp_path):
    """Heads that fit no two ranks are refused without ``uneven_heads``; the command line's degree goes first."""
    AutoConfig.for_model("llama", num_attention_heads=3, num_key_value_heads=1, hidden_size=48).save_pretrained(
        tmp_path
    )
    (tmp_path / "ds.json").write_text(
        json.dumps({"tensor_parallel": {"autotp_size": 3}, "tp_plugin": {"uneven_heads": True}})
    )
    assert main(["plan", str(tmp_path), "--tp", "2"]) == EXIT["refused"]
    assert main(["plan", str(tmp_path), "--tp", "2", "--deepspeed-config", str(tmp_path / "ds.json")]) == 0
    assert "tensor parallel over 2 ranks" in capsys.readouterr().out


def test_what_cannot_be_imported_is_told(capsys):
    assert main(["plan", "llama", "--tp", "2", "--import", "no_such_rules.py"]) == EXIT["refused"]
    assert "cannot import 'no_such_rules.py'" in capsys.readouterr().err


def test_a_check_of_one_rank_is_equal(capsys):
    assert main(["check", "LlamaConfig", "--tp", "1"]) == EXIT["equal"]
    assert capsys.readouterr().out.rpartition("\n")[0].splitlines()[-1].startswith("EQUAL")
