"""`onerec update`: a finished run carried forward by new rows, day after day.

Each update makes `DIR/updates/NNNN/`, itself the directory of a run: the stages `sessions`,
`tokenize`, `pretrain` and `mixture` of the whole log so far, made from those before it (the run, or
the last published update) and the new rows, and between them `measure`, what the network of
yesterday is worth on the new rows before anybody learns from them, and `check`, what the new one
is worth on users that it has not learned from. A line of `DIR/updates.jsonl` ends an update.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onerec.checks import at_least, fraction, positive
from onerec.errors import DataError, OneRecError
from onerec.files import atomic_write
from onerec.pipeline import mixture, report
from onerec.pipeline.inputs import Inputs
from onerec.pipeline.servers import swap_all
from onerec.pipeline.settings import Settings
from onerec.pipeline.stage import (
    StageRecord,
    StageResult,
    data_digest,
    data_files,
    digest,
    file_digest,
    locked,
    read_record,
    run_stage,
    write_json,
)
from onerec.progress import SILENT, Listener

if TYPE_CHECKING:
    from onerec.data.session_set import Samples, SessionSet
    from onerec.inference import Recommender
    from onerec.model import OneRec
    from onerec.tokenizer import Catalog

FOLDER = "updates"
LINES = "updates.jsonl"
LATEST = "latest"

_SESSIONS = 2000  # that are ranked to measure a network, at most
_ENOUGH = 100  # fewer say nothing
_MANY = 1000  # fewer held out would make the mixture's weights jump from day to day
_BEAMS = 20
_BLOCK = 256
_DAYS = 7  # whose mean a day is held against


@dataclass(frozen=True)
class UpdateConfig:
    """How a day is learned, and when it is refused.

    Attributes:
        epochs: Passes over the new rows.
        min_steps: At least so many optimizer steps, for days of few rows.
        lr: Learning rate, constant. Null: half of the run's (`train.lr`).
        replay: Of the users or sessions that are learned, the share that has nothing new: it is
            drawn from all that was learned before, in [0, 1).
        held_out: Share of the day's users that is kept out of the training until the next day, to
            hold the new network against the one before, in (0, 1).
        guard: Most that the new network may lose of the NDCG@10 of the one before, on the users
            held out, as a share.
        day_guard: Most that the network before may lose on the new rows of its mean NDCG@10 on the
            days before, as a share; more means that the rows are broken.
        keep: Newest folders of updates that stay, at least 2: one to go back to.
    """

    epochs: float = 3.0
    min_steps: int = 60
    lr: float | None = None
    replay: float = 0.2
    held_out: float = 0.1
    guard: float = 0.1
    day_guard: float = 0.5
    keep: int = 7

    def __post_init__(self) -> None:
        positive(self, "epochs")
        if self.lr is not None:
            positive(self, "lr")
        fraction(self, "replay", ends="[)")
        fraction(self, "held_out", ends="()")
        fraction(self, "guard", "day_guard")
        at_least(self, 0, "min_steps")
        at_least(self, 2, "keep")


def update(
    out: str | Path,
    data: str | Path,
    *,
    items: str | Path | None = None,
    remove: str | Path | None = None,
    config: UpdateConfig | None = None,
    force: bool = False,
    servers: Sequence[str] = (),
    token: str | None = None,
    dtype: str = "float32",
    listener: Listener = SILENT,
) -> dict[str, Any] | None:
    """Carries a run forward by new rows.

    Old semantic ids, item vectors and codebooks stay as they are; new items get codes, items that
    are removed stay known to histories. The same data again change nothing; a command that was
    stopped goes on when it is given again.

    Args:
        out: Directory of a finished run, held for this process meanwhile.
        data: New rows as `onerec run --data` takes them; rows that the run knows are left out.
        items: Table of the new items, with their vectors beside it; None: what lies beside the
            rows, or the rows themselves.
        remove: File with an item id a line; these are recommended no more.
        config: How the day is learned; the defaults when None.
        force: Publish it also where a guard refuses it.
        servers: Addresses that serve the new export at the end, all of them or none.
        token: Of the servers' admin.
        dtype: Of the export's matrices, "float32" or "bfloat16".
        listener: Told of the work.

    Returns:
        The line of the update, as in `updates.jsonl`; None where there was nothing new.

    Raises:
        OneRecError: What the data do not allow, a guard's refusal, or a server's.
    """
    directory = Path(out)
    if not (directory / "config.yaml").is_file():
        raise OneRecError(f"--out {directory}: wanted the directory of a finished `onerec run`")
    with locked(directory, "update"):
        settings = Settings.load(directory / "config.yaml")
        base = Inputs(directory).served_model(settings).fingerprint
        lines = read_lines(directory)
        day = _Day.of(Path(data), items, remove)
        done = [line for line in lines if line["published"]]
        for line in done:
            if line["base"] != base:
                raise OneRecError(
                    f"{directory / FOLDER} belongs to an earlier run of {directory}: move "
                    f"{FOLDER} and {LINES} away"
                )
            if line["digest"] == day.digest:
                listener.say(f"update: {data} is in update {line['version']} already")
                folder = directory / FOLDER / line["version"] / "export"
                if servers and line is done[-1]:
                    swap_all(servers, folder, token, listener.say)
                return line
        number = int(done[-1]["version"]) if done else 0
        before = Inputs(directory / FOLDER / f"{number:04d}" if number else directory)
        made = _Update(
            Inputs(directory / FOLDER / f"{number + 1:04d}"),
            before,
            settings,
            config or UpdateConfig(),
            day,
            listener,
        )
        return made.run(directory, base, done, force, servers, token, dtype)


def read_lines(directory: Path) -> list[dict[str, Any]]:
    """The lines of a run's updates, oldest first.

    Raises:
        DataError: A line is damaged.
    """
    path = directory / LINES
    if not path.is_file():
        return []
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        try:
            found.append(dict(json.loads(line)))
        except ValueError as error:
            raise DataError(f"{path}, line {number + 1}: not JSON: {error}") from None
    return found


@dataclass(frozen=True)
class _Day:
    """What an update is given.

    Attributes:
        data: The rows.
        items: The table of new items, or None.
        remove: The file of items to retire, or None.
        rows: Hash of the rows.
        digest: Hash of all of them.
    """

    data: Path
    items: Path | None
    remove: Path | None
    rows: str
    digest: str

    @classmethod
    def of(cls, data: Path, items: str | Path | None, remove: str | Path | None) -> _Day:
        if not data_files(data):
            raise OneRecError(f"--data {data}: wanted a folder, a file or a glob, found nothing")
        table, gone = (None if path is None else Path(path) for path in (items, remove))
        for name, path in (("items", table), ("remove", gone)):
            if path is not None and not path.exists():
                raise OneRecError(f"--{name} {path}: there is no such file")
        parts = [None if path is None else _content(path) for path in (data, table, gone)]
        return cls(data, table, gone, str(parts[0]), digest(parts))

    def removed(self, text: bool) -> list[Any]:
        """The item ids to retire."""
        if self.remove is None:
            return []
        words = self.remove.read_text(encoding="utf-8").split("\n")
        ids = [word.strip() for word in words if word.strip()]
        if text:
            return ids
        for row, word in enumerate(ids):
            if not word.lstrip("-").isdigit():
                raise DataError(
                    f"{self.remove}, row {row}: wanted an integer item id, got {word!r}"
                )
        return [int(word) for word in ids]

    def path(self, scratch: Path) -> Path:
        """The log as `open_log` takes it: rows and items in one folder."""
        if self.items is None:
            return self.data
        from onerec.data.readers.find import ending, named

        rows = self.data
        if rows.is_dir():
            rows = named(rows, "interactions") or rows
        table = self.items if self.items.is_file() else named(self.items, "items")
        if not rows.exists() or table is None:
            raise OneRecError(
                f"--items {self.items}: wanted a table of items beside a file or folder"
            )
        (scratch / f"interactions{ending(rows)}").symlink_to(rows.resolve())
        (scratch / f"items{ending(table)}").symlink_to(table.resolve())
        for file in table.parent.glob("*embeddings*.np[yz]"):
            (scratch / file.name).symlink_to(file.resolve())
        return scratch


def _content(path: Path) -> str:
    """A hash of what a file or folder holds, whatever lies beside the file."""
    return file_digest(path) if path.is_file() else data_digest(path)


@dataclass(frozen=True)
class _Update:
    """One update in the making.

    Attributes:
        inputs: Its folder.
        before: The folder that it goes on from.
        settings: Of the run.
        config: Of the update.
        day: What it was given.
        listener: Told of the work.
    """

    inputs: Inputs
    before: Inputs
    settings: Settings
    config: UpdateConfig
    day: _Day
    listener: Listener

    def run(
        self,
        directory: Path,
        base: str,
        done: list[dict[str, Any]],
        force: bool,
        servers: Sequence[str],
        token: str | None,
        dtype: str,
    ) -> dict[str, Any] | None:
        """Makes the stages, publishes them and writes the line."""
        from onerec.pipeline.export import export_run
        from onerec.tokenizer import Catalog

        begin = time.monotonic()
        folder = self.inputs.directory
        self._begin(base)
        sessions = self._sessions()
        told = sessions.record.summary
        nothing = not (told["rows"] or told["new_items"] or self.day.remove)
        if nothing:
            shutil.rmtree(folder)
            self.listener.say(
                f"update: {self.day.data} has no row later than those of the run "
                f"({told['known_rows']:,} rows are known): nothing to do"
            )
            return None
        made = {"sessions": sessions, "tokenize": self._tokenize(), "measure": self._measure()}
        made["pretrain"] = self._pretrain()
        if self.inputs.ranks_items(self.settings):
            made["mixture"] = self._mixture()
        made["check"] = self._check()
        refused = self._refusal(made, done)
        line: dict[str, Any] = {
            "version": folder.name,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "data": str(self.day.data),
            "digest": self.day.digest,
            "base": base,
            "published": refused is None or force,
            "refused": refused,
            **{name: result.record.summary for name, result in made.items()},
            "seconds": {name: result.record.seconds for name, result in made.items()},
        }
        if refused is not None and not force:
            if not any(line["digest"] == self.day.digest for line in read_lines(directory)):
                _append(directory, line)
            raise OneRecError(
                f"update {folder.name} is refused: {refused}; nothing was published. The same "
                f"command with --force publishes it; remove {folder} to leave the rows out"
            )
        earlier = self.before.directory / "export"
        words = Catalog.load(earlier).tag_words if (earlier / "catalog.parquet").is_file() else ()
        export_run(
            self.inputs,
            folder / "pretrain" / "model",
            folder / "export",
            dtype=dtype,
            tags=words or None,
            mixture=self.inputs.mixture(self.settings, whole=True),
        )
        if servers:
            swap_all(servers, folder / "export", token, self.listener.say)
        line["served"] = list(servers)
        line["seconds"]["this_command"] = round(time.monotonic() - begin, 3)
        _append(directory, line)
        _point(directory / FOLDER / LATEST, folder.name)
        self._prune(directory, [*done, line])
        if read_record(directory / "report") is not None:
            report.make(self.settings, Inputs(directory), self.listener)
        return line

    def _begin(self, base: str) -> None:
        """Says in the folder what it is being made from, or checks what it says."""
        folder = self.inputs.directory
        path = folder / "update.json"
        wanted = {"base": base, "rows": self.day.rows, "data": str(self.day.data)}
        if path.is_file() and read_record(folder / "sessions") is not None:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["rows"] != wanted["rows"] or found["base"] != base:
                raise OneRecError(
                    f"{folder} is an unfinished update by {found['data']}: give these rows again, "
                    "or remove the folder to leave them out"
                )
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, wanted)
        replace(self.settings, data=str(self.day.data)).save(folder / "config.yaml")

    def _sessions(self) -> StageResult:
        settings, before = self.settings, self.before

        def build(folder: Path) -> dict[str, Any]:
            from onerec.data import open_log
            from onerec.data.readers.find import is_glob, named
            from onerec.data.sessions.day import add_day

            with tempfile.TemporaryDirectory(prefix="onerec-update-") as scratch:
                path = self.day.path(Path(scratch))
                columns = settings.columns
                place = path if path.is_dir() else path.parent
                beside = path.is_dir() or path.name.startswith("interactions.")
                if is_glob(str(path)) or not (beside and named(place, "items")):
                    # A file of rows only names its items by the rows.
                    columns = {k: v for k, v in columns.items() if not k.startswith("items.")}
                with open_log(
                    path, kind=settings.kind, columns=columns, engine=settings.engine
                ) as log:
                    for line in (log.describe(), *log.notes):
                        self.listener.say(f"sessions: {line}")
                    found = add_day(
                        log,
                        before.directory / "sessions",
                        settings.sessions,
                        folder,
                        held_out=self.config.held_out,
                    )
            day = found.funnel["day"]
            if day["filled_vectors"]:
                self.listener.say(
                    f"sessions: {day['filled_vectors']} of {day['new_items']} new items lack a "
                    "vector in part: theirs is the mean of the items of the same tag"
                )
            return {
                **{k: v for k, v in day.items() if k != "from"},
                "users": found.sequences.num_rows,
                "users_of_day": day["users"],
                "items": found.items.num_rows,
                **{f"{split}_sessions": len(found.samples(split)) for split in ("train", "valid")},
                "rule": found.funnel["rule"],
                "session_length": found.session_length,
                "vector_size": int(found.embeddings.shape[1]),
            }

        return self._stage(
            "sessions",
            {
                "kind": settings.kind,
                "columns": settings.columns,
                "held_out": self.config.held_out,
                **asdict(settings.sessions),
            },
            {"day": self.day.digest, **before.fingerprints("sessions")},
            ["data"],
            build,
        )

    def _tokenize(self) -> StageResult:
        def build(folder: Path) -> dict[str, Any]:
            from onerec.data import SessionSet
            from onerec.tokenizer import Catalog, ResidualQuantizer
            from onerec.tokenizer.residual_quantizer import describe_ids

            source = self.before.directory / "tokenize"
            data = SessionSet.load(self.inputs.directory / "sessions")
            old = Catalog.load(source)
            quantizer = ResidualQuantizer.from_pretrained(source / "quantizer")
            new = data.embeddings[len(old) :]
            sids, error = old.sids, 0.0
            if len(new):
                try:
                    added = quantizer.add(new, sids=old.sids)
                except ValueError as problem:
                    raise OneRecError(
                        f"no semantic ids are left for {len(new)} new items ({problem}): make a "
                        "new run with a larger --tokenize.codebook_size"
                    ) from None
                sids = np.concatenate([old.sids, added])
                apart = ((quantizer.decode(added) - new) ** 2).sum(axis=1).mean()
                error = float(apart) / max(quantizer.report_["mse"], 1e-12)
            catalog = Catalog.build(
                data.items["item_id"].to_pylist(), sids, old.codebook_size, quantizer=old.quantizer
            )
            gone = [] if old.retired is None else old.item_ids[old.retired].tolist()
            removed = self.day.removed(catalog.item_ids.dtype == object)
            try:
                catalog = catalog.retire([*gone, *removed]) if gone or removed else catalog
            except ValueError as problem:
                raise OneRecError(f"--remove {self.day.remove}: {problem}") from None
            retired = 0 if catalog.retired is None else int(catalog.retired.sum())
            if retired == len(catalog):
                raise OneRecError(f"--remove {self.day.remove}: no item would be left to recommend")
            quantizer.save_pretrained(folder / "quantizer")
            catalog.save(folder)
            codes = describe_ids(catalog.sids, catalog.codebook_size)
            collisions = catalog.collision_report()
            write_json(
                folder / "metrics.json",
                {"quantizer": {**quantizer.report_, **codes}, "catalog": collisions},
            )
            return {
                "items": len(catalog),
                "new_items": len(new),
                "retired_now": len(removed),
                "retired": retired,
                "sizes": codes["sizes"],
                "error_of_new_to_fitted": round(error, 3),
            }

        removed = "" if self.day.remove is None else file_digest(self.day.remove)
        inputs = {
            "remove": removed,
            "before": self.before.require("tokenize").fingerprint,
            **self.inputs.fingerprints("sessions"),
        }
        return self._stage("tokenize", {}, inputs, ["tokenizer"], build)

    def _served_before(self) -> tuple[StageRecord, dict[str, str]]:
        """The stage of yesterday's network, and what a stage that uses it reads."""
        served = self.before.served_model(self.settings)
        read = {"network": served.fingerprint, **self.inputs.fingerprints("sessions", "tokenize")}
        if self.before.ranks_items(self.settings):
            read["mixture"] = self.before.require("mixture").fingerprint
        return served, read

    def _network(self, data: SessionSet, catalog: Catalog) -> OneRec:
        """Yesterday's network, grown to the items of today."""
        from onerec.model import OneRec
        from onerec.model.growth import grown

        stage = self.before.served_model(self.settings).stage
        model = OneRec.from_pretrained(self.before.directory / stage / "model")
        return grown(model, catalog.sids, data.embeddings)

    def _measure(self) -> StageResult:
        _, read = self._served_before()

        def build(folder: Path) -> dict[str, Any]:
            from onerec.inference import Recommender

            data, catalog = self.inputs.load()
            mixture = self.before.mixture(self.settings, whole=True)
            if mixture is not None:
                mixture = mixture.grown(len(catalog))
            recommender = Recommender(
                self._network(data, catalog), catalog, batching=True, mixture=mixture
            )
            first = len(catalog) - data.funnel["day"]["new_items"]
            since = data.funnel["day"]["from"]
            parts = [_since(data.samples(split), since) for split in ("train", "valid")]
            with self.listener.progress("measure") as report:
                whole = _measured(recommender, data, parts, first, report)
                held = _measured(recommender, data, parts[1:], first, report)
            found = {**whole, "held_out": held}
            write_json(folder / "measure.json", found)
            return found

        code = ["inference", "evaluation/metrics.py", "model"]
        return self._stage("measure", {}, read, code, build)

    def _pretrain(self) -> StageResult:
        served, read = self._served_before()
        number = int(self.inputs.directory.name)
        config, train = self.config, self.settings.train
        lr = train.lr / 2 if config.lr is None else config.lr

        def build(folder: Path) -> dict[str, Any]:
            from onerec.data.sessions.day import LEARN
            from onerec.training import pretrain
            from onerec.training.checkpoint import optimizer_state

            data, catalog = self.inputs.load()
            model = self._network(data, catalog)
            learn = np.load(self.inputs.directory / "sessions" / LEARN)
            if not len(learn):
                self.listener.say("pretrain: no new session to learn from")
                model.save_pretrained(folder / "model")
                return {"samples": 0, "new_samples": 0, "steps": 0}
            if model.item_column:
                model.leave_unseen(data.items["train_count"].to_numpy() == 0)
            samples = chosen_samples(
                data.samples("train"),
                learn,
                config.replay,
                seed=train.seed + number,
                window=model.config.history_length if model.prefixes else None,
            )
            optimizer = None
            if served.stage == "pretrain":
                optimizer = optimizer_state(self.before.directory / "pretrain" / "checkpoints")
            with self.listener.progress("pretrain") as report:
                result = pretrain(
                    model,
                    samples,
                    None,
                    catalog.sids,
                    replace(
                        train,
                        epochs=config.epochs,
                        steps=None,
                        min_steps=config.min_steps,
                        max_steps=None,
                        lr=lr,
                        # Without the optimizer's state its first steps are rash.
                        warmup=0.0 if optimizer else 0.1,
                        min_lr=1.0,
                        select="last",
                        seed=train.seed + number,
                        keep=1,
                    ),
                    folder,
                    optimizer=optimizer,
                    progress=report,
                )
            return {
                "samples": len(samples),
                "new_samples": len(learn),
                "steps": result.steps,
                "optimizer": "warm" if optimizer else "new",
                "resumed_from": result.resumed_from,
            }

        fields = {name: getattr(config, name) for name in ("epochs", "min_steps", "replay")}
        fields |= {"lr": lr, "seed": train.seed}
        return self._stage(
            "pretrain",
            {**fields, "batch_size": train.batch_size},
            read,
            ["model", "training", "ops"],
            build,
            resumable=True,
            scratch=["checkpoints"],
        )

    def _mixture(self) -> StageResult:
        if self.inputs.require("sessions").summary["valid_sessions"] >= _MANY:
            return mixture.make(self.settings, self.inputs, self.listener)

        def build(folder: Path) -> dict[str, Any]:
            from onerec.evaluation.counting import count_evidence

            before, data = self.before.mixture(self.settings), self.inputs.load()[0]
            assert before is not None
            mixture.save(folder, replace(before, counts=count_evidence(data)), data)
            return {"weights": f"those of before: fewer than {_MANY} sessions are held out"}

        read = {
            "before": self.before.require("mixture").fingerprint,
            **self.inputs.fingerprints("sessions", "tokenize"),
        }
        return self._stage("mixture", {}, read, ["evaluation/counting.py", "model"], build)

    def _check(self) -> StageResult:
        read = self.inputs.fingerprints("sessions", "tokenize", "pretrain")
        if self.inputs.ranks_items(self.settings):
            read |= self.inputs.fingerprints("mixture")

        def build(folder: Path) -> dict[str, Any]:
            data, catalog = self.inputs.load()
            mixture = self.inputs.mixture(self.settings)
            recommender = self.inputs.recommender("pretrain", catalog, mixture)
            recommender.warmup()
            first = len(catalog) - data.funnel["day"]["new_items"]
            held = _since(data.samples("valid"), data.funnel["day"]["from"])
            with self.listener.progress("check") as report:
                found = _measured(recommender, data, [held], first, report)
            write_json(folder / "check.json", found)
            return found

        code = ["inference", "evaluation/metrics.py", "model"]
        return self._stage("check", {}, read, code, build)

    def _refusal(self, made: dict[str, StageResult], done: list[dict[str, Any]]) -> str | None:
        """Why the update is not to be published; None: it may be."""
        measured, after = (made[name].record.summary for name in ("measure", "check"))
        before = measured["held_out"]
        if after["sessions"] >= _ENOUGH:
            least = (1 - self.config.guard) * before["ndcg@10"]
            if after["ndcg@10"] < least:
                return (
                    f"NDCG@10 on {after['sessions']} sessions held out is {after['ndcg@10']:.4f} "
                    f"after the update and {before['ndcg@10']:.4f} before it; wanted at least "
                    f"{least:.4f} (--guard {self.config.guard:g})"
                )
        else:
            self.listener.say(
                f"update: {after['sessions']} sessions are held out, too few for the guard "
                f"(it wants {_ENOUGH})"
            )
        past = [line["measure"] for line in done[-_DAYS:]]
        past = [one["ndcg@10"] for one in past if one["sessions"] >= _ENOUGH]
        if past and measured["sessions"] >= _ENOUGH:
            least = (1 - self.config.day_guard) * float(np.mean(past))
            if measured["ndcg@10"] < least:
                return (
                    "the network before ranks the new rows with NDCG@10 "
                    f"{measured['ndcg@10']:.4f}, on the {len(past)} days before it had "
                    f"{np.mean(past):.4f}; wanted at least {least:.4f} "
                    f"(--day_guard {self.config.day_guard:g}): are the rows broken?"
                )
        return None

    def _stage(
        self,
        name: str,
        config: dict[str, Any],
        inputs: dict[str, str],
        code: Sequence[str],
        build: Any,
        **options: Any,
    ) -> StageResult:
        return run_stage(
            self.inputs.directory,
            name,
            config=config,
            inputs=inputs,
            code=[*code, "pipeline/update.py"],
            build=build,
            say=self.listener.say,
            **options,
        )

    def _prune(self, directory: Path, done: list[dict[str, Any]]) -> None:
        for line in done[: -self.config.keep]:
            shutil.rmtree(directory / FOLDER / line["version"], ignore_errors=True)


def chosen_samples(
    samples: Samples,
    learn: np.ndarray[Any, np.dtype[np.int64]],
    replay: float,
    *,
    seed: int,
    window: int | None,
) -> Samples:
    """What a day's training reads: the new samples, and a share of those learned before.

    Args:
        samples: Of train.
        learn: Rows of `samples` that are new.
        replay: Share of the result that is drawn from the others, in [0, 1).
        seed: Of the draw.
        window: With a network that learns every prefix of a user, its history length: the result
            has one sample a user, which stands for whole windows that end with the user's last
            item, as many as the new items need; and `replay` is of users.
    """
    rng = np.random.default_rng([seed, len(samples)])
    if window is None:
        rest = np.setdiff1d(np.arange(len(samples)), learn)
        more = min(round(len(learn) * replay / (1 - replay)), len(rest))
        return samples.take(np.concatenate([learn, rng.permutation(rest)[:more]]))
    ends = samples.history_end + np.diff(samples.target_offsets)
    users = int(samples.user_row.max()) + 1
    last = np.full(users, -1, np.int64)
    order = np.argsort(ends, kind="stable")
    last[samples.user_row[order]] = order
    new = np.zeros(users, np.int64)
    first = np.full(users, np.iinfo(np.int64).max)
    np.minimum.at(first, samples.user_row[learn], samples.history_end[learn])
    active = np.unique(samples.user_row[learn])
    new[active] = ends[last[active]] - first[active]
    rest = np.setdiff1d(np.flatnonzero(last >= 0), active)
    more = min(round(len(active) * replay / (1 - replay)), len(rest))
    rows = np.concatenate([active, rng.permutation(rest)[:more]])
    chosen = samples.take(last[rows])
    windows = np.maximum(-(-new[rows] // window), 1)
    begin = np.maximum(chosen.history_begin, ends[last[rows]] - 1 - window * windows)
    return replace(chosen, history_begin=begin)


def _since(samples: Samples, time_ms: int) -> Samples:
    """The samples that began after a time."""
    return samples.take(np.flatnonzero(samples.timestamp > time_ms))


def _measured(
    recommender: Recommender,
    data: SessionSet,
    parts: Sequence[Samples],
    first_new: int,
    report: Any,
) -> dict[str, Any]:
    """How a network ranks sessions, at most 2,000 of them, and how many new items it shows."""
    from onerec.evaluation import metrics as m

    catalog, exclude = recommender.catalog, data.exclude_history
    sizes = [len(part) for part in parts]
    drawn = np.sort(np.random.default_rng(0).permutation(sum(sizes))[:_SESSIONS])
    histories: list[Any] = []
    targets: list[Any] = []
    begin = 0
    for part, size in zip(parts, sizes, strict=True):
        for row in drawn[(drawn >= begin) & (drawn < begin + size)] - begin:
            histories.append(part.history(int(row)))
            targets.append(list(dict.fromkeys(part.target(int(row)).tolist())))
        begin += size
    found = {"sessions": len(drawn), "of": sum(sizes), "recall@10": 0.0, "ndcg@10": 0.0}
    found |= {"new_items_shown": 0.0, "new_items_taken": 0.0}
    if not len(drawn):
        return found
    ranked: list[list[Any]] = []
    for at in range(0, len(histories), _BLOCK):
        ids = [catalog.item_ids[history].tolist() for history in histories[at : at + _BLOCK]]
        ranked += recommender.rank(ids, 10, beam_width=_BEAMS, exclude_history=exclude)
        report(min(at + _BLOCK, len(histories)), len(histories), "")
    places = m.pad_rows([catalog.index_of(row) for row in ranked], 10)
    groups = None if recommender.mixture is not None else catalog.leaf_of_item
    hidden = m.pad_rows(histories) if exclude else None
    ranks = m.target_ranks(places, m.pad_rows(targets), groups=groups, exclude=hidden)
    shown = places[places >= 0]
    taken = np.concatenate([np.asarray(row) for row in targets])
    return {
        "sessions": len(drawn),
        "of": sum(sizes),
        "recall@10": round(float(np.nanmean(m.recall(ranks, 10))), 6),
        "ndcg@10": round(float(np.nanmean(m.ndcg(ranks, 10))), 6),
        "new_items_shown": round(float((shown >= first_new).mean()), 6) if len(shown) else 0.0,
        "new_items_taken": round(float((taken >= first_new).mean()), 6),
    }


def _append(directory: Path, line: dict[str, Any]) -> None:
    """Adds a line to the run's updates; the file appears whole."""
    path = directory / LINES
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    with atomic_write(path) as temporary:
        temporary.write_text(text + json.dumps(line) + "\n", encoding="utf-8")


def _point(link: Path, name: str) -> None:
    """Makes a link to a folder beside it, in place of an earlier one."""
    temporary = link.with_name(f".{link.name}")
    temporary.unlink(missing_ok=True)
    os.symlink(name, temporary)
    temporary.replace(link)
