"""The files of a saved network; its config is read without torch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from onerec.errors import DataError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"


def read_config(path: Path, model_type: str, config_class: type[Any]) -> Any:
    """The config in a folder's config.json.

    Args:
        path: Of that file.
        model_type: What it must name.
        config_class: What is made of it.

    Raises:
        DataError: The file is missing, broken, or of another model.
    """
    if not path.is_file():
        raise DataError(f"{path}: missing; a saved {model_type} has {CONFIG} and {WEIGHTS}")
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    found = given.pop("model_type", None) if isinstance(given, dict) else None
    if found != model_type:
        raise DataError(f"{path}: model_type must be {model_type!r}, got {found!r}")
    given.pop("lineage", None)  # of an export; `load_exported` reads it
    unknown = sorted(given.keys() - {field.name for field in dataclasses.fields(config_class)})
    if unknown:
        raise DataError(f"{path}: unknown fields {unknown}; written by another version?")
    try:
        return config_class(**given)
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: {error}") from error
