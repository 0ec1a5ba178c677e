"""python -m tp_plugin.run: the user's script runs as if we were not there, but registered."""

import json
import random
import sys

import numpy
import pytest
import torch

import tp_plugin
from tp_plugin.errors import TensorParallelError
from tp_plugin.launch import run
from tp_plugin.layers.generators import same_draws, seed_all

REPORT = """
import json, os, sys
import beside
with open(os.environ["REPORT"], "w") as file:
    json.dump({"name": __name__, "argv": sys.argv, "path": sys.path[0], "beside": beside.VALUE}, file)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A script, a package, and modules beside them; registering is only noted."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "train.py").write_text(REPORT)
    (tmp_path / "scripts" / "beside.py").write_text("VALUE = 'script'")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "package" / "train.py").write_text(REPORT)
    (tmp_path / "beside.py").write_text("VALUE = 'package'")
    (tmp_path / "calls").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REPORT", str(tmp_path / "report"))
    monkeypatch.setattr(sys, "argv", ["run.py"])
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])  # what `python -m` does
    monkeypatch.setattr(tp_plugin, "register", lambda: (tmp_path / "calls").write_text("registered"))
    monkeypatch.delitem(sys.modules, "beside", raising=False)
    yield tmp_path
    for name in ("beside", "package", "package.train"):
        sys.modules.pop(name, None)


def report(folder):
    assert (folder / "calls").read_text() == "registered"
    return json.loads((folder / "report").read_text())


def test_a_script_sees_its_own_arguments_name_and_neighbours(folder):
    run.main(["scripts/train.py", "--lr", "1e-3", "-m", "x"])
    assert report(folder) == {
        "name": "__main__",
        "argv": ["scripts/train.py", "--lr", "1e-3", "-m", "x"],
        "path": str(folder / "scripts"),
        "beside": "script",
    }


def test_a_module_is_run_like_a_script(folder):
    run.main(["-m", "package.train", "--lr", "1e-3"])
    assert report(folder) == {
        "name": "__main__",
        "argv": [str(folder / "package" / "train.py"), "--lr", "1e-3"],
        "path": str(folder),
        "beside": "package",
    }


@pytest.mark.parametrize("front", [["--local_rank=3"], ["--local-rank=3"], ["--local_rank", "3"]])
@pytest.mark.parametrize("target", [["scripts/train.py"], ["-m", "package.train"]])
def test_what_a_launcher_puts_in_front_is_handed_on(folder, front, target):
    run.main([*front, *target, "--lr", "1"])
    assert report(folder)["argv"][1:] == [*front, "--lr", "1"]


def test_arguments_come_from_the_command_line(folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run.py", "scripts/train.py", "7"])
    run.main()
    assert report(folder)["argv"] == ["scripts/train.py", "7"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: "),
        (["--local_rank=0"], "usage: "),
        (["missing.py"], "there is no script 'missing.py'"),
        (["scripts"], "is a directory without __main__.py"),
        (["-m"], "-m needs the name of a module"),
        (["-m", "no.such.module"], "there is no module 'no.such.module'"),
        (["--lr", "1", "scripts/train.py"], "unknown option '--lr' before the script"),
    ],
)
def test_nothing_to_run_is_said_in_one_sentence(folder, capsys, arguments, message):
    with pytest.raises(SystemExit) as left:
        run.main(arguments)
    assert left.value.code == 2
    assert message in capsys.readouterr().err
    assert not (folder / "report").exists()


def test_a_refused_registration_ends_with_its_sentence(folder, monkeypatch):
    def refuse():
        raise TensorParallelError("deepspeed 1.0 is not supported")

    monkeypatch.setattr(tp_plugin, "register", refuse)
    with pytest.raises(SystemExit, match=r"tp_plugin: deepspeed 1\.0 is not supported"):
        run.main(["scripts/train.py"])
    assert not (folder / "report").exists()


def test_errors_of_the_script_are_its_own(folder):
    (folder / "scripts" / "train.py").write_text("raise KeyError('mine')")
    with pytest.raises(KeyError, match="mine"):
        run.main(["scripts/train.py"])


def drawn_at_start(monkeypatch, rank: int, arguments: list[str], world: int = 4) -> tuple[list, list, float]:
    """What a rank that nobody seeded draws at the start of its script: from NumPy, from Python, from torch."""
    for name, value in {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "RANK": rank}.items():
        monkeypatch.setenv(name, str(value))
    with same_draws(torch.device("cpu")):
        seed_all(1000 + rank)
        run.start_alike(arguments)
        return numpy.random.permutation(8).tolist(), random.sample(range(8), 8), torch.rand(()).item()


@pytest.mark.parametrize("known", [True, False])
def test_ranks_that_nobody_seeded_draw_alike_where_they_must(monkeypatch, tmp_path, known):
    """A data set is shuffled alike on all; replicas draw masks of their own."""
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({"tensor_parallel": {"autotp_size": 2}}))
    arguments = ["--deepspeed", str(config)] if known else ["--lr", "1e-3"]
    found = [drawn_at_start(monkeypatch, rank, arguments) for rank in range(4)]
    assert all(one[:2] == found[0][:2] for one in found)
    masks = [torch for *_, torch in found]
    assert (masks[0] == masks[1], masks[2] == masks[3]) == (known, known)
    assert masks[1] != masks[2]


@pytest.mark.parametrize(("world", "degree"), [(4, 1), (1, 2)])
def test_jobs_without_groups_draw_as_ever(monkeypatch, tmp_path, world, degree):
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({"tensor_parallel": {"autotp_size": degree}}))
    with same_draws(torch.device("cpu")):
        seed_all(1003)
        expected = numpy.random.permutation(8).tolist(), random.sample(range(8), 8), torch.rand(()).item()
    assert drawn_at_start(monkeypatch, 3, [f"--deepspeed_config={config}"], world) == expected


def test_a_script_starts_with_the_ranks_alike(folder, monkeypatch):
    seen = []
    monkeypatch.setattr(run, "start_alike", lambda arguments: seen.append(list(arguments)))
    run.main(["scripts/train.py", "--deepspeed", "ds.json"])
    assert seen == [["--deepspeed", "ds.json"]]
