"""The settings of a run: one section a stage."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from onerec.checks import at_least, at_least_or_none, wanted
from onerec.errors import DataError, Interrupted
from onerec.files import atomic_write
from onerec.model.config import preset_fields

_TWO_LEVELS = 65_536  # most items whose ids have two levels unless somebody says otherwise
_SIBLINGS = 32  # most items below a first code then


@dataclass(frozen=True)
class TokenizeConfig:
    """How item vectors become semantic ids.

    Attributes:
        levels: Codes of a semantic id, L. Null: 2 for up to 65,536 items, else 3.
        codebook_size: Codes of a level, K. Null: with two levels the smallest power of two with at
            most 32 items to a first code, so that a search scores few first codes and few items
            below each, and K^L at least twice the number of items; with more levels the smallest
            with K^L at least 8 times that number, so that distinct ids are close to their vectors.
            At most the number of items.
        method: Balanced k-means: "priced" (the best balanced cost, certified) or "sequential" (the
            paper's Algorithm 1).
        distinct: What is done about items with equal ids: "none", "cap", "distinct" or "rank".
        max_iter: Rounds of k-means a level.
        seed: Of the first centres.
    """

    levels: int | None = None
    codebook_size: int | None = None
    method: Literal["priced", "sequential"] = "priced"
    distinct: Literal["none", "cap", "distinct", "rank"] = "distinct"
    max_iter: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        at_least_or_none(self, 1, "levels")
        at_least_or_none(self, 2, "codebook_size")

    def shape_for(self, n_items: int) -> tuple[int, int]:
        """Levels and codebook size for a catalogue of `n_items`."""
        levels = self.levels
        if levels is None:
            levels = 2 if n_items <= _TWO_LEVELS else 3
        if self.codebook_size is not None:
            return levels, self.codebook_size
        size, room = (-(-n_items // _SIBLINGS), 2) if levels == 2 else (2, 8)
        size = 1 << max(size - 1, 1).bit_length()
        while size**levels < room * n_items:
            size *= 2
        return levels, min(size, n_items)


@dataclass(frozen=True)
class RecommendConfig:
    """What is written for every user.

    Attributes:
        users: The first so many users of the log; all when null. "paper-tiny" takes 2000.
        items: Items for each user, best first, of a run whose sessions have one item.
        num_sessions: Sessions for each user, best first, of other runs.
        beam_width: Beams of the search.
        exclude_history: Never recommend what the user has already taken. Null: so where fewer than
            5 % of the training targets repeat the history (`repeats` in funnel.json).
        batch_size: Users decoded together.
        examples: Users shown on the terminal.
    """

    users: int | None = None
    items: int = 10
    num_sessions: int = 1
    beam_width: int = 20
    exclude_history: bool | None = None
    batch_size: int = 128
    examples: int = 4

    def __post_init__(self) -> None:
        at_least(self, 1, "items", "num_sessions", "beam_width", "batch_size")
        at_least_or_none(self, 1, "users")
        if self.num_sessions > self.beam_width:
            what = f"at most beam_width = {self.beam_width}"
            raise wanted("num_sessions", what, self.num_sessions)
        at_least(self, 0, "examples")


# Section -> (module, class, fields that the data decide).
SECTIONS: dict[str, tuple[str, str, frozenset[str]]] = {
    "world": ("onerec.data", "SimulatorConfig", frozenset()),
    "sessions": ("onerec.data", "SessionConfig", frozenset()),
    "tokenize": ("onerec.pipeline.settings", "TokenizeConfig", frozenset()),
    "model": (
        "onerec.model.config",
        "OneRecConfig",
        frozenset({"codebook_size", "levels", "session_length", "n_items", "vector_dim"}),
    ),
    "train": ("onerec.training.config", "TrainConfig", frozenset()),
    "reward": ("onerec.training.reward.config", "RewardConfig", frozenset()),
    "align": ("onerec.training.alignment.config", "AlignmentConfig", frozenset()),
    "evaluate": ("onerec.evaluation.config", "EvaluationConfig", frozenset()),
    "recommend": ("onerec.pipeline.settings", "RecommendConfig", frozenset()),
}
PRESETS = ("items", "paper-tiny", "0.1b", "1b")
# What goes with a preset's network: "items" and "paper-tiny" train, measure and serve what a CPU
# does in minutes; the others have the learning rate that arXiv 2502.18965 gives for 1B, and a sixth
# of it in alignment, and as many steps as the epochs have.
_PAPER = {"tokenize.levels": 3, "train.batch_size": 128}
_LARGE = {
    **_PAPER,
    "train.lr": 2e-4,
    "train.max_steps": None,
    "align.lr": 3e-5,
    "align.max_steps": None,
}
_WITH_PRESET: dict[str, dict[str, float | None]] = {
    "items": {
        "train.lr": 2e-3,
        "train.epochs": 16,
        "train.min_steps": 800,
        "train.max_steps": 3000,
        "train.batch_size": None,
        "train.grad_accumulation": 4,
        "evaluate.max_sessions": 10_000,
        "recommend.users": 2000,
    },
    "paper-tiny": {**_PAPER, "evaluate.max_users": 2000, "recommend.users": 2000},
    "0.1b": _LARGE,
    "1b": _LARGE,
}


# Sections that a preset has defaults for.
PRESET_SECTIONS = {"model"} | {key.split(".")[0] for more in _WITH_PRESET.values() for key in more}


def section_class(section: str) -> Any:
    """The dataclass of a section."""
    module, name, _ = SECTIONS[section]
    return getattr(importlib.import_module(module), name)


def preset_values(preset: str) -> dict[str, Any]:
    """ "SECTION.FIELD" -> value of what goes with a preset, the fields of the model among it."""
    own = preset_fields(preset)
    free = [one for one in fields(section_class("model")) if one.name not in SECTIONS["model"][2]]
    return {
        **_WITH_PRESET[preset],
        **{f"model.{one.name}": own.get(one.name, one.default) for one in free},
    }


def knows_items(model: Mapping[str, Any]) -> bool:
    """Whether a network of these fields knows the items of its catalogue."""
    return bool(model["item_loss"] > 0 or model["legal_softmax"])


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

    @classmethod
    def of_preset(cls, preset: str = "items", **chosen: Any) -> Settings:
        """The defaults of a preset.

        Args:
            preset: One of PRESETS.
            **chosen: Attributes to have instead.

        Raises:
            TypeError: There is no such attribute.
        """
        sections: dict[str, Any] = {
            name: section_class(name)() for name in SECTIONS if name != "model"
        }
        sections["model"] = {}
        for key, value in preset_values(preset).items():
            section, name = key.split(".")
            if section == "model":
                sections[section][name] = value
            else:
                sections[section] = replace(sections[section], **{name: value})
        return cls(**{"data": None, "kind": "auto", "preset": preset, **sections, **chosen})

    @classmethod
    def load(cls, path: Path) -> Settings:
        """The settings that `save` wrote.

        Raises:
            DataError: There is no such file, or it is not what `save` wrote.
        """
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
            for name in SECTIONS:
                if name != "model":
                    values[name] = section_class(name)(**values[name])
            return cls(**values)
        except FileNotFoundError:
            raise DataError(f"{path}: there is no such file") from None
        except (TypeError, ValueError, KeyError, yaml.YAMLError) as error:
            raise DataError(f"{path}: not the settings of a run ({error})") from None

    def save(self, path: Path) -> None:
        """Writes the settings as YAML that `--config` reads."""
        text = yaml.safe_dump(_plain(asdict(self)), sort_keys=False)
        with atomic_write(path) as temporary:
            temporary.write_text(
                "# Settings of this run; `onerec run --config` reads it.\n" + text, encoding="utf-8"
            )

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
