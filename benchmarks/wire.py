"""What a piece of work sends, counted at torch.distributed beneath whoever sends it; and where it ran."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

REDUCERS = (
    *("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_single", "reduce_scatter_tensor"),
    "broadcast",
)


def traffic(work: Callable[[], object]) -> dict[str, int]:
    """Collectives issued in ``work`` and the bytes of this rank's tensors in them."""
    found = {"collectives": 0, "bytes": 0}
    with spying(found):
        work()
    return found


@contextlib.contextmanager
def spying(found: dict[str, int]) -> Iterator[None]:
    """Count into ``found`` inside the ``with`` block."""
    originals = {name: getattr(dist, name) for name in REDUCERS if hasattr(dist, name)}

    def spy(name: str) -> Callable[..., object]:
        def counted(*args: object, **kwargs: object) -> object:
            tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
            found["collectives"] += 1
            found["bytes"] += tensors[-1].numel() * tensors[-1].element_size() if tensors else 0
            return originals[name](*args, **kwargs)

        return counted

    for name in originals:
        setattr(dist, name, spy(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def circumstances(device: torch.device, *packages: str) -> dict[str, object]:
    """Date, machine and the versions of torch and ``packages``, for a result's file."""
    chip = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        chip = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    if device.type == "cuda":
        chip = f"{torch.cuda.get_device_name(device)}; {chip}"
    versions = {}
    for name in ("torch", *packages):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{chip}, {os.cpu_count()} cores",
        "versions": versions,
    }
