"""LLaMA-Factory: ``llamafactory-cli train x.yaml``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tests.clients.program import RATE, STEPS, Case, Command, Program, deepspeed_config

DATA = {
    "asked": {"file_name": "asked.json"},
    "preferred": {
        "file_name": "preferred.json",
        "ranking": True,
        "columns": {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"},
    },
}
COMMON = {
    "do_train": True, "template": "default", "cutoff_len": 64, "overwrite_cache": True, "logging_steps": 1,
    "preprocessing_num_workers": 1, "overwrite_output_dir": True, "report_to": "none", "max_steps": STEPS,
    "learning_rate": RATE, "lr_scheduler_type": "cosine", "save_only_model": True, "lora_rank": 4, "lora_target": "all",
    "gradient_accumulation_steps": 1, "disable_gradient_checkpointing": True,
}  # fmt: skip


def _trains(stage: str, dataset: str, finetuning: str, **more: Any) -> Command:
    def made(inputs: Path, case: Case, output: Path) -> list[str]:
        (inputs / "dataset_info.json").write_text(json.dumps(DATA))
        config = COMMON | {
            "model_name_or_path": str(inputs / "model"), "stage": stage, "finetuning_type": finetuning,
            "dataset": dataset, "dataset_dir": str(inputs), "output_dir": str(output),
            "per_device_train_batch_size": case.micro_batch,
        } | more  # fmt: skip
        if case.tp > 1:
            path = output / "deepspeed.json"
            path.write_text(json.dumps(deepspeed_config(2, case.tp)))
            config["deepspeed"] = str(path)
        (output / "train.yaml").write_text(yaml.safe_dump(config))
        return ["llamafactory-cli", "train", str(output / "train.yaml")]

    return made


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
        "SFT, full": _trains("sft", "asked", "full"),
        "SFT, LoRA": _trains("sft", "asked", "lora"),
        "SFT, packed": _trains("sft", "asked", "full", packing=True),
        "pre-training": _trains("pt", "asked", "full"),
        "DPO, LoRA": _trains("dpo", "preferred", "lora"),
        "reward model": _trains("rm", "preferred", "lora"),
    },
    environment=_environment,
)  # fmt: skip
