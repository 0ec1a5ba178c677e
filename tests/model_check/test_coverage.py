"""A sample of the coverage table, measured anew; the whole of it is ``tp-plugin coverage``."""

from __future__ import annotations

import functools

import pytest

from tp_plugin.launch.cli import main
from tp_plugin.model_check import coverage
from tp_plugin.model_check.coverage import markdown

SAMPLE = {
    "llama": "HF plan",  # a dense decoder
    "mixtral": "HF plan",  # experts
    "gpt2": "family",  # Conv1D, packed
    "bert": "family",  # a masked LM
    "t5": "family",  # seq2seq
    "speech_to_text": "inferred",  # it has no rules
    "dots3_note": "family",  # a config whose layers have different numbers of heads
}


@functools.cache
def rows() -> dict[str, coverage.Row]:
    return {row.model_type: row for row in coverage.cover(list(SAMPLE), 2, timeout_s=100)}


@pytest.mark.parametrize("model_type", SAMPLE)
def test_passes_sharded_enough(model_type):
    row = rows()[model_type]
    assert row.verdict == "equal", row.sentence
    assert row.counts
    assert row.fraction <= coverage.COUNTS_UP_TO
    assert SAMPLE[model_type] in row.source
    assert row.measured_on == "default config"


def test_the_table_says_what_was_measured():
    text = markdown(rows().values())
    assert "**7 architectures: 7 pass. 7 pass with at most 60% of their parameters on the" in text
    (line,) = [line for line in text.splitlines() if line.startswith("| llama |")]
    assert "LlamaForCausalLM" in line
    assert f"{rows()['llama'].fraction:.1%}" in line


def test_replicated_or_unequal_rows_do_not_count():
    row = coverage.Row("a", "causal LM", "A", 2, verdict="equal", fraction=0.61)
    assert not row.counts
    row.fraction = 0.6
    assert row.counts
    row.verdict = "differs"
    assert not row.counts


def test_an_interrupted_run_goes_on_where_it_was(tmp_path, capsys, monkeypatch):
    file = tmp_path / "coverage.json"
    coverage.save(file, [coverage.Row("llama", "causal LM", "X", 2, verdict="equal", versions=coverage.versions())])
    assert main(["coverage", "--only", "llama", "--output", str(tmp_path / "coverage.md")]) == 0
    assert "1 architectures, 1 known already" in capsys.readouterr().out
    assert "| llama |" in (tmp_path / "coverage.md").read_text()
    monkeypatch.setattr(coverage, "versions", lambda: {"transformers": "another"})
    assert coverage.load(file, 2) == {}, "rows of other versions are found again"


def test_a_rank_that_hangs_is_a_row_too(monkeypatch):
    monkeypatch.setattr(coverage, "_on_this_rank", lambda *_: __import__("time").sleep(60))
    (row,) = coverage.cover(["llama"], 2, timeout_s=2)
    assert row.verdict == "broken"
    assert "no answer within 2 s" in row.sentence
