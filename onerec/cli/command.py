"""The command line of a stage or of the whole run: flags over files over the defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from onerec.cli.options import Parser
from onerec.errors import OneRecError
from onerec.pipeline.settings import (
    PRESET_SECTIONS,
    PRESETS,
    SECTIONS,
    Settings,
    knows_items,
    preset_values,
    section_class,
)


def add_sections(parser: Parser, sections: Sequence[str], preset: str) -> None:
    """Adds `--SECTION.FIELD` for each field, with help and defaults from the dataclass."""
    for section in sections:
        cls = section_class(section)
        parser.add_class_arguments(cls, section, skip=set(SECTIONS[section][2]))
        parser.hide(section)
    parser.shorten()
    if not PRESET_SECTIONS.isdisjoint(sections):
        more = preset_values(preset)
        parser.set_defaults({k: v for k, v in more.items() if k.split(".")[0] in sections})


def add_reading(parser: Parser) -> None:
    """Adds `--kind` and `--columns`, how a log is read."""
    parser.add_argument(
        "--kind",
        type=Literal["auto", "kuairand", "amazon", "parquet"],
        default="auto",
        help="reader of the log",
    )
    parser.add_argument(
        "--columns",
        type=dict[str, str | None],
        default={},
        help="names in a log of your own where they are not those of docs/data.md, e.g. "
        "--columns.user_id uid --columns.items.text title; null forgets one that was stored",
    )


def given_names(columns: Mapping[str, str | None]) -> dict[str, str]:
    """`--columns` without the names that are null."""
    return {ours: theirs for ours, theirs in columns.items() if theirs is not None}


def _add_top(parser: Parser, data: bool, preset: bool) -> None:
    parser.add_argument("--out", type=str, required=True, help="directory of the run")
    parser.add_argument(
        "--config",
        type=str,
        default=None,
        help="YAML file of settings, such as the config.yaml of a run; flags win over it",
    )
    if data:
        parser.add_argument(
            "--data",
            type=str,
            default=None,
            help="the log: a folder, a file or a glob (docs/logs.md has ten of them); without it "
            "the log is simulated",
        )
        add_reading(parser)
        parser.add_argument(
            "--engine",
            type=Literal["duckdb", "spark"],
            default="duckdb",
            help="what builds the sessions: this machine, or Spark (extra spark): the session of "
            "spark-submit, or a local one",
        )
    if preset:
        parser.add_argument(
            "--preset",
            type=Literal["items", "paper-tiny", "0.1b", "1b"],
            default=PRESETS[0],
            help="network (--model.*) and its settings: items ranks best and takes a CPU minutes; "
            "paper-tiny, 0.1b and 1b are the paper's own network in three sizes",
        )


@dataclass(frozen=True)
class Command:
    """A parsed command line of a stage or of the whole run.

    Attributes:
        out: Directory of the run.
        settings: The merged settings.
        json: Whether results are wanted as JSON.
        more: Values of the flags that are no settings, None where one was not given.
    """

    out: Path
    settings: Settings
    json: bool
    more: Mapping[str, Any] = field(default_factory=dict)


def parse_command(
    verb: str,
    description: str,
    argv: list[str],
    sections: Sequence[str],
    *,
    data: bool = False,
    stored: bool = True,
    more: Callable[[Parser], None] | None = None,
) -> Command:
    """Parses a verb's flags and merges them over `--config` and the stored settings.

    Later wins: defaults of the preset, `OUT/config.yaml` (only with `stored`), `--config`, flags.
    With another `--preset` a file's values stay where they differ from the defaults of its own.

    Args:
        verb: Name of the verb.
        description: For its help.
        argv: Its arguments.
        sections: Sections that the verb has flags for.
        data: Whether it reads a log.
        stored: Whether to start from the settings of the last command on this directory.
        more: Adds flags that are no settings to the parser.

    Raises:
        OneRecError: A settings file cannot be read.
        SystemExit: With code 2 on wrong usage.
    """
    parser = Parser(verb, description, "--out DIR [options]")
    _add_top(parser, data, not PRESET_SECTIONS.isdisjoint(sections))
    add_sections(parser, sections, _flag(argv, "--preset", PRESETS) or PRESETS[0])
    others: list[str] = []
    if more is not None:
        before = {action.dest for action in parser._actions}
        more(parser)
        others = [action.dest for action in parser._actions if action.dest not in before]
    given = parser.given(argv).as_dict()
    extra = {name: given.pop(name, None) for name in others}
    for key in ("json", "debug"):
        given.setdefault(key, False)
    out = Path(given.pop("out"))
    merged: dict[str, Any] = {}
    files = [out / "config.yaml"] if stored and (out / "config.yaml").is_file() else []
    if named := given.pop("config", None):
        files.append(Path(named))
    for file in files:
        part = _read_yaml(file)
        full = _full(parser, part.get("preset", PRESETS[0]))
        full.source = str(file)
        full.parse_object({"out": ".", **part})
        if given.get("preset", part.get("preset")) != part.get("preset"):
            part = _chosen(part, full.get_defaults().as_dict())
        merged = _merge(merged, part)
    as_json = given.pop("json")
    given.pop("debug")
    merged = _merge(merged, given)
    return Command(out, _settings(parser, merged), as_json, extra)


def _flag(argv: list[str], name: str, choices: Sequence[str]) -> str | None:
    """The value of a flag before the real parsing, if it is a right one."""
    for at, word in enumerate(argv):
        value = word.removeprefix(f"{name}=") if word.startswith(f"{name}=") else None
        if word == name and at + 1 < len(argv):
            value = argv[at + 1]
        if value in choices:
            return value
    return None


def _settings(parser: Parser, merged: dict[str, Any]) -> Settings:
    """Checks merged values against every section and makes the dataclasses."""
    plain = _full(parser, merged.get("preset", PRESETS[0])).parse_object({"out": ".", **merged})
    values: dict[str, Any] = plain.as_dict()
    made: dict[str, Any] = {}
    for section in SECTIONS:
        made[section] = values[section]
        try:
            # The data decide later how many items there are; any number shows what does not fit.
            decided = {"n_items": 1} if section == "model" and knows_items(values[section]) else {}
            instance = section_class(section)(**values[section], **decided)
        except (ValueError, TypeError) as error:
            parser.error(f"{section}.{error}")
        if section != "model":
            made[section] = instance
    plain = {name: values[name] for name in ("data", "kind", "engine", "preset")}
    plain["columns"] = given_names(values["columns"])
    return Settings(**plain, **made)


def _full(parser: Parser, preset: Any) -> Parser:
    """A parser of every section, which complains under the name of `parser`."""
    if preset not in PRESETS:
        parser.error(f"preset: wanted one of {', '.join(PRESETS)}, got {preset!r}")
    full = Parser(parser.prog.removeprefix("onerec "), "")
    _add_top(full, data=True, preset=True)
    add_sections(full, list(SECTIONS), preset)
    return full


def _chosen(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`values` without those that are the defaults, so that another preset brings its own."""
    return {
        key: _chosen(value, defaults[key]) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if key not in defaults or value != defaults[key]
    }


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(out.get(key), Mapping):
            out[key] = _merge(out[key], value)
        else:
            out[key] = value
    return out


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OneRecError(f"--config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise OneRecError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if value is not None and not isinstance(value, dict):
        raise OneRecError(f"{path}: wanted sections of settings, got {type(value).__name__}")
    return value or {}
