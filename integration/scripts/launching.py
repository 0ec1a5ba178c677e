"""Start training scripts as users do, on CPU ranks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(__file__).parent
TRIPWIRE = {"layer_specs": [{"patterns": ["x"], "partition_type": "needs tp_plugin.register()"}]}


ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
}


def deepspeed_config(stage: int, tp: int = 2, **more: object) -> dict:
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage},
        "zero_force_ds_cpu_optimizer": False,
        "tensor_parallel": {"autotp_size": tp, "partition_config": TRIPWIRE},
        **more,
    }


def accelerate_launch(
    folder: Path, ranks: int, config: dict, command: list[str], env: dict | None = None, zero3_init: bool = False
) -> str:
    """``accelerate launch --config_file ... -m tp_plugin.run COMMAND``; its output, or AssertionError with it."""
    (folder / "ds.json").write_text(json.dumps(config))
    (folder / "accelerate.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\nuse_cpu: true\nnum_machines: 1\n"
        f"machine_rank: 0\nnum_processes: {ranks}\nmain_process_port: {free_port()}\n"
        f"deepspeed_config:\n  deepspeed_config_file: {folder}/ds.json\n  zero3_init_flag: {str(zero3_init).lower()}\n"
    )
    return _start(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"{folder}/accelerate.yaml"]
        + ["-m", "tp_plugin.run", *command],
        env,
    )


def deepspeed_launch(ranks: int, command: list[str], env: dict | None = None) -> str:
    """``deepspeed --num_gpus N --module tp_plugin.run COMMAND``; its output, or AssertionError with it."""
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(ranks)]
    return _start([*launcher, "--master_port", str(free_port()), "--module", "tp_plugin.run", *command], env)


def _start(command: list[str], env: dict | None) -> str:
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=ENVIRONMENT | (env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-8000:]}"
    return done.stdout


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
