"""Start training scripts as users do, on CPU ranks: by the real launchers, or in forked ranks with the same arguments.

A real launch imports every library in every rank, which is most of its time. :func:`launch` gives forked ranks the
environment that ``accelerate launch`` would give them; ``pytest --real-launches`` makes it launch for real.
"""

from __future__ import annotations

import json
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from unittest import mock

from tests.support.configs import auto_config
from tests.support.ranks import ROOT, outcomes

SCRIPTS = ROOT / "integration" / "scripts"
TRIPWIRE = {"layer_specs": [{"patterns": ["x"], "partition_type": "needs tp_plugin.register()"}]}
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
}
TIMEOUT_S = 600
real = False
"""Whether :func:`launch` and :func:`launch_module` start launchers; set by ``--real-launches``."""


def deepspeed_config(stage: int, tp: int = 2, **more: object) -> dict:
    """A DeepSpeed config that an unregistered DeepSpeed refuses; sizes are the script's."""
    return auto_config(stage, **{"tensor_parallel": {"autotp_size": tp, "partition_config": TRIPWIRE}} | more)


# ---- accelerate ------------------------------------------------------------------------------------------------------


def accelerate_launch(folder: Path, ranks: int, config: dict, command: list[str], zero3_init: bool = False) -> str:
    """``accelerate launch --config_file ... -m tp_plugin.run COMMAND``; its output, or AssertionError with it."""
    return _start([sys.executable, "-m", "accelerate.commands.launch", *_options(folder, ranks, config, zero3_init),
                   "-m", "tp_plugin.run", *command])  # fmt: skip


def launch(folder: Path, ranks: int, config: dict, command: list[str], zero3_init: bool = False) -> str:
    """:func:`accelerate_launch` in forked ranks, unless :data:`real`."""
    if real:
        return accelerate_launch(folder, ranks, config, command, zero3_init)
    environment = accelerate_environment(_options(folder, ranks, config, zero3_init))
    return forked(ranks, ["-m", "tp_plugin.run", *command], environment)


def accelerate_environment(options: Sequence[str]) -> dict[str, str]:
    """The variables that ``accelerate launch`` with ``options`` adds for DeepSpeed."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    with mock.patch("accelerate.commands.launch.deepspeed_launcher") as started:
        launch_command(launch_command_parser().parse_args([*options, "script.py"]))
    environment = prepare_deepspeed_cmd_env(started.call_args.args[0])[1]
    return {key: value for key, value in environment.items() if key.startswith("ACCELERATE_")}


def _options(folder: Path, ranks: int, config: dict, zero3_init: bool) -> list[str]:
    """Write the config files; name them as options of ``accelerate launch``."""
    (folder / "ds.json").write_text(json.dumps(config))
    (folder / "accelerate.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\nuse_cpu: true\nnum_machines: 1\n"
        f"machine_rank: 0\nnum_processes: {ranks}\nmain_process_port: {free_port()}\n"
        f"deepspeed_config:\n  deepspeed_config_file: {folder}/ds.json\n  zero3_init_flag: {str(zero3_init).lower()}\n"
    )
    return ["--config_file", f"{folder}/accelerate.yaml"]


# ---- deepspeed -------------------------------------------------------------------------------------------------------


def deepspeed_launch(ranks: int, module: str, arguments: list[str]) -> str:
    """``deepspeed --num_gpus N --module MODULE ARGUMENTS``; its output, or AssertionError with it."""
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(ranks)]
    return _start([*launcher, "--master_port", str(free_port()), "--module", module, *arguments])


def launch_module(ranks: int, module: str, arguments: list[str]) -> str:
    """:func:`deepspeed_launch` in forked ranks, unless :data:`real`."""
    return deepspeed_launch(ranks, module, arguments) if real else forked(ranks, ["-m", module, *arguments])


# ---- any command -----------------------------------------------------------------------------------------------------


def executed(degree: int, command: list[str]) -> str:
    """``tp-plugin exec --degree DEGREE COMMAND``, a command of this environment; its output."""
    folder = Path(sys.executable).parent
    return _start([str(folder / "tp-plugin"), "exec", "--degree", str(degree), str(folder / command[0]), *command[1:]])


# ---- both ------------------------------------------------------------------------------------------------------------


def forked(ranks: int, command: list[str], environment: dict[str, str] | None = None, cwd: Path = ROOT) -> str:
    """``python COMMAND`` in forked ranks; the output of all, or AssertionError with it."""
    found = outcomes(ranks, _run, command, str(cwd), timeout_s=TIMEOUT_S, env=environment, group=False)
    output = "\n".join(outcome["log"] for outcome in found)
    for rank, outcome in enumerate(found):
        assert outcome["ok"], f"rank {rank} of {command}: {outcome['kind']}: {outcome['error']}\n{output[-8000:]}"
    return output


def alone(*commands: list[str]) -> str:
    """``python COMMAND`` for each of ``commands`` in one forked process; their output."""
    (found,) = outcomes(1, _run_alone, commands, timeout_s=TIMEOUT_S, group=False)
    assert found["ok"], f"{found['kind']}: {found['error']}\n{found['log'][-8000:]}"
    return found["log"]


def _run(command: list[str], cwd: str) -> None:
    os.chdir(cwd)
    target, *arguments = command
    if target == "-m":
        sys.argv = arguments
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = command, str(Path(target).resolve().parent)
        runpy.run_path(target, run_name="__main__")


def _run_alone(commands: Sequence[list[str]]) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    for command in commands:
        _run(command, str(ROOT))


def _start(command: list[str]) -> str:
    return output_of(command, ENVIRONMENT)


def output_of(command: Sequence[str], env: Mapping[str, str], *, cwd: Path = ROOT, timeout_s: float = TIMEOUT_S) -> str:
    """What a command prints, stderr among it; AssertionError with the end of it when the command fails."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-8000:]}"
    return done.stdout


def free_port() -> int:
    """A port nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
