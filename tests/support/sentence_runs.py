"""Trainers of sentence-transformers in one unsharded process, and on ranks through DeepSpeed's slot."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import random
import traceback
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from tests.support import chat
from tests.support.errors import relative, replica_error
from tests.support.models import perturb
from tests.support.trl_runs import ROUNDING, common_folder, deepspeed_config, fill

STEPS, GLOBAL_ROWS, CLIP, RATE = 2, 4, 0.02, 1e-2
TASKS = {"bi": "FEATURE_EXTRACTION", "cross": "SEQ_CLS", "sparse": "FEATURE_EXTRACTION"}
NOT_COMPARED = ("runtime", "per_second", "flos", "step_time")
WAYS = ("trainer", "model")
TRAINERS = {"bi": "SentenceTransformer", "cross": "CrossEncoder", "sparse": "SparseEncoder"}
COLUMNS = {
    "pairs": ("anchor", "positive"), "triplets": ("anchor", "positive", "negative"),
    "scores": ("sentence1", "sentence2", "label"), "classes": ("sentence1", "sentence2", "label"),
    "single": ("anchor",),
}  # fmt: skip


def rows(form: str, count: int, seed: int = 0) -> dict[str, list]:
    """Columns of ``form``, of words at random; every sentence is another."""
    draw = random.Random(seed)
    made: dict[str, list] = {name: [] for name in COLUMNS[form]}
    for number in range(count):
        for place, name in enumerate(made):
            text = f"w{6 + (3 * number + place) % 125} {chat.words(draw, 2, 6)}"
            label = number % 3 if form == "classes" else draw.random()
            made[name].append(label if name == "label" else text)
    return made


def encoder(kind: str, folder: str, seed: int = 0) -> Any:
    """A small BERT of the library's class for ``kind``, without dropout; loaded from ``folder``, as users do."""
    import transformers

    sizes = transformers.BertConfig(
        vocab_size=chat.VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=53,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=0,
        num_labels=1,
    )  # fmt: skip
    name = {"bi": "BertModel", "cross": "BertForSequenceClassification", "sparse": "BertForMaskedLM"}[kind]
    torch.manual_seed(seed)
    plain = perturb(getattr(transformers, name)(sizes), seed)
    path = f"{folder}/{kind}-{seed}"
    if not dist.is_initialized() or dist.get_rank() == 0:
        plain.save_pretrained(path)
        chat.tokenizer().save_pretrained(path)
    if dist.is_initialized():
        dist.barrier()
    return load(kind, path)


def load(kind: str, path: str) -> Any:
    import sentence_transformers

    return getattr(sentence_transformers, TRAINERS[kind])(path, device="cpu")


def loss_of(kind: str, name: str, model: Any, folder: str, **options: Any) -> Any:
    """A loss by the name of its class; ``Matryoshka`` and ``GIST`` hold what the library's examples give them."""
    from sentence_transformers.cross_encoder import losses as cross
    from sentence_transformers.sentence_transformer import losses as bi
    from sentence_transformers.sparse_encoder import losses as sparse

    losses = {"bi": bi, "cross": cross, "sparse": sparse}[kind]
    if name == "Matryoshka":
        return bi.MatryoshkaLoss(model, bi.MultipleNegativesRankingLoss(model), [32, 16, 8])
    if name == "Splade":
        ranking = sparse.SparseMultipleNegativesRankingLoss(model, **options)
        return sparse.SpladeLoss(model, ranking, document_regularizer_weight=3e-3, query_regularizer_weight=5e-3)
    if name == "SoftmaxLoss":
        options |= {"num_labels": 3, "sentence_embedding_dimension": 32}
    if "GIST" in name:
        options["guide"] = encoder("bi", folder, seed=5)
    return getattr(losses, name)(model, **options)


def train(
    kind: str, loss: str, *, dp: int, deepspeed: dict | None = None, form: str = "pairs", lora: bool = False,
    dense: bool = False, extra: str = "", save: str = "", options: dict | None = None, accumulate: int = 1,
) -> dict[str, Any]:  # fmt: skip
    """One training of a few steps on the same global batches, however many ranks share them.

    Args:
        kind: bi, cross or sparse.
        loss: see :func:`loss_of`, with ``options``.
        dp: ranks that read different rows.
        deepspeed: the config of the engine; None trains in this process alone.
        dense: two layers of the library's own behind the encoder.
        extra: "loss" evaluates the loss, "evaluator" a metric each step; "best" also loads the best model, "resume"
            trains in two parts.
        save: folder in which ranks save the model in each way; one process encodes by what it finds there.
        accumulate: micro batches of a step in this process alone, as many as ranks read different rows elsewhere.

    Returns:
        The log, what ``extra`` found, the trained parameters, full and unsharded, and embeddings of a few texts.
    """
    with common_folder() as folder:
        make = functools.partial(
            trainer_of, kind, loss, folder, f"{save or folder}/base", form, lora, dense, extra, options or {},
            deepspeed=deepspeed, use_cpu=deepspeed is None, per_device_train_batch_size=GLOBAL_ROWS // dp // accumulate,
            per_device_eval_batch_size=GLOBAL_ROWS // dp // accumulate, gradient_accumulation_steps=accumulate,
        )  # fmt: skip
        if extra == "resume" and deepspeed is not None:
            make(max_steps=1).train()
        trainer = make(max_steps=STEPS)
        start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train(resume_from_checkpoint=extra == "resume" and deepspeed is not None)
        assert extra != "best" or trainer.state.best_global_step == 1, trainer.state.log_history
        found = trainer.evaluate() if extra in ("loss", "evaluator") else {}
        encoded, again = encode(kind, trainer.model), []
        replicas = 0.0
        if deepspeed is None:
            parameters = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
            again = [encode(kind, load(kind, f"{save}/{way}")) for way in WAYS if save]
        else:
            import tp_plugin

            replicas = replica_error(trainer.model_wrapped)
            parameters = tp_plugin.full_state_dict(trainer.model_wrapped)
            parameters = parameters if dist.get_rank() == 0 else {}
            if save:
                trainer.save_model(f"{save}/trainer")
                trainer.model.save_pretrained(f"{save}/model")
        # after resuming it is the mean of the second part
        left_out = (*NOT_COMPARED, *(["train_loss"] if extra == "resume" else []))
        kept = [{k: v for k, v in entry.items() if not any(word in k for word in left_out)}
                for entry in (*trainer.state.log_history, found)]  # fmt: skip
        return {
            "log": kept[:-1], "start": start, "parameters": parameters, "replicas": replicas, "evaluated": kept[-1],
            "encoded": encoded, "again": again,
        }  # fmt: skip


def trainer_of(
    kind: str, loss: str, folder: str, base: str, form: str, lora: bool, dense: bool, extra: str, options: dict,
    **arguments: Any,
) -> Any:  # fmt: skip
    """The library's trainer of ``kind``, as a script makes it; an adapter remembers the path ``base``."""
    import datasets
    import sentence_transformers
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # of an earlier case; fill() knows no models loaded in shards
    model = encoder(kind, base)  # before the arguments, as users do
    if dense:
        model = with_dense(model)
    if lora:
        import peft

        model.add_adapter(peft.LoraConfig(r=4, target_modules="all-linear", task_type=TASKS[kind]))
        fill(model)
    more = {}
    if extra in ("evaluator", "best"):
        more["evaluator"] = evaluator()
        arguments |= {"eval_strategy": "steps", "eval_steps": 1}
    if extra == "best":
        # the lowest, which is that of the first step
        best = {"metric_for_best_model": "eval_words_pearson_cosine", "greater_is_better": False}
        arguments |= {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True} | best
    elif extra == "resume":
        arguments |= {"save_strategy": "steps", "save_steps": 1}
    name = TRAINERS[kind]
    args = getattr(sentence_transformers, f"{name}TrainingArguments")(
        output_dir=folder, logging_steps=1, learning_rate=RATE, adam_epsilon=1e-4, lr_scheduler_type="constant",
        max_grad_norm=CLIP, weight_decay=0.0, report_to="none", disable_tqdm=True, bf16=False, seed=3,
        **{"save_strategy": "no"} | arguments,
    )  # fmt: skip
    held_out = datasets.Dataset.from_dict(rows(form, 8, seed=9)) if extra == "loss" else None
    return getattr(sentence_transformers, f"{name}Trainer")(
        model=model, args=args, train_dataset=datasets.Dataset.from_dict(rows(form, 24)), eval_dataset=held_out,
        loss=loss_of(kind, loss, model, folder, **options), **more,
    )  # fmt: skip


def with_dense(model: Any) -> Any:
    """``model`` with two layers of the library's own, which are sharded as a block and saved by themselves."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense

    torch.manual_seed(7)
    return SentenceTransformer(modules=[*model.children(), Dense(32, 48), Dense(48, 16)], device="cpu")


def evaluator() -> Any:
    from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

    given = rows("scores", 8, seed=4)
    return EmbeddingSimilarityEvaluator(given["sentence1"], given["sentence2"], given["label"], name="words")


def encode(kind: str, model: Any) -> torch.Tensor:
    """Embeddings of a few texts, or scores of pairs of them."""
    texts = ["w7 w30 w54", "w9 w30 w78 w12", "w100"]
    if kind == "cross":
        return torch.as_tensor(model.predict(list(itertools.pairwise(texts))))
    found = model.encode(texts, convert_to_tensor=True)
    return (found.to_dense() if kind == "sparse" else found).cpu()


def alone(kind: str, loss: str, **options: Any) -> dict[str, Any]:
    """:func:`train` in this process, as one that was launched by nobody."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    return train(kind, loss, dp=1, **options)


def sharded(kind: str, loss: str, tp: int, stage: int, guarded: bool = True, **options: Any) -> dict[str, Any]:
    """:func:`train` on this world's ranks; the guard of the first step must be able to compute it again."""
    import tp_plugin

    tp_plugin.register()
    options.pop("accumulate", None)
    with guard_able() if guarded else contextlib.nullcontext():
        return train(kind, loss, dp=dist.get_world_size() // tp, deepspeed=deepspeed_config(tp, stage), **options)


@contextlib.contextmanager
def guard_able() -> Iterator[None]:
    """Fail where the guard could not compute the first step again."""
    from tp_plugin.step_guard import comparison, guard

    def unchecked(reason: str | None, *_: Any) -> None:
        raise AssertionError(f"the guard could not check it: {reason}")

    with contextlib.ExitStack() as stack:
        for place in (comparison, guard):
            stack.enter_context(mock.patch.object(place, "warn_unchecked", unchecked))
        yield


def run_all(function: str, cases: list[dict]) -> list[dict[str, Any] | str]:
    """``alone`` or ``sharded`` for every case; an exception ends its case only."""
    found: list[dict[str, Any] | str] = []
    for case in cases:
        try:
            found.append({"alone": alone, "sharded": sharded}[function](**case))
        except Exception:
            traceback.print_exc()
            found.append(traceback.format_exc())
    return found


def differences(ours: dict[str, Any], truth: dict[str, Any]) -> list[str]:
    """What of one rank's run is not that of one process, in words; nothing if all is well.

    Updates are relative to a quarter of what Adam can do, or more: gradients that cancel (a key's bias) are noise.
    """
    wrong, start = [], truth["start"]
    entries = zip((*ours["log"], ours["evaluated"]), (*truth["log"], truth["evaluated"]), strict=True)
    for number, (mine, expected) in enumerate(entries):
        assert mine.keys() == expected.keys(), f"other things were logged: {mine.keys() ^ expected.keys()}"
        for key, value in expected.items():
            limit = 1e-5 if "loss" in key else 1e-4
            if not math.isclose(mine[key], value, rel_tol=limit):
                wrong.append(f"{key} of entry {number} is {mine[key]}, not {value}")
    if not ours["replicas"] <= ROUNDING:
        wrong.append(f"replicas differ by {ours['replicas']}")
    for name, found in {"encoded": ours["encoded"], **dict(zip(WAYS, truth["again"], strict=False))}.items():
        if not relative(found, truth["encoded"]) <= 1e-4:
            wrong.append(f"embeddings ({name}) are off by {relative(found, truth['encoded']):.1e}")
    for name, full in ours["parameters"].items():
        if name in truth["parameters"]:  # else the other name of a tied one
            final = truth["parameters"][name]
            least = 0.25 * STEPS * RATE * math.sqrt(final.numel())
            errors = relative(full, final, least), relative(full - start[name], final - start[name], least)
            if not max(errors) <= 1e-4:
                wrong.append(f"{name} and its update are off by {errors[0]:.1e} and {errors[1]:.1e}")
    return wrong
