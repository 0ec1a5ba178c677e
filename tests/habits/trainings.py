"""Trainings with HF Trainer as transformers' and DeepSpeed's example scripts write them, sharded or in one process."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.lr_schedules import WarmupDecayLR
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForQuestionAnswering,
    OPTConfig,
    OPTForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint, speed_metrics

from tests.habits.loops import Texts, shared_folder
from tests.habits.tasks import Pairs
from tests.support import tiny, zoo
from tests.support.configs import auto_config

ROWS = 4  # of a global batch
SMALL = {"vocab_size": tiny.VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def arguments(tp: int | None, stage: int = 1, config: dict | None = None, **options: Any) -> TrainingArguments:
    """Arguments for ``tp`` ranks a group; None for one process without DeepSpeed."""
    kind = options.pop("kind", TrainingArguments)
    rows, how = ROWS, {"use_cpu": True}
    if tp is not None:
        rows = ROWS * tp // dist.get_world_size()
        ours = {"tensor_parallel": {"autotp_size": tp}, "tp_plugin": {"quiet": True}, "train_batch_size": "auto"}
        how = {"deepspeed": auto_config(stage, **ours | (config or {}))}
    defaults = {
        "learning_rate": 1e-2, "adam_epsilon": 1e-4, "lr_scheduler_type": "constant", "max_grad_norm": 0.5,
        "max_steps": 3, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    return kind(
        output_dir=str(shared_folder()), per_device_train_batch_size=rows, per_device_eval_batch_size=rows,
        **defaults | how | options,
    )  # fmt: skip


def logged(trainer: Trainer) -> dict[str, list[float]]:
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {key: [float(entry[key]) for entry in steps] for key in ("loss", "grad_norm", "learning_rate")}


def extractive() -> torch.nn.Module:
    torch.manual_seed(0)
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForQuestionAnswering(BertConfig(**SMALL, intermediate_size=48, initializer_range=0.1, **dropout))


def scaled_rate(tp: int | None) -> dict:
    """``run_mae``: the learning rate follows the rows of a step, counted by ``training_args.world_size``."""
    given = arguments(tp)
    rows = given.train_batch_size * given.gradient_accumulation_steps * given.world_size
    given.learning_rate = 0.1 * rows / 4
    trainer = Trainer(tiny.model(), given, train_dataset=Texts(24))
    trainer.train()
    return logged(trainer) | {"rows": rows}


class Spans(tiny.Samples):
    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = super().__getitem__(index)["input_ids"]
        start = torch.tensor(index % 5)
        return {"input_ids": ids, "start_positions": start, "end_positions": start + 5}


class SpansTrainer(Trainer):
    """``trainer_qa``: an evaluation of its own, whose steps it counts by ``args.world_size``."""

    def evaluate(self, *_args: Any, **_kwargs: Any) -> dict[str, float]:
        compute, self.compute_metrics = self.compute_metrics, None
        began = time.time()
        try:
            output = self.evaluation_loop(self.get_eval_dataloader(), "Evaluation", metric_key_prefix="eval")
        finally:
            self.compute_metrics = compute
        steps = math.ceil(output.num_samples / (self.args.eval_batch_size * self.args.world_size))
        found = speed_metrics("eval", began, num_samples=output.num_samples, num_steps=steps)
        measured = compute(output) if self.args.should_save else {}
        self.log(measured)
        return {"steps": steps, "samples": output.num_samples, "told": sorted(found), **measured}


def answers(tp: int | None) -> dict:
    def compute(output: Any) -> dict[str, float]:
        starts, ends = output.predictions
        return {"rows": float(len(starts)), "sum": float(abs(starts).sum() + abs(ends).sum())}

    given = arguments(tp)
    trainer = SpansTrainer(extractive(), given, train_dataset=Spans(24), eval_dataset=Spans(7),
                           compute_metrics=compute)  # fmt: skip
    trainer.train()
    return logged(trainer) | {"evaluated": trainer.evaluate()}


def smoothed(tp: int | None) -> dict:
    """``run_translation``: label smoothing over decoder inputs that the collator has made."""

    class Prepared(Pairs):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            ids = super().__getitem__(index)["input_ids"]
            return {"input_ids": ids, "labels": ids[:5], "decoder_input_ids": torch.cat([ids.new_zeros(1), ids[:4]])}

    given = arguments(tp, kind=Seq2SeqTrainingArguments, label_smoothing_factor=0.1)
    trainer = Seq2SeqTrainer(zoo.build("t5"), given, train_dataset=Prepared(24), eval_dataset=Prepared(8))
    trainer.train()
    return logged(trainer) | {"evaluated": trainer.evaluate()["eval_loss"]}


def reported(tp: int | None) -> dict:
    """What every ``run_*.py`` ends with: metrics and state in files, a card, and the last checkpoint to go on from."""
    given = arguments(tp, save_strategy="steps", save_steps=2)
    with given.main_process_first(desc="map"):
        pass
    model = tiny.model()
    model.gradient_checkpointing_enable()
    trainer = Trainer(model, given, train_dataset=Texts(24), eval_dataset=Texts(8))
    metrics = trainer.train(resume_from_checkpoint=get_last_checkpoint(given.output_dir)).metrics
    trainer.save_model()
    trainer.save_metrics("train", metrics | {"train_samples": 24})
    trainer.save_state()
    evaluated = trainer.evaluate()
    trainer.log_metrics("eval", evaluated)
    trainer.save_metrics("eval", evaluated | {"perplexity": math.exp(evaluated["eval_loss"])})
    trainer.create_model_card(tasks="text-generation")
    trainer.accelerator.wait_for_everyone()
    folder = Path(given.output_dir)
    later = arguments(tp, max_steps=4)
    resumed = Trainer(tiny.model(seed=1), later, train_dataset=Texts(24))
    resumed.train(resume_from_checkpoint=get_last_checkpoint(given.output_dir))
    results = json.loads((folder / "all_results.json").read_text())
    return logged(resumed) | {
        "files": sorted(path.name for path in folder.iterdir()),
        "results": sorted(results),
        "perplexity": results["perplexity"],
    }


PLANNED = {
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True},
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "total_num_steps": "auto", "warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto",
            "warmup_type": "linear",
        },
    },
    "steps_per_print": 1,
    "wall_clock_breakdown": False,
}  # fmt: skip


def autotp(tp: int | None) -> dict:
    """AutoTP's ``hf_integration``: optimizer and schedule of the config, words added with the mean of the others."""
    given = arguments(tp, 2, PLANNED, lr_scheduler_type="linear", warmup_steps=2, max_steps=4,
                      gradient_accumulation_steps=2)  # fmt: skip
    torch.manual_seed(0)
    config = OPTConfig(
        **SMALL, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=32, dropout=0.0, init_std=0.1
    )
    model = OPTForCausalLM(config)
    model.resize_token_embeddings(tiny.VOCAB + 3, mean_resizing=False)
    for embeddings in (model.get_input_embeddings(), model.get_output_embeddings()):
        embeddings.weight.data[-3:] = embeddings.weight.data[:-3].mean(0, keepdim=True)
    brought = {}
    if tp is None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4, weight_decay=0.0)
        schedule = WarmupDecayLR(optimizer, 4, warmup_max_lr=1e-2, warmup_num_steps=2, warmup_type="linear")
        brought = {"optimizers": (optimizer, schedule)}
    trainer = Trainer(model, given, train_dataset=Texts(24), **brought)
    trainer.train()
    trainer.save_model(given.output_dir)
    trainer.accelerator.wait_for_everyone()
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(given.output_dir)(tiny.batch([3])["input_ids"]).logits
    found = logged(trainer) | {"logits": logits}
    del found["learning_rate"]  # under DeepSpeed transformers logs that of the step to come
    return found


def asks_a_shard_for_the_vocabulary(tp: int | None) -> dict:
    """``run_clm`` resizes where the tokenizer has more words than the embedding has rows: a rank's under ZeRO-3."""
    folder = shared_folder()
    if not dist.is_initialized() or dist.get_rank() == 0:
        tiny.model().save_pretrained(folder)
    if dist.is_initialized():
        dist.barrier()
    kept = arguments(tp, 3)  # the ZeRO-3 config lives as long as it does
    model = AutoModelForCausalLM.from_pretrained(folder)
    if model.get_input_embeddings().weight.shape[0] < 100:
        model.resize_token_embeddings(100)
    return {"rows": len(model.get_input_embeddings().weight), "stage": type(kept).__name__}
