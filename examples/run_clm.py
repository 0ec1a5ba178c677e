"""Fine-tune a causal language model on text, with HF Trainer: an ordinary script, written as for one GPU.

    python examples/run_clm.py --model Qwen/Qwen3-0.6B --train_file train.jsonl --validation_file held_out.jsonl \
        --output_dir out --per_device_train_batch_size 8 --num_train_epochs 1

Nothing in it knows of tensor parallelism. The same file, sharded over pairs of GPUs (or CPU processes), each
pair with a batch of its own:

    accelerate launch --config_file recipes/accelerate/tp2_zero1.yaml -m tp_plugin.run examples/run_clm.py ...
"""

import math
import sys
from dataclasses import dataclass, field

import torch
from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)


@dataclass
class ScriptArguments:
    model: str = field(metadata={"help": "A model of the hub, or a directory."})
    train_file: str = field(metadata={"help": "JSON lines with a field `text`."})
    validation_file: str | None = field(default=None, metadata={"help": "The same, for the evaluation at the end."})
    block_size: int = field(default=1024, metadata={"help": "Texts are joined and cut into blocks of so many tokens."})
    dtype: str = field(default="auto", metadata={"help": "auto, float32 or bfloat16."})
    prompt: str | None = field(default=None, metadata={"help": "Continue this text when training is done."})
    max_new_tokens: int = field(default=32)


def blocks_of(files: dict[str, str], tokenizer, size: int):
    """Token blocks of one length; what is left of the end of a file is dropped."""
    raw = load_dataset("json", data_files=files)

    def tokenize(rows):
        ends = [text + (tokenizer.eos_token or "") for text in rows["text"]]
        return {"input_ids": tokenizer(ends)["input_ids"]}

    def cut(rows):
        joined = [token for ids in rows["input_ids"] for token in ids]
        blocks = [joined[start : start + size] for start in range(0, len(joined) - size + 1, size)]
        return {"input_ids": blocks, "labels": blocks}

    tokens = raw.map(tokenize, batched=True, remove_columns=raw["train"].column_names, desc="tokenizing")
    return tokens.map(cut, batched=True, desc="cutting into blocks")


def best_tokens(logits, _labels):
    """Whole logits of an evaluation set are far larger than the tokens they stand for."""
    return logits.argmax(dim=-1)


def accuracy(found):
    guesses, labels = found.predictions[:, :-1], found.label_ids[:, 1:]
    counted = labels != -100
    return {"accuracy": float((guesses == labels)[counted].mean())}


def main() -> None:
    script, args = HfArgumentParser((ScriptArguments, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(args.seed)

    tokenizer = AutoTokenizer.from_pretrained(script.model)
    dtype = script.dtype if script.dtype == "auto" else getattr(torch, script.dtype)
    model = AutoModelForCausalLM.from_pretrained(script.model, dtype=dtype)
    if args.gradient_checkpointing:
        model.config.use_cache = False

    files = {"train": script.train_file}
    if script.validation_file is not None:
        files["validation"] = script.validation_file
    with args.main_process_first(desc="preparing the data"):
        data = blocks_of(files, tokenizer, script.block_size)

    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=data["train"],
        eval_dataset=data.get("validation"),
        processing_class=tokenizer,
        data_collator=default_data_collator,
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=best_tokens,
    )
    trained = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.log_metrics("train", trained.metrics)
    trainer.save_metrics("train", trained.metrics)
    trainer.save_state()

    if "validation" in data:
        metrics = trainer.evaluate()
        metrics["eval_perplexity"] = math.exp(min(metrics["eval_loss"], 700.0))
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)

    trainer.save_model()

    if script.prompt is not None:
        start = tokenizer(script.prompt, return_tensors="pt").to(args.device)
        text = trainer.model.eval().generate(**start, max_new_tokens=script.max_new_tokens, do_sample=False)
        if trainer.is_world_process_zero():
            print(tokenizer.decode(text[0], skip_special_tokens=True), file=sys.stdout, flush=True)


if __name__ == "__main__":
    main()
