"""A tokenizer of words, and small data sets in the forms that TRL's trainers read, the same in every process."""

from __future__ import annotations

import functools
import random
from typing import Any

VOCAB = 131  # which no degree of tensor parallelism divides
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|> ' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + ' </s> ' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
)


@functools.cache
def tokenizer() -> Any:
    """Words ``w6`` to ``w130``, split at white space, with a chat template that marks the assistant's turns."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *(f"w{number}" for number in range(len(SPECIAL), VOCAB))]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
    )  # fmt: skip
    fast.chat_template = TEMPLATE
    return fast


def words(draw: random.Random, least: int, most: int) -> str:
    """Some words at random, of few, so that a model soon guesses some right; they lie on all shards of a vocabulary."""
    return " ".join(f"w{len(SPECIAL) + 24 * draw.randrange(6)}" for _ in range(draw.randint(least, most)))


def rows(form: str, count: int, seed: int = 0, length: int | None = None) -> list[dict[str, Any]]:
    """``count`` rows of a form: text, prompt-completion, chat, preference, a chat's preference, or tokens.

    ``tokens`` are prepared already, and only every tenth row has labels: whole batches have none.

    Of ``length`` words a part, or of lengths that vary.
    """
    draw = random.Random(seed)
    made = []
    for number in range(count):
        prompt, good, bad = (words(draw, length or 2, length or most) for most in (6, 7, 7))
        said = [{"role": "user", "content": prompt}]
        answer = [{"role": "assistant", "content": good}]
        made.append(
            {
                "text": {"text": f"{prompt} {good}"},
                "prompt-completion": {"prompt": prompt + " ", "completion": good},
                "chat": {"messages": [*said, *answer, {"role": "user", "content": bad}, *answer]},
                "preference": {"prompt": prompt + " ", "chosen": good, "rejected": bad},
                "chat-preference": {
                    "prompt": said,
                    "chosen": answer,
                    "rejected": [{"role": "assistant", "content": bad}],
                },
                "tokens": {
                    "input_ids": (ids := tokenizer()(f"{prompt} {good}")["input_ids"]),
                    "labels": ids if number % 10 == 0 else [-100] * len(ids),
                },
            }[form]
        )
    return made


def dataset(form: str, count: int, seed: int = 0, length: int | None = None) -> Any:
    """The same as a ``datasets.Dataset``."""
    from datasets import Dataset

    return Dataset.from_list(rows(form, count, seed, length))
