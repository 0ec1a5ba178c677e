"""``generate()`` of a sharded model: one process's tokens on every rank, whatever way, cache and padding."""

from __future__ import annotations

import itertools
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import (
    CompileConfig,
    GenerationConfig,
    GenerationMixin,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    pipeline,
)
from transformers.generation import stopping_criteria

import tp_plugin
from tests.support.batched_cases import launched, sentence, values
from tests.support.configs import config_for
from tests.support.generation import LENGTH, MODELS, RUN, TP, WAYS, prompts, sharded, tokens_of
from tests.support.models import make
from tests.support.ranks import on_ranks
from tests.support.train import engine_for, optimizer_for
from tp_plugin.integrations.transformers import generate
from tp_plugin.mesh import ParallelMesh

HERE = __name__


# ---- ways to generate, on several kinds of caches -----------------------------------------------------------------


def ways() -> dict[tuple[str, str, bool], tuple[list, list]]:
    found, known = {}, {kind: (build().eval(), sharded(build().eval())) for kind, build in MODELS.items()}
    for kind, name in RUN:
        for padded in (False, True):
            both = (tokens_of(model, WAYS[name], padded) for model in known[kind])
            found[kind, name, padded] = tuple(tokens.tolist() for tokens in both)
    return found


def scores() -> tuple[float, bool]:
    """The largest difference of what ``output_scores`` and ``output_logits`` give; whether hidden states are equal."""
    found = []
    for model in (make("Llama").eval(), sharded(make("Llama").eval())):
        out = model.generate(
            **prompts(), **LENGTH, output_scores=True, output_logits=True, output_hidden_states=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        found.append((torch.stack(out.scores + out.logits).clamp(min=-1e4), out.hidden_states[-1][-1]))
    (theirs, hidden), (ours, own) = found
    return float((theirs - ours).abs().max()), bool(torch.allclose(hidden, own, atol=1e-5))


def compiled() -> tuple[list, list]:
    """A static cache and compiled forwards, which transformers chooses by itself on GPUs."""
    options = LENGTH | {"cache_implementation": "static", "compile_config": CompileConfig(backend="eager")}
    return tuple(m.eval().generate(**prompts(), **options).tolist() for m in (make("Llama"), sharded(make("Llama"))))


def piped() -> tuple[list[str], list[str]]:
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({f"w{number}": number for number in range(131)}, unk_token="w1"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="w0", eos_token="w2", padding_side="left")
    found = []
    for model in (make("Llama").eval(), sharded(make("Llama").eval())):
        torch.manual_seed(3)
        write = pipeline("text-generation", model=model, tokenizer=words, device="cpu")
        texts = write(["w5 w7 w9", "w11 w3 w77 w8 w9"], max_new_tokens=6, do_sample=True, batch_size=2)
        found.append([one[0]["generated_text"] for one in texts])
    return tuple(found)


# ---- what the ranks must do together -----------------------------------------------------------------------------


def seeded_apart() -> list:
    """Each rank with a seed of its own, as without ``set_seed``: the group samples with its rank 0's."""
    model = sharded(make("Llama").eval())
    torch.manual_seed(dist.get_rank())
    return model.generate(**prompts(), **LENGTH, do_sample=True).tolist()


def late() -> tuple[str, list]:
    """Rank 1 comes late; rank 0 says what it waits for and both end alike."""
    import contextlib
    import io

    from tp_plugin.integrations.transformers import generate

    model, said = sharded(make("Llama").eval()), io.StringIO()
    before, generate.LATE_S = generate.LATE_S, 0.2
    try:
        if dist.get_rank():
            time.sleep(1)
        with contextlib.redirect_stderr(said):
            tokens = model.generate(**prompts(), **LENGTH).tolist()
    finally:
        generate.LATE_S = before
    return said.getvalue(), tokens


class Button(StoppingCriteria):
    """Somebody stops it, on each rank at another time."""

    def __init__(self) -> None:
        self.left = 3 + 2 * dist.get_rank()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> bool:
        self.left -= 1
        return self.left <= 0


STOPPED = {"clock": {"max_time": 3.5}, "button": {}, "assisted": {"max_time": 9.5, "max_new_tokens": 60}}


def stopped() -> dict[str, tuple[list, list]]:
    """A second passes with every look at the clock, on rank 1 half a second; and what is written without any."""
    plain, model, found = make("Llama").eval(), sharded(make("Llama").eval()), {}
    endless = prompts(rows=1) | {"no_repeat_ngram_size": 1, "pad_token_id": 0, "eos_token_id": None}
    for name, how in STOPPED.items():
        ticks = itertools.count()
        how = {"max_new_tokens": 12, **how}
        if name == "button":
            how["stopping_criteria"] = [Button()]
        if name == "assisted":
            how["assistant_model"] = make("Llama", seed=3).eval()
        pace = 1 / (1 + dist.get_rank())
        stopping_criteria.time = SimpleNamespace(time=lambda ticks=ticks, pace=pace: pace * next(ticks))
        try:
            tokens = model.generate(**endless, **how).tolist()
        finally:
            stopping_criteria.time = time
        found[name] = tokens, plain.generate(**endless, max_new_tokens=how["max_new_tokens"]).tolist()
    return found


def other_prompts() -> None:
    sharded(make("Llama").eval()).generate(**prompts(step=dist.get_rank()), **LENGTH)


def other_options() -> None:
    config = GenerationConfig(max_new_tokens=4 + dist.get_rank())
    sharded(make("Llama").eval()).generate(**prompts(), generation_config=config)


def continuous_batching() -> None:
    sharded(make("Llama").eval()).generate_batch([[3, 4, 5]], max_new_tokens=3)


def attention_weights() -> None:
    sharded(make("Llama", attn_implementation="eager").eval()).generate(
        **prompts(), **LENGTH, output_attentions=True, return_dict_in_generate=True
    )


CASES = (
    *("ways", "scores", "piped", "compiled", "seeded_apart", "late", "stopped"),
    *("other_prompts", "other_options", "continuous_batching", "attention_weights"),
)


def results() -> list[dict]:
    return launched(TP, HERE, CASES)


@pytest.mark.parametrize(("kind", "name"), RUN)
def test_every_way_gives_the_tokens_of_one_process(kind, name):
    for found in values(results(), "ways"):
        for padded in (False, True):
            theirs, ours = found[kind, name, padded]
            assert ours == theirs, f"padded: {padded}"
            assert len({token for row in theirs for token in row}) > 6, "a model that repeats itself proves little"


def test_scores_logits_and_hidden_states_are_whole():
    for difference, equal in values(results(), "scores"):
        assert difference < 1e-5
        assert equal


@pytest.mark.parametrize("name", ["piped", "compiled"])
def test_a_pipeline_and_compiled_forwards_give_the_same(name):
    for theirs, ours in values(results(), name):
        assert ours == theirs


@pytest.mark.parametrize("is_sharded", [True, False])
def test_forwards_of_a_sharded_model_are_never_captured_in_cuda_graphs(is_sharded):
    """transformers compiles them on GPUs by itself, in a mode that does; another mode that is asked for stays."""
    tp_plugin.register()
    cache = SimpleNamespace(is_compileable=True)
    model = SimpleNamespace(device=torch.device("cuda"), config=make("Llama").config)
    usual, other = "reduce-overhead", "max-autotune-no-cudagraphs"
    token = generate._MESH.set(ParallelMesh.single() if is_sharded else None)
    found = []
    for asked in (None, CompileConfig(), CompileConfig(mode=other), CompileConfig(backend="eager")):
        config = GenerationConfig(compile_config=asked)
        compiled = GenerationMixin._valid_auto_compile_criteria(model, {"past_key_values": cache}, config)
        found.append((compiled, config.compile_config.mode if config.compile_config is not None else None))
    generate._MESH.reset(token)
    if is_sharded:
        assert found == [(False, None), (True, "default"), (True, other), (True, usual)]
    else:
        assert found == [(True, None), (True, usual), (True, other), (True, usual)]


def test_ranks_that_are_seeded_apart_sample_one_text():
    first, second = values(results(), "seeded_apart")
    model = make("Llama").eval()
    torch.manual_seed(0)
    assert first == second == model.generate(**prompts(), **LENGTH, do_sample=True).tolist()


def test_a_rank_says_whom_it_waits_for():
    (said, first), (nothing, second) = values(results(), "late")
    assert "tp_plugin: WARNING: rank 0 waits in generate() for other ranks; it is collective" in said
    assert nothing == ""
    assert first == second


def test_one_rank_decides_when_clocks_and_users_stop():
    first, second = values(results(), "stopped")
    assert first == second
    prompt = prompts()["input_ids"].shape[1]
    for name, (written, endless) in first.items():
        assert written[0] == endless[0][: len(written[0])], name
        assert len(written[0]) < len(endless[0]), name
    assert [len(first[name][0][0]) - prompt for name in ("clock", "button")] == [4, 3]


REFUSED = {
    "other_prompts": "with different prompts or options",
    "other_options": "with different prompts or options",
    "continuous_batching": "use generate()",
    "attention_weights": "output_attentions",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_on_every_rank(name):
    assert REFUSED[name] in sentence(results(), name)


# ---- data-parallel ranks that end at different times -------------------------------------------------------------


def of_an_engine(stage: int) -> bool:
    """Replicas write texts of different lengths; under ZeRO-3 they have to go on together all the same."""
    plain, model = make("Llama").eval(), make("Llama")
    engine = engine_for(model, optimizer_for(model, "adamw"), config_for(TP, stage))
    engine.eval()
    replica = dist.get_rank() // TP
    how = prompts(step=replica) | {"max_new_tokens": 3 + 4 * replica, "do_sample": True}
    torch.manual_seed(replica)
    ours = engine.generate(**how, synced_gpus=stage == 3)
    torch.manual_seed(replica)
    theirs = plain.generate(**how, synced_gpus=False)
    return ours.tolist() == theirs.tolist()


def of_engines() -> list[bool]:
    return [of_an_engine(stage) for stage in (1, 3)]


def test_an_engine_generates_what_one_process_does():
    assert on_ranks(4, of_engines) == [[True, True]] * 4
