"""`onerec update`: a finished run carried forward by new rows."""

from __future__ import annotations

import os
from dataclasses import fields
from typing import Any

from onerec.cli import console
from onerec.cli.options import Parser
from onerec.pipeline.update import UpdateConfig, update


def main(argv: list[str]) -> None:
    parser = Parser(
        "update",
        "Carries a finished run forward by new rows, such as a day's: new items get codes, the "
        "network of yesterday is measured on the rows and then learns them, and a new export is "
        "written and served. The same rows again change nothing; a command that was stopped goes "
        "on when it is given again.",
        "--out DIR --data NEW [options]",
    )
    parser.add_argument("--out", type=str, required=True, help="directory of a finished run")
    parser.add_argument(
        "--data",
        type=str,
        required=True,
        help="the new rows, as of `onerec run --data`: a file, a folder or a glob; rows that the "
        "run knows by their time are left out, so the whole grown log will do",
    )
    parser.add_argument(
        "--items",
        type=str,
        default=None,
        help="table of the new items, or its folder, with their vectors beside it under the names "
        "of the run's; default: what lies beside the rows",
    )
    parser.add_argument(
        "--remove",
        type=str,
        default=None,
        help="file with an item id a line: these stay known and are recommended no more",
    )
    parser.add_argument(
        "--serve",
        type=str,
        nargs="+",
        default=[],
        metavar="URL",
        help="servers that serve the new export at the end, all or none of them; their admin's "
        "token is in ONEREC_ADMIN_TOKEN",
    )
    parser.add_argument("--force", action="store_true", help="publish what a guard refuses")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="type of the export's matrices",
    )
    parser.add_class_arguments(UpdateConfig, as_group=False)
    options = parser.parse(argv)
    try:
        config = UpdateConfig(
            **{one.name: getattr(options, one.name) for one in fields(UpdateConfig)}
        )
    except ValueError as error:
        parser.error(str(error))
    line = update(
        options.out,
        options.data,
        items=options["items"],  # `items` itself is a method
        remove=options.remove,
        config=config,
        force=options.force,
        servers=options.serve,
        token=os.environ.get("ONEREC_ADMIN_TOKEN"),
        dtype=options.dtype,
        listener=console.LISTENER,
    )
    if options.json:
        console.print_json(line)
    elif line is not None:
        _show(line)


def _show(line: dict[str, Any]) -> None:
    sessions, codes, measured, after = (
        line[name] for name in ("sessions", "tokenize", "measure", "check")
    )
    held = measured["held_out"]
    rows = [
        f"update {line['version']}: {sessions['rows']:,} rows of {sessions['users_of_day']:,} "
        f"users ({sessions['new_users']:,} new); items: {codes['new_items']:,} new, "
        f"{codes['retired']:,} of {codes['items']:,} retired",
        f"the network before, on the new rows: NDCG@10 {measured['ndcg@10']:.4f}, Recall@10 "
        f"{measured['recall@10']:.4f} ({measured['sessions']:,} sessions); new items are "
        f"{measured['new_items_shown']:.1%} of its lists and {measured['new_items_taken']:.1%} of "
        "what was taken",
        f"on {after['sessions']:,} sessions held out: NDCG@10 {held['ndcg@10']:.4f} before, "
        f"{after['ndcg@10']:.4f} after",
    ]
    if line["refused"]:
        rows.append(f"published by --force: {line['refused']}")
    for row in rows:
        console.stdout().print(row, markup=False)
