"""What a save has put on the disk, and in which order: a crash of the machine must not find a name without its bytes.

The real calls are noted on their way to the system. A file is known by its inode, which it keeps through a rename.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import tp_plugin
from tests.support.ranks import on_ranks
from tests.support.resume import engine_of, train
from tp_plugin.integrations.checkpoint_folders import LATEST
from tp_plugin.weights import atomic
from tp_plugin.weights.atomic import write_file, written_whole
from tp_plugin.weights.safetensors_file import write_tensors


@dataclasses.dataclass(frozen=True)
class Call:
    """``kind`` is "fsync" or "rename", ``inode`` what was synced or moved, ``size`` how long it was then."""

    at: int
    kind: str
    inode: int
    size: int
    path: str


@contextlib.contextmanager
def noted() -> Iterator[list[Call]]:
    """The fsyncs and renames of this process, in order; nothing is kept from being done."""
    calls: list[Call] = []
    fsync, exchange = os.fsync, atomic._exchange

    def synced(handle: int) -> None:
        fsync(handle)
        found = os.fstat(handle)
        path = os.readlink(f"/proc/self/fd/{handle}")
        calls.append(Call(time.monotonic_ns(), "fsync", found.st_ino, found.st_size, path))

    def moving(real):
        def moved(one, other, **more):
            at = time.monotonic_ns()  # what comes later is later than the call, what it needs is earlier
            result = real(one, other, **more)
            if result is not False:  # an exchange that the system does not know
                calls.append(Call(at, "rename", os.stat(other).st_ino, 0, str(other)))
            return result

        return moved

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", synced)
        patch.setattr(os, "rename", moving(os.rename))
        patch.setattr(os, "replace", moving(os.replace))
        patch.setattr(atomic, "_exchange", moving(exchange))
        yield calls


def on_the_disk(calls: list[Call], target: Path) -> None:
    """``target`` and all in it was synced, at its full size, before it came into its place, and the place after."""
    renames = [call for call in calls if call.kind == "rename" and call.inode == target.stat().st_ino]
    assert len(renames) == 1, f"{target.name} came to its place {len(renames)} times"
    for path in [target, *target.rglob("*")] if target.is_dir() else [target]:
        found = path.stat()
        synced = [call for call in calls if call.kind == "fsync" and call.inode == found.st_ino]
        assert any(call.at < renames[0].at and (path.is_dir() or call.size == found.st_size) for call in synced), (
            f"{path.name} may lie empty under its name"
        )
    parent = target.parent.stat().st_ino
    assert any(call.at > renames[0].at and call.kind == "fsync" and call.inode == parent for call in calls), (
        f"the name of {target.name} may be lost"
    )


def everyones(calls: list[Call]) -> list[Call]:
    every: list = [None] * dist.get_world_size()
    dist.all_gather_object(every, calls)
    return sorted((call for one in every for call in one), key=lambda call: call.at)


def saved() -> dict[str, str]:
    """A checkpoint and an export of two ranks, and again over them: what is wrong with each, on the first rank."""
    shared = [tempfile.mkdtemp()]
    dist.broadcast_object_list(shared)
    checkpoints, export, wrong = Path(shared[0], "checkpoints"), Path(shared[0], "export"), {}
    engine = engine_of(2, 1)

    def checkpoint() -> list[Path]:
        engine.save_checkpoint(checkpoints, "tag")
        return [checkpoints / "tag", checkpoints / LATEST]

    def exported() -> list[Path]:
        tp_plugin.save_pretrained(engine, export, max_shard_size="20KB")
        return [path for path in export.rglob("*") if path.is_file()]

    for name, save in (("checkpoint", checkpoint), ("export", exported)) * 2:
        train(engine, 2, (0,))
        with noted() as mine:
            targets = save()
        calls, problem = everyones(mine), ""
        if dist.get_rank() == 0:
            try:
                for target in targets:
                    on_the_disk(calls, target)
                if name == "checkpoint":
                    latest_is_last(calls, *targets)
                else:
                    assert len(targets) > 4, "everything is in one file"
            except AssertionError as failure:
                problem = str(failure)
        wrong[f"{name} over another" if name in wrong else name] = problem
        dist.barrier()
    return wrong


def latest_is_last(calls: list[Call], directory: Path, latest: Path) -> None:
    swapped, named = (
        max(call.at for call in calls if call.kind == "rename" and call.inode == path.stat().st_ino)
        for path in (directory, latest)
    )
    parent = directory.parent.stat().st_ino
    assert any(swapped < call.at < named for call in calls if call.kind == "fsync" and call.inode == parent), (
        "`latest` may name a directory whose own name is lost"
    )


@functools.cache
def outcome() -> dict[str, str]:
    return on_ranks(2, saved)[0]


@pytest.mark.parametrize("name", ["checkpoint", "export", "checkpoint over another", "export over another"])
def test_a_save_is_on_the_disk_before_it_has_its_name(name):
    assert outcome()[name] == ""


@pytest.mark.parametrize("exchange", [True, False])
def test_a_directory_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    for content in (torch.zeros(1), torch.ones(2)):
        with noted() as calls, written_whole(tmp_path / "target") as temporary:
            write_tensors(temporary / "file", {"a": content})
        calls = [call for call in calls if not call.path.endswith("-replaced")]  # what is moved out of the way
        on_the_disk(calls, tmp_path / "target")
    assert torch.equal(load_file(tmp_path / "target" / "file")["a"], content)


def test_a_small_file_is_on_the_disk_before_it_has_its_name(tmp_path):
    for content in (b"a", b"bc"):
        with noted() as calls:
            write_file(tmp_path / "latest", content)
        on_the_disk(calls, tmp_path / "latest")
