"""``model.push_to_hub`` of a sharded model: saved by all ranks together, uploaded once.

transformers' own would make a directory on every rank and upload each. (Trainer's pushes what ``save_model`` wrote.)
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from tp_plugin.integrations.contract import Patches, contract
from tp_plugin.integrations.transformers import export
from tp_plugin.sharding import state_of


def check_contracts() -> None:
    contract(PreTrainedModel, "push_to_hub", ["repo_id"], "every rank would upload a model")


def install(patches: Patches) -> None:
    patches.replace(PreTrainedModel, "push_to_hub", _push_to_hub_method)


def _push_to_hub_method(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def push_to_hub(self: PreTrainedModel, repo_id: str, **options: Any) -> Any:
        if state_of(self) is None:
            return original(self, repo_id, **options)
        with tempfile.TemporaryDirectory() as directory:  # rank 0's is used
            export.save(self, directory, push_to_hub=True, repo_id=repo_id, **options)
        return f"https://huggingface.co/{repo_id}"

    return push_to_hub
