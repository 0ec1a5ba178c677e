"""Unmodified HuggingFace forwards whose head returns lazy logits, against the same model with a plain head."""

import copy
import types

import pytest
import torch
import torch.distributed as dist
import transformers as hf

from tests.support.ranks import on_ranks
from tp_plugin.collectives import counted
from tp_plugin.lazy import VocabParallelLogits, lazy_logits
from tp_plugin.loss import VocabShard

V, H = 41, 16
DECODER = {
    "vocab_size": V,
    "hidden_size": H,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}
BERT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "tie_word_embeddings": False}
T5 = {"d_model": H, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": V, "dropout_rate": 0.0}
GPT2 = {"n_embd": H, "n_head": 2, "n_layer": 1, "vocab_size": V, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
MODELS = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, DECODER, "lm_head"),
    "gemma2": (
        hf.Gemma2ForCausalLM,
        hf.Gemma2Config,
        DECODER | {"final_logit_softcapping": 0.5, "tie_word_embeddings": False},
        "lm_head",
    ),
    "granite": (hf.GraniteForCausalLM, hf.GraniteConfig, DECODER | {"logits_scaling": 0.25}, "lm_head"),
    "cohere": (
        hf.CohereForCausalLM,
        hf.CohereConfig,
        DECODER | {"logit_scale": 3.0, "tie_word_embeddings": False},
        "lm_head",
    ),
    "bert": (hf.BertForMaskedLM, hf.BertConfig, DECODER | BERT, "cls.predictions.decoder"),
    "gpt2": (
        hf.GPT2LMHeadModel,
        hf.GPT2Config,
        GPT2 | {"attn_pdrop": 0.0, "tie_word_embeddings": False},
        "lm_head",
    ),
    "t5": (
        hf.T5ForConditionalGeneration,
        hf.T5Config,
        T5 | {"decoder_start_token_id": 0, "tie_word_embeddings": False},
        "lm_head",
    ),
}


def lazy_head(model, path, vocab):
    """Cut the head's rows to this rank's and make its forward return lazy logits."""
    head = model.get_submodule(path)
    own = slice(vocab.start, vocab.stop)
    head.weight = torch.nn.Parameter(head.weight.detach()[own].clone())
    if head.bias is not None:
        head.bias = torch.nn.Parameter(head.bias.detach()[own].clone())
    made = []

    def forward(self, hidden):
        made.append(lazy_logits(hidden, self.weight, self.bias, vocab, workspace_bytes=4096))
        return made[-1]

    head.forward = types.MethodType(forward, head)
    return made


def pair(name, group):
    model_class, config_class, options, path = MODELS[name]
    torch.manual_seed(0)
    plain = model_class(config_class(**options)).train()
    head = plain.get_submodule(path)
    head.weight = torch.nn.Parameter(head.weight.detach().clone())  # T5 ties it whatever the config says
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    ours = copy.deepcopy(plain)
    vocab = VocabShard.balanced(V, group)
    return plain, ours, vocab, path, lazy_head(ours, path, vocab)


def compare(names, group):
    worst = {}
    for name in names:
        plain, ours, vocab, path, made = pair(name, group)
        ids = torch.randint(1, V, (2, 9))
        labels = ids.clone()
        labels[0, :3] = -100
        for extra in ({}, {"num_items_in_batch": torch.tensor(7)}) if name in ("llama", "gemma2", "granite") else ({},):
            plain.zero_grad()
            ours.zero_grad()
            with counted() as counter:
                found = ours(input_ids=ids, labels=labels, **extra)
                truth = plain(input_ids=ids, labels=labels, **extra)
                found.loss.backward()
                truth.loss.backward()
            assert isinstance(found.logits, VocabParallelLogits)
            assert made[-1]._full is None
            assert not counter.count("logits")
            errors = [abs(found.loss - truth.loss).item() / truth.loss.item()]
            for key, parameter in plain.named_parameters():
                got, expected = ours.get_parameter(key).grad, parameter.grad
                if expected is None:
                    assert got is None
                    continue
                if key.startswith(path):
                    expected = expected[vocab.start : vocab.stop]
                # a key bias has no gradient but rounding noise
                errors.append(((got - expected).norm() / expected.norm().clamp(min=1e-4)).item())
            torch.testing.assert_close(found.logits.materialize(), truth.logits, rtol=1e-5, atol=1e-5)
            worst[name] = max(worst.get(name, 0.0), *errors)
    return worst


def on_several_ranks(names):
    return compare(names, dist.group.WORLD)


def test_models_on_three_ranks():
    for found in on_ranks(3, on_several_ranks, list(MODELS)):
        assert set(found) == set(MODELS)
        assert max(found.values()) <= 2e-5, found


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_compiled_model(name):
    plain, ours, *_ = pair(name, None)
    ids = torch.randint(1, V, (2, 9))
    compiled = torch.compile(ours, backend="aot_eager")
    for _ in range(2):
        plain.zero_grad()
        ours.zero_grad()
        found, truth = compiled(input_ids=ids, labels=ids), plain(input_ids=ids, labels=ids)
        found.loss.backward()
        truth.loss.backward()
        torch.testing.assert_close(found.loss, truth.loss)
        for key, parameter in plain.named_parameters():
            torch.testing.assert_close(ours.get_parameter(key).grad, parameter.grad, rtol=1e-4, atol=1e-6)
