"""``from_pretrained`` that brings only this rank's shards into memory.

transformers' own ``from_pretrained`` runs: it finds the files, builds the model on ``meta``, renames and converts the
checkpoint's tensors, initialises what is missing, reads the generation config. It is given tensors that have not been
read (:class:`tp_plugin.weights.unread.Unread`) in place of the file's; when every name and shape is settled, and all
ranks agree, the plan is made, and each rank reads its slices. What is missing in the checkpoint is initialised whole,
as transformers does it, and cut then; classes change last.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel, core_model_loading, modeling_utils
from transformers.integrations import deepspeed as trainer_side

from tp_plugin.config import TensorParallelConfig
from tp_plugin.errors import TensorParallelError, agree, meet, sentence_of
from tp_plugin.layout import ShardLayout
from tp_plugin.mesh import ParallelMesh, take_device
from tp_plugin.plans import Plan
from tp_plugin.sharding.equal import make_equal, require_alike
from tp_plugin.sharding.shard import install as install_sharded
from tp_plugin.sharding.shard import layouts_by_name, planned
from tp_plugin.verify.guard import proven, watched
from tp_plugin.weights.load import read_shards, share_new, unread_names
from tp_plugin.weights.reader import Reader
from tp_plugin.weights.unread import Stored, Unread

_CURRENT: Load | None = None


def current() -> Load | None:
    """The load under way in this process."""
    return _CURRENT


def load_sharded(call: Callable[[], Any], name: Any, config: TensorParallelConfig) -> Any:
    """What ``call`` (some ``from_pretrained`` of transformers) returns, its model sharded; a collective call.

    Args:
        call: loads ``name`` once.
        name: a directory or the id of a repository.
        config: ``tp_size`` and options.

    Raises:
        TensorParallelError: on every rank together, before anything is read if the checkpoint does not fit.
    """
    global _CURRENT
    if dist.is_initialized():
        take_device()
        meet("from_pretrained")
    mesh = ParallelMesh.create(config.tp_size)
    load = _CURRENT = Load(name, config, mesh)
    try:
        with zero3_asleep():
            _check_directory(name)
            found = call()
            load.finish(found[0] if isinstance(found, tuple) else found)
        return found
    except Exception as failure:
        if load.agreed:
            raise
        try:
            agree(_sentence(name, failure))  # the others wait for this rank's word before they go on
        except TensorParallelError as together:
            raise together from failure
        raise
    finally:
        _CURRENT = None
        load.close()


def _check_directory(name: Any) -> None:
    """What is clearly meant to be a directory must be one, with something in it."""
    path = str(name)
    if os.path.isdir(path):
        if not os.listdir(path):
            raise TensorParallelError(f"the directory {path!r} is empty; name that of a saved model.")
        if os.path.exists(os.path.join(path, "adapter_config.json")):
            raise TensorParallelError(
                f"{path!r} is an adapter; load its base model and put the adapter on it with PEFT."
            )
    elif os.path.isabs(path) or path.startswith("."):
        raise TensorParallelError(f"there is no directory {path!r}; name that of a saved model, or a repository.")


def saved_class(name: str, options: Mapping[str, Any]) -> Any:
    """The transformers class that a checkpoint says it was saved from; the auto class of causal LMs if it does not."""
    import transformers

    config = options.get("config")
    if not isinstance(config, transformers.PreTrainedConfig):
        known = {"trust_remote_code", "revision", "subfolder", "token", "cache_dir", "local_files_only"}
        config = transformers.AutoConfig.from_pretrained(
            config or name, **{key: value for key, value in options.items() if key in known}
        )
    saved = (getattr(config, "architectures", None) or [""])[0]
    if getattr(config, "auto_map", None) and options.get("trust_remote_code"):
        return transformers.AutoModelForCausalLM
    return getattr(transformers, saved, None) or transformers.AutoModelForCausalLM


class Load:
    """One ``from_pretrained`` under way on all ranks.

    Attributes:
        agreed: all ranks raise what is being raised; an error is otherwise this rank's own until it has told the rest.
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
        """What is raised in here is raised on every rank."""
        self.agreed = True
        yield
        self.agreed = False

    def meet(self, error: str | None = None) -> None:
        """Go on only when all ranks have come this far."""
        with self.together():
            agree(error)

    def open(self, files: Sequence[str], index: Mapping[str, str] | None) -> None:
        """Read all headers; on every rank they must be the same."""
        self.reader, self.files = Reader.open(files, index), list(files)
        known = sorted((name, self.reader.shape(name), str(self.reader.dtype(name))) for name in self.reader.names())
        self.meet()
        if dist.is_initialized():
            digests: list[object] = [None] * dist.get_world_size()
            dist.all_gather_object(digests, hashlib.sha256(str(known).encode()).digest())
            other = next((rank for rank, digest in enumerate(digests) if digest != digests[0]), None)
            with self.together():
                if other is not None:
                    raise TensorParallelError(
                        f"ranks 0 and {other} find different checkpoints under {str(self.name)!r} (other names, shapes "
                        "or dtypes); give every host the same files."
                    )

    def fill(self, model: PreTrainedModel, files: Sequence[str], options: Any) -> Any:
        """Settle every name and shape, plan, and read this rank's shards into ``model``, which is on ``meta``."""
        if options.pretrained_model_name_or_path != self.name:
            raise TensorParallelError(
                f"{str(self.name)!r} is an adapter; load its base model {options.pretrained_model_name_or_path!s} and "
                "put the adapter on it with PEFT."
            )
        if list(files) != self.files:
            self.close()  # a class that keeps some of its weights in a file of another name
            self.open(files, None)
        assert self.reader is not None
        reader = self.reader
        waiting = {
            name: Unread(Stored(reader.shape(name), reader.dtype(name), reader, name)) for name in reader.names()
        }
        info, _ = core_model_loading.convert_and_load_state_dict_in_model(
            model=model, state_dict=waiting, load_config=options
        )
        del waiting
        self.meet(self._misfit(model, info, options))
        self._settle_ties(model, info.missing_keys)
        model.tie_weights(missing_keys=set(info.missing_keys), recompute_mapping=False)
        with self.together():
            if dist.is_initialized():
                require_alike(dict(model.named_parameters()))
            self.config = proven(model, self.config, self.mesh, unread=True)
            self.plan = planned(model, self.config, self.mesh, unread=True)
        # ties are settled; when transformers ties again a bias that is new is whole, and the weight beside it a shard
        model._adjust_bias = lambda *_: None  # type: ignore[method-assign]
        self.layouts = layouts_by_name(model, self.plan)
        self.shapes = {name: tuple(param.shape) for name, param in model.named_parameters()}
        self.new = set(self.shapes) - set(unread_names(model))
        read_shards(model, self.layouts, self.mesh)
        self.meet()
        return info

    def finish(self, model: nn.Module) -> None:
        """Cut what was missing and has been initialised, then change classes."""
        if self.plan is None:
            raise TensorParallelError(
                f"{str(self.name)!r} was not loaded from safetensors or .bin files in transformers' format; save it "
                "with save_pretrained, without distributed_checkpoint."
            )
        del model._adjust_bias
        new = [(name, tuple(param.shape)) for name, param in model.named_parameters() if name in self.new]
        wrong = [name for name, shape in new if shape != self.shapes[name]]
        self.meet(f"{wrong[0]!r}, which {self.name!s} lacks, was not initialised whole." if wrong else None)
        with self.together(), torch.no_grad():
            share_new(model, self.new, self.layouts, self.mesh)
            equalised = make_equal(model, self.mesh, leaving=self.layouts)
        with torch.no_grad():  # this rank's own work, of which the others hear
            record = install_sharded(model, self.plan, self.config, self.mesh, self.shapes, equalised)
            watched(model, record)
        self.meet()

    def close(self) -> None:
        if self.reader is not None:
            self.reader.close()

    def _misfit(self, model: PreTrainedModel, info: Any, options: Any) -> str | None:
        """Why the checkpoint is not this model's; None if it is, as far as names and shapes tell."""
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
                "correct the config, or pass ignore_mismatched_sizes=True to start such weights anew."
            )
        if not unread_names(model):
            found = sorted(info.unexpected_keys)
            return (
                f"{name!r} holds no weights of {kind} (its tensors are named like {found[0] if found else 'nothing'!r})"
                "; name a checkpoint of that architecture, or the model_class it was saved from."
            )
        return None

    def _settle_ties(self, model: PreTrainedModel, missing: set[str]) -> None:
        """Tied parameters that the checkpoint has both of are one where they are equal, as transformers has it.

        Each rank compares its share of the rows, so all come to the same conclusion.
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
                        "they stay two. Set tie_word_embeddings=False in the config to silence this."
                    )
                continue
            parent, _, leaf = target.rpartition(".")
            setattr(model.get_submodule(parent), leaf, other)

    def _all(self, ask: Callable[[], bool]) -> bool:
        """Whether the answer is yes on every rank."""
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
    """Whether this rank's share of the rows is equal in both."""
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


@contextlib.contextmanager
def zero3_asleep() -> Iterator[None]:
    """transformers builds and loads models as it does without ZeRO-3."""
    known = trainer_side._hf_deepspeed_config_weak_ref
    trainer_side._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        trainer_side._hf_deepspeed_config_weak_ref = known


def _sentence(name: Any, failure: Exception) -> str:
    """One sentence about what went wrong on this rank alone."""
    if isinstance(failure, TensorParallelError):
        return str(failure)
    if "trust_remote_code=True" in str(failure):
        return (
            f"{str(name)!r} brings modelling code of its own, which is not run unasked; read it, then pass "
            "trust_remote_code=True (model.trust_remote_code: true in a recipe)."
        )
    return f"cannot load {str(name)!r}: {sentence_of(failure)}."
