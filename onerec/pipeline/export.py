"""`onerec export`: the trained model and its catalogue as a folder for serving and for C++."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING

from onerec.cli import console
from onerec.cli.config import parse_command
from onerec.cli.inputs import served_model
from onerec.errors import OneRecError

if TYPE_CHECKING:
    from onerec.tokenizer import Catalog


def _trained(directory: Path) -> Path:
    """Folder of the model that the run measures and recommends with."""
    settings = parse_command("export", "", ["--out", str(directory)], []).settings
    return directory / served_model(directory, settings).stage / "model"


def _tagged(catalog: Catalog, directory: Path, words: list[str]) -> Catalog:
    """The catalogue with the tags of the run's items."""
    from onerec.data import SessionSet

    items = SessionSet.load(directory / "sessions").items
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


def main(argv: list[str]) -> None:
    from onerec.cli.options import Parser

    parser = Parser(
        "export",
        "Packs a run's model and catalogue into one folder, for `onerec serve` and C++ programs.",
        usage="DIR [options]",
    )
    parser.add_argument("directory", type=str, help="directory of a finished `onerec run`")
    parser.add_argument("--to", type=str, default=None, help="folder to write; default DIR/export")
    parser.add_argument(
        "--model",
        type=str,
        default=None,
        help="default DIR/align/model, or DIR/pretrain/model where alignment changed nothing",
    )
    parser.add_argument("--catalog", type=str, default=None, help="default DIR/tokenize")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="type of the packed matrices; sums are float32 always",
    )
    parser.add_argument(
        "--format",
        choices=("native", "aoti"),
        default="native",
        help="aoti: only the network, compiled for libtorch on this machine's CPU (network.pt2)",
    )
    parser.add_argument(
        "--tags",
        nargs="*",
        default=None,
        metavar="WORD",
        help="words of the items' column `tags` (docs/data.md) that requests can name in "
        "allow_tags, at most 63; all where none is named",
    )
    options = parser.parse(argv)
    if options.format == "aoti" and options.dtype != "float32":
        parser.error("--format aoti takes --dtype float32")

    import torch

    from onerec.inference.exported import export
    from onerec.model import OneRec
    from onerec.tokenizer import Catalog

    directory = Path(options.directory)
    folder = Path(options.to) if options.to else directory / "export"
    model = OneRec.from_pretrained(options.model or _trained(directory))
    if options.format == "aoti":
        from onerec.inference.aoti import export_network

        package = export_network(model, folder)
        if options.json:
            console.print_json({"package": str(package), "bytes": package.stat().st_size})
        else:
            console.stdout().print(str(package), highlight=False, markup=False)
        return
    catalog = Catalog.load(options.catalog or directory / "tokenize")
    if options.tags is not None:
        catalog = _tagged(catalog, directory, options.tags)
    packed = export(model, catalog, folder, dtype=getattr(torch, options.dtype))
    record = {
        "folder": str(folder),
        "items": len(catalog),
        "dtype": options.dtype,
        "engine_bytes": packed.nbytes,
        "trie_bytes": catalog.trie.nbytes,
        "tags": catalog.tag_words,
    }
    if options.json:
        console.print_json(record)
        return
    console.stdout().print(
        f"{folder}: {len(catalog):,} items, weights {packed.nbytes / 2**20:,.1f} MiB "
        f"({options.dtype}), trie {catalog.trie.nbytes / 2**20:,.1f} MiB"
        + (f"; tags {', '.join(catalog.tag_words)}" if catalog.tag_words else ""),
        highlight=False,
        markup=False,
    )
