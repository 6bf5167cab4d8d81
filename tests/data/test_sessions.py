"""Session building against a plain-Python reference, and what must never leak."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onerec.data import SessionConfig, SessionSet, SimulatorConfig, build_sessions, open_log
from onerec.data import simulate as make_world
from onerec.errors import DataError, OneRecError

N_ITEMS = 7
COLUMNS = (
    "user_id",
    "item_id",
    "timestamp",
    "request_id",
    "session_id",
    "watch_time_ms",
    "duration_ms",
    "like",
    "hate",
    "split",
)


def write_log(folder: Path, rows: list[dict[str, Any]], drop: tuple[str, ...] = ()) -> Path:
    """A log of these rows, an items table of 7 items and 2-d vectors."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [name for name in COLUMNS if name in rows[0] and name not in drop]
    table = pa.table({name: [row[name] for row in rows] for name in names})
    pq.write_table(table, folder / "interactions.parquet")
    ids = list(range(100, 100 + N_ITEMS))
    pq.write_table(
        pa.table({"item_id": ids, "text": [f"t{i}" for i in ids]}), folder / "items.parquet"
    )
    np.save(folder / "embeddings.npy", np.arange(2 * N_ITEMS, dtype=np.float32).reshape(-1, 2))
    return folder


def build(folder: Path, config: SessionConfig) -> SessionSet:
    with open_log(folder, threads=1) as log:
        return build_sessions(log, config, folder / "out")


def distinct(values: list[int]) -> list[int]:
    return list(dict.fromkeys(values))


def reference(
    rows: list[dict[str, Any]], config: SessionConfig, rule: str, split: str
) -> tuple[list[tuple[Any, ...]], Counter[int]]:
    """The sessions that must come out, and the train counts, by plain loops."""
    rows = [dict(row, row=n) for n, row in enumerate(rows)]
    by_user: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in sorted(rows, key=lambda r: (r["user_id"], r["timestamp"], r["row"])):
        enough = min(row["duration_ms"] or 18_000, 18_000)
        row["watched"] = row["watch_time_ms"] is not None and row["watch_time_ms"] >= enough
        row["positive"] = (row["watched"] or row["like"] == 1) and row["hate"] != 1
        by_user[row["user_id"]].append(row)
    cuts = (config.valid_from, config.test_from)

    def timed(timestamp: int) -> str:
        return "train" if timestamp < cuts[0] else "valid" if timestamp < cuts[1] else "test"

    sessions, counts = [], Counter()
    for user, mine in by_user.items():
        good = [row for row in mine if row["positive"]]
        for at, row in enumerate(good):
            left = len(good) - 1 - at
            row["period"] = (
                timed(row["timestamp"])
                if split == "time"
                else {0: "test", 1: "valid"}.get(left, "train")
                if len(good) >= 3
                else "train"
            )
        found = []
        if rule == "next":
            for period in ("train", "valid", "test"):
                at_of = [at for at, row in enumerate(good) if row["period"] == period]
                stride = config.stride if period == "train" else config.length
                for first in range(0, len(at_of), stride):
                    part = [good[at] for at in at_of[first : first + config.length]]
                    found.append((part, part, at_of[first], period))
        else:
            groups: dict[Any, list[dict[str, Any]]] = defaultdict(list)
            key, last = 0, None
            for row in mine:
                if last is not None and row["timestamp"] - last > config.gap_minutes * 60_000:
                    key += 1
                last = row["timestamp"]
                groups[key if rule == "gap" else row[f"{rule}_id"]].append(row)
            for part in groups.values():
                tests = [
                    sum(r["watched"] for r in part) >= config.min_watched,
                    sum(r["watch_time_ms"] or 0 for r in part) >= config.min_watch_seconds * 1000,
                    sum(r["like"] == 1 for r in part) >= config.min_interactions,
                ]
                if not (any if config.require == "any" else all)(tests):
                    continue
                windows: dict[int, list[dict[str, Any]]] = defaultdict(list)
                so_far = 0
                for row in part:
                    so_far += row["positive"] or config.target == "shown"
                    windows[max(so_far - 1, 0) // config.length].append(row)
                for window in windows.values():
                    begin, end = window[0]["timestamp"], window[-1]["timestamp"]
                    if split == "time" and timed(begin) != timed(end):
                        continue
                    start = sum(row["timestamp"] < begin for row in good)
                    shown = config.target == "shown"
                    wanted = [row for row in window if shown or row["positive"]]
                    period = timed(begin) if split == "time" else None
                    found.append((wanted, window, start, period))
        found = [f for f in found if f[0] and f[2] >= config.min_history]
        limit = None
        if split == "last" and rule != "next":
            ids = f"{rule}_id"
            usable = {f[1][0][ids] for f in found}
            begins = {i: min(r["timestamp"] for r in mine if r[ids] == i) for i in usable}
            order = sorted(usable, key=lambda i: (begins[i], -i))
            periods = dict.fromkeys(order, "train")
            if len(order) >= 3:
                periods |= {order[-2]: "valid", order[-1]: "test"}
                limit, last_cut = begins[order[-2]], begins[order[-1]]
            found = [
                (*f[:3], period)
                for f in found
                for period in [periods[f[1][0][ids]]]
                if limit is None
                or period == "test"
                or f[1][-1]["timestamp"] < (limit if period == "train" else last_cut)
            ]
        for wanted, part, start, period in found:
            watches = [r["watch_time_ms"] for r in part if r["watch_time_ms"] is not None]
            sessions.append(
                (
                    user,
                    start,
                    period,
                    part[0]["timestamp"],
                    tuple(distinct([r["item_id"] - 100 for r in wanted])),
                    sum(watches) if watches else None,
                    sum(r["watched"] for r in part),
                    sum(r["like"] == 1 for r in part),
                )
            )
        for row in good:
            seen = (
                row["period"] == "train"
                if rule == "next" or split == "time"
                else limit is None or row["timestamp"] < limit
            )
            counts[row["item_id"] - 100] += seen
    return sorted(sessions, key=str), counts


def flat(found: SessionSet) -> list[tuple[Any, ...]]:
    users = found.sequences["user_id"].to_pylist()
    return sorted(
        (
            (
                users[row["user_row"]],
                row["start"],
                row["split"],
                row["timestamp"],
                tuple(row["target"]),
                row["watch_time_ms"],
                row["watched"],
                row["interactions"],
            )
            for row in found.sessions.to_pylist()
        ),
        key=str,
    )


ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "user_id": st.integers(0, 5),
            "item_id": st.integers(100, 99 + N_ITEMS),
            "timestamp": st.integers(0, 30).map(lambda minute: minute * 60_000),
            "request_id": st.integers(0, 6),
            "session_id": st.integers(0, 6),
            "watch_time_ms": st.none() | st.integers(0, 30_000),
            "duration_ms": st.sampled_from([None, 0, 5_000, 60_000]),
            "like": st.sampled_from([0, 0, 1, None]),
            "hate": st.sampled_from([0, 0, 0, 1]),
        }
    ),
    min_size=20,
    max_size=120,
)
CONFIGS = st.fixed_dictionaries(
    {
        "length": st.integers(1, 4),
        "stride": st.integers(1, 3),
        "gap_minutes": st.sampled_from([0.5, 1, 2]),
        "min_watched": st.integers(1, 3),
        "min_watch_seconds": st.sampled_from([0, 10, 30]),
        "min_interactions": st.integers(0, 2),
        "require": st.sampled_from(["any", "all"]),
        "target": st.sampled_from(["positive", "shown"]),
        "min_history": st.integers(0, 2),
    }
)


@pytest.mark.parametrize(
    ("rule", "split"),
    [
        ("request", "time"),
        ("session", "time"),
        ("gap", "time"),
        ("next", "time"),
        ("next", "last"),
        ("request", "last"),
    ],
)
@settings(
    max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(rows=ROWS, fields=CONFIGS)
def test_equals_the_reference(
    tmp_path: Path, rule: str, split: str, rows: list[dict[str, Any]], fields: dict[str, Any]
) -> None:
    config = SessionConfig(
        rule=rule,  # type: ignore[arg-type]
        split=split,  # type: ignore[arg-type]
        valid_from=12 * 60_000,
        test_from=20 * 60_000,
        **fields,
    )
    folder = write_log(tmp_path / "log", rows)
    wanted, counts = reference(rows, config, rule, split)
    if {session[2] for session in wanted} != {"train", "valid", "test"}:
        with pytest.raises(DataError, match=r"no (train|valid|test) session is left"):
            build(folder, config)
        return
    found = build(folder, config)
    assert flat(found) == wanted
    assert found.items["train_count"].to_pylist() == [counts[i] for i in range(N_ITEMS)]


def simple_rows(n_users: int = 6, length: int = 12) -> list[dict[str, Any]]:
    return [
        {
            "user_id": f"u{user}",
            "item_id": 100 + (user + step) % N_ITEMS,
            "timestamp": (user + step * 10) * 60_000,
            "request_id": step // 3,
        }
        for user in range(n_users)
        for step in range(length)
    ]


def test_equal_timestamps_keep_the_order_of_the_rows(tmp_path: Path) -> None:
    rows = [
        {"user_id": 0, "item_id": 100 + item, "timestamp": step // 3}
        for step, item in enumerate([3, 1, 2, 6, 5, 4, 0, 2, 1])
    ]
    config = SessionConfig(rule="next", length=2, valid_from=1, test_from=2)
    found = build(write_log(tmp_path, rows), config)
    assert found.sequences["items"].to_pylist() == [[3, 1, 2, 6, 5, 4, 0, 2, 1]]
    train = found.samples("train")
    assert [train.history(i).tolist() for i in range(len(train))] == [[3], [3, 1]]
    assert [train.target(i).tolist() for i in range(len(train))] == [[1, 2], [2]]


def test_a_grouped_history_leaves_out_equal_timestamps(tmp_path: Path) -> None:
    rows = [
        {"user_id": 0, "item_id": 100, "timestamp": 0, "request_id": 0},
        {"user_id": 0, "item_id": 101, "timestamp": 5, "request_id": 1},
        {"user_id": 0, "item_id": 102, "timestamp": 5, "request_id": 2},
        {"user_id": 0, "item_id": 103, "timestamp": 10, "request_id": 3},
        {"user_id": 0, "item_id": 104, "timestamp": 20, "request_id": 4},
    ]
    config = SessionConfig(rule="request", min_watched=1, valid_from=10, test_from=20)
    train = build(write_log(tmp_path, rows), config).samples("train")
    assert sorted(train.target(i).tolist() for i in range(len(train))) == [[1], [2]]
    assert [train.history(i).tolist() for i in range(len(train))] == [[0], [0]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(SimulatorConfig(n_users=80, n_items=300, n_creators=30, requests_per_user=12)).write(
        folder
    )
    return folder


def test_the_log_itself_is_not_replaced(world: Path) -> None:
    before = sorted(world.iterdir())
    with open_log(world) as log, pytest.raises(FileExistsError, match=r"no funnel\.json"):
        build_sessions(log, SessionConfig(), world)
    assert sorted(world.iterdir()) == before


@pytest.mark.parametrize("rule", ["request", "gap", "next"])
def test_nothing_of_the_future_is_in_a_history_or_in_train(
    world: Path, tmp_path: Path, rule: Any
) -> None:
    with open_log(world) as log:
        found = build_sessions(log, SessionConfig(rule=rule), tmp_path)
    valid_from, test_from = (found.funnel["split"][name] for name in ("valid_from", "test_from"))
    sequences = found.sequences.to_pylist()
    seen = Counter()
    for row in found.sessions.to_pylist():
        of_user = sequences[row["user_row"]]
        assert of_user["timestamps"] == sorted(of_user["timestamps"])
        history = of_user["timestamps"][: row["start"]]
        assert len(history) == row["start"] >= 1
        assert history[-1] < row["timestamp"]
        rest = of_user["timestamps"][row["start"] :]
        target_end = rest[len(row["target"]) - 1]
        period = {"train": (0, valid_from), "valid": (valid_from, test_from)}.get(
            row["split"], (test_from, 1 << 62)
        )
        assert period[0] <= row["timestamp"] <= target_end < period[1]
        seen[row["split"]] += 1
    assert seen == found.funnel["sessions"]
    counts = Counter(
        item
        for row in sequences
        for item, at in zip(row["items"], row["timestamps"], strict=True)
        if at < valid_from
    )
    assert found.items["train_count"].to_pylist() == [counts[i] for i in range(300)]


def test_cooccurrence_and_counts_do_not_see_valid_and_test(world: Path, tmp_path: Path) -> None:
    """Other rows after the valid cut change neither the vectors nor the train counts."""
    table = pq.read_table(world / "interactions.parquet")
    stamps = table["timestamp"].to_numpy()
    cuts = [int(np.quantile(stamps, q)) for q in (0.7, 0.85)]
    items = table["item_id"].to_numpy().copy()
    later = stamps >= cuts[0]
    items[later] = np.random.default_rng(0).permutation(items[later])
    other = tmp_path / "other"
    other.mkdir()
    changed = table.set_column(1, "item_id", pa.array(items))
    pq.write_table(changed, other / "interactions.parquet")
    pq.write_table(pq.read_table(world / "items.parquet"), other / "items.parquet")
    config = SessionConfig(
        embeddings="cooccurrence", embedding_dim=8, valid_from=cuts[0], test_from=cuts[1]
    )
    built = []
    for folder, name in ((world, "a"), (other, "b")):
        with open_log(folder) as log:
            built.append(build_sessions(log, config, tmp_path / name))
    assert built[0].funnel["embeddings"]["source"] == "cooccurrence"
    np.testing.assert_array_equal(built[0].embeddings, built[1].embeddings)
    assert built[0].items["train_count"].equals(built[1].items["train_count"])
    assert not built[0].sequences["items"].equals(built[1].sequences["items"])


def test_vectors_side_by_side(world: Path, tmp_path: Path) -> None:
    def vectors(name: str) -> np.ndarray[Any, Any]:
        with open_log(world) as log:
            found = build_sessions(log, SessionConfig(embeddings=name), tmp_path / "out")
        assert found.funnel["embeddings"]["source"] == name
        return found.embeddings

    given, near = vectors("embeddings"), vectors("cooccurrence")
    both = vectors("embeddings+cooccurrence")
    assert both.shape == (300, 128)
    for part, whole in ((both[:, :64], given), (both[:, 64:], near)):
        np.testing.assert_allclose(part.mean(axis=0), 0, atol=1e-6)
        np.testing.assert_allclose((part**2).sum(axis=1).mean(), 1, rtol=1e-5)
        centred = whole - whole.mean(axis=0)
        np.testing.assert_allclose(
            part, centred / np.sqrt((centred**2).sum(axis=1).mean()), atol=1e-6
        )


def test_the_result_does_not_depend_on_threads_or_runs(world: Path, tmp_path: Path) -> None:
    files = []
    for threads in (1, 2):
        with open_log(world, threads=threads) as log:
            build_sessions(log, SessionConfig(), tmp_path / str(threads))
        files.append(
            {
                name: pq.read_table(tmp_path / str(threads) / f"{name}.parquet")
                for name in ("items", "sequences", "sessions")
            }
        )
    assert all(files[0][name].equals(files[1][name]) for name in files[0])


def test_round_trip_and_funnel(world: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    with open_log(world) as log:
        found = build_sessions(
            log, SessionConfig(), tmp_path, progress=lambda *step: told.append(step)
        )
    again = SessionSet.load(tmp_path)
    for name in ("items", "sequences", "sessions"):
        assert getattr(found, name).equals(getattr(again, name))
    np.testing.assert_array_equal(found.embeddings, np.load(world / "embeddings.npy"))
    assert json.loads((tmp_path / "funnel.json").read_text()) == again.funnel == found.funnel
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "basis.npz",
        "embeddings.npy",
        "exposed.parquet",
        "funnel.json",
        "items.parquet",
        "sequences.parquet",
        "sessions.parquet",
    ]
    steps = [step["count"] for step in found.funnel["steps"]]
    assert steps[0] == pq.read_metadata(world / "interactions.parquet").num_rows
    assert steps[-1] == found.sessions.num_rows == sum(found.funnel["sessions"].values())
    assert found.funnel["rule"] == "request"
    assert told[0][:2] == (0, 5)
    assert told[-1][:2] == (5, 5)


@pytest.mark.parametrize(
    ("gap", "rule"), [(10, "gap"), (9, "next")], ids=["dense log", "sparse log"]
)
def test_auto_takes_gaps_only_where_they_make_sessions(
    tmp_path: Path, gap: float, rule: str
) -> None:
    rows = [{**row, "watch_time_ms": 30_000} for row in simple_rows()]
    folder = write_log(tmp_path, rows, drop=("request_id",))
    config = SessionConfig(gap_minutes=gap, length=2, stride=2, min_history=0, split="last")
    if rule == "gap":
        # One run a user: too few for leave-last-out, but the rule is chosen and told.
        with pytest.raises(DataError, match=r"36 windows of runs without a long pause.*rule 'gap'"):
            build(folder, config)
        return
    found = build(folder, config)
    assert found.funnel["rule"] == "next"
    assert "only 0% of the positive rows lie in visits" in found.funnel["rule_reason"]


def log_of(tmp_path: Path, table: pa.Table, config: SessionConfig) -> SessionSet:
    pq.write_table(table, tmp_path / "interactions.parquet")
    return build(tmp_path, config)


DAY = 86_400_000


def visits(rng: Any, n_users: int, n_visits: int, sizes: tuple[int, int]) -> pa.Table:
    """Users with visits on days of their own, a minute between the rows of a visit."""
    rows = [
        (user, int(rng.integers(0, 40)), day * DAY + user * 1_000 + n * 60_000, day)
        for user in range(n_users)
        for day in sorted(rng.choice(3 * n_visits, n_visits, replace=False).tolist())
        for n in range(int(rng.integers(*sizes)))
    ]
    users, items, times, ids = (list(column) for column in zip(*rows, strict=True))
    columns = {"user_id": users, "item_id": items, "timestamp": times, "session_id": ids}
    return pa.table({**columns, "watch_time_ms": [30_000] * len(rows)})


@pytest.mark.parametrize(
    ("sizes", "ids", "rule", "length"),
    [
        ((3, 9), True, "session", 5),
        ((3, 9), False, "gap", 5),
        ((1, 2), False, "next", 1),
        ((60, 90), False, "next", 1),
    ],
    ids=["visits", "visits without ids", "single purchases", "a hundred films in a row"],
)
def test_auto_takes_visits_where_they_are_real(
    tmp_path: Path, sizes: tuple[int, int], ids: bool, rule: str, length: int
) -> None:
    table = visits(np.random.default_rng(0), 20, 8, sizes)
    found = log_of(tmp_path, table if ids else table.drop(["session_id"]), SessionConfig())
    assert (found.funnel["rule"], found.funnel["length"]) == (rule, length)
    assert found.session_length == length
    (tmp_path / "bare").mkdir()
    bare = log_of(tmp_path / "bare", table.drop(["watch_time_ms"]), SessionConfig())
    assert bare.funnel["rule"] == "next", "no feedback, no alignment of sessions"
    told = found.funnel["targets"]
    positives = table.num_rows
    assert told["positive rows"] == positives
    sessions = found.sessions
    firsts = Counter(table["user_id"].to_pylist())
    if rule == "next":
        assert told["that are a target"] == positives - len(firsts) == sessions.num_rows
    else:
        # All but each user's first visit, and what reaches over a cut.
        assert 0.7 * positives < told["that are a target"] < positives
    train = [row for row in sessions.to_pylist() if row["split"] == "train"]
    assert told["that are a training target"] == sum(row["watched"] for row in train)


def test_session_ids_that_make_no_targets_are_passed_over(tmp_path: Path) -> None:
    """One session id a user: a session has no earlier one, so hardly a row would be a target."""
    table = visits(np.random.default_rng(1), 20, 1, (4, 6))
    more = table.set_column(3, "session_id", pa.array([1] * table.num_rows))
    stamps = pa.array([user * DAY for user in table["user_id"].to_pylist()])
    found = log_of(
        tmp_path,
        more.set_column(2, "timestamp", stamps),
        SessionConfig(valid_from=10 * DAY, test_from=15 * DAY),
    )
    assert found.funnel["rule"] == "next"
    assert "the log has session ids, but only 0%" in found.funnel["rule_reason"]


def test_long_runs_are_cut_and_earlier_windows_are_history(tmp_path: Path) -> None:
    rows = [
        {"user_id": 0, "item_id": 100 + n % N_ITEMS, "timestamp": day * DAY + n * 1_000}
        for day in range(3)
        for n in range(7)
    ]
    config = SessionConfig(rule="gap", length=3, valid_from=DAY, test_from=2 * DAY)
    found = build(write_log(tmp_path, rows), config)
    train = found.samples("train")
    assert [train.history(i).tolist() for i in range(len(train))] == [[0, 1, 2], [0, 1, 2, 3, 4, 5]]
    assert [train.target(i).tolist() for i in range(len(train))] == [[3, 4, 5], [6]]
    valid = found.samples("valid")
    assert [valid.target(i).tolist() for i in range(len(valid))] == [[0, 1, 2], [3, 4, 5], [6]]
    assert found.funnel["targets"]["that are a target"] == 18
    assert found.funnel["targets"]["that are a training target"] == 4


@pytest.mark.parametrize("come_back", [True, False], ids=["users who come back", "users who leave"])
def test_the_split_goes_by_who_is_left_in_the_test(tmp_path: Path, come_back: bool) -> None:
    rows = [
        {
            "user_id": user,
            "item_id": 100 + (user + n) % N_ITEMS,
            "timestamp": (n * 30 if come_back else user * 30 + n) * DAY // 10 + user,
        }
        for user in range(30)
        for n in range(12)
    ]
    found = build(write_log(tmp_path, rows), SessionConfig(rule="next"))
    split = found.funnel["split"]
    assert split["rule"] == ("time" if come_back else "last")
    assert ("30 of 30 users" in split["reason"]) == come_back
    if not come_back:
        assert found.funnel["sessions"]["test"] == found.funnel["sessions"]["valid"] == 30


@pytest.mark.parametrize("late", [True, False], ids=["at the end", "at the start"])
def test_one_giant_user_does_not_empty_the_test(tmp_path: Path, late: bool) -> None:
    table = visits(np.random.default_rng(2), 30, 10, (3, 8)).drop(["session_id"])
    n = 40_000
    giant = pa.table(
        {
            "user_id": [999] * n,
            "item_id": np.random.default_rng(3).integers(0, 40, n),
            "timestamp": np.arange(n) * 2_000 + (40 * DAY if late else 0),
            "watch_time_ms": [30_000] * n,
        }
    )
    alone = log_of(tmp_path, table, SessionConfig(exposed_sessions=0))
    both = log_of(tmp_path, pa.concat_tables([table, giant]), SessionConfig(exposed_sessions=0))
    assert both.funnel["rule"] == alone.funnel["rule"] == "gap"
    for name in ("valid", "test"):
        users = set(both.samples(name).user_row.tolist()) - {30}
        assert len(users) >= 15, name
    assert "user 999 has 40,000 positive rows" in both.funnel["split"]["reason"]


@pytest.mark.parametrize(("repeats", "exclude"), [(0.0, True), (0.04, True), (0.08, False)])
def test_the_share_of_repeats_decides_about_the_history(
    tmp_path: Path, repeats: float, exclude: bool
) -> None:
    rng = np.random.default_rng(4)
    rows = []
    for user in range(20):
        items = rng.permutation(200).tolist()
        for n in range(100):
            again = n > 0 and n % 25 in range(1, 1 + round(25 * repeats))
            rows.append((user, items[0] if again else items[n], n * DAY + user))
    users, items, times = (list(column) for column in zip(*rows, strict=True))
    table = pa.table({"user_id": users, "item_id": items, "timestamp": times})
    found = log_of(tmp_path, table, SessionConfig(rule="next", split="last"))
    told = found.funnel["repeats"]
    train = found.samples("train")
    counted = sum(train.target(i)[0] in train.history(i) for i in range(len(train)))
    assert (told["training targets"], told["that the history has"]) == (len(train), counted)
    assert told["share"] == pytest.approx(counted / len(train), abs=1e-4)
    assert told["share"] == pytest.approx(repeats, abs=0.01)
    assert told["exclude_history"] == found.exclude_history == exclude


def test_a_giant_user_does_not_decide_about_the_history(tmp_path: Path) -> None:
    """One user takes ten items four thousand times, forty users take each item once."""
    rng = np.random.default_rng(5)
    rows = [(999, int(rng.integers(10)), n * DAY // 100) for n in range(4000)]
    for user in range(40):
        rows += [(user, item, n * DAY) for n, item in enumerate(rng.permutation(200)[:30].tolist())]
    users, items, times = (list(column) for column in zip(*rows, strict=True))
    table = pa.table({"user_id": users, "item_id": items, "timestamp": times})
    found = log_of(tmp_path, table, SessionConfig(rule="next", split="last"))
    told = found.funnel["repeats"]
    assert told["that the history has"] > 0.7 * told["training targets"]
    assert told["share"] < 0.05
    assert found.exclude_history


def test_a_split_that_is_empty_names_the_ways_out(tmp_path: Path) -> None:
    rows = [{"user_id": n, "item_id": 100 + n % N_ITEMS, "timestamp": 5} for n in range(30)]
    told = r'no train session is left .*split "last".*min_history 0'
    with pytest.raises(DataError, match=told):
        build(write_log(tmp_path, rows), SessionConfig())


def test_unknown_items_are_refused_or_dropped_and_counted(tmp_path: Path) -> None:
    rows = simple_rows()
    rows[17]["item_id"] = 999
    rows[40]["item_id"] = 998
    folder = write_log(tmp_path, rows)
    config = SessionConfig(rule="next", length=2)
    with pytest.raises(
        DataError, match=r"interactions\.parquet, column 'item_id', row 17: item 999 .*2 such rows"
    ):
        build(folder, config)
    found = build(folder, SessionConfig(rule="next", length=2, unknown_items="drop"))
    assert [s["count"] for s in found.funnel["steps"]][:2] == [72, 70]
    assert len(found.sequences["items"].combine_chunks().values) == 70


def test_item_ids_of_another_type_than_the_items_table(tmp_path: Path) -> None:
    rows = simple_rows()
    for row in rows:
        row["item_id"] = str(row["item_id"])
    with pytest.raises(DataError, match=r"column 'item_id': wanted the type of the items table"):
        build(write_log(tmp_path, rows), SessionConfig())


def test_a_split_column_is_taken_as_it_is(tmp_path: Path) -> None:
    rows = simple_rows(3, 6)
    for n, row in enumerate(rows):
        row["split"] = ("train", "train", "train", "train", "valid", "test")[n % 6]
    found = build(write_log(tmp_path, rows), SessionConfig(rule="next", length=2))
    assert found.funnel["split"]["rule"] == "column"
    assert found.funnel["sessions"] == {"train": 9, "valid": 3, "test": 3}
    assert found.samples("test").history(0).tolist() == [0, 1, 2, 3, 4]
    assert found.samples("test").target(0).tolist() == [5]
    rows[1]["split"], rows[4]["split"] = "valid", "train"
    with pytest.raises(DataError, match=r"column 'split', row 2: .*train, valid, test by time"):
        build(write_log(tmp_path, rows), SessionConfig(rule="next", length=2))


def test_a_failed_build_leaves_the_earlier_result_whole(tmp_path: Path) -> None:
    folder = write_log(tmp_path, simple_rows())
    before = build(folder, SessionConfig(rule="next", length=2))
    np.save(folder / "embeddings.npy", np.full((N_ITEMS, 2), np.nan, dtype=np.float32))
    with pytest.raises(DataError, match="NaN"):
        build(folder, SessionConfig(rule="next", length=2))
    assert SessionSet.load(folder / "out").sessions.equals(before.sessions)
    assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"length": 0}, "length: wanted 1 or more, got 0"),
        ({"min_watched": -1}, "min_watched: wanted 0 or more"),
        ({"rule": "day"}, "rule: wanted one of .* got 'day'"),
        ({"valid_from": "2024-01-01"}, "give both or neither"),
        ({"valid_fraction": 0.6, "test_fraction": 0.5}, "wanted less than 1"),
        ({"test_fraction": 1.0}, "test_fraction: wanted a share"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_config_refuses(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SessionConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rule": "session"}, "needs a column session_id"),
        ({"split": "column"}, "wanted a log with a column split"),
        (
            {"embeddings": "bert"},
            "auto, cooccurrence, text, embeddings, or several joined by '\\+', got 'bert'",
        ),
        ({"valid_from": "noon", "test_from": "2024-01-01"}, "wanted an ISO time"),
        ({"valid_from": 5, "test_from": 5}, "wanted the first before the second"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_config_that_the_log_cannot_serve(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    folder = write_log(tmp_path, simple_rows())
    with pytest.raises(ValueError, match=message):
        build(folder, SessionConfig(**({"rule": "next", "length": 2} | fields)))


def test_string_ids_all_the_way(tmp_path: Path) -> None:
    rows = simple_rows()
    names = [f"item-{i}" for i in range(N_ITEMS)]
    for row in rows:
        row["item_id"] = names[row["item_id"] - 100]
    folder = write_log(tmp_path, rows)
    pq.write_table(pa.table({"item_id": names}), folder / "items.parquet")
    (folder / "embeddings.npy").unlink()
    vectors = np.arange(2 * N_ITEMS, dtype=np.float32).reshape(-1, 2)
    np.savez(folder / "embeddings.npz", item_ids=np.array(names[::-1]), vectors=vectors)
    found = build(folder, SessionConfig(rule="next", length=2, embeddings="embeddings"))
    assert found.items["item_id"].to_pylist() == names
    assert found.items["text"].to_pylist() == [f"item {name}" for name in names]
    np.testing.assert_array_equal(found.embeddings, vectors[::-1])
    assert found.sequences["items"][0].as_py() == [step % N_ITEMS for step in range(12)]


def test_no_memory_is_told_in_one_message(world: Path, tmp_path: Path) -> None:
    with open_log(world, threads=1) as log:
        log.connection.backend.raw_sql("SET max_temp_directory_size = '0KB'")
        log.connection.backend.raw_sql("SET memory_limit = '1MB'")
        with pytest.raises(OneRecError, match="ran out of memory or disk"):
            build_sessions(log, SessionConfig(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_gaps_need_times(tmp_path: Path) -> None:
    table = pa.table(
        {
            "user_id": [0] * 4,
            "item_id": [0, 1, 2, 3],
            "position": [0, 1, 2, 3],
            "split": ["train", "train", "valid", "test"],
        }
    )
    pq.write_table(table, tmp_path / "interactions.parquet")
    pq.write_table(pa.table({"item_id": [0, 1, 2, 3]}), tmp_path / "items.parquet")
    with open_log(tmp_path) as log:
        assert log.kind == "amazon"
        with pytest.raises(ValueError, match="'gap' needs the time of every row"):
            build_sessions(log, SessionConfig(rule="gap"), tmp_path / "out")
        with pytest.raises(ValueError, match="'time' needs timestamps"):
            build_sessions(log, SessionConfig(split="time"), tmp_path / "out")
        found = build_sessions(log, SessionConfig(), tmp_path / "out")
    assert found.funnel["sessions"] == {"train": 1, "valid": 1, "test": 1}


def test_iso_cut_times_are_utc(tmp_path: Path) -> None:
    config = SessionConfig(
        rule="next", length=2, valid_from="1970-01-01T01:00", test_from="1970-01-01T03:30+02:00"
    )
    found = build(write_log(tmp_path, simple_rows()), config)
    assert found.funnel["split"]["valid_from"] == 3_600_000
    assert found.funnel["split"]["test_from"] == 5_400_000


@pytest.mark.data
def test_kuairand_pure(data_dir: Path, tmp_path: Path) -> None:
    folder = data_dir / "kuairand_pure"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    with open_log(folder) as log:
        assert log.found == {
            "full rows": 91_812,
            "exact repeats dropped": 2_972,
            "earlier exposures": 817_187,
            "items": 7_583,
        }
        found = build_sessions(log, SessionConfig(embeddings="graph64"), tmp_path)
    assert found.funnel["rule"] == "next"
    assert found.funnel["steps"][0]["count"] == 91_812 + 817_187
    history = pq.read_table(folder / "train_history.parquet")
    long_view = np.concatenate([np.asarray(v) for v in history["long_view"].to_pylist()])
    like = np.concatenate([np.asarray(v) for v in history["is_like"].to_pylist()])
    full = pq.read_table(folder / "interactions.parquet").to_pandas().drop_duplicates()
    flags = ["long_view", "is_like", "is_follow", "is_forward", "is_comment"]
    positive = (full[flags].sum(axis=1) > 0) & (full["is_hate"] == 0)
    expected = int(((long_view + like) > 0).sum() + positive.sum())
    assert found.funnel["steps"][2]["count"] == expected
    assert found.embeddings.shape == (7_583, 64)
    assert found.funnel["embeddings"]["source"] == "graph64"
    assert found.funnel["embeddings"]["filled"] == 759
    assert found.items["text"][0].as_py() == "tag 39 · author 7349781 · 87 s"
    assert min(found.funnel["sessions"].values()) > 5_000


@pytest.mark.data
def test_amazon_beauty(data_dir: Path, tmp_path: Path) -> None:
    folder = data_dir / "amazon2014_beauty"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    with open_log(folder) as log:
        assert log.time == "position"
        found = build_sessions(log, SessionConfig(embeddings="minilm"), tmp_path)
    # Every user has one test and one valid item, and n - 3 windows with a history in train.
    assert found.funnel["sessions"] == {
        "train": 198_502 - 3 * 22_363,
        "valid": 22_363,
        "test": 22_363,
    }
    log_rows = pq.read_table(folder / "interactions.parquet").to_pandas()
    train = log_rows[log_rows["split"].astype(str) == "train"]
    counts = train.groupby("item_id").size().reindex(range(1, 12_102), fill_value=0)
    assert found.items["train_count"].to_pylist() == counts.tolist()
    last = log_rows.sort_values(["user_id", "position"]).groupby("user_id")["item_id"].last()
    test = found.samples("test")
    assert (test.targets(np.arange(len(test)), 1)[:, 0] + 1 == last.to_numpy()).all()
    assert found.embeddings.shape == (12_101, 384)
    assert found.funnel["embeddings"]["filled"] == 0


@pytest.mark.parametrize("rule", ["request", "gap", "next"])
@pytest.mark.parametrize("split", ["time", "last"])
def test_exposed_sessions_are_runs_of_what_was_shown(rule: str, split: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    rows = [
        {
            "user_id": int(rng.integers(0, 6)),
            "item_id": int(rng.integers(100, 100 + N_ITEMS)),
            "timestamp": int(minute) * 60_000,
            "request_id": int(minute) // 4,
            "watch_time_ms": [None, 2_000, 25_000][rng.integers(0, 3)],
            "duration_ms": 60_000,
            "like": [0, 1, None][rng.integers(0, 3)],
        }
        for minute in rng.integers(0, 30, 150)
    ]
    cuts = {"valid_from": 12 * 60_000, "test_from": 20 * 60_000} if split == "time" else {}
    config = SessionConfig(
        rule=rule, length=3, gap_minutes=2, min_watched=1, min_watch_seconds=0, split=split, **cuts
    )
    found = build(write_log(tmp_path, rows), config)
    users = found.sequences["user_id"].to_pylist()
    begins = {
        (row["user_row"], row["split"]): row["timestamp"]
        for row in sorted(
            found.sessions.to_pylist(), key=lambda row: row["timestamp"], reverse=True
        )
    }
    expected = []
    for row_of_user, user in enumerate(users):
        mine = [(r["timestamp"], n, r) for n, r in enumerate(rows) if r["user_id"] == user]
        mine.sort(key=lambda each: each[:2])
        good = [t for t, _, r in mine if (r["watch_time_ms"] or 0) >= 18_000 or r["like"] == 1]
        runs: dict[Any, list[dict[str, Any]]] = defaultdict(list)
        key, last = 0, None
        for t, _, r in mine:
            key += last is not None and t - last > 120_000
            last = t
            if split == "time":
                period = ["train", "valid", "test"][(t >= 12 * 60_000) + (t >= 20 * 60_000)]
            else:
                late = [t >= begins.get((row_of_user, name), 10**12) for name in ("valid", "test")]
                period = ["train", "valid", "test"][sum(late)]
            runs[period, {"request": r["request_id"], "gap": key, "next": 0}[rule]].append(r)
        for (period, _), run in runs.items():
            for at in range(0, len(run), 3):
                part = run[at : at + 3]
                begin = part[0]["timestamp"]
                expected.append(
                    (
                        row_of_user,
                        sum(t < begin for t in good),
                        period,
                        begin,
                        tuple(r["item_id"] - 100 for r in part),
                        tuple(r["watch_time_ms"] for r in part),
                        tuple(r["like"] for r in part),
                    )
                )
    assert found.exposed is not None
    got = [
        (
            *(row[name] for name in ("user_row", "start", "split", "timestamp")),
            *(tuple(row[name]) for name in ("items", "watch_time_ms", "like")),
        )
        for row in found.exposed.to_pylist()
    ]
    assert sorted(got, key=str) == sorted(expected, key=str)
    arrays = found.exposed_sessions("train")
    assert len(arrays) == found.funnel["exposed"]["train"] == sum(row[2] == "train" for row in got)
    first = next(row for row in got if row[2] == "train")
    assert arrays.items[0].tolist() == [*first[4], *[-1] * (3 - len(first[4]))]
    wanted = [np.nan if value is None else value for value in first[6]]
    np.testing.assert_array_equal(arrays.feedback["like"][0][: len(wanted)], wanted)
    assert (arrays.feedback["duration_ms"][arrays.items >= 0] == 60_000).all()


def test_exposed_sessions_are_bounded_known_watch_time_first(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    rows = [
        {
            "user_id": n % 10,
            "item_id": 100 + int(rng.integers(0, N_ITEMS)),
            "timestamp": n * 60_000,
            "watch_time_ms": 20_000 if n % 4 == 0 else None,
            "like": 1,
        }
        for n in range(200)
    ]
    config = {"rule": "next", "length": 1, "split": "last"}
    found = build(write_log(tmp_path, rows), SessionConfig(**config, exposed_sessions=60))
    assert found.exposed is not None
    told = found.funnel["exposed"]
    assert (told["sessions"], told["of"]) == (60, 200)
    known = [value for (value,) in found.exposed["watch_time_ms"].to_pylist()]
    assert sum(value is not None for value in known) == 50
    assert len(set(found.exposed["user_row"].to_pylist())) == 10, "an even sample of the rest"


def test_a_log_without_feedback_says_so(tmp_path: Path) -> None:
    rows = [
        {"user_id": n % 3, "item_id": 100 + n % N_ITEMS, "timestamp": n * 60_000} for n in range(30)
    ]
    found = build(write_log(tmp_path, rows), SessionConfig(rule="next", length=1, split="last"))
    assert found.exposed is None
    with pytest.raises(ValueError, match="no feedback column"):
        found.exposed_sessions("train")
