"""The training text: documents -> one stream of tokens -> blocks of equal length."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import random
import secrets
import socket
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch

from tp_plugin.errors import TensorParallelError
from tp_plugin.launch.recipe import DataRecipe
from tp_plugin.weights.atomic import sync

BATCH = 256  # documents handed to the tokenizer at a time


class Blocks(torch.utils.data.Dataset):
    """Rows ``[start, stop)`` of a ``[blocks, sequence_length]`` array of token ids; the labels are the ids."""

    def __init__(self, tokens: numpy.ndarray, start: int, stop: int) -> None:
        self.tokens, self.start, self.stop = tokens, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self.tokens[self.start + range(len(self))[index]].astype(numpy.int64))
        return {"input_ids": ids, "labels": ids.clone()}


def documents(data: DataRecipe) -> Iterator[str]:
    """The recipe's documents, in an order every machine with the same files agrees on.

    Raises:
        TensorParallelError: a pattern matches no file, a field is missing, or ``datasets`` is not installed.
    """
    if data.text_files is not None:
        for path in _files(data.text_files, "data.text_files"):
            yield path.read_text(encoding="utf-8", errors="replace")
    elif data.jsonl_files is not None:
        for path in _files(data.jsonl_files, "data.jsonl_files"):
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield _text(json.loads(line), data.text_field, f"{path}:{number}")
    else:
        try:
            import datasets
        except ImportError as failure:
            raise TensorParallelError("data.dataset needs datasets: pip install 'tp-plugin[data]'.") from failure
        rows = datasets.load_dataset(data.dataset, data.dataset_config, split=data.split)
        for number, row in enumerate(rows):
            yield _text(row, data.text_field, f"{data.dataset}[{number}]")


def blocks(data: DataRecipe, tokenizer: Any, *, seed: int, cache: Path) -> tuple[Blocks, Blocks]:
    """Tokenise, join and split the documents into blocks, once: the result is cached in ``cache`` and memory-mapped.

    Call it on one process of a host first.

    Returns:
        Training and validation blocks. Validation is the tail of the stream.

    Raises:
        TensorParallelError: no source, or too little text for a training block (and a validation block, if asked for).
    """
    file = cache / f"tokens-{_fingerprint(data, tokenizer, seed)}.npy"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        # hosts share the directory, and containers have the same pids
        part = file.with_suffix(f".{socket.gethostname()}.{secrets.token_hex(8)}.part")
        try:
            with part.open("xb") as out:
                numpy.save(out, _tokens(data, tokenizer, seed))
            sync(part)
            os.replace(part, file)
        finally:
            part.unlink(missing_ok=True)
    tokens = numpy.load(file, mmap_mode="r")
    held_out = max(1, round(len(tokens) * data.validation_fraction)) if data.validation_fraction else 0
    if len(tokens) <= held_out:
        raise TensorParallelError(
            f"the text fills {len(tokens)} blocks of data.sequence_length {data.sequence_length}, of which {held_out} "
            "would be held out; give more text or shorten the blocks."
        )
    return Blocks(tokens, 0, len(tokens) - held_out), Blocks(tokens, len(tokens) - held_out, len(tokens))


def _tokens(data: DataRecipe, tokenizer: Any, seed: int) -> numpy.ndarray:
    end = tokenizer.eos_token_id
    if end is None:
        raise TensorParallelError("the tokenizer has no end-of-text token to separate documents; set its eos_token.")
    texts = list(documents(data))
    random.Random(seed).shuffle(texts)
    pieces = []
    for start in range(0, len(texts), BATCH):
        for ids in tokenizer(texts[start : start + BATCH], return_attention_mask=False)["input_ids"]:
            pieces.append(numpy.asarray(ids if ids and ids[-1] == end else [*ids, end], dtype=numpy.uint32))
    stream = numpy.concatenate(pieces) if pieces else numpy.zeros(0, numpy.uint32)
    count = len(stream) // data.sequence_length
    return stream[: count * data.sequence_length].reshape(count, data.sequence_length)


def _fingerprint(data: DataRecipe, tokenizer: Any, seed: int) -> str:
    """A hash of what the tokens depend on: the source, its files' sizes and times, the tokenizer, the block length."""
    patterns = data.text_files or data.jsonl_files or []
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in _files(patterns, "data")]
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    # The share that is held out does not change the tokens.
    source = [getattr(data, name) for name in vars(data) if name != "validation_fraction"]
    return hashlib.sha256(repr((source, stats, vocabulary, seed)).encode()).hexdigest()[:16]


def _files(patterns: list[str], key: str) -> list[Path]:
    found: list[Path] = []
    for pattern in patterns:
        matches = sorted(glob.glob(pattern.replace("{stdlib}", sysconfig.get_paths()["stdlib"]), recursive=True))
        files = [Path(match) for match in matches if os.path.isfile(match)]
        if not files:
            raise TensorParallelError(f"{key}: no file matches {pattern!r} (from {os.getcwd()}).")
        found += files
    return found


def _text(row: Any, field: str, where: str) -> str:
    text = row.get(field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        held = ", ".join(row) if isinstance(row, dict) else repr(row)
        raise TensorParallelError(f"data.text_field {field!r} is no text in {where}, which holds: {held}.")
    return text
