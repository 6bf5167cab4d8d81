"""The stage `recommend`, lists or sessions of items for the users of the log."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from onerec.pipeline.inputs import Inputs
from onerec.pipeline.settings import RecommendConfig, Settings
from onerec.pipeline.stage import StageResult, run_stage, write_json
from onerec.progress import Listener

if TYPE_CHECKING:
    from onerec.data import SessionSet
    from onerec.inference import Recommender

FILE = "recommendations.parquet"
EXAMPLES = "examples.json"
_SHOWN_HISTORY = 5


def make(settings: Settings, inputs: Inputs, listener: Listener) -> StageResult:
    """Makes the stage `recommend` from the trained model and the users' whole histories."""
    directory = inputs.directory
    served = inputs.served_model(settings)
    read = inputs.fingerprints("sessions", "tokenize")
    read[served.stage] = served.fingerprint
    if inputs.ranks_items(settings):
        read |= inputs.fingerprints("mixture")

    def build(folder: Path) -> dict[str, Any]:
        data, catalog = inputs.load()
        recommender = inputs.recommender(
            served.stage, catalog, inputs.mixture(settings, whole=True)
        )
        return _write(folder, data, recommender, settings, listener)

    return run_stage(
        directory,
        "recommend",
        config=asdict(settings.recommend),
        inputs=read,
        code=["inference", "model", "ops", "pipeline/recommend.py"],
        build=build,
        say=listener.say,
    )


def _write(
    folder: Path,
    data: SessionSet,
    recommender: Recommender,
    settings: Settings,
    listener: Listener,
) -> dict[str, Any]:
    """Recommends batch by batch, so that memory does not grow with the number of users."""
    config = settings.recommend
    exclude = config.exclude_history
    if exclude is None:
        exclude = data.exclude_history
    item_ids = data.items["item_id"].to_pylist()
    texts = [text or "" for text in data.items["text"].to_pylist()]
    index = {item_id: row for row, item_id in enumerate(item_ids)}
    n_users = min(config.users or data.sequences.num_rows, data.sequences.num_rows)
    schema = pa.schema(
        [
            ("user_id", data.sequences.schema.field("user_id").type),
            ("rank", pa.int32()),
            ("session", pa.int32()),
            ("position", pa.int32()),
            ("item_id", data.items.schema.field("item_id").type),
            ("score", pa.float32()),
            ("text", pa.string()),
        ]
    )
    examples: list[dict[str, Any]] = []
    rows_written = short = 0
    with (
        pq.ParquetWriter(folder / FILE, schema) as writer,
        listener.progress("recommend") as report,
    ):
        for begin in range(0, n_users, config.batch_size):
            users = data.sequences.slice(begin, min(config.batch_size, n_users - begin))
            user_ids = users["user_id"].to_pylist()
            histories = [[item_ids[i] for i in row] for row in users["items"].to_pylist()]
            found = recommendation_rows(recommender, histories, config, exclude)
            rows: list[dict[str, Any]] = []
            for user_id, history, one in zip(user_ids, histories, found, strict=True):
                mine = [
                    {"user_id": user_id, **row, "text": texts[index[row["item_id"]]]} for row in one
                ]
                short += not mine
                rows += [{**row, "rank": rank} for rank, row in enumerate(mine)]
                if len(examples) < config.examples and len(history) >= _SHOWN_HISTORY:
                    examples.append(
                        {
                            "user_id": user_id,
                            "history": [
                                {"item_id": i, "text": texts[index[i]]}
                                for i in history[-_SHOWN_HISTORY:]
                            ],
                            "recommended": [
                                {k: row[k] for k in ("item_id", "text", "score")}
                                for row in mine
                                if row["session"] == 0
                            ],
                        }
                    )
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
            rows_written += len(rows)
            report(begin + len(user_ids), n_users, "")
    write_json(folder / EXAMPLES, examples)
    return {
        "users": n_users,
        "users_of_log": data.sequences.num_rows,
        "rows": rows_written,
        "exclude_history": exclude,
        "users_without_items": short,
    }


def recommendation_rows(
    recommender: Recommender,
    histories: list[list[Any]],
    config: RecommendConfig,
    exclude_history: bool,
) -> list[list[dict[str, Any]]]:
    """For each history the rows session, position, item_id and score: one list of items ranked by
    the mixture, or the best sessions, whose items have their session's score."""
    mixture = recommender.mixture
    if mixture is None:
        sessions = recommender.recommend(
            histories,
            beam_width=config.beam_width,
            num_sessions=config.num_sessions,
            exclude_history=exclude_history,
        )
        return [
            [
                {"session": session, "position": position, "item_id": item, "score": score}
                for session, (items, score) in enumerate(zip(one.item_ids, one.scores, strict=True))
                for position, item in enumerate(items)
            ]
            for one in sessions
        ]
    candidates = recommender.next_items(
        histories,
        beam_width=max(config.beam_width, config.items),
        dense_top=max(config.beam_width, config.items),
        counts=mixture.counts,
        exclude_history=exclude_history,
    )
    lists = []
    for one in candidates:
        items, scores = mixture.best(one, config.items, exclude_history=exclude_history)
        ids = recommender.catalog.item_ids[items].tolist()
        lists.append(
            [
                {"session": 0, "position": position, "item_id": item, "score": score}
                for position, (item, score) in enumerate(zip(ids, scores.tolist(), strict=True))
            ]
        )
    return lists
