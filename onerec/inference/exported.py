"""Folders for serving: the packed network and the catalogue, for Python and for C++ programs.

config.json (the network's), engine.bin, catalog.parquet and trie.bin, and catalog.bin, the
catalogue for programs without Parquet.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from onerec._native import core
from onerec.errors import DataError
from onerec.files import atomic_directory, atomic_write, check_replaceable
from onerec.inference.native import NativeModel
from onerec.model.config import OneRecConfig
from onerec.model.onerec import OneRec
from onerec.model.pretrained import CONFIG
from onerec.tokenizer import Catalog

ENGINE = "engine.bin"
CATALOG = "catalog.bin"


def export(
    model: OneRec | NativeModel,
    catalog: Catalog,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
) -> NativeModel:
    """Writes a folder that `Recommender.from_exported` and C++ programs load.

    An earlier folder of this function is replaced as a whole.

    Args:
        model: The network.
        catalog: Its items.
        folder: Where to.
        dtype: Type of the packed matrices; as for `NativeModel.pack`.

    Returns:
        The packed network.

    Raises:
        ValueError: A network that the engine cannot run, or a catalogue of other levels, codebook
            size or, for a network that knows its items, other items.
        OSError: It cannot be written, or holds other files.
    """
    check_replaceable(folder, ENGINE)
    check_catalog(model, catalog)
    packed = NativeModel.pack(model, dtype=dtype) if isinstance(model, OneRec) else model
    with atomic_directory(folder) as temporary:
        fields = {"model_type": OneRec.model_type, **model.config.to_dict()}
        with atomic_write(temporary / CONFIG) as file:
            file.write_text(json.dumps(fields, indent=2) + "\n")
        packed.save(temporary / ENGINE)
        catalog.save(temporary)
        save_catalog(catalog, temporary / CATALOG)
    return packed


def check_catalog(model: OneRec | NativeModel, catalog: Catalog) -> None:
    """Refuses a catalogue that is not one of the network's.

    Raises:
        ValueError: Other levels or codebook size; or, for a network that knows its items
            (`n_items`), other semantic ids or another order of them.
    """
    config = model.config
    if (config.levels, config.codebook_size) != (catalog.levels, catalog.codebook_size):
        raise ValueError(
            f"catalog must have {config.levels} levels of {config.codebook_size} codes as the "
            f"model, got {catalog.levels} of {catalog.codebook_size}"
        )
    if config.n_items and not np.array_equal(
        catalog.sids, torch.as_tensor(model.item_sids).cpu().numpy()
    ):
        raise ValueError("catalog must hold the semantic ids that the model was given, in order")


def save_catalog(catalog: Catalog, path: str | Path) -> None:
    """Writes item ids and their leaves for C++ programs (csrc/include/onerec/recommender.h).

    Raises:
        OSError: It cannot be written.
    """
    text = catalog.item_ids.dtype == object
    if text:
        parts = [item.encode() + b"\0" for item in catalog.item_ids.tolist()]
        values = np.frombuffer(b"".join(parts), dtype=np.uint8)
        offsets = np.cumsum([0, *map(len, parts)], dtype=np.int64)
    else:
        values, offsets = np.ascontiguousarray(catalog.item_ids), np.empty(0, np.int64)
    leaves = np.ascontiguousarray(catalog.leaf_of_item)
    tags = None if catalog.tags is None else np.ascontiguousarray(catalog.tags)
    try:
        core().save_catalog(
            str(path),
            len(catalog),
            catalog.trie.n_leaves,
            leaves.ctypes.data,
            text,
            values.ctypes.data,
            offsets.ctypes.data,
            0 if tags is None else tags.ctypes.data,
        )
    except RuntimeError as error:
        raise OSError(str(error)) from None


def load_exported(folder: str | Path) -> tuple[NativeModel, Catalog]:
    """The network and the catalogue of a folder that `export` wrote.

    Raises:
        DataError: A file is missing or broken, or does not fit the others.
    """
    folder = Path(folder)
    wanted = (CONFIG, ENGINE, "catalog.parquet", "trie.bin")
    if missing := [name for name in wanted if not (folder / name).is_file()]:
        here = ", ".join(sorted(path.name for path in folder.glob("[!.]*"))[:12]) or "nothing"
        made = folder / "export"
        raise DataError(
            f"{folder}: wanted a folder of `onerec export` with {', '.join(wanted)}; "
            f"{', '.join(missing)} missing, found {here}; "
            + (
                f"take {made}"
                if (made / ENGINE).is_file()
                else "make one from a run with `onerec export RUN`, which writes RUN/export"
            )
        )
    config: OneRecConfig = OneRec.read_config(folder / CONFIG)
    return NativeModel.load(folder / ENGINE, config), Catalog.load(folder)
