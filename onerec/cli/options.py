"""The argument parser that every verb uses."""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace

_LONGEST_CHOICES = 50  # characters of {a,b,c} that fit beside an option in 80 columns


class Parser(ArgumentParser):
    """`onerec VERB` options: `--json` and `--debug` for all, short errors, exit code 2."""

    # The file that the values come from, for messages; empty for the command line.
    source = ""

    def __init__(self, verb: str, description: str, usage: str = "[options]") -> None:
        """Makes the parser of a verb.

        Args:
            verb: Name after `onerec`.
            description: First lines of its help.
            usage: What stands behind `onerec VERB` in the usage line.
        """
        super().__init__(
            prog=f"onerec {verb}",
            description=description,
            usage=f"onerec {verb} {usage}",
            allow_abbrev=False,
        )
        self.add_argument("--json", action="store_true", help="results as JSON on stdout")
        self.add_argument("--debug", action="store_true", help="show tracebacks")

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints the message without the long usage text, and exits with code 2."""
        if unknown := re.search(r"unrecognized arguments: (--[\w.\-]+)", message):
            options = [option for action in self._actions for option in action.option_strings]
            section = [o for o in options if o.endswith(f".{unknown[1].removeprefix('--')}")]
            if near := difflib.get_close_matches(unknown[1], options, n=1) or section:
                message += f" (did you mean {' or '.join(near)}?)"
        message = " ".join(message.split()).replace(
            "the following arguments are required: out", "--out DIR is needed"
        )
        message = re.sub(
            r'Parser key "(.+?)": Expected an? (?:typing\.Literal)?(.+?)\. Got value: ',
            r"\1: wanted \2, got ",
            message,
        )
        message = re.sub(r"(\w+): wanted <class 'dict'>", r"\1: wanted --\1.NAME VALUE", message)
        if self.source:
            message = f"{self.source}: {message}"
        print(f"{self.prog}: {message}\nsee `{self.prog} --help`", file=sys.stderr)
        sys.exit(2)

    def check_positive(self, values: Namespace, *names: str) -> None:
        """Exits with code 2 where one of these options is given and not above 0."""
        for name in names:
            value = getattr(values, name)
            if value is not None and value <= 0:
                self.error(f"--{name}: wanted more than 0, got {value}")

    def shorten(self) -> None:
        """Lets the help name a long list of choices once, behind the option's text."""
        for action in self._actions:
            if isinstance(action.metavar, str) and len(action.metavar) > _LONGEST_CHOICES:
                action.metavar = action.dest.split(".")[-1].upper()

    def hide(self, dest: str) -> None:
        """Leaves an option out of the help."""
        for action in self._actions:
            if action.dest == dest:
                action.help = argparse.SUPPRESS

    def parse(self, argv: list[str]) -> Any:
        """Parses arguments; exits with code 2 on a wrong one."""
        return self.parse_args(_mapped("--columns", argv))

    def given(self, argv: list[str]) -> Namespace:
        """Parses arguments and returns only those that are in `argv`."""
        return self.parse_args(_mapped("--columns", argv), defaults=False)


def _mapped(name: str, argv: list[str]) -> list[str]:
    """`argv` with every `NAME.KEY VALUE` in one `NAME JSON`, null for None.

    jsonargparse would make a tree of a key with a dot, and keep only the last one below a branch.
    """
    rest: list[str] = []
    values: dict[str, str | None] = {}
    words = iter(argv)
    for word in words:
        key, equals, value = word.removeprefix(f"{name}.").partition("=")
        if not word.startswith(f"{name}."):
            rest.append(word)
        elif (value := value if equals else next(words, "--")).startswith("--"):
            return argv  # no value: argparse says so
        else:
            values[key] = None if value == "null" else value
    return [*rest, name, json.dumps(values)] if values else argv
