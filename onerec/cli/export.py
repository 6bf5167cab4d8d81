"""`onerec export`: the trained model and its catalogue as a folder for serving and for C++."""

from __future__ import annotations

from pathlib import Path

from onerec.cli import console
from onerec.cli.command import parse_command
from onerec.cli.options import Parser
from onerec.pipeline import Inputs


def main(argv: list[str]) -> None:
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

    from onerec.pipeline.export import export_run, trained_mixture, trained_model

    inputs = Inputs(Path(options.directory))
    folder = Path(options.to) if options.to else inputs.directory / "export"
    model, mixture = options.model, None
    if model is None:
        settings = parse_command("export", "", ["--out", options.directory], []).settings
        model = trained_model(settings, inputs)
        mixture = trained_mixture(settings, inputs)
    if options.format == "aoti":
        from onerec.inference.aoti import export_network
        from onerec.model import OneRec

        package = export_network(OneRec.from_pretrained(model), folder)
        if options.json:
            console.print_json({"package": str(package), "bytes": package.stat().st_size})
        else:
            console.stdout().print(str(package), highlight=False, markup=False)
        return
    record = export_run(
        inputs,
        model,
        folder,
        catalog=options.catalog,
        dtype=options.dtype,
        tags=options.tags,
        mixture=mixture,
    )
    if options.json:
        console.print_json(record)
        return
    mib = {part: f"{record[f'{part}_bytes'] / 2**20:,.1f} MiB" for part in ("engine", "trie")}
    console.stdout().print(
        f"{folder}: {record['items']:,} items, weights {mib['engine']} ({options.dtype}), "
        f"trie {mib['trie']}" + (f"; tags {', '.join(record['tags'])}" if record["tags"] else ""),
        highlight=False,
        markup=False,
    )
