"""Directories that exist whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.support.batched_cases import launched, sentence, values
from tp_plugin.errors import TensorParallelError
from tp_plugin.weights import atomic
from tp_plugin.weights.atomic import write_file, written_whole


def test_it_appears_when_the_body_is_through(tmp_path):
    target = tmp_path / "deep" / "target"
    with written_whole(target) as temporary:
        (temporary / "file").write_text("x")
        assert not target.exists()
        assert temporary.parent == target.parent
    assert (target / "file").read_text() == "x"
    assert os.listdir(target.parent) == ["target"]


@pytest.mark.parametrize("exchange", [True, False])
def test_one_of_that_name_is_replaced_whole(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    target = tmp_path / "target"
    for content in "ab":
        with written_whole(target) as temporary:
            (temporary / content).write_text(content)
    assert os.listdir(target) == ["b"]
    assert os.listdir(tmp_path) == ["target"]


def test_a_failure_leaves_everything_as_it_was(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").touch()

    def fail():
        with written_whole(target) as temporary:
            (temporary / "new").touch()
            raise OSError("no space")

    with pytest.raises(TensorParallelError, match="what was there before is untouched: OSError: no space"):
        fail()
    assert os.listdir(tmp_path) == ["target"]
    assert os.listdir(target) == ["old"]


def test_what_a_killed_job_left_goes(tmp_path):
    for left in ("01234567", "01234567-replaced"):
        (tmp_path / f".tp_plugin-writing-target-{left}").mkdir()
    with written_whole(tmp_path / "target"):
        pass
    assert os.listdir(tmp_path) == ["target"]


class Killed(BaseException):
    pass


def test_a_job_killed_between_two_renames_loses_nothing(tmp_path, monkeypatch, caplog):
    """Where there is no exchange: the old state lies aside, and a save that fails then does not cost it."""
    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    target, real = tmp_path / "target", os.rename
    with written_whole(target) as temporary:
        (temporary / "old").touch()

    def save(name: str) -> None:
        with written_whole(target) as temporary:
            (temporary / name).touch()
            if name == "failing":
                raise OSError("no space")

    def rename(one, other):
        if Path(other) == target and target.with_name(f"{Path(one).name}-replaced").exists():
            raise Killed
        real(one, other)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(Killed):
        save("new")
    monkeypatch.setattr(os, "rename", real)
    assert sorted(name.endswith("-replaced") for name in os.listdir(tmp_path)) == [False, True], "both lie aside"
    with pytest.raises(TensorParallelError, match="no space"):
        save("failing")
    assert os.listdir(target) == ["old"]
    assert "was being replaced when a job ended, and is what it was before" in caplog.text
    save("newest")
    assert os.listdir(target) == ["newest"]
    assert os.listdir(tmp_path) == ["target"]


def test_a_place_that_cannot_be_taken_is_given_back(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    target, real, failing = tmp_path / "target", os.rename, []
    with written_whole(target) as temporary:
        (temporary / "old").touch()

    def rename(one, other):
        if Path(other) == target and not str(one).endswith("-replaced"):
            failing.append(one)
            raise OSError(5, "Input/output error")
        real(one, other)

    monkeypatch.setattr(os, "rename", rename)
    said = "what was there before is untouched: OSError: Input/output error"
    with pytest.raises(TensorParallelError, match=said), written_whole(target) as temporary:
        (temporary / "new").touch()
    assert len(failing) == 2
    assert os.listdir(target) == ["old"]
    assert os.listdir(tmp_path) == ["target"]


@pytest.mark.parametrize("exchange", [True, False])
def test_what_cannot_be_cleared_away_is_no_failed_save(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").touch()

    def rmtree(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError("still open")

    monkeypatch.setattr(atomic.shutil, "rmtree", rmtree)
    with written_whole(target) as temporary:
        (temporary / "new").touch()
    assert os.listdir(target) == ["new"]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_followed(tmp_path, there):
    real, link = tmp_path / "elsewhere" / "real", tmp_path / "here" / "link"
    link.parent.mkdir()
    link.symlink_to(real)
    if there:
        real.mkdir(parents=True)
        (real / "old").touch()
    with written_whole(link) as temporary:
        (temporary / "new").touch()
    assert link.is_symlink()
    assert os.listdir(link) == ["new"]
    assert (os.listdir(link.parent), os.listdir(real.parent)) == (["link"], ["real"])


@pytest.mark.parametrize("other", ["other", "target-2", "tar"])
def test_a_save_under_another_name_goes_on_beside_it(tmp_path, other):
    with written_whole(tmp_path / other) as temporary:
        (temporary / "file").write_text("x")
        with written_whole(tmp_path / "target"):
            pass
    assert (tmp_path / other / "file").read_text() == "x"


def test_a_file_in_the_way_is_not_removed(tmp_path):
    (tmp_path / "target").write_text("mine")
    with pytest.raises(TensorParallelError, match="failed"), written_whole(tmp_path / "target"):
        pass
    assert (tmp_path / "target").read_text() == "mine"


def test_a_small_file_is_replaced_in_one_step(tmp_path, monkeypatch):
    write_file(tmp_path / "latest", b"a")
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        write_file(tmp_path / "latest", b"b")
    assert (tmp_path / "latest").read_text() == "a"
    assert os.listdir(tmp_path) == ["latest"]


# ---- several ranks ---------------------------------------------------------------------------------------------------


def together():
    where = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(where)
    target = Path(where[0], "target")
    with written_whole(target) as temporary:
        (temporary / str(dist.get_rank())).touch()
    return sorted(os.listdir(target)), os.listdir(where[0])


def one_fails():
    where = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(where)
    try:
        with written_whole(Path(where[0], "target")):
            if dist.get_rank() == 1:
                raise OSError(28, "No space left on device")
    except TensorParallelError as refused:
        dist.barrier()
        assert os.listdir(where[0]) == []
        raise TensorParallelError(str(refused).replace(where[0], "FOLDER")) from None


def outcomes():
    return launched(3, __name__, ("together", "one_fails"))


def test_all_ranks_write_into_one():
    assert values(outcomes(), "together") == [(["0", "1", "2"], ["target"])] * 3


def test_what_one_rank_raises_all_raise():
    said = sentence(outcomes(), "one_fails")
    assert said.startswith(
        "writing 'FOLDER/target' failed, and what was there before is untouched: OSError: No space left"
    )
