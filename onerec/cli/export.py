"""`onerec export`: the trained model and its catalogue as a folder for serving and for C++."""

from __future__ import annotations

from pathlib import Path

from onerec.cli import console
from onerec.cli.config import parse_command
from onerec.cli.inputs import served_model


def _trained(directory: Path) -> Path:
    """Folder of the model that the run measures and recommends with."""
    settings = parse_command("export", "", ["--out", str(directory)], []).settings
    return directory / served_model(directory, settings).stage / "model"


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
        help="default DIR/align/model, or DIR/pretrain/model of a run without alignment",
    )
    parser.add_argument("--catalog", type=str, default=None, help="default DIR/tokenize")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="type of the packed matrices; activations and sums are float32 always",
    )
    parser.add_argument(
        "--format",
        choices=("native", "aoti"),
        default="native",
        help="aoti: only the network, compiled for libtorch on this machine's CPU (network.pt2)",
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
    packed = export(model, catalog, folder, dtype=getattr(torch, options.dtype))
    record = {
        "folder": str(folder),
        "items": len(catalog),
        "dtype": options.dtype,
        "engine_bytes": packed.nbytes,
        "trie_bytes": catalog.trie.nbytes,
    }
    if options.json:
        console.print_json(record)
        return
    console.stdout().print(
        f"{folder}: {len(catalog):,} items, weights {packed.nbytes / 2**20:,.1f} MiB "
        f"({options.dtype}), trie {catalog.trie.nbytes / 2**20:,.1f} MiB",
        highlight=False,
        markup=False,
    )
