"""Short trainings with HF Trainer, the same in one plain process and sharded over two or four, and what they report.

A case is data: options of ``TrainingArguments``, and names of what goes with them. The plain process takes the whole
batch that the data-parallel ranks share, so that everything it reports must come out the same.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from tests.support import tiny, zoo
from tests.support.configs import auto_config
from tests.support.models import perturb
from tests.support.trainer_data import DATA, Rows, padded

TP = 2
ROWS = 4  # of a global batch
TIMED = ("runtime", "per_second", "preparation_time")
SHARDED = {"tensor_parallel": {"autotp_size": TP}, "tp_plugin": {"quiet": True, "check_batch_every": 3}}


def config_of(stage: int, tp: int = TP, **more: Any) -> dict[str, Any]:
    """A DeepSpeed config for Trainer."""
    zero = {"stage3_gather_16bit_weights_on_model_save": True} if tp == 1 else {}
    sizes = {"train_batch_size": "auto", "bf16": {"enabled": "auto"}}
    return auto_config(stage, zero, **sizes | more) | (SHARDED if tp > 1 else {})


# ---- data ------------------------------------------------------------------------------------------------------------


# ---- what users bring ------------------------------------------------------------------------------------------------


def own_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None) -> torch.Tensor:
    """How far the log-probability of each label is from -1, squared."""
    logits, wanted = outputs["logits"][:, :-1].float(), labels[:, 1:]
    chosen = torch.log_softmax(logits, -1).gather(-1, wanted.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    summed = ((chosen + 1) ** 2 * (wanted != -100)).sum()
    return summed / (num_items_in_batch if num_items_in_batch is not None else (wanted != -100).sum())


def best_words(logits: torch.Tensor, _labels: torch.Tensor) -> torch.Tensor:
    return logits.argmax(-1)


class Sums:
    """``compute_metrics`` of whole sets and, with ``batch_eval_metrics``, of batches."""

    def __init__(self) -> None:
        self.total, self.rows, self.losses = 0.0, 0, 0.0

    def __call__(self, found: Any, compute_result: bool = True) -> dict[str, float]:
        parts = found.predictions if isinstance(found.predictions, list) else [found.predictions]
        self.total += sum(float(np.abs(np.asarray(part, dtype=np.float64)).sum()) for part in parts)
        self.rows += sum(len(part) for part in parts)
        self.losses += 0.0 if found.losses is None else float(np.asarray(found.losses).sum())
        result = {"sum": self.total, "rows": self.rows, "losses": self.losses}
        if compute_result:
            self.__init__()  # type: ignore[misc]
        return result


def model_of(kind: str, seed: int = 0) -> Any:
    import transformers

    if kind == "t5":
        return zoo.build("t5")
    model = tiny.model(seed=seed)
    model.config.pad_token_id = model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None  # what follows an end depends on the rows beside it
    if kind == "causal":
        return model
    model.config.num_labels = 3
    torch.manual_seed(1)
    return perturb(getattr(transformers, kind)(model.config))


# ---- cases -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """One training.

    Attributes:
        world: processes when sharded two ways: 2, or 4 for two data-parallel ranks.
        differs: fields that data parallelism changes by itself, sharded or not.
    """

    world: int = 4
    stage: int = 1
    model: str = "causal"
    data: str = "plain"
    samples: int = 24
    train: bool = True
    evaluate: bool = False
    predict: bool = False
    metrics: bool = False
    preprocess: bool = False
    loss: bool = False
    patience: int = 0
    seq2seq: bool = False
    differs: tuple[str, ...] = ()
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)


def case(**options: Any) -> Case:
    own = {field.name for field in dataclasses.fields(Case)}
    arguments = {key: value for key, value in options.items() if key not in own}
    return Case(**{key: value for key, value in options.items() if key in own}, arguments=arguments)


MEASURED = {"evaluate": True, "metrics": True}
EACH_STEP = {"eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.05, "greater_is_better": False}
GENERATING = {"seq2seq": True, "predict": True, "predict_with_generate": True, "generation_max_length": 20} | MEASURED
IN_ORDER = {"evaluate": True, "train_sampling_strategy": "sequential"}
CASES: dict[str, Case] = {
    "measured": case(predict=True, **MEASURED),
    "measured_zero3": case(predict=True, stage=3, **MEASURED),
    "odd_sizes": case(predict=True, world=2, **MEASURED),
    "only_evaluated": case(stage=3, train=False, **MEASURED),
    "non_padding": case(include_num_input_tokens_seen="non_padding", data="uneven", differs=("flos", "total_flos")),
    "local_mean": case(average_tokens_across_devices=False, world=2, evaluate=True),
    "smoothed": case(label_smoothing_factor=0.1, evaluate=True),
    "own_loss": case(loss=True, evaluate=True, gradient_accumulation_steps=2),
    "accumulated": case(gradient_accumulation_steps=2, num_train_epochs=2, max_steps=-1, samples=12),
    "best": case(save_strategy="steps", save_steps=1, max_steps=4, load_best_model_at_end=True, save_total_limit=2,
                 metrics=True, metric_for_best_model="sum", **EACH_STEP),
    "stopped": case(max_steps=8, patience=1, metric_for_best_model="eval_loss", **EACH_STEP | {"learning_rate": 0.3}),
    "plateau": case(lr_scheduler_type="reduce_lr_on_plateau", lr_scheduler_kwargs={"patience": 0}, max_steps=4,
                    metric_for_best_model="eval_loss", **EACH_STEP),
    "scheduled": case(lr_scheduler_type="cosine", warmup_steps=2, max_steps=5),
    "grouped": case(train_sampling_strategy="group_by_length", data="uneven", evaluate=True, world=2),
    "rebalanced": case(train_sampling_strategy="batch_rebalance", data="uneven", world=2),
    "batch_metrics": case(batch_eval_metrics=True, preprocess=True, **MEASURED),
    "moved_metrics": case(eval_accumulation_steps=1, preprocess=True, predict=True,
                          include_for_metrics=["inputs", "loss"], **MEASURED),
    "listed_metrics": case(eval_do_concat_batches=False, **MEASURED),
    "workers": case(data="augmented", dataloader_num_workers=1, world=2),
    "masked": case(data="masked", world=2),
    "stream": case(data="stream", accelerator_config={"dispatch_batches": True}),
    "stream_cut": case(data="stream", accelerator_config={"dispatch_batches": False}),
    # with two data-parallel ranks transformers multiplies losses of this kind by two, sharded or not
    "classes": case(model="LlamaForSequenceClassification", data="one_class", predict=True, world=2, **MEASURED),
    "token_classes": case(model="LlamaForTokenClassification", data="token_classes", world=2, **MEASURED),
    "generating": case(world=2, **GENERATING),
    # Seq2SeqTrainer's loss of an evaluation is a mean of ranks' means
    "generating_zero3": case(stage=3, generation_num_beams=2, differs=("eval_loss", "test_loss"), **GENERATING),
    "generating_t5": case(model="t5", world=2, **GENERATING),
    **{f"unlabelled_zero{stage}": case(stage=stage, world=world, data="unlabelled", **IN_ORDER)
       for stage, world in ((0, 2), (1, 4), (2, 2), (3, 4))},
    "unlabelled_accumulated": case(data="unlabelled", gradient_accumulation_steps=2, samples=24, **IN_ORDER),
    "unlabelled_first": case(stage=0, data="unlabelled_first", world=2, **IN_ORDER),
    "bf16": case(bf16=True, max_steps=2, world=2),
    "bf16_zero3": case(bf16=True, max_steps=2, world=2, stage=3),
    "compiled": case(torch_compile=True, torch_compile_backend="eager", evaluate=True, world=2),
}  # fmt: skip


def train(name: str, tp: int | None, exact: bool = False, seed: int = 0) -> dict[str, Any]:
    """Run one case and say what it reported, on this rank; ``tp`` None is one process without DeepSpeed."""
    import transformers.training_args
    from transformers import (
        EarlyStoppingCallback,
        Seq2SeqTrainer,
        Seq2SeqTrainingArguments,
        Trainer,
        TrainingArguments,
    )

    one, how = CASES[name], {"use_cpu": True}
    if tp is not None:
        import tp_plugin

        tp_plugin.register()
        how = {"deepspeed": config_of(one.stage, tp)}
    else:
        for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            os.environ.pop(key, None)
    rows = ROWS if tp is None else ROWS * tp // dist.get_world_size()
    folder = [tempfile.mkdtemp()]
    if dist.is_initialized():
        dist.broadcast_object_list(folder)
    kind = Seq2SeqTrainingArguments if one.seq2seq else TrainingArguments
    defaults = {
        "learning_rate": 1e-2, "adam_epsilon": 1e-4, "lr_scheduler_type": "constant", "max_grad_norm": 0.5,
        "weight_decay": 0.0, "max_steps": 3, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "include_num_input_tokens_seen": "all",
    }  # fmt: skip
    given = one.arguments | ({"bf16": False} if exact else {})
    if given.get("bf16"):  # transformers has it on GPUs only, unless asked for plain CPU training without DeepSpeed
        transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    arguments = kind(
        output_dir=folder[0], per_device_train_batch_size=rows, per_device_eval_batch_size=rows,
        **(defaults | how | given),
    )  # fmt: skip
    make = DATA[one.data]
    held_out = (Rows if one.data == "stream" else make)(7 if one.world == TP else 8)
    trainer = (Seq2SeqTrainer if one.seq2seq else Trainer)(
        model=model_of(one.model, seed), args=arguments, data_collator=padded,
        train_dataset=make(one.samples), eval_dataset=held_out,
        compute_metrics=Sums() if one.metrics else None, compute_loss_func=own_loss if one.loss else None,
        preprocess_logits_for_metrics=best_words if one.preprocess else None,
        callbacks=[EarlyStoppingCallback(one.patience)] if one.patience else None,
    )  # fmt: skip
    found: dict[str, Any] = {}
    if one.train:
        found["trained"] = counts(trainer.train().metrics)
    if one.evaluate:
        found["evaluated"] = counts(trainer.evaluate())
    if one.predict:
        predicted = trainer.predict(make(5 if one.world == TP else 8))
        found["predicted"] = np.asarray(predicted.predictions), np.asarray(predicted.label_ids)
        found["tested"] = counts(predicted.metrics)
    state = trainer.state
    found["log"] = [counts(entry) for entry in state.log_history]
    found["state"] = {
        "steps": state.global_step, "epoch": state.epoch, "tokens": state.num_input_tokens_seen,
        "flos": state.total_flos, "best": state.best_metric, "best_step": Path(state.best_model_checkpoint or "").name,
        "kept": sorted(each.name for each in Path(folder[0]).glob("checkpoint-*")),
        "parameters": [trainer.get_num_trainable_parameters(), trainer.model.num_parameters()],
        "batch": trainer.get_total_train_batch_size(arguments),
    }  # fmt: skip
    weights = trainer.accelerator.get_state_dict(trainer.model if tp is None else trainer.model_wrapped)
    found["weights"] = {key: value.detach().clone() for key, value in weights.items()}
    return found


def counts(metrics: dict[str, Any]) -> dict[str, Any]:
    """Rates times the time they are of, which makes counts of them; times themselves left out."""
    found = {}
    for key, value in metrics.items():
        runtime = metrics.get(f"{key.split('_')[0]}_runtime")
        if key.endswith("_per_second") and runtime:
            found[key] = value * runtime
        elif not any(part in key for part in TIMED):
            found[key] = value
    return found
