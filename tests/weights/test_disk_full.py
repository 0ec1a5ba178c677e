"""A disk that is really full: a small tmpfs with a save in it and no room for the next."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch.distributed as dist

import tp_plugin
from tests.support import resume
from tests.support.ranks import on_ranks
from tp_plugin.errors import TensorParallelError


@pytest.fixture
def disk(tmp_path):
    """16 MiB, of which everybody who is not root may need a user namespace to mount any."""
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(tmp_path)], capture_output=True)
    if done.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {done.stderr.decode().strip()}")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def fill(folder: Path, leave: int) -> None:
    """Take all room but ``leave`` bytes."""
    free = shutil.disk_usage(folder).free
    with open(folder / "filler", "wb") as filler:
        os.posix_fallocate(filler.fileno(), 0, free - leave)


def checkpoint(engine, folder: Path, number: int) -> None:
    engine.save_checkpoint(str(folder / "kept"), tag=f"step{number}")


def export(engine, folder: Path, _number: int) -> None:
    tp_plugin.save_pretrained(engine, folder / "kept", max_shard_size="30KB")


def saved_on_a_full_disk(save, disk):
    """The sentence of a save without room, whether the one before is as it was, and losses and sizes afterwards."""
    engine = resume.engine_of(2, 1, family="Llama", heads=(4, 2), tied=False)
    resume.train(engine, 2, (0,), "Llama")
    save(engine, disk, 1)
    resume.train(engine, 2, (1,), "Llama")
    dist.barrier()
    before = contents(disk / "kept")
    if dist.get_rank() == 0:
        fill(disk, sum(map(len, before.values())) // 2)
    dist.barrier()
    with pytest.raises(TensorParallelError) as caught:
        save(engine, disk, 2)
    dist.barrier()
    untouched = contents(disk / "kept") == before
    left = sorted(path.name for path in disk.iterdir())
    dist.barrier()
    if dist.get_rank() == 0:
        (disk / "filler").unlink()
    dist.barrier()
    save(engine, disk, 2)  # and with room again
    return str(caught.value), untouched, left, contents(disk / "kept").keys() >= before.keys()


@pytest.mark.parametrize("save", [checkpoint, export])
def test_a_save_without_room_loses_nothing(save, disk):
    first, second = on_ranks(2, saved_on_a_full_disk, save, disk)
    assert first == second
    said, untouched, left, saved = first
    assert "No space left on device" in said
    assert untouched
    assert left == ["filler", "kept"]
    assert saved
