"""Full fine-tuning of a causal LM from a recipe, by HF Trainer, tensor parallel.

    accelerate launch --config_file recipes/accelerate/tp2_zero1.yaml -m tp_plugin.finetune RECIPE.yaml [key=value ...]
    deepspeed --num_gpus 4 --module tp_plugin.finetune RECIPE.yaml [key=value ...]

The recipe (:mod:`tp_plugin.launch.recipe`) names model and data, the DeepSpeed config the sharding. Trainer trains and
leaves an ordinary HF directory. A plain process of transformers then loads it, checks it and writes a sample.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import tp_plugin
from tp_plugin.errors import TensorParallelError, agree
from tp_plugin.integrations.checkpoint_folders import LATEST_GOOD, newest_whole
from tp_plugin.launch.data import Blocks, blocks, documents
from tp_plugin.launch.export_check import reference, visit_plainly
from tp_plugin.launch.model import build_model, build_tokenizer, is_missing, load_model
from tp_plugin.launch.recipe import Recipe, load_recipe
from tp_plugin.mesh import check_world
from tp_plugin.sharding import state_of

PATIENCE = timedelta(hours=12)
"""Timeout of the world's process group: one process tokenises or checks the export while the others wait. A training
step waits in other groups, which keep their libraries' timeouts."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line. An error that the user can correct is one sentence on stderr, with exit code 1."""
    parser = argparse.ArgumentParser(prog="python -m tp_plugin.finetune", description=__doc__.split("\n")[0])
    parser.add_argument("recipe", help="YAML file, see recipes/README.md")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as training.max_steps=5")
    parser.add_argument(
        "--resume",
        metavar="WHERE",
        help=f"a checkpoint-N directory, or {LATEST_GOOD}: the newest whole one of the output directory, if any",
    )
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    arguments = parser.parse_intermixed_args(argv)  # key=value may follow an option
    try:
        finetune(load_recipe(arguments.recipe, arguments.overrides), arguments.resume)
    except TensorParallelError as failure:
        sys.exit(f"tp_plugin.finetune: {failure}")


def finetune(recipe: Recipe, resume: str | None = None) -> None:
    """Train, save, check and sample; called on every rank of a launched job.

    Args:
        resume: a ``checkpoint-N`` directory to go on from, or "latest-good".

    Raises:
        TensorParallelError: on every rank, for a setup that cannot work, or when the exported model is not the one
            that was trained.
    """
    launched_by_accelerate, ds_config = _deepspeed_config(recipe)
    config = tp_plugin.TensorParallelConfig.from_deepspeed(ds_config)
    tp_plugin.register()
    state = _join()
    check_world(config.tp_size)

    from transformers import ProgressCallback, Trainer, default_data_collator

    tokenizer, train_set, held_out = _prepare(recipe, state)
    # Before TrainingArguments: with ZeRO-3 their mere existence makes from_pretrained partition over the whole world.
    model = load_model(recipe.model, config)
    model.config.use_cache = False
    _say(
        f"{recipe.model.path}: {_size(model) / 1e6:,.1f}M parameters, vocabulary {model.config.vocab_size}; "
        f"{len(train_set)} blocks of {recipe.data.sequence_length} tokens to train on, {len(held_out)} held out"
    )
    trainer = Trainer(
        model=model,
        args=_training_arguments(recipe, None if launched_by_accelerate else ds_config, evaluate=len(held_out) > 0),
        train_dataset=train_set,
        eval_dataset=held_out if len(held_out) else None,
        data_collator=default_data_collator,
        processing_class=tokenizer,
    )
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(_bar_after_first_step())
    _say(f"checkpoints and the trained model go to {recipe.output_dir}")
    start = time.monotonic()
    trainer.train(resume_from_checkpoint=_resumed(recipe, resume))
    seconds = time.monotonic() - start
    _report(trainer, seconds, evaluate=len(held_out) > 0)

    model.config.use_cache = True
    expected = reference(trainer.model_wrapped, held_out, recipe.sample.check_blocks)
    tp_plugin.save_pretrained(trainer.model_wrapped, recipe.output_dir)
    if state.is_main_process:
        tokenizer.save_pretrained(recipe.output_dir)
    _say(f"saved {recipe.output_dir}, an ordinary HF directory")
    agree(_visit(recipe, expected) if state.is_main_process else None)


def _bar_after_first_step() -> Any:
    """Trainer's progress bar, drawn after the first step, so that messages of the first step come before it."""
    from transformers import ProgressCallback

    class BarAfterFirstStep(ProgressCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            """Draw nothing yet."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero and self.training_bar is None:
                super().on_train_begin(args, state, control, **kwargs)
            super().on_step_end(args, state, control, **kwargs)

        def on_prediction_step(
            self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
        ) -> None:
            if self.training_bar is not None:
                super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.training_bar is not None:
                super().on_train_end(args, state, control, **kwargs)

    return BarAfterFirstStep


def _size(model: Any) -> int:
    """Number of parameters of the full model; a rank may have shards of them."""
    record = state_of(model)
    return model.num_parameters() if record is None else sum(map(math.prod, record.shapes.values()))


def _deepspeed_config(recipe: Recipe) -> tuple[bool, str]:
    """Return if accelerate started this process with DeepSpeed, and the path of the DeepSpeed config."""
    if "RANK" not in os.environ:
        raise TensorParallelError("start it with accelerate launch, deepspeed or torchrun, not with plain python.")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
        if not path:
            raise TensorParallelError(
                "accelerate's config names no DeepSpeed config; add deepspeed_config: {deepspeed_config_file: ...} to "
                "it, with tensor_parallel.autotp_size in that file."
            )
        return True, path
    if not recipe.deepspeed:
        raise TensorParallelError(
            "no DeepSpeed config: add 'deepspeed: path/to/config.json' to the recipe, or start it with accelerate "
            "launch and a config file of distributed_type DEEPSPEED."
        )
    return False, recipe.deepspeed


def _join() -> Any:
    """Create the process group through accelerate, so that Trainer finds it; the state has this rank's place in it."""
    from accelerate import PartialState

    _quieten()
    chosen = os.environ.get("ACCELERATE_USE_DEEPSPEED")
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"  # PartialState asks the environment, not the plugin
    try:
        backend = {} if torch.cuda.is_available() else {"backend": "gloo"}
        state = PartialState(timeout=PATIENCE, **backend)
    finally:
        if chosen is None:
            del os.environ["ACCELERATE_USE_DEEPSPEED"]
    if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    return state


def _quieten() -> None:
    """Silence DeepSpeed's log lines and the progress bars of all ranks but one, so that bar and losses are seen."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # of calls DeepSpeed makes
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if os.environ["RANK"] != "0":
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()


def _prepare(recipe: Recipe, state: Any) -> tuple[Any, Blocks, Blocks]:
    """Tokenizer, training blocks and held-out blocks; one process makes missing ones while the others wait."""
    from transformers import AutoTokenizer

    path = recipe.tokenizer.path or recipe.model.path
    error = None
    if state.is_main_process:
        error = _sentence(lambda: _build(recipe, path))
    agree(error)
    tokenizer = AutoTokenizer.from_pretrained(
        path,
        revision=recipe.model.revision if path == recipe.model.path else None,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    cut: list[tuple[Blocks, Blocks]] = []

    def cut_text() -> None:
        cut.append(blocks(recipe.data, tokenizer, seed=recipe.seed, cache=Path(recipe.output_dir, "cache")))

    agree(_sentence(cut_text) if state.is_local_main_process else None)  # one process a host writes the cache,
    agree(None if state.is_local_main_process else _sentence(cut_text))  # then its neighbours map it
    return tokenizer, *cut[0]


def _resumed(recipe: Recipe, resume: str | None) -> str | None:
    """The directory to resume from; None to begin. A collective call."""
    if resume != LATEST_GOOD:
        return resume
    newest = newest_whole(Path(recipe.output_dir), for_trainer=True)
    if newest is None:
        _say(f"no whole checkpoint in {recipe.output_dir}: training starts from step 0")
        return None
    return str(newest.parent)


def _build(recipe: Recipe, tokenizer_path: str) -> None:
    from transformers import AutoTokenizer

    size = recipe.tokenizer.build_vocab_size
    if size is not None and is_missing(tokenizer_path, "tokenizer.json"):
        build_tokenizer(tokenizer_path, size, documents(recipe.data))
        _say(f"trained a byte-level tokenizer of {size} tokens: {tokenizer_path}")
    if recipe.model.build is not None and is_missing(recipe.model.path, "config.json"):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
        build_model(recipe.model.path, recipe.model.build, tokenizer, seed=recipe.seed)
        _say(f"wrote a {recipe.model.build['model_type']} with random weights: {recipe.model.path}")


def _sentence(action: Any) -> str | None:
    """Call ``action`` and return its failure for :func:`agree`: a rank must not leave the others waiting."""
    try:
        action()
    except TensorParallelError as failure:
        return str(failure)
    except Exception as failure:
        return f"{type(failure).__name__}: {failure}"
    return None


def _training_arguments(recipe: Recipe, ds_config: str | None, *, evaluate: bool) -> Any:
    from transformers import TrainingArguments

    own = dict(vars(recipe.training))
    extra = own.pop("extra")
    own["save_strategy"] = "steps" if own["save_steps"] else "no"
    own["save_steps"] = own["save_steps"] or 500  # unused, but must be positive
    options = {
        "report_to": "none",
        "logging_first_step": True,
        "eval_on_start": evaluate,
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "accelerator_config": {"use_configured_state": True},
    }
    try:
        return TrainingArguments(
            output_dir=recipe.output_dir, deepspeed=ds_config, seed=recipe.seed, **(own | options | extra)
        )
    except (TypeError, ValueError) as failure:
        raise TensorParallelError(f"'training' of the recipe is refused by TrainingArguments: {failure}") from failure


def _report(trainer: Any, seconds: float, *, evaluate: bool) -> None:
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    line = f"{trainer.state.global_step} steps in {seconds:.0f} s"
    if logged:
        line += f", loss {logged[0]:.3f} -> {logged[-1]:.3f}"
    if evaluate:
        last = trainer.evaluate()["eval_loss"]
        first = next(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
        line += f", held-out loss {first:.3f} -> {last:.3f}"
    _say(line)


def _visit(recipe: Recipe, expected: dict[str, torch.Tensor]) -> str | None:
    report, complaint = visit_plainly(recipe, expected)
    _say(report)
    return complaint


def _say(line: str) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(line, flush=True)


if __name__ == "__main__":
    main()
