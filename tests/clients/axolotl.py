"""axolotl: ``axolotl train x.yaml``, with ``tensor_parallel_size: 2`` beside a ``deepspeed:`` file."""

from __future__ import annotations

from pathlib import Path

import yaml

from tests.clients.program import (
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

SMALL = {
    "tokenizer_type": "AutoTokenizer", "sequence_len": 64, "pad_to_sequence_len": False, "warmup_ratio": 0,
    "gradient_accumulation_steps": 1, "max_steps": STEPS, "learning_rate": RATE, "bf16": False, "fp16": False,
    "tf32": False, "save_only_model": True, "special_tokens": {"pad_token": "<pad>"},
}  # fmt: skip
EVALUATED = {"val_set_size": 0.25, "eval_steps": STEPS // 2, "eval_batch_size": 2, "max_steps": None, "num_epochs": 1}
PREFERENCES = {"rl": "dpo", "remove_unused_columns": False}


def _trains(file: str, kind: str, data: str, resumed: bool = False, **more: object) -> Command:
    def made(inputs: Path, case: Case, output: Path) -> list[Words]:
        dataset = {"path": str(inputs / f"{data}.json"), "ds_type": "json", "type": kind}
        config = recipe("axolotl", file) | SMALL | {
            "base_model": str(inputs / "model"), "output_dir": str(output), "datasets": [dataset],
            "dataset_prepared_path": str(output / "prepared"), "micro_batch_size": case.micro_batch,
            "deepspeed": deepspeed_file(case, output), "tensor_parallel_size": case.tp,
        } | more  # fmt: skip
        if "adapter" in config:  # a new one is random from run to run
            config |= {"lora_r": 4, "lora_alpha": 8, "lora_model_dir": str(inputs / "adapter")}
        many = ["--launcher", "torchrun", "--", "--nproc_per_node", str(case.world)]
        if case.tp == 1:
            del config["deepspeed"], config["tensor_parallel_size"]
            many = []
        half = output / f"checkpoint-{STEPS // 2}" if resumed else None
        return [["axolotl", "train", file, *many] for file in files_of(config, output, half)]

    return made


def _finish(inputs: Path, output: Path) -> list[tuple[Words, str]]:
    config = yaml.safe_load((output / "train.yaml").read_text())
    for key in ("deepspeed", "tensor_parallel_size"):
        config.pop(key, None)
    file = written(output / "finish.yaml", config | {"lora_model_dir": str(output)})
    return [(["axolotl", "merge-lora", file], ""), (["axolotl", "inference", file], f"{QUESTION}\n")]


def _environment(case: Case) -> dict[str, str]:
    return {"AXOLOTL_DO_NOT_TRACK": "1"} | ({"CLIENTS_CPU_MESH": "1"} if case.world > 1 else {})


PROGRAM = Program(
    name="axolotl 0.19.0",
    package="axolotl==0.19.0",
    of="axolotl-0.19",
    needs=(
        "deepspeed==0.19.8",  # as axolotl 0.21 takes it; ZeRO 1 of 0.18 does not run over several gloo ranks
        "datasets==4.8.4", "kernels<0.17.0,>=0.16.0", "hf_transfer", "sentencepiece", "pydantic==2.12.5", "addict",
        "fire", "requests", "einops", "colorama", "numba<1.0,>=0.63.1", "typer==0.25.1", "evaluate==0.4.1", "scipy",
        "nvidia-ml-py", "art", "tensorboard", "python-dotenv", "zstandard", "fastcore", "langdetect", "immutabledict",
        "antlr4-python3-runtime==4.13.2", "schedulefree==1.4.1", "gradio", "axolotl-contribs-lgpl==0.0.7",
        "axolotl-contribs-mit==0.0.6", "posthog", "mistral-common==1.11.5", "wandb", "bitsandbytes==0.50.2", "triton",
    ),
    kinds={
        "SFT, full": _trains("full", "alpaca", "asked"),
        "SFT, LoRA": _trains("lora", "alpaca", "asked"),
        "SFT, full, an epoch, evaluated": _trains("full", "alpaca", "asked", **EVALUATED),
        "SFT, LoRA, resumed": _trains("lora", "alpaca", "asked", resumed=True),
        "SFT, LoRA, merged and asked": _trains("lora", "alpaca", "asked"),
        "SFT, packed": _trains("full", "alpaca", "asked", sample_packing=True, pad_to_sequence_len=True),
        "DPO, full": _trains("full", "chat_template.argilla_chat", "chosen", **PREFERENCES),
    },
    finish={"SFT, LoRA, merged and asked": _finish},
    answer=r"^(<unk> w7 w9) ",  # the question: it samples its answer at random, from run to run
    environment=_environment,
    alone={"SFT, packed": "its packer makes other batches for two replicas"},
)  # fmt: skip
