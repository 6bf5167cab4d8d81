"""Fills docs/commands.md with the help texts of the verbs, as the program prints them."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Appends the help of every verb to the page of commands."""
    if page.file.src_uri != "commands.md":
        return markdown
    from onerec.cli.main import VERBS

    environment = os.environ | {"COLUMNS": "80", "NO_COLOR": "1"}
    for verb, about in VERBS.items():
        text = subprocess.run(
            [sys.executable, "-m", "onerec", verb, "--help"],
            check=True, capture_output=True, text=True, env=environment,
        ).stdout  # fmt: skip
        markdown += f"\n## onerec {verb}\n\n{about[0].upper()}{about[1:]}.\n\n```text\n{text}```\n"
    return markdown
