"""LLaMA-Factory: ``llamafactory-cli train x.yaml``, ``export`` and ``chat``."""

from __future__ import annotations

import json
from pathlib import Path

from tests.clients.program import (
    MERGED,
    QUESTION,
    RATE,
    STEPS,
    Case,
    Command,
    Program,
    Words,
    deepspeed_file,
    files_of,
    recipe,
    written,
)

DATA = {
    "asked": {"file_name": "asked.json"},
    "preferred": {
        "file_name": "preferred.json",
        "ranking": True,
        "columns": {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"},
    },
}
SMALL = {
    "template": "default", "cutoff_len": 64, "overwrite_cache": True, "preprocessing_num_workers": 1, "bf16": False,
    "max_steps": STEPS, "learning_rate": RATE, "warmup_ratio": 0, "save_only_model": True, "lora_rank": 4,
    "gradient_accumulation_steps": 1, "disable_gradient_checkpointing": True,
}  # fmt: skip
EVALUATED = {
    "val_size": 0.25, "eval_strategy": "steps", "eval_steps": STEPS // 2, "per_device_eval_batch_size": 2,
    "compute_accuracy": True, "max_steps": -1, "num_train_epochs": 1,
}  # fmt: skip


def _trains(file: str, stage: str, dataset: str, resumed: bool = False, **more: object) -> Command:
    def made(inputs: Path, case: Case, output: Path) -> list[Words]:
        (inputs / "dataset_info.json").write_text(json.dumps(DATA))
        config = recipe("llamafactory", file) | SMALL | {
            "model_name_or_path": str(inputs / "model"), "stage": stage, "dataset": dataset,
            "dataset_dir": str(inputs), "output_dir": str(output), "per_device_train_batch_size": case.micro_batch,
            "deepspeed": deepspeed_file(case, output),
        } | more  # fmt: skip
        if case.tp == 1:
            del config["deepspeed"]
        half = output / f"checkpoint-{STEPS // 2}" if resumed else None
        return [["llamafactory-cli", "train", file] for file in files_of(config, output, half)]

    return made


def _finish(inputs: Path, adapter: Path) -> list[tuple[Words, str]]:
    model = {
        "model_name_or_path": str(inputs / "model"), "adapter_name_or_path": str(adapter), "template": "default",
        "finetuning_type": "lora",
    }  # fmt: skip
    merging = model | {"export_dir": str(adapter / MERGED), "export_device": "cpu"}
    asking = model | {"do_sample": False, "max_new_tokens": 12, "infer_dtype": "float32"}
    return [
        (["llamafactory-cli", "export", written(adapter / "merge.yaml", merging)], ""),
        (["llamafactory-cli", "chat", written(adapter / "ask.yaml", asking)], f"{QUESTION}\nexit\n"),
    ]


def _environment(case: Case) -> dict[str, str]:
    return {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": str(case.world)} if case.world > 1 else {}


PROGRAM = Program(
    name="LLaMA-Factory 0.9.5",
    package="llamafactory==0.9.5",
    of="llamafactory-0.9.5",
    needs=(
        "datasets<=4.0.0", "einops", "fastapi", "fire", "gradio<=5.50.0", "hf-transfer", "matplotlib", "modelscope",
        "omegaconf", "pandas", "protobuf", "pydantic", "scipy", "sentencepiece", "sse-starlette", "tiktoken",
        "tyro<0.9.0", "uvicorn", "torchdata==0.11.0",
    ),
    kinds={
        "SFT, full": _trains("full", "sft", "asked"),
        "SFT, LoRA": _trains("lora", "sft", "asked"),
        "SFT, full, an epoch, evaluated": _trains("full", "sft", "asked", **EVALUATED),
        "SFT, LoRA, resumed": _trains("lora", "sft", "asked", resumed=True),
        "SFT, LoRA, merged and asked": _trains("lora", "sft", "asked"),
        "SFT, packed": _trains("full", "sft", "asked", packing=True),
        "pre-training": _trains("full", "pt", "asked", cutoff_len=16),
        "DPO, LoRA": _trains("lora", "dpo", "preferred"),
        "reward model, full": _trains("full", "rm", "preferred"),
    },
    finish={"SFT, LoRA, merged and asked": _finish},
    answer=r"Assistant: (.+)$",
    environment=_environment,
    alone={"reward model, full": "the value head has dropout, which each replica draws for its rows"},
)  # fmt: skip
