"""A file in place of an optimizer's state that the engine checkpoint has; loading it raises an explanation."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import torch

from tp_plugin.errors import TensorParallelError


class OptimizerStateLiesInTheEngineCheckpoint_ResumeUnderDeepSpeedWithTpPlugin:
    """``torch.load(weights_only=True)`` reports this name; unpickling an instance otherwise raises."""

    def __reduce__(self) -> tuple:
        return type(self), ()

    def __new__(cls, *, written: bool = False) -> Any:
        if not written:
            _refuse()
        return super().__new__(cls)


def _refuse() -> NoReturn:
    raise TensorParallelError(
        "the optimizer's state is in tp_plugin's engine checkpoint beside this file: resume under DeepSpeed with "
        "tp_plugin (autotp_size 1 is enough), or start a new run from the model's directory."
    )


def write(path: Path) -> None:
    """Write the file."""
    torch.save(OptimizerStateLiesInTheEngineCheckpoint_ResumeUnderDeepSpeedWithTpPlugin(written=True), path)
