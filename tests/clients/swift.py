"""ms-swift: ``swift sft --model ... --deepspeed zero1 --deepspeed_autotp_size 2``."""

from __future__ import annotations

import json
from pathlib import Path

from tests.clients.program import RATE, STEPS, Case, Command, Program

COMMON = {
    "model_type": "llama", "template": "dummy", "torch_dtype": "float32", "max_steps": STEPS, "logging_steps": 1,
    "learning_rate": RATE, "report_to": "none", "split_dataset_ratio": 0, "max_length": 64, "save_only_model": True,
    "gradient_accumulation_steps": 1, "gradient_checkpointing": False, "dataset_num_proc": 1, "add_version": False,
    "dataloader_num_workers": 0, "lora_rank": 4, "lora_dropout": 0, "attn_impl": "sdpa", "bf16": False, "fp16": False, "use_hf": True,
}  # fmt: skip


def _trains(command: str, tuner: str, dataset: str, **more: object) -> Command:
    def made(inputs: Path, case: Case, output: Path) -> list[str]:
        options = COMMON | {
            "model": inputs / "model", "dataset": inputs / f"{dataset}.json", "tuner_type": tuner,
            "output_dir": output, "per_device_train_batch_size": case.micro_batch,
        } | more  # fmt: skip
        if case.tp > 1:
            options |= {"deepspeed": "zero1", "deepspeed_autotp_size": case.tp}
        return ["swift", command, *(word for key, value in options.items() for word in (f"--{key}", _word(value)))]

    return made


def _word(value: object) -> str:
    return json.dumps(value) if isinstance(value, bool | dict) else str(value)


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
        "SFT, full": _trains("sft", "full", "messages"),
        "SFT, LoRA": _trains("sft", "lora", "messages"),
        "SFT, packed": _trains("sft", "full", "messages", padding_free=True),
        "pre-training": _trains("pt", "full", "messages"),
        "DPO, LoRA": _trains("rlhf", "lora", "messages", rlhf_type="dpo"),
        "reward model": _trains("rlhf", "lora", "messages", rlhf_type="rm"),
    },
    environment=lambda case: {"NPROC_PER_NODE": str(case.world)} if case.world > 1 else {},
)  # fmt: skip
