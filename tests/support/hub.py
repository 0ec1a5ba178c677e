"""A hub in a directory."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import transformers.utils.hub
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects
from transformers import Trainer


class Hub:
    """What was uploaded, in a directory."""

    def __init__(self) -> None:
        self.uploads, self.directory, self.tags = 0, Path(tempfile.mkdtemp()), list[str]()

    def __enter__(self) -> Hub:
        def upload(_api, *, repo_id, folder_path, allow_patterns=None, ignore_patterns=None, **_options):
            self.uploads += 1
            here = [path.relative_to(folder_path).as_posix() for path in Path(folder_path).rglob("*") if path.is_file()]
            for name in filter_repo_objects(here, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
                target = self.directory / repo_id / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(Path(folder_path, name), target)

        def tagged(_repo_id, tags=None, **_options):
            self.tags += tags or []
            return card

        created = SimpleNamespace(repo_id="me/model")
        card = SimpleNamespace(save=lambda path: Path(path).write_text("card"), data=SimpleNamespace(tags=[]))
        self.patches = [
            mock.patch.object(HfApi, "create_repo", return_value=created),
            mock.patch.object(HfApi, "upload_folder", upload),
            mock.patch.object(transformers.utils.hub, "create_and_tag_model_card", tagged),
            mock.patch.object(Trainer, "create_model_card", return_value=None),
        ]
        for patch in self.patches:
            patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        for patch in self.patches:
            patch.stop()
