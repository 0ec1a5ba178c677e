"""What loops write that would train otherwise, or do nothing, on four ranks: each function is one habit."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.local_sgd import LocalSGD
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin, DistributedDataParallelKwargs, gather_object
from torch.utils.data import DataLoader, DistributedSampler

import tp_plugin
from tests.habits.loops import Texts, grouped, shared_folder
from tests.support import tiny
from tests.support.configs import auto_config


def accelerated(clip: Any = 0.0, **options: Any) -> Accelerator:
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    tp_plugin.register()
    AcceleratorState._reset_state(reset_partial_state=True)
    ours = {"tensor_parallel": {"autotp_size": 2}, "tp_plugin": {"quiet": True}, "gradient_clipping": clip}
    config = auto_config(1, **{"zero_allow_untested_optimizer": True} | ours)
    return Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config), **options)


def prepared(accelerator: Accelerator, data: Any = None, **loading: Any) -> tuple:
    model = tiny.model()
    loader = DataLoader(data or Texts(16), batch_size=2, **loading)
    return accelerator.prepare(model, grouped(model), loader)


def stepped(accelerator: Accelerator, data: Any = None, **loading: Any) -> Any:
    """The engine, after the first backward."""
    model, _, loader = prepared(accelerator, data, **loading)
    accelerator.backward(model(**next(iter(loader))).loss)
    return model


def accumulates_by_hand() -> None:
    """``nlp_example`` with a batch too large for it, and others that divide the loss by themselves."""
    accelerator = accelerated()
    model, optimizer, loader = prepared(accelerator)
    for step, batch in enumerate(loader, 1):
        accelerator.backward(model(**batch).loss / 2)
        if step % 2 == 0:
            optimizer.step()
            optimizer.zero_grad()


def leaves_the_sum_out() -> None:
    """``gradient_accumulation_for_autoregressive_models``."""
    accelerator = accelerated()
    model, _, loader = prepared(accelerator)
    with model.no_sync():
        accelerator.backward(model(**next(iter(loader))).loss)


def clips_at_another_norm() -> None:
    accelerator = accelerated(clip="auto")
    model = stepped(accelerator)
    accelerator.clip_grad_norm_(model.parameters(), 0.5)


def clips_by_another_norm() -> None:
    accelerator = accelerated(clip=1.0)
    model = stepped(accelerator)
    accelerator.clip_grad_norm_(model.parameters(), 1.0, norm_type=1)


def clips_where_the_config_never_does() -> None:
    accelerator = accelerated()
    model = stepped(accelerator)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)


def clips_by_value() -> None:
    accelerator = accelerated()
    model = stepped(accelerator)
    accelerator.clip_grad_value_(model.parameters(), 1.0)


def samples_by_rank() -> None:
    data, world = Texts(16), dist.get_world_size()
    stepped(accelerated(), sampler=DistributedSampler(data, num_replicas=world, rank=dist.get_rank(), shuffle=False))


def cuts_by_rank() -> None:
    stepped(accelerated(), [Texts(16)[index] for index in range(dist.get_rank(), 16, dist.get_world_size())])


def steps_locally() -> None:
    accelerator = accelerated()
    model, *_ = prepared(accelerator)
    with LocalSGD(accelerator=accelerator, model=model, local_sgd_steps=2):
        pass


def saves_in_a_hook() -> None:
    """PEFT's semantic search takes each model's weights from the list that a hook is given, which is empty."""
    accelerator = accelerated()
    prepared(accelerator)
    accelerator.register_save_state_pre_hook(lambda models, weights, _folder: [weights[0] for _ in models])
    accelerator.save_state(str(shared_folder()))


def asks_for_nothing() -> list[str]:
    """What is said of clipping in a loop that never clips, and in one that clips at the norm of "auto"."""
    from tp_plugin import log

    found: list[str] = []
    plain, log.warning = log.warning, lambda text, **_: found.append(text)
    try:
        for clips in (False, True):
            accelerator = accelerated(clip="auto")
            model, optimizer, loader = prepared(accelerator)
            for batch in loader:
                accelerator.backward(model(**batch).loss)
                if clips:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
    finally:
        log.warning = plain
    return [text for text in found if "gradient_clipping" in text]


def changes_gradients() -> list[int]:
    """``run_wav2vec2_pretraining_no_trainer`` multiplies gradients after backward: there are none any more."""
    return [sum(p.grad is not None and bool(p.grad.any()) for p in stepped(accelerated()).parameters())]


def compresses() -> float:
    """``ddp_comm_hook``: DeepSpeed has no such hook, and accelerate leaves it out."""
    hooked = accelerated(kwargs_handlers=[DistributedDataParallelKwargs(comm_hook="fp16")])
    return stepped(hooked).get_global_grad_norm() - stepped(accelerated()).get_global_grad_norm()


def infers() -> tuple[list[int], list[int]]:
    """``inference/distributed``: prompts dealt by a PartialState, what was made of them collected."""
    accelerated()
    with PartialState().split_between_processes(list(range(5)), apply_padding=True) as mine:
        made = [10 * prompt for prompt in mine]
    return made, gather_object(made)[:5]


def follows_the_parallelism_config() -> Any:
    """``nd_parallel`` reads the mesh and the sizes of accelerate's own tensor parallelism: there are none."""
    accelerator = accelerated()
    return accelerator.torch_device_mesh, accelerator.parallelism_config


REFUSED: dict[Callable[[], Any], tuple[str, str]] = {
    accumulates_by_hand: ("TensorParallelError", "came twice before optimizer.step.*with accelerator.accumulate"),
    leaves_the_sum_out: (
        "TensorParallelError",
        r"no_sync\(\) around accelerator.backward.*with accelerator.accumulate",
    ),
    clips_at_another_norm: ("TensorParallelError", r'clip_grad_norm_\(.*0.5\).* at 1 .*"gradient_clipping": 0.5 in'),
    clips_by_another_norm: ("TensorParallelError", "norm_type=1.* clips 2-norms at 1 "),
    clips_where_the_config_never_does: ("TensorParallelError", 'at 0 .*: set "gradient_clipping": 1 in the DeepSpeed'),
    clips_by_value: ("Exception", "do not support `clip_grad_value_`"),
    samples_by_rank: ("TensorParallelError", "got different batches.* sample by data-parallel rank"),
    cuts_by_rank: ("TensorParallelError", "got different batches.* sample by data-parallel rank"),
    steps_locally: ("NotImplementedError", "LocalSGD is supported only for CPUs and GPUs .no DeepSpeed"),
    saves_in_a_hook: ("IndexError", "list index out of range"),
}
ALLOWED = (asks_for_nothing, changes_gradients, compresses, infers, follows_the_parallelism_config)
