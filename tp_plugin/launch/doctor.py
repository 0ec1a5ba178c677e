"""``tp-plugin doctor``: what this environment has and lacks, in the order in which a user would look for a fault."""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator

import torch

from tp_plugin.errors import TensorParallelError
from tp_plugin.integrations.features import Feature, reasons_of
from tp_plugin.integrations.rooms import ROOMS
from tp_plugin.integrations.versions import TESTED, installed, is_tested

COMPILERS = {"c++": "DeepSpeed's CPU optimizers", "ninja": "DeepSpeed on a CPU", "nvcc": "DeepSpeed's fused optimizers"}
"""Programs that are called while training, and what calls them."""
VARIABLES = (
    "CUDA_",
    "NCCL_",
    "GLOO_",
    "TORCH_",
    "DS_",
    "ACCELERATE_",
    "PARALLELISM_CONFIG_",
    "OMP_",
    "HF_",
    "TRITON_",
    "TP_PLUGIN",
)
"""Beginnings of environment variables that change how ranks are started and speak with each other."""
_SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD")


@dataclasses.dataclass(frozen=True)
class Line:
    """One row of the report: ``state`` is "ok", "new" (no test ran with it), "none" or "lost"."""

    part: str
    subject: str
    state: str
    text: str


def diagnose() -> Iterator[Line]:
    """Rows about libraries, features, devices, compilers and variables; imports the libraries."""
    yield from libraries()
    yield from features()
    yield from devices()
    for name, use in COMPILERS.items():
        path = shutil.which(name)
        yield Line("compilers", name, "ok" if path else "none", path or f"not found; needed by {use}")
    for name in sorted(os.environ):
        if name.startswith(VARIABLES):
            hidden = any(word in name for word in _SECRET)
            yield Line("variables", name, "ok", "(hidden)" if hidden else os.environ[name])


def libraries() -> Iterator[Line]:
    """The libraries that tp_plugin plugs into, and whether tests ran with their versions."""
    yield Line("libraries", "python", "ok", platform.python_version())
    for name, tested in TESTED.items():
        version = installed(name)
        if version is None:
            yield Line("libraries", name, "none", "not installed")
        elif is_tested(name, version):
            yield Line("libraries", name, "ok", version)
        else:
            text = f"{version}; tests ran with {', '.join(tested)}, so the guard cannot be switched off"
            yield Line("libraries", name, "new", text)


def features() -> Iterator[Line]:
    """Features by library, and every name that has moved."""
    for room in ROOMS:
        if installed(room.library) is None:
            continue
        room.check()
        names: dict[Feature, int] = dict.fromkeys(room.features(), 0)
        for one in room.declarations():
            names[one.feature] = names.get(one.feature, 0) + len(one.names)
        for feature, count in names.items():
            if feature.broken is None:
                yield Line("features", feature.library, "ok", f"{feature.name}: {count} names")
            else:
                yield Line("features", feature.library, "lost", feature.broken)
                for reason in reasons_of(feature)[1:]:
                    yield Line("features", feature.library, "lost", reason)


def devices() -> Iterator[Line]:
    """GPUs, their memory and the library that connects them."""
    if not torch.cuda.is_available():
        yield Line("devices", "GPU", "none", f"none that torch {torch.__version__} can use; ranks use gloo on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        reach = [n for n in range(torch.cuda.device_count()) if n != index and _reaches(index, n)]
        text = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, direct access to {reach or 'none'}"
        yield Line("devices", f"GPU {index}", "ok", text)
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else ""
    yield Line("devices", "NCCL", "ok" if nccl else "none", nccl or "torch was built without it")
    yield Line("devices", "driver", "ok", _driver() or "unknown; nvidia-smi is not found or fails")


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if shutil.which(query[0]) is None:
        return ""
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return done.stdout.split("\n")[0] if done.returncode == 0 else ""


def _reaches(index: int, other: int) -> bool:
    return torch.cuda.can_device_access_peer(index, other)


def self_test() -> Line:
    """Train a small Llama on two CPU ranks and in one process, and compare them; takes about ten seconds."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tp_plugin.config import TensorParallelConfig
    from tp_plugin.model_check.check import check

    began = time.monotonic()
    try:
        parity = check(LlamaForCausalLM, LlamaConfig(), TensorParallelConfig(tp_size=2, quiet=True)).parity
    except TensorParallelError as failure:
        return Line("self-test", "two ranks", "lost", str(failure))
    errors = ", ".join(f"{name} {error:.0e}" for name, error in parity.errors.items()) or parity.sentence
    text = f"a small Llama on two CPU ranks against one process: {parity.verdict} ({errors}) in"
    state = "ok" if parity.verdict == "equal" else "lost"
    return Line("self-test", "two ranks", state, f"{text} {time.monotonic() - began:.0f} s")
