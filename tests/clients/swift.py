"""ms-swift: ``swift sft x.yaml``, with ``deepspeed: zero1`` and ``deepspeed_autotp_size: 2``.

Its packing and padding-free batches need flash attention, and so a GPU.
"""

from __future__ import annotations

from pathlib import Path

from tests.clients.program import (
    ANSWERS,
    MERGED,
    RATE,
    STEPS,
    Case,
    Command,
    Program,
    Words,
    files_of,
    recipe,
    written,
)

SMALL = {
    "model_type": "llama", "template": "dummy", "torch_dtype": "float32", "max_steps": STEPS, "learning_rate": RATE,
    "warmup_ratio": 0, "max_length": 64, "save_only_model": True, "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False, "dataset_num_proc": 1, "dataloader_num_workers": 0, "lora_rank": 4,
    "add_version": False, "split_dataset_ratio": 0, "attn_impl": "sdpa", "bf16": False, "fp16": False, "use_hf": True,
}  # fmt: skip


def _trains(file: str, command: str, resumed: bool = False, evaluated: bool = False, **more: object) -> Command:
    def made(inputs: Path, case: Case, output: Path) -> list[Words]:
        config = recipe("ms-swift", file) | SMALL | {
            "model": str(inputs / "model"), "dataset": str(inputs / "messages.json"), "output_dir": str(output / "out"),
            "per_device_train_batch_size": case.micro_batch, "deepspeed_autotp_size": case.tp,
        } | more  # fmt: skip
        if evaluated:
            config |= {"val_dataset": config["dataset"], "eval_strategy": "steps", "eval_steps": STEPS // 2}
            config |= {"per_device_eval_batch_size": 2, "max_steps": -1, "num_train_epochs": 1}
        if case.tp == 1:
            del config["deepspeed"], config["deepspeed_autotp_size"]
        half = output / "out" / f"checkpoint-{STEPS // 2}" if resumed else None
        return [["swift", command, file] for file in files_of(config, output, half)]

    return made


def _finish(inputs: Path, output: Path) -> list[tuple[Words, str]]:
    model = {"model": str(inputs / "model"), "model_type": "llama", "template": "dummy", "torch_dtype": "float32"}
    adapted = model | {"adapters": str(output / "out" / f"checkpoint-{STEPS}"), "use_hf": True}
    merging = adapted | {"merge_lora": True, "output_dir": str(output / MERGED)}
    asking = adapted | {
        "val_dataset": str(inputs / "messages.json"), "val_dataset_sample": 4, "max_new_tokens": 12, "temperature": 0,
        "result_path": str(output / ANSWERS), "attn_impl": "sdpa",
    }  # fmt: skip
    return [
        (["swift", "export", written(output / "merge.yaml", merging)], ""),
        (["swift", "infer", written(output / "ask.yaml", asking)], ""),
    ]


PROGRAM = Program(
    name="ms-swift 4.6.0",
    package="ms_swift==4.6.0",
    of="ms-swift",
    needs=(
        "datasets<4.8.5", "addict", "aiohttp", "binpacking", "charset-normalizer", "dacite", "einops", "fastapi",
        "importlib-metadata", "json-repair", "matplotlib", "modelscope>=1.23", "nltk", "openai", "pandas", "pillow",
        "requests", "rouge", "scipy", "sentencepiece", "simplejson", "sortedcontainers", "tensorboard", "tiktoken",
        "uvicorn", "zstandard",
    ),
    kinds={
        "SFT, full": _trains("full", "sft"),
        "SFT, LoRA": _trains("lora", "sft"),
        "SFT, full, an epoch, evaluated": _trains("full", "sft", evaluated=True),
        "SFT, LoRA, resumed": _trains("lora", "sft", resumed=True),
        "SFT, LoRA, merged and asked": _trains("lora", "sft"),
        "pre-training": _trains("full", "pt"),
        "DPO, LoRA": _trains("lora", "rlhf", rlhf_type="dpo"),
        "reward model, LoRA": _trains("lora", "rlhf", rlhf_type="rm"),
    },
    finish={"SFT, LoRA, merged and asked": _finish},
    answer=r'"response": "([^"]+)"',
    environment=lambda case: {"NPROC_PER_NODE": str(case.world)} if case.world > 1 else {},
)  # fmt: skip
