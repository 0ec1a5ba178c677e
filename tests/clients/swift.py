"""ms-swift: ``swift sft x.yaml``, with ``deepspeed: zero1`` and ``deepspeed_autotp_size: 2``.

Its packing and padding-free batches need flash attention, and so a GPU.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from tests.clients.program import RATE, STEPS, Case, Command, Program, recipe

SMALL = {
    "model_type": "llama", "template": "dummy", "torch_dtype": "float32", "max_steps": STEPS, "learning_rate": RATE,
    "warmup_ratio": 0, "max_length": 64, "save_only_model": True, "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False, "dataset_num_proc": 1, "dataloader_num_workers": 0, "lora_rank": 4,
    "add_version": False, "split_dataset_ratio": 0, "attn_impl": "sdpa", "bf16": False, "fp16": False, "use_hf": True,
}  # fmt: skip


def _trains(file: str, command: str, **more: object) -> Command:
    def made(inputs: Path, case: Case, output: Path) -> list[str]:
        config = recipe("ms-swift", file) | SMALL | {
            "model": str(inputs / "model"), "dataset": str(inputs / "messages.json"), "output_dir": str(output / "out"),
            "per_device_train_batch_size": case.micro_batch, "deepspeed_autotp_size": case.tp,
        } | more  # fmt: skip
        if case.tp == 1:
            del config["deepspeed"], config["deepspeed_autotp_size"]
        (output / "train.yaml").write_text(yaml.safe_dump(config))
        return ["swift", command, str(output / "train.yaml")]

    return made


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
        "pre-training": _trains("full", "pt"),
        "DPO, LoRA": _trains("lora", "rlhf", rlhf_type="dpo"),
        "reward model, LoRA": _trains("lora", "rlhf", rlhf_type="rm"),
    },
    environment=lambda case: {"NPROC_PER_NODE": str(case.world)} if case.world > 1 else {},
)  # fmt: skip
