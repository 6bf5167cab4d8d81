"""Folders for serving: the packed network and the catalogue, for Python and for C++ programs.

config.json (the network's, and the folder's lineage), engine.bin, catalog.parquet and trie.bin,
catalog.bin, the catalogue for programs without Parquet; and, where items are ranked by a mixture,
mixture.json and counts.npz, and mixture.bin, the same for C++ programs.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onerec._native import core
from onerec.errors import DataError
from onerec.files import atomic_directory, atomic_write, check_replaceable, is_regular
from onerec.inference.mixture import FILES as mixture_files
from onerec.inference.mixture import Mixture
from onerec.inference.native import NativeModel
from onerec.model.config import OneRecConfig
from onerec.model.folder import CONFIG, read_config
from onerec.tokenizer import Catalog

if TYPE_CHECKING:
    import torch

    from onerec.model.onerec import OneRec

ENGINE = "engine.bin"
CATALOG = "catalog.bin"
_MODEL = "onerec"
MIXTURE = "mixture.bin"


def export(
    model: OneRec | NativeModel,
    catalog: Catalog,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    mixture: Mixture | None = None,
) -> NativeModel:
    """Writes a folder that `Recommender.from_exported` and C++ programs load.

    An earlier folder of this function is replaced as a whole.

    Args:
        model: The network.
        catalog: Its items.
        folder: Where to.
        dtype: Type of the packed matrices; as for `NativeModel.pack`.
        mixture: How rankings weigh generator, dense head and counts; None: by the generator.

    Returns:
        The packed network.

    Raises:
        ValueError: A network that the engine cannot run, a catalogue of other levels, codebook
            size or, for a network that knows its items, other items; or such a mixture.
        DataError: Weights that are not finite, or a catalogue without items.
        OSError: It cannot be written, or holds other files.
    """
    check_replaceable(folder, ENGINE)
    check_catalog(model, catalog)
    if not len(catalog):
        raise DataError("catalog: wanted items, got none")
    if mixture is not None:
        check_mixture(model, mixture)
    if isinstance(model, NativeModel):
        packed = model
    else:
        check_finite(model)
        packed = NativeModel.pack(model, dtype=dtype)
    with atomic_directory(folder) as temporary:
        packed.save(temporary / ENGINE)
        catalog.save(temporary)
        if mixture is not None:
            mixture.save(temporary)
            save_mixture(mixture, temporary / MIXTURE)
        save_catalog(catalog, temporary / CATALOG, temporary)
        fields = {
            "model_type": _MODEL,
            **model.config.to_dict(),
            LINEAGE: _lineage(temporary, catalog),
        }
        with atomic_write(temporary / CONFIG) as file:
            file.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    return packed


def check_finite(model: OneRec) -> None:
    """Refuses a network with a weight that is NaN or infinite: nothing sound comes out of it.

    Raises:
        DataError: The message names the first such weight.
    """
    import torch

    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            row = torch.nonzero(~torch.isfinite(tensor))[0].tolist()
            got = float(tensor[tuple(row)])
            raise DataError(f"model: {name}{row}: wanted finite weights, got {got}")


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
    if config.n_items:
        given: Any = model.item_sids
        sids = given if isinstance(model, NativeModel) else given.cpu().numpy()
        if not np.array_equal(catalog.sids, sids):
            raise ValueError(
                "catalog must hold the semantic ids that the model was given, in order"
            )


def check_mixture(model: OneRec | NativeModel, mixture: Mixture) -> None:
    """Refuses a mixture that does not rank the network's items.

    Raises:
        ValueError: The network has no dense head, or the counts are of other items.
    """
    if not model.config.item_loss:
        raise ValueError("mixture: wanted a model with a dense head (item_loss above 0), got none")
    if mixture.counts.n_items != model.config.n_items:
        raise ValueError(
            f"mixture: wanted counts of the model's {model.config.n_items} items, got "
            f"{mixture.counts.n_items}"
        )


def save_catalog(catalog: Catalog, path: str | Path, folder: Path | None = None) -> None:
    """Writes item ids and their leaves for C++ programs (csrc/include/onerec/recommender.h).

    Args:
        catalog: The items.
        path: Where to.
        folder: With the engine.bin, trie.bin and perhaps mixture.bin that C++ programs take with
            it, and no others; None: any engine and trie, and no mixture.

    Raises:
        OSError: It cannot be written.
    """
    hashes = [
        0 if folder is None or not (folder / name).exists() else _header_hash(folder / name)
        for name in (ENGINE, "trie.bin", MIXTURE)
    ]
    text = catalog.item_ids.dtype == object
    if text:
        parts = [item.encode() + b"\0" for item in catalog.item_ids.tolist()]
        values = np.frombuffer(b"".join(parts), dtype=np.uint8)
        offsets = np.cumsum([0, *map(len, parts)], dtype=np.int64)
    else:
        values, offsets = np.ascontiguousarray(catalog.item_ids), np.empty(0, np.int64)
    leaves = np.ascontiguousarray(catalog.leaf_of_item)
    tags = None if catalog.tags is None else np.ascontiguousarray(catalog.tags)
    if catalog.retired is not None:
        marks = np.where(catalog.retired, np.int64(-1) << 63, np.int64(0))
        tags = marks if tags is None else tags | marks
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
            *hashes,
        )
    except RuntimeError as error:
        raise OSError(str(error)) from None


def save_mixture(mixture: Mixture, path: str | Path) -> None:
    """Writes a mixture for C++ programs (csrc/recommender/mixture.h).

    Raises:
        OSError: It cannot be written.
    """
    counts = mixture.counts
    lists = list({id(part.lists): part.lists for part in counts.parts}.values())
    kept: list[npt.NDArray[Any]] = []  # alive until the file is written

    def at(values: npt.ArrayLike, dtype: type) -> int:
        kept.append(np.ascontiguousarray(values, dtype=dtype))
        return int(kept[-1].ctypes.data)

    parts = []
    for part in counts.parts:
        items, weights = part.constant or (np.empty(0, np.int64), np.empty(0))
        parts.append(
            (
                next(n for n, one in enumerate(lists) if one is part.lists),
                len(part.recency),
                at(part.recency, np.float64),
                len(items),
                at(items, np.int64),
                at(weights, np.float64),
            )
        )
    try:
        core().save_mixture(
            str(path),
            counts.n_items,
            at(counts.place, np.int64),
            mixture.masked.tolist(),
            mixture.unmasked.tolist(),
            [
                (at(one.offsets, np.int64), at(one.items, np.int32), at(one.weights, np.float32))
                for one in lists
            ],
            parts,
        )
    except RuntimeError as error:
        raise OSError(str(error)) from None


def _header_hash(path: Path) -> int:
    """The hash at the end of a header of 256 bytes, which covers all of the file."""
    with path.open("rb") as file:
        return int.from_bytes(file.read(256)[248:], "little")


def load_exported(folder: str | Path) -> tuple[NativeModel, Catalog, Mixture | None, str]:
    """Network, catalogue, mixture and fingerprint of a folder that `export` wrote.

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
    for name in wanted:
        if not is_regular(folder / name):
            raise DataError(f"{folder / name}: wanted a regular file, got another kind")
    if (size := (folder / CONFIG).stat().st_size) > _LARGEST_CONFIG:
        raise DataError(f"{folder / CONFIG}: wanted at most {_LARGEST_CONFIG} bytes, got {size}")
    config: OneRecConfig = read_config(folder / CONFIG, _MODEL, OneRecConfig)
    lineage = _read_lineage(folder)
    _check_size(config, folder / ENGINE)
    model, catalog = NativeModel.load(folder / ENGINE, config), Catalog.load(folder)
    _check_lineage(folder, lineage, catalog)
    mixture = Mixture.load(folder) if mixture_files[0] in lineage else None
    if mixture is not None:
        try:
            check_mixture(model, mixture)
        except ValueError as error:
            raise DataError(f"{folder}: {error}") from None
    return model, catalog, mixture, lineage["export"]


LINEAGE = "lineage"  # of an export, in its config.json
_LARGEST_CONFIG = 1 << 20  # bytes
_PARTS = (ENGINE, "trie.bin", "catalog.parquet", CATALOG)
_MIXTURE_PARTS = (*mixture_files, MIXTURE)


def _lineage(folder: Path, catalog: Catalog) -> dict[str, str]:
    """What ties the parts of an export to each other: a digest of each, and one of all."""
    parts = [*_PARTS, *(name for name in _MIXTURE_PARTS if (folder / name).exists())]
    digests = {name: _digest(folder / name) for name in parts}
    whole = hashlib.blake2b("".join(digests.values()).encode(), digest_size=16).hexdigest()
    return {"export": whole, "quantizer": catalog.quantizer, **digests}


def _digest(path: Path) -> str:
    """Of a file's content, in hexadecimal digits.

    The first 256 bytes of a .bin file hold a hash of the rest, which its loader checks.
    """
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        if path.suffix == ".bin":
            digest.update(file.read(256))
        else:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _read_lineage(folder: Path) -> dict[str, str]:
    given = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get(LINEAGE)
    wanted = ("export", "quantizer", *_PARTS)
    if not isinstance(given, dict) or not all(isinstance(given.get(k), str) for k in wanted):
        raise DataError(
            f"{folder / CONFIG}: wanted {LINEAGE} with {', '.join(wanted)}, got "
            f"{'none' if given is None else 'another'}; make the folder anew with `onerec export`"
        )
    return given


def _check_lineage(folder: Path, lineage: dict[str, str], catalog: Catalog) -> None:
    for name in (*_PARTS, *_MIXTURE_PARTS):
        if (folder / name).exists() and _digest(folder / name) != lineage.get(name):
            raise DataError(
                f"{folder / name}: wanted the file that was exported with {CONFIG}, got another"
            )
    if catalog.quantizer != lineage["quantizer"]:
        raise DataError(
            f"{folder}: quantizer: wanted {lineage['quantizer'] or 'none'} as in {CONFIG}, got "
            f"{catalog.quantizer or 'none'} in catalog.parquet"
        )


def _check_size(config: OneRecConfig, engine: Path) -> None:
    """Refuses a config whose network is larger than the file before anything goes through it."""
    least, size = 2 * config.least_parameters(), engine.stat().st_size
    if least > size:
        raise DataError(
            f"{engine}: wanted the network of {CONFIG}, at least {least:,} bytes, got {size:,}"
        )
