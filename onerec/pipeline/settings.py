"""The settings of a run: one section a stage, from defaults, a YAML file and flags."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from onerec.cli.options import Parser
from onerec.errors import Interrupted, OneRecError
from onerec.files import atomic_write


@dataclass(frozen=True)
class TokenizeConfig:
    """How item vectors become semantic ids.

    Attributes:
        levels: Codes of a semantic id, L.
        codebook_size: Codes of a level, K. Null: the smallest power of two with K^L at least 8
            times the number of items, so that distinct ids are close to their vectors; at most that
            number.
        method: Balanced k-means: "priced" (the best balanced cost, certified), "fast" (near it) or
            "sequential" (the paper's Algorithm 1).
        distinct: What is done about items with equal ids: "none", "cap", "distinct" or "rank".
        max_iter: Rounds of k-means a level.
        seed: Of the first centres.
    """

    levels: int = 3
    codebook_size: int | None = None
    method: Literal["priced", "fast", "sequential"] = "priced"
    distinct: Literal["none", "cap", "distinct", "rank"] = "distinct"
    max_iter: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if self.levels < 1:
            raise ValueError(f"levels must be >= 1, got {self.levels}")
        if self.codebook_size is not None and self.codebook_size < 2:
            raise ValueError(f"codebook_size must be >= 2, got {self.codebook_size}")

    def size_for(self, n_items: int) -> int:
        """The codebook size for a catalogue of `n_items`."""
        if self.codebook_size is not None:
            return self.codebook_size
        size = 2
        while size**self.levels < 8 * n_items:
            size *= 2
        return min(size, n_items)


@dataclass(frozen=True)
class RecommendConfig:
    """What is written for every user.

    Attributes:
        users: The first so many users of the log; all when null. The preset "tiny" takes 2000.
        num_sessions: Sessions for each user, best first.
        beam_width: Beams of the search.
        exclude_history: Never recommend what the user has already taken.
        batch_size: Users decoded together.
        examples: Users shown on the terminal.
    """

    users: int | None = None
    num_sessions: int = 1
    beam_width: int = 20
    exclude_history: bool = True
    batch_size: int = 128
    examples: int = 4

    def __post_init__(self) -> None:
        for name in ("users", "num_sessions", "beam_width", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if self.num_sessions > self.beam_width:
            raise ValueError(
                f"num_sessions must be <= beam_width = {self.beam_width}, got {self.num_sessions}"
            )
        if self.examples < 0:
            raise ValueError(f"examples must be >= 0, got {self.examples}")


# Section -> (module, class, fields that the data decide).
SECTIONS: dict[str, tuple[str, str, frozenset[str]]] = {
    "world": ("onerec.data", "SimulatorConfig", frozenset()),
    "sessions": ("onerec.data", "SessionConfig", frozenset()),
    "tokenize": ("onerec.cli.config", "TokenizeConfig", frozenset()),
    "model": (
        "onerec.model.config",
        "OneRecConfig",
        frozenset({"codebook_size", "levels", "session_length", "n_items", "vector_dim"}),
    ),
    "train": ("onerec.training.config", "TrainConfig", frozenset()),
    "reward": ("onerec.training.reward.config", "RewardConfig", frozenset()),
    "align": ("onerec.training.alignment.config", "AlignmentConfig", frozenset()),
    "evaluate": ("onerec.evaluation.config", "EvaluationConfig", frozenset()),
    "recommend": ("onerec.cli.config", "RecommendConfig", frozenset()),
}
PRESETS = ("tiny", "0.1b", "1b")
# What goes with a preset's size: tiny trains, measures and serves what a CPU does in minutes; the
# others have the learning rate that arXiv 2502.18965 gives for 1B, and a sixth of it in alignment,
# and as many steps as the epochs have.
_LARGE = {"train.lr": 2e-4, "train.max_steps": None, "align.lr": 3e-5, "align.max_steps": None}
_WITH_PRESET: dict[str, dict[str, float | None]] = {
    "tiny": {"evaluate.max_users": 2000, "recommend.users": 2000},
    "0.1b": _LARGE,
    "1b": _LARGE,
}


def section_class(section: str) -> Any:
    """The dataclass of a section."""
    module, name, _ = SECTIONS[section]
    return getattr(importlib.import_module(module), name)


@dataclass
class Settings:
    """The settings of a whole run.

    Attributes:
        data: Folder of the log; None for the simulator's world.
        kind: Reader of the log.
        preset: Size of the model, where `model` does not say otherwise.
        world: SimulatorConfig.
        sessions: SessionConfig.
        tokenize: TokenizeConfig.
        model: Fields of OneRecConfig, less those that the data decide.
        train: TrainConfig.
        reward: RewardConfig.
        align: AlignmentConfig.
        evaluate: EvaluationConfig.
        recommend: RecommendConfig.
        engine: What runs the queries that build sessions.
        columns: Columns of the schema that the log has under other names.
    """

    data: str | None
    kind: str
    preset: str
    world: Any
    sessions: Any
    tokenize: TokenizeConfig
    model: dict[str, Any]
    train: Any
    reward: Any
    align: Any
    evaluate: Any
    recommend: RecommendConfig
    engine: str = "duckdb"
    columns: dict[str, str] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Writes the settings as YAML that `--config` reads."""
        text = yaml.safe_dump(_plain(asdict(self)), sort_keys=False)
        with atomic_write(path) as temporary:
            temporary.write_text("# Settings of this run; `onerec run --config` reads it.\n" + text)

    def saved(self, path: Path) -> ExitStack:
        """Saves the settings, and puts back what was there where the `with` block ends in an error.

        An interruption, after which the same command goes on, keeps them, and so does `pop_all()`
        of what `with` gives.
        """
        before = path.read_bytes() if path.exists() else None

        def undo(_: object, error: BaseException | None, __: object) -> None:
            if not isinstance(error, Exception) or isinstance(error, Interrupted):
                return
            if before is None:
                path.unlink()
            else:
                with atomic_write(path) as temporary:
                    temporary.write_bytes(before)

        self.save(path)
        stack = ExitStack()
        stack.push(undo)
        return stack


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def add_sections(parser: Parser, sections: Sequence[str], preset: str) -> None:
    """Adds `--SECTION.FIELD` for each field, with help and defaults from the dataclass."""
    for section in sections:
        cls = section_class(section)
        parser.add_class_arguments(cls, section, skip=set(SECTIONS[section][2]))
        parser.hide(section)
    more = _WITH_PRESET[preset]
    parser.set_defaults({k: v for k, v in more.items() if k.split(".")[0] in sections})
    if "model" in sections:
        config = section_class("model").preset(preset)
        parser.set_defaults(
            {
                f"model.{one.name}": getattr(config, one.name)
                for one in fields(config)
                if one.name not in SECTIONS["model"][2]
            }
        )


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


# Sections that a preset has defaults for.
_PRESET_SECTIONS = {"model"} | {key.split(".")[0] for more in _WITH_PRESET.values() for key in more}


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
            help="folder of the log: KuaiRand, Amazon, or the schema of docs/data.md; without it "
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
            type=Literal["tiny", "0.1b", "1b"],
            default="tiny",
            help="size of the model (--model.*); tiny also bounds steps and the users measured and "
            "served, the others have lower learning rates",
        )


@dataclass(frozen=True)
class Command:
    """A parsed command line of a stage or of the whole run.

    Attributes:
        out: Directory of the run.
        settings: The merged settings.
        json: Whether results are wanted as JSON.
    """

    out: Path
    settings: Settings
    json: bool


def parse_command(
    verb: str,
    description: str,
    argv: list[str],
    sections: Sequence[str],
    *,
    data: bool = False,
    stored: bool = True,
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

    Raises:
        OneRecError: A settings file cannot be read.
        SystemExit: With code 2 on wrong usage.
    """
    parser = Parser(verb, description, "--out DIR [options]")
    _add_top(parser, data, not _PRESET_SECTIONS.isdisjoint(sections))
    add_sections(parser, sections, _flag(argv, "--preset", PRESETS) or "tiny")
    given = parser.given(argv).as_dict()
    for key in ("json", "debug"):
        given.setdefault(key, False)
    out = Path(given.pop("out"))
    merged: dict[str, Any] = {}
    files = [out / "config.yaml"] if stored and (out / "config.yaml").is_file() else []
    if named := given.pop("config", None):
        files.append(Path(named))
    for file in files:
        part = _read_yaml(file)
        full = _full(parser, part.get("preset", "tiny"))
        full.source = str(file)
        full.parse_object({"out": ".", **part})
        if given.get("preset", part.get("preset")) != part.get("preset"):
            part = _chosen(part, full.get_defaults().as_dict())
        merged = _merge(merged, part)
    as_json = given.pop("json")
    given.pop("debug")
    merged = _merge(merged, given)
    return Command(out, _settings(parser, merged), as_json)


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
    plain = _full(parser, merged.get("preset", "tiny")).parse_object({"out": ".", **merged})
    values: dict[str, Any] = plain.as_dict()
    made: dict[str, Any] = {}
    for section in SECTIONS:
        made[section] = values[section]
        try:
            instance = section_class(section)(**values[section])
        except (ValueError, TypeError) as error:
            parser.error(f"{section}: {error}")
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
        value = yaml.safe_load(path.read_text())
    except OSError as error:
        raise OneRecError(f"--config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise OneRecError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if value is not None and not isinstance(value, dict):
        raise OneRecError(f"{path}: wanted sections of settings, got {type(value).__name__}")
    return value or {}
