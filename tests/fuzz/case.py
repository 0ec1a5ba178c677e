"""One case of the fuzzer: plain data, drawn from a seed."""

from __future__ import annotations

import dataclasses
import json
import random
from typing import Any

from tests.fuzz import families
from tests.fuzz.families import CAUSAL, CLASSES, FAMILIES, MASKED, SEQ2SEQ

WORLDS = {(2, 2): 12, (4, 2): 5, (4, 4): 2, (3, 3): 2, (2, 1): 1}
"""(world, tp) -> how often it is drawn, beside the others."""
SHAPES = {"even": 3, "uneven": 4, "left": 2, "packed": 2}
LABELS = {"some": 8, "none": 2, "one": 2, "one rank": 2}
LOSSES = {
    CAUSAL: {"items": 6, "mean": 3, "smoothing": 2, "own": 2, "normaliser": 1, "entropy": 1, "fused": 2, "direct": 3},
    MASKED: {"mean": 3, "own": 1, "smoothing": 1},
    SEQ2SEQ: {"mean": 3, "smoothing": 1, "own": 1},
    CLASSES: {"mean": 1},
}
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "granite", "olmo", "olmo2", "helium")
CONV1D = ("gpt2", "gpt2_classes")
LINEAR = (*LIKE_LLAMA, "phi", "phi3", "cohere", "cohere2", "stablelm", "starcoder2", "smollm3", "glm", "glm4",
          "exaone4", "arcee", "seed_oss", "ernie4_5", "hunyuan", "gpt_neox", "bloom", "falcon", "opt",
          "qwen2_moe", "qwen3_moe", "mixtral", "deepseek_v3", "bert", "bert_classes", "llama_classes")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """A training of ``len(batches)`` steps on ``tp * dp`` ranks.

    Attributes:
        options: of the family's config.
        adapter: ``{"kind", ...}`` of PEFT's config; None trains the model itself.
        loss: a name of :mod:`tests.fuzz.losses`.
        direct: options of ``linear_cross_entropy``, for the loss of that name.
        batches: of each step how its rows are shaped, and how they are labelled.
        loop: ``engine``, or ``trainer`` for HF Trainer.
        way: as of :func:`tests.support.train.compare`.
        checkpointing: None, or whether activations are recomputed reentrantly.
        uneven: whether heads that tp does not divide are dealt unevenly (``uneven_heads``).
    """

    seed: int
    tp: int
    dp: int
    stage: int
    family: str
    options: dict[str, Any]
    adapter: dict[str, Any] | None
    loss: str
    direct: dict[str, Any]
    batches: list[tuple[str, str]]
    rows: int
    length: int
    accumulation: int
    optimizer: str
    way: str
    checkpointing: bool | None
    offload: bool
    guard: bool
    loop: str
    uneven: bool = False

    @property
    def world(self) -> int:
        return self.tp * self.dp

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Case:
        found = json.loads(text)
        return cls(**found | {"batches": [tuple(pair) for pair in found["batches"]]})

    def __str__(self) -> str:
        tuned = "" if self.adapter is None else f" {self.adapter['kind']}"
        steps = ", ".join("/".join(pair) for pair in self.batches)
        return (
            f"{self.family}{tuned} tp {self.tp} x dp {self.dp}, ZeRO {self.stage}, {self.loss} loss, {self.loop}, "
            f"{self.way} [{steps}]"
        )


def one_of(draw: random.Random, weights: dict[Any, int]) -> Any:
    return draw.choices(list(weights), list(weights.values()))[0]


def drawn(seed: int) -> Case:
    """The case of ``seed``, always the same."""
    draw = random.Random(seed)
    world, tp = one_of(draw, WORLDS)
    dp, stage = world // tp, draw.randint(0, 3)
    family = one_of(draw, {name: found.weight for name, found in FAMILIES.items()})
    options, kind = families.options_of(family, draw, tp), FAMILIES[family].kind
    adapter = adapter_of(family, draw) if draw.random() < 0.3 else None
    loop = "trainer" if kind == CAUSAL and draw.random() < 0.15 else "engine"
    loss = one_of(draw, {"items": 2, "own": 1} if loop == "trainer" else LOSSES[kind])
    if loss == "direct" and (not FAMILIES[family].plain_head or adapter or stage == 3):
        loss = "smoothing"
    if loss == "fused" and (family not in LIKE_LLAMA or (adapter and adapter["kind"] != "Lora")):
        loss = "normaliser"
    recomputed = draw.choice((True, False)) if draw.random() < 0.15 else None
    # with a cache transformers sees no packing; Trainer and recomputation turn it off
    options["use_cache"] = loop == "engine" and recomputed is None and draw.random() < 0.3
    ways = {"slot": 8, "early": 1, "mpu": 1, "load": 1} | ({"zero3 order": 3} if stage == 3 else {})
    ways |= {"late": 5} if adapter else {}
    way = "slot" if loop == "trainer" or tp == 1 else one_of(draw, ways)
    if way in ("load", "zero3 order"):  # no file says how attention and experts are computed
        options = {key: value for key, value in options.items() if key not in ("attn_implementation", "experts")}
    return Case(
        seed=seed, tp=tp, dp=dp, stage=stage, family=family, options=options, adapter=adapter, loss=loss,
        direct=direct_options(draw) if loss == "direct" else {},
        batches=[batch_of(kind, draw) for _ in range(draw.choice((2, 3)))],
        rows=draw.randint(1, 3), length=draw.randint(3, 17), accumulation=draw.choice((1, 1, 2)),
        optimizer=draw.choice(("adamw", "adamw", "sgd")),
        way=way,
        checkpointing=recomputed,
        offload=stage > 0 and draw.random() < 0.07, guard=draw.random() < 0.6, loop=loop,
        uneven=draw.random() < 0.6 and way in ("slot", "late", "zero3 order"),
    )  # fmt: skip


def batch_of(kind: str, draw: random.Random) -> tuple[str, str]:
    if kind == CLASSES:
        return one_of(draw, {"even": 1, "left": 1}), "some"
    shapes = SHAPES if kind == CAUSAL else {"even": 1, "uneven": 1}
    return one_of(draw, shapes), one_of(draw, LABELS)


def direct_options(draw: random.Random) -> dict[str, Any]:
    """Options of ``linear_cross_entropy``."""
    return {
        "label_smoothing": draw.choice((0.0, 0.1)), "z_loss": draw.choice((0.0, 1e-2)),
        "scale": draw.choice((1.0, 0.7)), "softcap": draw.choice((None, 4.0)), "weights": draw.random() < 0.3,
        "recompute": draw.random() < 0.3, "impl": draw.choice(("auto", "chunked", "reference")),
        "reduction": draw.choice(("mean", "sum", "none", "items")),
    }  # fmt: skip


def adapter_of(family: str, draw: random.Random) -> dict[str, Any] | None:
    """Options of a PEFT config for ``family``; None where none is tried."""
    r = draw.randint(1, 8)
    if family in CONV1D:
        task = "SEQ_CLS" if FAMILIES[family].kind == CLASSES else "CAUSAL_LM"
        return {"kind": "Lora", "r": r, "target_modules": "all-linear", "fan_in_fan_out": True, "task_type": task,
                "use_dora": draw.random() < 0.2}  # fmt: skip
    if family not in LINEAR:
        return None
    if FAMILIES[family].kind != CAUSAL:
        task = "SEQ_CLS" if FAMILIES[family].kind == CLASSES else None
        return {"kind": "Lora", "r": r, "target_modules": "all-linear", "task_type": task}
    found: dict[str, Any] = {"kind": "Lora", "r": r, "task_type": "CAUSAL_LM", "target_modules": "all-linear",
                             "use_rslora": draw.random() < 0.2, "use_dora": draw.random() < 0.15}  # fmt: skip
    if family in ("mixtral", "qwen2_moe", "qwen3_moe"):
        found["use_dora"] = False  # PEFT has none for experts
    if family not in LIKE_LLAMA:
        return found
    special = draw.random()
    if special < 0.1:
        return {"kind": "IA3", "task_type": "CAUSAL_LM", "target_modules": ["k_proj", "v_proj", "down_proj"],
                "feedforward_modules": ["down_proj"]}  # fmt: skip
    if special < 0.2:
        return {"kind": "PromptTuning", "num_virtual_tokens": draw.randint(1, 4), "task_type": "CAUSAL_LM"}
    found["target_modules"] = draw.choice(
        ["all-linear", sorted(draw.sample(LORA_TARGETS, draw.randint(1, 5))), ["q_proj", "v_proj"]]
    )
    if special < 0.35:
        found["modules_to_save"] = draw.sample(["lm_head", "embed_tokens", "norm"], draw.randint(1, 2))
    elif special < 0.45:
        found |= {"target_modules": ["embed_tokens", "lm_head", "v_proj"], "use_dora": False}
    elif special < 0.6:
        found["bias"] = draw.choice(("all", "lora_only"))
    elif special < 0.7:
        found["rank_pattern"] = {"q_proj": 2, "down_proj": 3}
    return found
