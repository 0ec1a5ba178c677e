"""What PEFT's scripts do with an adapter that has begun from the base's weights."""

from __future__ import annotations

from tests.support.adapters import adapt, shard, shared_folder
from tests.support.models import make
from tests.support.ranks import errors_on_ranks


def convert_while_saving() -> None:
    with shared_folder() as folder:
        model = shard(adapt(make("Llama"), "PiSSA"))
        model.save_pretrained(str(folder), path_initial_model_for_weight_conversion=str(folder))


def test_an_adapter_is_not_converted_while_it_is_saved():
    for error in errors_on_ranks(2, convert_while_saving):
        assert "path_initial_model_for_weight_conversion; convert the adapter after it is saved" in error
