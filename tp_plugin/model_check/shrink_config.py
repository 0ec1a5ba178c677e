"""Shrink a config: fewer layers and narrower ones, with everything kept that sharding depends on.

Head counts, groups, packing, flags and the kinds of layers stay as they are. Every width shrinks by one factor, which
leaves heads of about eight dimensions. So ``q:kv`` ratios, uneven splits and refusals are those of the model. It works
on any ``PreTrainedConfig`` by the names and values of its fields, and shrinks nested configs too.
"""

from __future__ import annotations

import copy
import math
import re
from typing import Any

from tp_plugin.model_check.resolve_model import complete_config, configs_in, explicit_sections, match_widths

PRIMES = (131, 137, 139, 149, 151, 157, 163, 167)
"""Vocabularies of the copy: no tensor-parallel degree divides them."""
MOST_LAYERS = 8

_LAYERS = re.compile(
    r"(n_layers?|num_layers|layers|depth|num_(en|de)coder_layers|(\w+_)?num_hidden_layers|\w*(en|de)coder_layers)"
)
_HEADS = re.compile(
    r"num_attention_heads|n_heads?|num_heads|attention_heads|(en|de)coder_attention_heads|"
    r"num_(en|de)coder_attention_heads|(en|de)coder_num_attention_heads"
)
_HIDDEN = ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "emb_dim", "encoder_hidden_size")
_HEAD_DIM = re.compile(
    r"head_dim|d_kv|d_head|kv_channels|dim_head|attention_head_(dim|size)|rotary_dim|v_head_dim|qk_\w*head_dim|"
    r"(swa|linear|index|global|linear_key|linear_value|resampler|mamba)_head_dim"
)
_WIDTH = re.compile(
    r"\w*(hidden|intermediate|embed(ding)?|inner|ffn|mlp|lora|projection|latent|kv|state|ff|size|dim|rank)\w*"
)
_NO_WIDTH = re.compile(
    r"(num_|n_|max_|use_|type_)\w*|\w*(vocab|patch|image|kernel|window|chunk|block|position|pad|stride|batch|length|ratio|"
    r"mult|factor|expand|layer|bucket|group|resolution|frame|grid|merge|codebook|context|channel|crop|sampling|drop|std|"
    r"epsilon|scal|hop_|feature_size|mel_)\w*|\w*_id"
)
_EXPERTS = re.compile(r"n_routed_experts|num_experts|num_local_experts|moe_num_experts")
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
_TOKEN_ID = re.compile(r"\w*(token_ids?|token_index|_index|_id|_idx)")
_PERIOD = re.compile(
    r"\w*(layer\w*(period|interval|freq|step|group_size)|every_n_layers|sparse_step|interval|frequency)"
)
_RANDOM = re.compile(r"\w*(drop|jitter|mask_(time|feature)_prob)\w*")


def shrunk_config(config: Any, *, widths: bool = True, vocabulary: bool = True) -> Any:
    """A deep copy of ``config`` for a model of about a million parameters.

    Args:
        config: any transformers config; left as it is.
        widths: shrink hidden sizes too; without it only layers, experts and vocabulary shrink.
        vocabulary: shrink vocabularies, and move special token ids into them.
    """
    small = copy.deepcopy(config)
    parts = list(configs_in(small))
    for part in parts:
        complete_config(part)
    for part in parts:
        if len(parts) > 1 and "vision" in part.model_type:
            match_widths(part, small.get_text_config())
        if len(parts) > 1:
            explicit_sections(part)
        _fewer_layers(part)
        _fewer_experts(part)
        _no_randomness(part)
    if widths:
        factors = [_factor(part) for part in parts]
        common: dict[int, int] = {}  # parts that are equally wide stay so
        for part, factor in zip(parts, factors, strict=True):
            for value in _hiddens(part):
                common[value] = math.gcd(common.get(value, factor), factor)
        factors = [
            math.gcd(factor, *(common[value] for value in _hiddens(part)))
            for part, factor in zip(parts, factors, strict=True)
        ]
        hiddens = {
            value: value // factor
            for part, factor in zip(parts, factors, strict=True)
            for value in _hiddens(part)
            if factor > 1 and value % factor == 0
        }
        for part, factor in zip(parts, factors, strict=True):
            _narrow(part, factor, hiddens)
    if vocabulary:
        _shrink_vocabularies(parts)
    return small


# ---- depth -----------------------------------------------------------------------------------------------------------


def _fewer_layers(config: Any) -> None:
    fields = vars(config)
    counts = {name: v for name, v in fields.items() if _LAYERS.fullmatch(name) and isinstance(v, int) and v > 2}
    if not counts:
        return
    total = max(counts.values())
    per_layer = [v for v in fields.values() if isinstance(v, list | tuple) and len(v) == total and _simple(v)]
    kinds = [v for v in per_layer if 1 < len(set(v)) <= 4]
    wanted = [2] + [max(v.index(kind) for kind in set(v)) + 1 for v in kinds]
    if not kinds:
        for name, v in fields.items():
            if isinstance(v, int) and not isinstance(v, bool) and 1 < v <= MOST_LAYERS:
                wanted += [v] if _PERIOD.fullmatch(name) or name.endswith("sliding_window_pattern") else []
                wanted += [v + 1] if name.endswith("layer_offset") else []
    left = min(max(wanted), MOST_LAYERS, total)
    if fields.get("num_kv_shared_layers"):  # each kind of layer once with its own keys and values, once without
        left = min(2 * left, total)
    for name, count in counts.items():
        fields[name] = min(left, count)
    for name, v in list(fields.items()):
        if isinstance(v, list | tuple) and len(v) in (total, total + 1) and _simple(v):
            fields[name] = type(v)(v[: left + len(v) - total])
        elif _is_indices(name, v, total):
            kept = [i for i in v if i < left]
            fields[name] = type(v)(kept or [left - 1])
        elif isinstance(v, int) and not isinstance(v, bool) and name not in counts:
            if name in ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index") and v > 1:
                fields[name] = 1
            elif name == "num_kv_shared_layers" and v > 0:
                fields[name] = left // 2
            elif name in ("max_window_layers", "moe_layer_end_index") and v > left:
                fields[name] = left - (name == "moe_layer_end_index")


def _simple(values: Any) -> bool:
    return all(isinstance(v, str | int | float | bool) or v is None for v in values)


def _is_indices(name: str, v: Any, total: int) -> bool:
    named = "layer" in name or "index" in name or "idx" in name
    ints = isinstance(v, list | tuple) and bool(v) and all(type(i) is int and 0 <= i <= total for i in v)
    return named and ints and "token" not in name and list(v) == sorted(set(v))


# ---- experts and randomness ------------------------------------------------------------------------------------------


def _fewer_experts(config: Any) -> None:
    fields = vars(config)
    groups = fields.get("n_group") or fields.get("num_expert_group") or 1
    for name, count in list(fields.items()):
        if not _EXPERTS.fullmatch(name) or not isinstance(count, int) or count <= 16:
            continue
        left = max(8, 2 * groups)
        left += -left % groups
        fields[name] = left + (count % 2 if groups == 1 else 0)  # as even as it was
        for top in _TOP_K:
            if isinstance(fields.get(top), int):
                fields[top] = min(fields[top], left // 2)


def _no_randomness(config: Any) -> None:
    """Dropout would make two runs differ; it is tested elsewhere."""
    for name, value in list(vars(config).items()):
        if _RANDOM.fullmatch(name) and isinstance(value, int | float) and not isinstance(value, bool):
            vars(config)[name] = type(value)(0)
        if name == "apply_spec_augment":
            vars(config)[name] = False


# ---- width -----------------------------------------------------------------------------------------------------------


def _hiddens(config: Any) -> list[int]:
    fields = vars(config)
    names = ("embed_dim",) if {"embed_dim", "patch_size"} <= fields.keys() else _HIDDEN
    return [v for name in names if type(v := fields.get(name)) is int and v > 0]


def _factor(config: Any) -> int:
    """Divisor of every width: it leaves an even head size of eight or a little more; 1 if unknown."""
    fields = vars(config)
    heads = [v for name, v in fields.items() if _HEADS.fullmatch(name) and type(v) is int and v > 0]
    names = ("embed_dim", *_HIDDEN) if "patch_size" in fields else _HIDDEN
    hidden = next((fields[name] for name in names if type(fields.get(name)) is int and fields[name] > 0), None)
    sizes = [v for name, v in fields.items() if _HEAD_DIM.fullmatch(name) and type(v) is int and v > 0]
    sizes += [hidden // n for n in heads if hidden and hidden % n == 0 and not fields.get("head_dim")]
    if hidden is None:
        return 1
    if not sizes:  # no attention
        return 16 if hidden % 16 == 0 and hidden >= 512 else 1
    sections = [s for v in _rope_dicts(fields) for name, s in v.items() if name.endswith("section")]
    common = math.gcd(*sizes)
    fits = [
        f
        for f in range(1, common + 1)
        if common % f == 0
        and hidden % f == 0
        and max(sizes) // f >= 8
        and all(s // f % 2 == 0 and s // f >= 4 for s in sizes)
        and all(i % f == 0 for section in sections for i in section)
    ]
    return max(fits, default=1)


def _rope_dicts(fields: dict[str, Any]) -> list[dict[str, Any]]:
    found = [v for name, v in fields.items() if name.startswith("rope") and isinstance(v, dict)]
    return found + [inner for v in found for inner in v.values() if isinstance(inner, dict)]


def _narrow(config: Any, factor: int, hiddens: dict[int, int]) -> None:
    fields = vars(config)
    for name, value in list(fields.items()):
        if type(value) is int and value > 0:
            fields[name] = _narrowed(name, value, factor, hiddens)
        elif isinstance(value, list) and value and all(type(v) is int for v in value) and _WIDTH.fullmatch(name):
            fields[name] = [_narrowed(name, v, factor, hiddens) for v in value]
    if factor > 1:
        for rope in _rope_dicts(fields):
            for name, value in rope.items():
                if name.endswith("section"):
                    rope[name] = [v // factor for v in value]
                elif isinstance(value, list) and len(value) >= factor and len(value) % factor == 0:
                    rope[name] = value[: len(value) // factor]


def _narrowed(name: str, value: int, factor: int, hiddens: dict[int, int]) -> int:
    if _HEAD_DIM.fullmatch(name):
        return value // factor
    if name not in (*_HIDDEN, "n_inner") and (_NO_WIDTH.fullmatch(name) or not _WIDTH.fullmatch(name)):
        return value
    if value in hiddens:
        return hiddens[value]
    if value <= 64 or factor == 1:
        return value
    return value // factor if value % factor == 0 else max(8, 8 * round(value / factor / 8))


# ---- vocabulary ------------------------------------------------------------------------------------------------------


def _shrink_vocabularies(parts: list[Any]) -> None:
    sizes: dict[int, int] = {}
    fresh = iter(PRIMES)
    for part in sorted(parts, key=lambda part: "text" not in part.model_type):
        for name, value in list(vars(part).items()):
            if (
                "vocab_size" in name
                and type(value) is int
                and value > 512
                and (value in sizes or len(sizes) < len(PRIMES))
            ):
                sizes[value] = vars(part)[name] = sizes.get(value) or next(fresh)
    if not sizes:
        return
    smallest = min(sizes.values())
    moved: dict[int, int] = {}
    for part in parts:
        for name, value in list(vars(part).items()):
            if not _TOKEN_ID.fullmatch(name):
                continue
            if type(value) is int:
                vars(part)[name] = _moved(value, smallest, moved)
            elif isinstance(value, list) and all(type(v) is int for v in value):
                vars(part)[name] = [_moved(v, smallest, moved) for v in value]


def _moved(token: int, vocabulary: int, moved: dict[int, int]) -> int:
    if token < vocabulary:
        return token
    return moved.setdefault(token, vocabulary - 1 - len(moved) % 64)
