"""Bad input and bad disks: one sentence on every rank, nothing touched, the newest whole checkpoint named."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
from pathlib import Path

import pytest
import torch

import tp_plugin
from tests.support import damaged_checkpoints, resume
from tests.support.batched_cases import launched, sentence, values
from tests.support.models import batch, make
from tests.support.spoilt import base, engine, everywhere, first, flip, frozen_engine
from tests.support.train import engine_for
from tp_plugin.weights.manifest import FILE, Manifest

CASES = (
    "truncated", "missing", "flipped", "manifest_flipped", "manifest_truncated", "manifest_missing", "not_there",
    "newer_format", "deepspeeds_own", "other_architecture", "other_vocabulary", "other_optimizer", "other_groups",
    "adam_into_adamw", "adamw_into_radam", "adamw_into_nadam", "without_optimizer", "unwritable_client_state",
    "endless_client_state", "endless_scheduler", "different_tags", "disk_full", "no_directory", "local_storage",
    "frozen_left_out", "block_quantised", "latest_unreadable",
)  # fmt: skip
GOOD = (
    "between_steps", "falls_back", "nothing_there", "replaces", "weights_only", "without_frozen", "two_models",
    "moved_aside", "others_client_state", "frozen_in_groups", "frozen_listed",
)  # fmt: skip


# ---- what works ----------------------------------------------------------------------------------------------------


def falls_back():
    folder = everywhere()
    one = engine()
    for step in (0, 1, 2):
        resume.train(one, 2, (step,), "Llama")
        one.save_checkpoint(folder)
    first(lambda: flip(Path(folder, "global_step3", "rank_00000.safetensors"), 0.5))
    first(lambda: (Path(folder, "global_step3", "rank_00001.safetensors")).write_bytes(b""))
    other = engine()
    path, _ = other.load_checkpoint(folder, "latest-good")
    return Path(path).name, other.global_steps


def between_steps():
    """Saved when one of two micro-batches is accumulated, resumed before it; the next step as if nothing had been."""
    folder = everywhere()
    one, other = engine(), engine(seed=1)
    resume.train(one, 2, (0,), "Llama")
    one.save_checkpoint(folder)
    true = resume.train(one, 2, (1,), "Llama")
    one.load_checkpoint(folder)
    one.backward(one(**batch(2, resume.MICRO)).loss)
    one.step()
    saved = one.micro_steps
    one.save_checkpoint(folder)
    other.load_checkpoint(folder)
    return saved, other.micro_steps, resume.train(other, 2, (1,), "Llama") == true, other.global_steps


def nothing_there():
    folder, said = everywhere(), io.StringIO()
    with contextlib.redirect_stderr(said):
        found = engine().load_checkpoint(folder)
    lines = [line for line in said.getvalue().replace(folder, "FOLDER").splitlines() if line.startswith("tp_plugin:")]
    return found, lines


def moved_aside():
    """A job was killed while it replaced the checkpoint, where the file system has no exchange."""
    folder = everywhere()
    one = engine()
    resume.train(one, 2, (0,), "Llama")
    one.save_checkpoint(folder, tag="same")
    aside = Path(folder, ".tp_plugin-writing-same-01234567-replaced")
    first(lambda: Path(folder, "same").rename(aside))
    other = engine()
    other.load_checkpoint(folder)
    return other.global_steps, sorted(os.listdir(folder))


def mixed_engine(stage: int):
    """Frozen parameters in the optimizer's groups, as ``AdamW(model.parameters())`` has them."""
    model = make("Llama", tied=False)
    model.model.embed_tokens.requires_grad_(False)
    config = base() | {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 40}}
    return engine_for(model, torch.optim.AdamW(model.parameters(), 0.01), config)


def frozen_in_groups():
    """From stage 0 to the others and back, to a loss that is the same."""
    folder, losses = everywhere(), []
    for before, after in ((0, 1), (1, 0), (0, 3), (0, 0)):
        one, other = mixed_engine(before), mixed_engine(after)
        resume.train(one, 2, (0,), "Llama")
        one.save_checkpoint(folder)
        other.load_checkpoint(folder)
        losses.append((resume.train(one, 2, (1, 2), "Llama"), resume.train(other, 2, (1, 2), "Llama")))
    return max(abs(a - b) for ours, theirs in losses for a, b in zip(ours, theirs, strict=True))


def frozen_listed():
    """Stage 0 once listed frozen parameters as the optimizer's."""
    folder = everywhere()
    mixed_engine(0).save_checkpoint(folder, tag="old")

    def age() -> None:
        manifest = Manifest.load(Path(folder, "old"))
        ((name, entry),) = [(n, e) for n, e in manifest.entries.items() if not e.trained and not e.buffer]
        manifest.optimizer["groups"][0]["names"].insert(0, name)
        manifest.optimizer["stateless"].insert(0, name)
        entries = manifest.entries | {name: dataclasses.replace(entry, trained=True)}
        Path(folder, "old", FILE).write_bytes(dataclasses.replace(manifest, entries=entries).dump())

    first(age)
    other = mixed_engine(1)
    other.load_checkpoint(folder)
    mixed_engine(0).load_checkpoint(folder)
    return other.global_steps


def replaces():
    """The same tag again: the directory is exchanged, nothing is left over."""
    folder = everywhere()
    one = engine()
    one.save_checkpoint(folder, tag="same")
    resume.train(one, 2, (0,), "Llama")
    first(lambda: Path(folder, ".tp_plugin-writing-same-01234567").mkdir())
    one.save_checkpoint(folder, tag="same")
    other = engine()
    other.load_checkpoint(folder)
    return other.global_steps, sorted(os.listdir(folder)), sorted(os.listdir(Path(folder, "same")))


def weights_only():
    """``load_module_only``: the weights, and nothing of the optimizer, the steps or the learning rate."""
    folder = everywhere()
    one = engine()
    resume.train(one, 2, (0, 1), "Llama")
    one.save_checkpoint(folder)
    other = engine(seed=1)
    other.load_checkpoint(folder, load_module_only=True)
    alike = tp_plugin.full_state_dict(one), tp_plugin.full_state_dict(other)
    assert all(torch.equal(alike[0][name], alike[1][name]) for name in alike[0])
    return other.global_steps, other.optimizer.param_groups[0]["lr"], other.lr_scheduler.last_epoch


def without_frozen():
    folder = everywhere()
    one, other = frozen_engine(), frozen_engine()
    resume.train(one, 2, (0,), "Llama")
    one.save_checkpoint(folder, exclude_frozen_parameters=True)
    other.load_checkpoint(folder, load_module_strict=False)
    alike = tp_plugin.full_state_dict(one), tp_plugin.full_state_dict(other)
    return all(torch.equal(alike[0][name], alike[1][name]) for name in alike[0])


def two_models():
    """A frozen reference model without an optimizer has a checkpoint too."""
    folder = everywhere()
    reference = engine_for(make("Llama", tied=False), None, base() | {"zero_optimization": {"stage": 0}})
    reference.save_checkpoint(folder)
    other = engine_for(make("Llama", tied=False, seed=1), None, base() | {"zero_optimization": {"stage": 0}})
    other.load_checkpoint(folder, load_optimizer_states=False)
    alike = tp_plugin.full_state_dict(reference), tp_plugin.full_state_dict(other)
    return all(torch.equal(alike[0][name], alike[1][name]) for name in alike[0])


SAID = {
    "truncated": "the checkpoint 'FOLDER/global_step2' is damaged: rank_00001.safetensors has 1000 bytes and was",
    "missing": "the checkpoint 'FOLDER/global_step2' is damaged: rank_00001.safetensors is missing",
    "flipped": "the checkpoint 'FOLDER/global_step2' is damaged: the content of rank_00001.safetensors has changed",
    "manifest_flipped": "the checkpoint 'FOLDER/global_step2' is damaged: manifest.json has changed",
    "manifest_truncated": "the checkpoint 'FOLDER/global_step2' is damaged: manifest.json cannot be read",
    "manifest_missing": "'FOLDER/global_step2' is not a whole checkpoint",
    "not_there": "'FOLDER/global_step7' does not exist",
    "newer_format": "is a checkpoint of format version 99, and this tp_plugin reads version 1",
    "deepspeeds_own": "'FOLDER/global_step2' is a DeepSpeed checkpoint, tied to its topology: convert it to weights",
    "other_architecture": "is of another model (LlamaForCausalLM; this is Qwen3ForCausalLM)",
    "other_vocabulary": "'model.embed_tokens.weight' has shape [131, 32] in it and [137, 32] here (the vocabulary",
    "other_optimizer": "holds the state of AdamW and this engine's optimizer is SGD",
    "adam_into_adamw": "holds the state of Adam and this engine's optimizer is AdamW; use the same, or load with",
    "adamw_into_radam": "holds the state of AdamW and this engine's optimizer is RAdam",
    "adamw_into_nadam": "holds the state of AdamW and this engine's optimizer is NAdam",
    "other_groups": "global_step2' (2) and of this optimizer (1) differ; make the optimizer as before",
    "without_optimizer": "was saved without an optimizer; load it with load_optimizer_states=False",
    "unwritable_client_state": "client_state.where.sampler holds a object, and a checkpoint holds tensors, numbers",
    "endless_client_state": "the checkpoint cannot be written: RecursionError: maximum recursion depth exceeded",
    "endless_scheduler": "the checkpoint cannot be written: RecursionError: maximum recursion depth exceeded",
    "different_tags": "save_checkpoint was given different tags, ['mine-0', 'mine-1']; use one",
    "disk_full": "writing rank_00001.safetensors of the checkpoint 'FOLDER/kept' failed: File too large",
    "no_directory": "writing '/proc/no/such/place/global_step0' failed: ",
    "local_storage": "checkpoint.use_node_local_storage keeps each host's files on that host",
    "block_quantised": "cannot hold 'absmax1' of the optimizer AdamW8bit: block-wise state cannot be resharded",
    "latest_unreadable": "looking for a checkpoint in 'FOLDER' failed: Input/output error; the newest whole checkpoint "
    "is 'FOLDER/global_step0'.",
    "frozen_left_out": "it was saved without frozen parameters: load with load_module_strict=False",
}
OFFERED = ("truncated", "missing", "flipped", "manifest_flipped", "manifest_missing", "deepspeeds_own")


def outcomes():
    return launched(2, (__name__, damaged_checkpoints.__name__), (*CASES, *GOOD))


@pytest.mark.parametrize("name", CASES)
def test_a_damaged_checkpoint_is_refused_on_every_rank(name):
    said = sentence(outcomes(), name)
    assert SAID[name] in said
    if name in OFFERED:
        assert said.endswith("; the newest whole checkpoint is 'FOLDER/global_step1'.")


@pytest.mark.parametrize("name", ["twin_flow_saved", "twin_flow_loaded"])
def test_an_optimizer_beside_the_optimizer_is_refused(name):
    said = sentence(launched(1, damaged_checkpoints.__name__, ("twin_flow_saved", "twin_flow_loaded")), name)
    assert "cannot hold the second optimizer of zero_optimization.offload_optimizer.ratio; remove ratio" in said


def test_a_step_begun_is_begun_anew():
    assert values(outcomes(), "between_steps") == [(3, 2, True, 2)] * 2


def test_the_newest_whole_one_is_taken_on_request():
    assert values(outcomes(), "falls_back") == [("global_step2", 2)] * 2


def test_a_directory_without_checkpoints_is_answered_as_deepspeed_does():
    line = "tp_plugin: no checkpoint in 'FOLDER': training starts from step 0"
    assert values(outcomes(), "nothing_there") == [((None, None), [line]), ((None, None), [])]


def test_what_was_moved_aside_is_loaded():
    assert values(outcomes(), "moved_aside") == [(1, ["latest", "same", "zero_to_fp32.py"])] * 2


def test_only_the_first_ranks_client_state_counts():
    assert values(outcomes(), "others_client_state") == [{"seen": 3}] * 2


def test_frozen_parameters_in_the_optimizers_groups_are_none_of_its_own():
    assert max(values(outcomes(), "frozen_in_groups")) < 1e-5
    assert values(outcomes(), "frozen_listed") == [0, 0]


def test_the_same_tag_is_replaced_whole_and_leftovers_go():
    files = ["manifest.json", "rank_00000.safetensors", "rank_00001.safetensors"]
    assert values(outcomes(), "replaces") == [(1, ["latest", "same", "zero_to_fp32.py"], files)] * 2


def test_weights_alone():
    assert values(outcomes(), "weights_only") == [(0, 1e-2, 0)] * 2


@pytest.mark.parametrize("name", ["without_frozen", "two_models"])
def test_what_a_checkpoint_holds_is_loaded_and_the_rest_kept(name):
    assert values(outcomes(), name) == [True, True]
