"""The package's logger: on stderr by itself, and as the program configures it."""

from __future__ import annotations

import json
import logging
import sys

import pytest

from tests.support.launching import ENVIRONMENT, output_of
from tp_plugin import log

SAY = "from tp_plugin import log; log.info('sharded'); log.warning('50% differ')"
ROOT = "logging.basicConfig(stream=sys.stdout, format='%(name)s %(message)s')"
OWN = "logging.getLogger('tp_plugin').addHandler(logging.StreamHandler(sys.stdout))"
CONFIGURED = {
    "not at all": ("", "", "tp_plugin: sharded\ntp_plugin: WARNING: 50% differ\n"),
    "a level": ("logging.getLogger('tp_plugin').setLevel('WARNING')", "", "tp_plugin: WARNING: 50% differ\n"),
    "the root": (ROOT, "tp_plugin sharded\ntp_plugin 50% differ\n", ""),
    "a handler of its own": (OWN, "sharded\n50% differ\n", ""),
}


FORKS = """
import json, os, subprocess, sys
import torch.distributed, packaging.version  # what tp_plugin imports, once
for script in json.loads(sys.argv[1]):
    out, err = (open(name, "w+") for name in ("out", "err"))
    if os.fork() == 0:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        exec(script, {})
        sys.stdout.flush()
        os._exit(0)
    os.wait()
    print(json.dumps([open(name).read() for name in ("out", "err")]))
"""


def scripts() -> dict[tuple[str, str], str]:
    """A program that configures logging before or after it imports the package."""
    found = {}
    for how, (configure, _, _) in CONFIGURED.items():
        lines = [configure, "import tp_plugin"]
        found[how, "the program"] = "\n".join(["import logging, sys", *lines, SAY])
        found[how, "the package"] = "\n".join(["import logging, sys", *lines[::-1], SAY])
    return found


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> dict[tuple[str, str], list[str]]:
    command = [sys.executable, "-c", FORKS, json.dumps(list(scripts().values()))]
    text = output_of(command, ENVIRONMENT, cwd=tmp_path_factory.mktemp("log"))
    return dict(zip(scripts(), map(json.loads, text.splitlines()), strict=True))


@pytest.mark.parametrize("first", ["the program", "the package"])
@pytest.mark.parametrize("how", CONFIGURED)
def test_messages_go_to_stderr_unless_the_program_has_configured_logging(printed, how, first):
    _, out, err = CONFIGURED[how]
    said = printed[how, first]
    assert said[0] == out
    assert [line for line in said[1].splitlines(keepends=True) if "tp_plugin" in line] == err.splitlines(True)


def test_other_ranks_are_silent_but_for_what_is_their_own(monkeypatch, caplog):
    from tp_plugin import log

    monkeypatch.setattr(log.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(log.dist, "get_rank", lambda: 1)
    log.info("of the model")
    log.warning("of this rank", rank0_only=False)
    assert caplog.record_tuples == [("tp_plugin", logging.WARNING, "of this rank")]


def test_one_rank_speaks_before_there_is_a_process_group(monkeypatch, caplog):
    monkeypatch.setenv("RANK", "1")
    log.warning("of all")
    log.warning("of this rank", rank0_only=False)
    monkeypatch.setenv("RANK", "0")
    log.warning("of rank 0")
    assert [record.message for record in caplog.records] == ["of this rank", "of rank 0"]
