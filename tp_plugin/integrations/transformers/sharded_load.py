"""One load of a checkpoint of which each rank reads its slices only, within transformers' ``from_pretrained``.

transformers finds the files, builds the model on ``meta``, renames and converts the checkpoint's tensors, initialises
missing ones and reads the generation config. Instead of the file's tensors it gets some that are not read yet
(:class:`tp_plugin.weights.checkpoint_view.Unread`). When names and shapes are settled and all ranks agree, the plan is
made, and each rank reads its slices. Tensors missing in the checkpoint are initialised in full by transformers, then
sharded. Classes change last.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel, core_model_loading, modeling_utils

from tp_plugin.config import TensorParallelConfig
from tp_plugin.errors import TensorParallelError, agree
from tp_plugin.layout import ShardLayout
from tp_plugin.mesh import ParallelMesh
from tp_plugin.peers import prepare
from tp_plugin.plans import Plan
from tp_plugin.sharding.require_same import facts_of, require_same
from tp_plugin.sharding.shard import install_sharded as install_sharded
from tp_plugin.sharding.shard import layouts_by_name, planned
from tp_plugin.sharding.sync_params import require_alike, sync_params
from tp_plugin.step_guard.trial import proven, watched
from tp_plugin.weights.checkpoint_view import Unread, read_shards, share_new, unread_names
from tp_plugin.weights.reader import Reader
from tp_plugin.weights.sources import Stored


class Load:
    """One ``from_pretrained`` under way on all ranks.

    Attributes:
        agreed: every rank raises the current exception; otherwise it is this rank's own until the ranks agree on it.
    """

    def __init__(self, name: Any, config: TensorParallelConfig, mesh: ParallelMesh) -> None:
        self.name, self.config, self.mesh = name, config, mesh
        self.agreed = False
        self.reader: Reader | None = None
        self.files: list[str] = []
        self.plan: Plan | None = None
        self.layouts: dict[str, ShardLayout] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.new: set[str] = set()  # parameters that the checkpoint lacks

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Mark the body as one whose exceptions every rank raises."""
        self.agreed = True
        yield
        self.agreed = False

    def meet(self, error: str | None = None) -> None:
        """Wait for all ranks; raise on all of them if one has an ``error``."""
        with self.together():
            agree(error)

    def open(self, files: Sequence[str], index: Mapping[str, str] | None) -> None:
        """Read all headers and a part of every tensor, which must be the same on every rank."""
        self.reader, self.files = Reader.open(files, index), list(files)
        reader = self.reader
        facts = {
            f"tensor {name!r} of the checkpoint": f"{reader.dtype(name)} {list(reader.shape(name))} with a part that "
            f"hashes to {reader.probe(name)}"
            for name in reader.names()
        }
        self.meet()
        with self.together():
            require_same(facts)

    def fill(self, model: PreTrainedModel, files: Sequence[str], options: Any) -> Any:
        """Settle names and shapes, plan, and read this rank's shards into ``model``, which is on ``meta``."""
        if options.pretrained_model_name_or_path != self.name:
            raise TensorParallelError(
                f"{str(self.name)!r} is an adapter; load its base model {options.pretrained_model_name_or_path!s} and "
                "put the adapter on it with PEFT."
            )
        if list(files) != self.files:
            self.close()  # the class has some of its weights in a file of another name
            self.open(files, None)
        assert self.reader is not None
        reader = self.reader
        waiting = {
            name: Unread(Stored(reader.shape(name), reader.dtype(name), reader, name)) for name in reader.names()
        }
        convert = core_model_loading.convert_and_load_state_dict_in_model
        theirs = {"tp_plan": None} if "tp_plan" in inspect.signature(convert).parameters else {}  # before 5.16
        info, _ = convert(model=model, state_dict=waiting, load_config=options, **theirs)
        del waiting
        self.meet(self._misfit(model, info, options))
        self._settle_ties(model, info.missing_keys)
        model.tie_weights(missing_keys=set(info.missing_keys), recompute_mapping=False)
        with self.together():
            require_same(facts_of(model, self.config))
            prepare(self.mesh)
            if dist.is_initialized():
                require_alike(dict(model.named_parameters()))
            self.config = proven(model, self.config, self.mesh, unread=True)
            self.plan = planned(model, self.config, self.mesh, unread=True)
        # ties are settled; when transformers ties again, a new bias has full size beside a weight that is a shard
        model._adjust_bias = lambda *_: None  # type: ignore[method-assign]
        self.layouts = layouts_by_name(model, self.plan)
        self.shapes = {name: tuple(param.shape) for name, param in model.named_parameters()}
        self.new = set(self.shapes) - set(unread_names(model))
        read_shards(model, self.layouts, self.mesh)
        self.meet()
        return info

    def finish(self, model: nn.Module) -> None:
        """Shard the newly initialised parameters, then change classes."""
        if self.plan is None:
            raise TensorParallelError(
                f"{str(self.name)!r} was not loaded from safetensors or .bin files in transformers' format; save it "
                "with save_pretrained, without distributed_checkpoint."
            )
        del model._adjust_bias
        new = [(name, tuple(param.shape)) for name, param in model.named_parameters() if name in self.new]
        wrong = [name for name, shape in new if shape != self.shapes[name]]
        self.meet(
            f"{wrong[0]!r}, which {self.name!s} lacks, was not initialised with its full shape." if wrong else None
        )
        with self.together(), torch.no_grad():
            share_new(model, self.new, self.layouts, self.mesh)
            equalised = sync_params(model, self.mesh, leaving=self.layouts)
        with torch.no_grad():  # work of this rank alone; meet() shares its error
            record = install_sharded(model, self.plan, self.config, self.mesh, self.shapes, equalised)
            watched(model, record)
        self.meet()

    def close(self) -> None:
        if self.reader is not None:
            self.reader.close()

    def _misfit(self, model: PreTrainedModel, info: Any, options: Any) -> str | None:
        """Return an error if names or shapes show that the checkpoint is not this model's; None if they fit."""
        kind, name = type(model).__name__, str(self.name)
        if info.conversion_errors:
            key, text = next(iter(info.conversion_errors.items()))
            reason = next((line for line in text.splitlines()[::-1] if "Error" in line), text).strip().rstrip(".")
            return f"the tensors of {name!r} for {key!r} cannot be converted as transformers prescribes ({reason})."
        if info.mismatched_keys and not options.ignore_mismatched_sizes:
            key, stored, wanted = sorted(info.mismatched_keys)[0]
            more = f" (and {len(info.mismatched_keys) - 1} more)" if len(info.mismatched_keys) > 1 else ""
            return (
                f"{key!r} of {name!r} has shape {list(stored)} where {kind} with its config has {list(wanted)}{more}; "
                "correct the config, or pass ignore_mismatched_sizes=True to initialise such weights again."
            )
        if not unread_names(model):
            found = sorted(info.unexpected_keys)
            return (
                f"{name!r} holds no weights of {kind} (its tensors are named like {found[0] if found else 'nothing'!r})"
                "; name a checkpoint of that architecture, or the model_class it was saved from."
            )
        return None

    def _settle_ties(self, model: PreTrainedModel, missing: set[str]) -> None:
        """Tie parameters of which the checkpoint has both where they are equal, as transformers does.

        Each rank compares its share of the rows, and all ranks get the same result.
        """
        for target, source in list(model.all_tied_weights_keys.items()):
            if {target, source} & missing:
                continue
            one, other = model.get_parameter(target), model.get_parameter(source)
            if one is other or not (isinstance(one, Unread) and isinstance(other, Unread)):
                continue
            if not self._all(functools.partial(_equal_here, one, other)):
                model.all_tied_weights_keys.pop(target)
                if not dist.is_initialized() or dist.get_rank() == 0:
                    modeling_utils.logger.warning(
                        f"{target} and {source} are tied in the config and differ in the checkpoint {self.name!s}; "
                        "they stay separate. Set tie_word_embeddings=False in the config to silence this."
                    )
                continue
            parent, _, leaf = target.rpartition(".")
            setattr(model.get_submodule(parent), leaf, other)

    def _all(self, ask: Callable[[], bool]) -> bool:
        """Tell if ``ask()`` is true on every rank; a collective call."""
        here, error = False, None
        try:
            here = ask()
        except TensorParallelError as failure:
            error = str(failure)
        self.meet(error)
        if not dist.is_initialized():
            return here
        found: list[object] = [None] * dist.get_world_size()
        dist.all_gather_object(found, here)
        return all(found)


def _equal_here(one: Unread, other: Unread) -> bool:
    """Compare this rank's share of the rows."""
    if one.shape != other.shape:
        return False
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    parts = []
    for tensor in (one, other):
        layout = ShardLayout.even(tuple(tensor.shape), 0, ranks)
        parts.append(torch.empty(layout.local_shape(rank), dtype=tensor.dtype))
        for index in layout.slices(rank):
            tensor.read_into(parts[-1], index)
    return torch.equal(*parts)
