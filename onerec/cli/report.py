"""`onerec report`: one HTML file about the whole run, or about two runs side by side."""

from __future__ import annotations

from rich.markup import escape

from onerec.cli import console
from onerec.cli.options import Parser
from onerec.cli.verb import stage_verb


def main(argv: list[str]) -> None:
    if "--compare" in argv:
        _compare(argv)
        return
    stage_verb(
        "report",
        "Writes OUT/report/report.html about the stages in OUT. `onerec report --compare DIR1 DIR2 "
        "[--out FILE]` writes two runs side by side: the settings that differ, the measures with "
        "paired differences.",
        argv,
        [],
    )


def _compare(argv: list[str]) -> None:
    from onerec.report.compare import render_comparison

    parser = Parser(
        "report",
        "Writes two runs side by side as one HTML file.",
        usage="--compare DIR1 DIR2 [--out FILE]",
    )
    parser.add_argument("--compare", nargs=2, type=str, required=True, help="directories of runs")
    parser.add_argument("--out", type=str, default="comparison.html", help="the file to write")
    options = parser.parse(argv)
    first, second = options.compare
    path = render_comparison(first, second, options.out)
    if options.json:
        console.print_json({"report": str(path)})
    else:
        console.stdout().print(f"comparison       {escape(str(path))}")
