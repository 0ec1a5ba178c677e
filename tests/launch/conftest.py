"""A tokenizer and a folder of texts."""

from __future__ import annotations

import pytest
import transformers

from tests.support.texts import TEXTS
from tp_plugin.launch.model import build_tokenizer
from tp_plugin.launch.recipe import DataRecipe


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(str(directory), 287, TEXTS)
    return transformers.AutoTokenizer.from_pretrained(directory)


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number:02}.txt").write_text(text)
    return DataRecipe(text_files=[f"{folder}/*.txt"], sequence_length=16, validation_fraction=0.1)
