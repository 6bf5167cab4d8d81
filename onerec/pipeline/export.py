"""The trained model and its catalogue as a folder for serving and for C++."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onerec.errors import OneRecError
from onerec.pipeline.inputs import Inputs
from onerec.pipeline.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from onerec.inference import Mixture
    from onerec.tokenizer import Catalog


def trained_model(settings: Settings, inputs: Inputs) -> Path:
    """Folder of the model that the run measures and recommends with."""
    return inputs.directory / inputs.served_model(settings).stage / "model"


def trained_mixture(settings: Settings, inputs: Inputs) -> Mixture | None:
    """The mixture of the run's own model, if it ranks by one.

    A folder without config.yaml holds a model and a catalogue of one's own, and no mixture.
    """
    run = (inputs.directory / "config.yaml").is_file()
    return inputs.mixture(settings, whole=True) if run else None


def export_run(
    inputs: Inputs,
    model: str | Path,
    folder: Path,
    *,
    catalog: str | None = None,
    dtype: str = "float32",
    tags: Sequence[str] | None = None,
    mixture: Mixture | None = None,
) -> dict[str, Any]:
    """Packs a run's model and catalogue into one folder, for the server and for C++ programs.

    Args:
        inputs: The run.
        model: Folder of the model; `trained_model` names the run's.
        folder: Folder to write.
        catalog: Folder of another catalogue than the run's.
        dtype: Type of the packed matrices, "float32" or "bfloat16".
        tags: Words that requests can name, of the items' column `tags`; all where none is named,
            none when None.
        mixture: How rankings are made; `trained_mixture` has the run's.

    Returns:
        {"folder", "items", "dtype", "engine_bytes", "trie_bytes", "tags"}.

    Raises:
        OneRecError: No item has such a tag.
    """
    import torch

    from onerec.inference.exported import export
    from onerec.model import OneRec
    from onerec.tokenizer import Catalog

    network = OneRec.from_pretrained(model)
    items = Catalog.load(catalog or inputs.directory / "tokenize")
    if tags is not None:
        items = _tagged(items, inputs, tags)
    packed = export(network, items, folder, dtype=getattr(torch, dtype), mixture=mixture)
    return {
        "folder": str(folder),
        "items": len(items),
        "dtype": dtype,
        "engine_bytes": packed.nbytes,
        "trie_bytes": items.trie.nbytes,
        "tags": items.tag_words,
    }


def _tagged(catalog: Catalog, inputs: Inputs, words: Sequence[str]) -> Catalog:
    """The catalogue with the tags of the run's items."""
    from onerec.data import SessionSet

    items = SessionSet.load(inputs.directory / "sessions").items
    tags: list[list[str] | None] = [None] * len(catalog)
    for at, row in zip(catalog.find(items["item_id"].to_pylist()), items["tags"], strict=True):
        if at >= 0:
            tags[at] = row.as_py()
    known = {word for row in tags for word in row or ()}
    if not known:
        raise OneRecError(
            "--tags: the items have none; name their column before the sessions are made, "
            "--columns.items.tags NAME, or see Catalog.with_tags"
        )
    if unknown := [word for word in words if word not in known]:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise OneRecError(f"--tags: no item has the tag {unknown[0]!r}{hint}")
    try:
        return catalog.with_tags(tags, words or None)
    except ValueError as error:
        raise OneRecError(f"--tags: {error}: --tags WORD WORD ...") from None
