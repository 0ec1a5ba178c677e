"""SmolLM2 loaded by slices, and what it generates token by token."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tp_plugin
from tp_plugin.config import TensorParallelConfig

QUESTIONS = ("What is the capital of France?", "Name three primary colours.")


def answers(path: str, tp: int) -> tuple[list[list[int]], list[str], list[float]]:
    """Greedy tokens, their texts, and the log-probability of each token chosen; ``tp`` 1 is plain transformers."""
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    model: Any
    if tp > 1:
        model = tp_plugin.from_pretrained(path, config=TensorParallelConfig(tp_size=tp, quiet=True))
    else:
        model = AutoModelForCausalLM.from_pretrained(path)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    made = model.eval().generate(
        **inputs, max_new_tokens=24, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    tokens = made.sequences[:, inputs["input_ids"].shape[1] :]
    scores = torch.stack(made.logits, 1).log_softmax(-1).gather(-1, tokens.unsqueeze(-1))
    return tokens.tolist(), tokenizer.batch_decode(tokens, skip_special_tokens=True), scores.flatten().tolist()
