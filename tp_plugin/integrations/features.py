"""Features of the plugin and the library that each relies on: a name that has moved costs its feature alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from tp_plugin.errors import TensorParallelError
from tp_plugin.integrations.versions import WHOLE, named


@dataclasses.dataclass(frozen=True, eq=False)
class Feature:
    """A use of the plugin that names of another library make possible.

    Attributes:
        name: the use, as the object of a sentence ("saving a sharded model").
        library: distribution that has the names.
        instead: a way without it, "" if there is none.
        needed: nothing works without it; ``register()`` refuses.
        places: public functions at which it is refused while a model is sharded, beside those that we replace:
            "module:Class.method".
    """

    name: str
    library: str
    instead: str = ""
    needed: bool = False
    places: tuple[str, ...] = ()

    @property
    def broken(self) -> str | None:
        """The sentence that refuses it; None while every name it relies on is there."""
        reasons = _MOVED.get(self)
        if not reasons:
            return None
        more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        instead = f"{self.instead}, or " if self.instead else ""
        return (
            f"tp_plugin refuses {self.name} with {named(self.library)}: {reasons[0]}{more}; {instead}install a version "
            f"of {self.library} that tp_plugin was tested with ({WHOLE[self.library]})."
        )

    def require(self) -> None:
        """Raise TensorParallelError if the feature is broken."""
        if (error := self.broken) is not None:
            raise TensorParallelError(error)


_MOVED: dict[Feature, list[str]] = {}


def note_moved(feature: Feature, reason: str) -> None:
    """Say that a name ``feature`` relies on has moved; ``reason`` has the name and its use."""
    reasons = _MOVED.setdefault(feature, [])
    if reason not in reasons:
        reasons.append(reason)


def forget_moved(library: str) -> None:
    """Drop reasons of features of ``library``: its names are about to be checked again."""
    for feature in [feature for feature in _MOVED if feature.library == library]:
        del _MOVED[feature]


def broken_features() -> Iterator[Feature]:
    """Features of which a name has moved, as far as their libraries were checked."""
    return iter(list(_MOVED))


def reasons_of(feature: Feature) -> list[str]:
    """Every name that has moved, with its use."""
    return list(_MOVED.get(feature, ()))


# ---- torch ----------------------------------------------------------------------------------------------------------

WEIGHTS = Feature("reading, writing and measuring the weights of a sharded model", "torch", needed=True)
PRESENCE = Feature("naming ranks that run without tp_plugin", "torch", "start it alike on every host")

# ---- DeepSpeed ------------------------------------------------------------------------------------------------------

SLOT = Feature("sharding the model of an engine", "deepspeed", needed=True)
NORMS = Feature("the gradient norm of a sharded model", "deepspeed", needed=True)
CHECKPOINTS = Feature(
    "saving and loading checkpoints of a sharded engine",
    "deepspeed",
    "save the model by tp_plugin.save_pretrained",
    places=(
        "deepspeed.runtime.engine:DeepSpeedEngine.save_checkpoint",
        "deepspeed.runtime.engine:DeepSpeedEngine.load_checkpoint",
    ),
)
ENGINE_EXPORT = Feature(
    "DeepSpeed's export of a sharded engine (save_16bit_model)",
    "deepspeed",
    "save the model by tp_plugin.save_pretrained",
    places=("deepspeed.runtime.engine:DeepSpeedEngine.save_16bit_model",),
)

# ---- accelerate -----------------------------------------------------------------------------------------------------

_BY_HAND = "train with deepspeed.initialize in a loop of your own"
ACCELERATE = Feature(
    "training through accelerate (and HF Trainer and TRL)",
    "accelerate",
    _BY_HAND,
    places=("accelerate:Accelerator.prepare",),
)
CPU_TRAINING = Feature(
    "training through accelerate without an accelerator, or with offloaded optimizers",
    "accelerate",
    "train on GPUs without offload_optimizer",
)
STREAMS = Feature(
    "distributing a data stream that rank 0 reads (dispatch_batches)",
    "accelerate",
    "set dispatch_batches=False, or use a data set with a length",
    places=("accelerate.data_loader:DataLoaderDispatcher.__init__",),
)

# ---- transformers ---------------------------------------------------------------------------------------------------

TRAINER = Feature("training by HF Trainer", "transformers", _BY_HAND, places=("transformers:Trainer.__init__",))
LOADING = Feature(
    "loading a model by slices",
    "transformers",
    "load it before the DeepSpeed config is made, by plain from_pretrained, and let the engine shard it",
)
SAVING = Feature(
    "saving a sharded model (save_pretrained)",
    "transformers",
    "use tp_plugin.full_state_dict, or checkpoints of the engine",
    places=("transformers:PreTrainedModel.save_pretrained",),
)
GENERATION = Feature(
    "generate() of a sharded model", "transformers", "save the model and generate in one process",
    places=("transformers:GenerationMixin.generate",),
)  # fmt: skip
LOGGED_COUNTS = Feature("counting a sharded model's parameters and operations", "transformers")

# ---- PEFT -----------------------------------------------------------------------------------------------------------

ADAPTERS = Feature(
    "adapters in a sharded model",
    "peft",
    "train without adapters",
    places=("peft.tuners.tuners_utils:BaseTuner.inject_adapter", "peft:PeftModel.__init__"),
)
DORA = Feature("DoRA in a sharded model", "peft", "train plain LoRA (use_dora=False)")
EXPERT_ADAPTERS = Feature("LoRA on the experts of a sharded model", "peft", "leave target_parameters out")
SAVED_ADAPTERS = Feature(
    "saving and loading adapters of a sharded model",
    "peft",
    "save checkpoints of the engine",
    places=("peft:PeftModel.save_pretrained", "peft:PeftModel.from_pretrained", "peft:PeftModel.load_adapter"),
)

# ---- TRL ------------------------------------------------------------------------------------------------------------

TRL_TRAINERS = Feature("trainers of TRL", "trl", "use HF Trainer")
FUSED_HEAD = Feature(
    "TRL's fused language-model head (SFT and DPO) over a sharded vocabulary",
    "trl",
    "train by HF Trainer",
    places=("trl.trainer.utils:add_fused_lm_head",),
)

# ---- sentence-transformers ------------------------------------------------------------------------------------------

_SENTENCES = "sentence_transformers"
GATHERED_NEGATIVES = Feature(
    "in-batch negatives of all devices (gather_across_devices)",
    _SENTENCES,
    "set gather_across_devices=False",
    places=("sentence_transformers.util.distributed:all_gather",),
)
CACHED_LOSSES = Feature("sentence-transformers' losses with cached gradients", _SENTENCES, "use plain losses")
MODEL_CARDS = Feature(
    "sentence-transformers' model card of a sharded model", _SENTENCES, "write none (create_model_card=False)"
)
SENTENCE_SAVING = Feature(
    "save_pretrained of a sharded model of sentence-transformers", _SENTENCES, "use the trainer's save_model"
)
SENTENCE_TRAINERS = Feature("guide models and best checkpoints in sentence-transformers' trainers", _SENTENCES)

# ---- programs -------------------------------------------------------------------------------------------------------

AXOLOTL = Feature(
    "saving what axolotl trained", "axolotl", "save checkpoints while it trains (save_steps)",
    places=("axolotl.train:save_trained_model",),
)  # fmt: skip
