"""`onerec VERB`: finds the verb's file, runs it, and turns errors into one line.

Exit codes: 0 done; 1 a problem with input, files or the machine, told in one message on stderr
(`--debug` adds the traceback); 2 wrong usage; 130 interrupted by Ctrl-C.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback
from types import FrameType

from onerec._version import __version__
from onerec.errors import Interrupted, OneRecError

# In the order of the main job, then the tools.
VERBS = {
    "run": "logs -> semantic ids -> training -> evaluation -> report",
    "simulate": "stage: make a short-video world of known interests, and its log",
    "sessions": "stage: read a log, keep the good sessions, make item vectors",
    "tokenize": "stage: item vectors -> balanced semantic ids, catalogue and trie",
    "pretrain": "stage: train the generator on the sessions (resumes by itself)",
    "reward": "stage: train the reward model on what was shown (needs feedback)",
    "align": "stage: prefer what the reward model prefers (resumes by itself)",
    "mixture": "stage: weigh generator, dense head and counts in a ranking of items",
    "evaluate": "stage: metrics with confidence intervals beside baselines",
    "recommend": "stage: lists or sessions of items for every user, as Parquet",
    "report": "stage: one HTML file about the whole run",
    "sweep": "try settings, compared on valid (extra sweep; resumes by itself)",
    "update": "carry a finished run forward by new rows, items and removals",
    "export": "pack a run's model and catalogue for serving and for C++ programs",
    "serve": "recommendations over HTTP from an exported folder",
    "env": "what is installed and what this machine can do",
    "bench": "run the benchmarks of a source tree and print medians",
}

HELP = """usage: onerec VERB [options]

Generative recommendation in the manner of OneRec (arXiv 2502.18965).

verbs:
{verbs}

  onerec VERB --help    the options of a verb, with defaults and units
  onerec --version      the release

Try it:                 onerec run --out demo
On your own log:        onerec run --data FOLDER --out DIR

Every verb takes --json (results as JSON on stdout) and --debug (tracebacks).
Results go to stdout, logs and progress to stderr. Exit codes: 0 done, 1 a
problem with input, files or the machine, 2 wrong usage, 130 interrupted."""


class Interruption:
    """Remembers Ctrl-C, because some libraries turn it into an error of their own."""

    def __init__(self) -> None:
        self.seen = False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if self.seen:  # the second one does not wait for anything
            os._exit(130)
        self.seen = True
        raise KeyboardInterrupt


def describe(error: BaseException) -> str:
    """An exception as one line for a user: bare where the message is ours, else with its kind."""
    text = " ".join(str(error).split())
    if isinstance(error, OneRecError | ValueError | TypeError) and text:
        return text
    if isinstance(error, OSError) and error.strerror:
        name = f"{error.filename}: " if error.filename else ""
        return f"{name}{error.strerror}"
    if isinstance(error, MemoryError):
        return f"out of memory. {text}".rstrip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def main(argv: list[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: Arguments after the program's name; the process's own by default.

    Returns:
        The exit code.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        width = max(map(len, VERBS))
        verbs = "\n".join(f"  {name:{width}}  {text}" for name, text in VERBS.items())
        print(HELP.format(verbs=verbs))
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"onerec {__version__}")
        return 0
    verb = argv[0]
    if verb not in VERBS:
        import difflib

        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        print(f"onerec: no verb {verb!r}{hint}; one of: {', '.join(VERBS)}", file=sys.stderr)
        return 2

    interruption = Interruption()
    previous = signal.signal(signal.SIGINT, interruption)
    debug = "--debug" in argv
    try:
        module = importlib.import_module(f"onerec.cli.{verb}")
        module.main(argv[1:])
        sys.stdout.flush()
        return 0
    except BrokenPipeError:
        # The reader of our output has gone (`onerec ... | head`): nothing is left to say to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (KeyboardInterrupt, Exception) as error:
        if debug:
            traceback.print_exc()
        if interruption.seen or isinstance(error, KeyboardInterrupt | Interrupted):
            print(
                "onerec: interrupted; what was finished is kept, the same command goes on from it",
                file=sys.stderr,
            )
            return 130
        ours = debug or isinstance(error, OneRecError | OSError | ValueError)
        hint = "" if ours else " (--debug shows where)"
        print(f"onerec {verb}: {describe(error)}{hint}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGINT, previous)


if __name__ == "__main__":
    sys.exit(main())
