"""A small Llama and a small data set, the same in every process, and the plain truth to compare with."""

from __future__ import annotations

import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB, LENGTH = 131, 12  # a vocabulary that two ranks cannot share evenly


def model(*, tied: bool = False, seed: int = 0) -> LlamaForCausalLM:
    """Grouped key/value heads, biases, and norms away from one: zeros and ones hide errors."""
    torch.manual_seed(seed)
    made = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, attention_bias=True, mlp_bias=True, tie_word_embeddings=tied, initializer_range=0.1,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def adapted():
    """:func:`model` with LoRA on every linear layer and a head of its own, B away from zero."""
    import peft

    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules="all-linear", modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    made = peft.get_peft_model(model(), config)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return made


class Samples(torch.utils.data.Dataset):
    """``count`` samples of LENGTH tokens; the first token is the sample's number, the rest is made from it.

    Each has another number of labels: sample i hides its first ``2 + i % 7`` ones.
    """

    def __init__(self, count: int, offset: int = 0) -> None:
        self.count, self.offset = count, offset

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        number = index + self.offset
        ids = torch.randint(VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(1000 + number))
        ids[0] = number
        labels = ids.clone()
        labels[: 2 + number % 7] = -100
        return {"input_ids": ids, "labels": labels}


class Stream(torch.utils.data.IterableDataset):
    """The same samples as an iterable of unknown length."""

    def __init__(self, count: int) -> None:
        self.samples = Samples(count)

    def __iter__(self):
        return iter(self.samples)


def batch(numbers: list[int]) -> dict[str, torch.Tensor]:
    rows = [Samples(number + 1)[number] for number in numbers]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def truth(
    start: LlamaForCausalLM,
    steps: list[list[list[list[int]]]],
    *,
    all_tokens: bool,
    clip: float,
    lr: float,
    decay: float = 1.0,
) -> dict:
    """One unsharded process in plain PyTorch, AdamW; eps is 1e-4 so that noise in near-zero gradients stays small.

    Args:
        steps: [step][data-parallel rank][micro batch] -> sample numbers.
        decay: factor of the learning rate after every step.
        all_tokens: each step's loss is a mean over the tokens of the global batch; else over each rank's, averaged.

    Returns:
        ``losses`` and ``norms`` (before clipping), one a step, and the trained ``model``.
    """
    optimizer = torch.optim.AdamW(start.parameters(), lr=lr, eps=1e-4, weight_decay=0.0)
    losses, norms = [], []
    for ranks in steps:
        counts = [sum(int((batch(micro)["labels"][:, 1:] != -100).sum()) for micro in micros) for micros in ranks]
        total = torch.zeros(())
        for micros, count in zip(ranks, counts, strict=True):
            for micro in micros:
                inputs = batch(micro)
                logits = start(input_ids=inputs["input_ids"]).logits[:, :-1].flatten(0, 1)
                summed = F.cross_entropy(logits, inputs["labels"][:, 1:].flatten(), reduction="sum")
                total = total + summed / (sum(counts) if all_tokens else count * len(ranks))
        total.backward()
        losses.append(total.item())
        norms.append(torch.nn.utils.clip_grad_norm_(start.parameters(), clip).item())
        optimizer.step()
        optimizer.zero_grad()
        for settings in optimizer.param_groups:
            settings["lr"] *= decay
    return {"losses": losses, "norms": norms, "model": start}
