"""`onerec update`: what a day changes, what it leaves as it is, and what stops it."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from serving_helpers import ADMIN, TOKEN, Server
from test_hostile_files import LIBRARY, Library

from onerec import pipeline
from onerec.data import (
    SessionConfig,
    SessionSet,
    SimulatorConfig,
    build_sessions,
    open_log,
    simulate,
)
from onerec.data.session_set import list_values
from onerec.data.sessions.day import add_day
from onerec.errors import DataError, OneRecError
from onerec.files import recover_directory
from onerec.inference import Mixture, Recommender
from onerec.model import OneRec
from onerec.model.growth import grown
from onerec.pipeline import Settings
from onerec.pipeline.export import export_run
from onerec.pipeline.servers import swap_all
from onerec.pipeline.stage import read_record
from onerec.pipeline.update import UpdateConfig, chosen_samples, read_lines, update
from onerec.serving.config import ServeConfig
from onerec.tokenizer import Catalog

DAY = 86_400_000
NEW = 6  # items a day
BASE, DAYS = 2, 4


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log in parts: base/ of two days, day2/ and day3/ with six new items each, all of it/."""
    root = tmp_path_factory.mktemp("world")
    config = SimulatorConfig(
        n_users=120, n_items=90, n_creators=12, days=DAYS, requests_per_user=14, seed=3
    )
    simulate(config).write(root / "world")
    log = pq.read_table(root / "world/interactions.parquet")
    items = pq.read_table(root / "world/items.parquet")
    vectors = np.load(root / "world/embeddings.npy")
    born = np.zeros(90, int)
    born[-NEW:], born[-2 * NEW : -NEW] = 3, 2
    day = (log["timestamp"].to_numpy() - config.start_ms) // DAY
    came = born[log["item_id"].to_numpy() - items["item_id"][0].as_py()]

    def write(name: str, rows: Any, told: Any) -> None:
        (root / name).mkdir()
        pq.write_table(log.filter(pa.array(rows)), root / name / "interactions.parquet")
        pq.write_table(items.filter(pa.array(told)), root / name / "items.parquet")
        np.save(root / name / "embeddings.npy", vectors[told])

    write("base", (day < BASE) & (came < BASE), born < BASE)
    for d in range(BASE, DAYS):
        write(f"day{d}", (day == d) & (came <= d), born == d)
    write("whole", ((day < 3) & (came <= 2)) & ((came < BASE) | (day == 2)), born <= 2)
    return root


SMALL = {
    "history_length": 12,
    "d_model": 16,
    "n_heads": 2,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "d_ff": 32,
}


def settings(data: Path, preset: str = "items", **sessions: Any) -> Settings:
    found = Settings.of_preset(preset, data=str(data))
    found.model.update(SMALL)
    if preset != "items":
        found.model.update(n_experts=2, expert_d_ff=16)
    found.sessions = SessionConfig(**sessions)
    found.tokenize = replace(found.tokenize, levels=2, codebook_size=16)
    found.train = replace(
        found.train,
        steps=30,
        batch_size=32,
        grad_accumulation=1,
        checkpoint_every=10,
        eval_every=0,
        num_threads=1,
    )
    found.align = replace(found.align, iterations=0)
    found.evaluate = replace(found.evaluate, max_users=20, resamples=10, latency_requests=1)
    found.recommend = replace(found.recommend, users=10)
    return found


@pytest.fixture(scope="module")
def ran(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ran") / "run"
    pipeline.run(settings(world / "base", rule="next", length=1), out)
    shutil.move(
        out / "report", out.parent / "report"
    )  # an update makes it again where there is one
    return out


@pytest.fixture
def run(ran: Path, tmp_path: Path) -> Path:
    """A finished run that a test may change."""
    return Path(shutil.copytree(ran, tmp_path / "run"))


@pytest.fixture(scope="module")
def updated(ran: Path, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run after day 2, with three items removed."""
    out = Path(shutil.copytree(ran, tmp_path_factory.mktemp("updated") / "run"))
    gone = removed(out)
    (out.parent / "gone.txt").write_text("".join(f"{item}\n" for item in gone))
    # So few steps that the small network does not forget what it was.
    config = UpdateConfig(min_steps=0)
    update(out, world / "day2", remove=out.parent / "gone.txt", config=config)
    return out


def removed(run: Path) -> list[int]:
    """The three items that most users have taken."""
    items = SessionSet.load(run / "sessions").items
    order = np.argsort(-items["train_count"].to_numpy(), kind="stable")[:3]
    return items["item_id"].to_numpy()[order].tolist()


def contents(folder: Path) -> dict[str, Any]:
    """The hashes of a version's stages, and the fingerprint of its export."""
    stages = ("sessions", "tokenize", "measure", "pretrain", "mixture", "check")
    found: dict[str, Any] = {}
    for stage in stages:
        record = read_record(folder / stage)
        assert record is not None
        found[stage] = {
            name: known["blake2b"]
            for name, known in record.outputs.items()
            if "metrics.jsonl" not in name  # it has seconds
        }
    found["export"] = json.loads((folder / "export/config.json").read_text())["lineage"]
    return found


def test_a_day_continues_the_sequences(world: Path, tmp_path: Path) -> None:
    """Base and day together give the sequences and the items of the whole log at once."""
    config = SessionConfig(rule="next", length=1)
    for name in ("base", "whole"):
        with open_log(world / name) as log:
            build_sessions(log, config, tmp_path / name)
    with open_log(world / "day2") as log:
        found = add_day(log, tmp_path / "base", config, tmp_path / "day")
    whole = SessionSet.load(tmp_path / "whole")

    def by_user(data: SessionSet) -> dict[Any, list[Any]]:
        ids = data.items["item_id"].to_pylist()
        return {
            row["user_id"]: [ids[i] for i in row["items"]] for row in data.sequences.to_pylist()
        }

    assert by_user(found) == by_user(whole)
    assert found.items["item_id"].to_pylist() == whole.items["item_id"].to_pylist()
    base = SessionSet.load(tmp_path / "base")
    n = base.n_items
    assert found.n_items == n + NEW
    np.testing.assert_array_equal(found.embeddings[:n], base.embeddings)
    assert found.sequences["user_id"][: base.sequences.num_rows] == base.sequences["user_id"]

    # Each positive row of the day with a history is a session; a tenth of the users is held out.
    day = found.funnel["day"]
    valid, train = found.samples("valid"), found.samples("train")
    learn = np.load(tmp_path / "day/learn.npy")
    assert set(valid.timestamp > day["from"]) == {True}
    assert day["held_out_users"] == len(np.unique(valid.user_row)) == round(0.1 * day["users"])
    held_before = len(base.samples("valid")) + len(base.samples("test"))
    assert len(learn) == held_before + day["sessions"] - len(valid)
    assert len(train) == len(base.samples("train")) + len(learn)
    sequence, offsets = list_values(found.sequences["items"])
    for at in learn[:: max(1, len(learn) // 50)]:  # targets are what follows the history
        assert train.target(int(at))[0] == sequence[train.history_end[at]]
        assert train.history_begin[at] == offsets[train.user_row[at]]
    # What the users who are held out took is in no count.
    counts = np.bincount(sequence, minlength=found.n_items)
    counts -= np.bincount(valid.target_values, minlength=found.n_items)
    first = np.setdiff1d(valid.user_row, base.sequences["user_row"].to_numpy())
    if not len(first):  # a new user's first row is no target, and is not counted either
        np.testing.assert_array_equal(found.items["train_count"].to_numpy(), counts)


def test_rows_that_are_known_change_nothing(world: Path, tmp_path: Path) -> None:
    config = SessionConfig(rule="next", length=1)
    with open_log(world / "base") as log:
        build_sessions(log, config, tmp_path / "base")
    for name in ("day2", "whole"):
        with open_log(world / name) as log:
            add_day(log, tmp_path / "base", config, tmp_path / name)
    a, b = (SessionSet.load(tmp_path / name) for name in ("day2", "whole"))
    assert a.sequences.equals(b.sequences)
    assert a.sessions.equals(b.sessions)
    assert b.funnel["day"]["known_rows"] > 0
    assert a.funnel["day"]["known_rows"] == 0


def test_vectors_of_another_space_are_refused(world: Path, tmp_path: Path) -> None:
    config = SessionConfig(rule="next", length=1)
    with open_log(world / "base") as log:
        build_sessions(log, config, tmp_path / "base")
    shutil.copytree(world / "whole", tmp_path / "whole")
    vectors = np.load(tmp_path / "whole/embeddings.npy")
    np.save(tmp_path / "whole/embeddings.npy", vectors[:, ::-1])
    with (
        open_log(tmp_path / "whole") as log,
        pytest.raises(DataError, match=r"embeddings\.npy: wanted vectors in the space of the run"),
    ):
        add_day(log, tmp_path / "base", config, tmp_path / "day")


@pytest.mark.parametrize("column", ["user_id", "item_id"])
def test_ids_of_another_type_are_refused(
    column: str, run: Path, world: Path, tmp_path: Path
) -> None:
    rows = pq.read_table(world / "day2/interactions.parquet")
    at = rows.schema.get_field_index(column)
    pq.write_table(
        rows.set_column(at, column, rows[column].cast(pa.string())), tmp_path / "d.parquet"
    )
    with pytest.raises(DataError, match=rf"'{column}': wanted the type of the run's \(int64\)"):
        update(run, tmp_path / "d.parquet")


def test_old_ids_stay_and_new_items_have_codes_within_the_caps(ran: Path, updated: Path) -> None:
    old, new = Catalog.load(ran / "tokenize"), Catalog.load(updated / "updates/0001/tokenize")
    assert len(new) == len(old) + NEW
    np.testing.assert_array_equal(new.item_ids[: len(old)], old.item_ids)
    np.testing.assert_array_equal(new.sids[: len(old)], old.sids)
    assert len(np.unique(new.sids, axis=0)) == len(new)
    assert np.bincount(new.sids[:, 0]).max() <= np.ceil(1.05 * len(new) / 16)
    assert new.quantizer == old.quantizer


def test_new_items_are_shown_and_removed_ones_are_not(updated: Path) -> None:
    served = Recommender.from_exported(updated / "updates/0001/export")
    gone = set(removed(updated))
    catalog = served.catalog
    assert catalog.retired is not None
    assert set(catalog.item_ids[catalog.retired].tolist()) == gone
    data = SessionSet.load(updated / "updates/0001/sessions")
    ids = data.items["item_id"].to_numpy()
    histories = [ids[row].tolist() for row in data.sequences["items"].to_pylist()]
    lists = served.rank(histories, 60)
    shown = {item for one in lists for item in one}
    assert not shown & gone
    assert set(ids[-NEW:].tolist()) <= shown
    for session in served.recommend(histories[:40], beam_width=32, num_sessions=32):
        assert not {item for items in session.item_ids for item in items} & gone
    # A history of withdrawn items is still a history.
    one, none = served.recommend([sorted(gone), []], exclude_history=False)
    assert one.scores[0] != none.scores[0]
    # The same from the network of the folder.
    folder = updated / "updates/0001"
    twin = Recommender(
        OneRec.from_pretrained(folder / "pretrain/model"),
        Catalog.load(folder / "tokenize"),
        mixture=Mixture.load(folder / "mixture/whole"),
    )
    assert twin.rank(histories[:20], 10) == served.rank(histories[:20], 10)


@pytest.mark.skipif(LIBRARY is None, reason="no shared library beside the package")
def test_c_programs_leave_removed_items_out_too(updated: Path) -> None:
    folder = updated / "updates/0001/export"
    library, made = Library().c, ctypes.c_void_p()
    assert library.onerec_create(str(folder).encode(), ctypes.byref(made), None, 0) == 0
    served = Recommender.from_exported(folder)
    catalog = served.catalog
    gone = catalog.index_of(removed(updated))
    options, found = library.onerec_default_rank_options(), ctypes.c_int64()
    options.k, options.beam_width, options.exclude_history = 80, 80, 0
    items = (ctypes.c_int64 * 80)()
    for history in ([], gone.tolist(), [5, 3, *gone.tolist()]):
        read = (ctypes.c_int64 * len(history))(*history)
        arguments = (read, len(history), None, 0, ctypes.byref(options), items, ctypes.byref(found))
        assert library.onerec_rank(made, *arguments, None, 0) == 0
        ids = catalog.item_ids[history].tolist()
        (wanted,) = served.rank([ids], 80, beam_width=80, exclude_history=False)
        assert catalog.item_ids[items[: found.value]].tolist() == wanted
        assert not set(items[: found.value]) & set(gone.tolist())
    library.onerec_destroy(made)


def test_the_network_grows_and_learns(ran: Path, updated: Path) -> None:
    before = OneRec.from_pretrained(ran / "pretrain/model")
    after = OneRec.from_pretrained(updated / "updates/0001/pretrain/model")
    n = before.config.n_items
    assert after.config.n_items == n + NEW
    assert after.items is not None
    assert before.items is not None
    torch.testing.assert_close(after.item_vectors[:n], before.item_vectors)
    # Learned on the same day, as far as training saw it.
    counts = SessionSet.load(updated / "updates/0001/sessions").items["train_count"].to_numpy()
    learned = after.items.weight[n:].abs().sum(dim=1) > 0
    assert learned.tolist() == (counts[n:] > 0).tolist()
    assert learned.any()
    moved = (after.items.weight[:n] - before.items.weight).norm() / before.items.weight.norm()
    assert 0 < moved < 0.5  # yesterday's weights, trained on
    (line,) = read_lines(updated)
    assert line["pretrain"]["optimizer"] == "warm"
    assert line["pretrain"]["steps"] > 0


def test_a_grown_network_says_what_it_said(ran: Path) -> None:
    """New items take nothing from the old ones but their share of the softmax."""
    model = OneRec.from_pretrained(ran / "pretrain/model")
    data, catalog = pipeline.Inputs(ran).load()
    n = len(catalog)
    taken = set(map(tuple, catalog.sids.tolist()))
    free = next((a, b) for a in range(16) for b in range(16) if (a, b) not in taken)
    sids = np.concatenate([catalog.sids, [free]])
    vectors = np.concatenate([data.embeddings, data.embeddings[:1]])
    larger = grown(model, sids, vectors)
    assert larger.items is not None
    assert larger.items.weight[n].abs().max() == 0
    rows = torch.arange(10)
    history = torch.cat([torch.tensor(catalog.sids[:10]).long(), rows[:, None]], dim=1)[None]
    with torch.no_grad():
        torch.testing.assert_close(larger.item_scores(history)[:, :n], model.item_scores(history))
    with pytest.raises(ValueError, match="wanted those of the network's"):
        grown(model, sids[::-1], vectors)


def test_the_same_day_again_changes_nothing(updated: Path, world: Path) -> None:
    def state() -> dict[str, int]:
        files = [p for p in updated.rglob("*") if p.is_file() and p.name != ".lock"]
        return {str(path): path.stat().st_mtime_ns for path in files}

    before = state()
    (line,) = read_lines(updated)
    assert update(updated, world / "day2", remove=updated.parent / "gone.txt") == line
    assert update(updated, world / "base") is None  # no later row
    assert state() == before
    assert read_lines(updated) == [line]


def test_days_follow_each_other(updated: Path, world: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(updated, tmp_path / "run", symlinks=True))
    line = update(out, world / "day3", config=UpdateConfig(keep=2))
    assert line is not None
    assert line["version"] == "0002"
    assert line["tokenize"]["new_items"] == NEW
    assert line["tokenize"]["retired"] == 3
    assert (out / "updates/latest").resolve() == (out / "updates/0002").resolve()
    gone = set(removed(updated))
    served = Recommender.from_exported(out / "updates/latest/export")
    assert not {item for one in served.rank([[], sorted(gone)], 100) for item in one} & gone


@pytest.fixture(scope="module")
def ran_sessions(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of whole sessions, by the paper's network, which knows no items."""
    out = tmp_path_factory.mktemp("ran_sessions") / "run"
    pipeline.run(settings(world / "base", "paper-tiny", rule="request", length=2), out)
    return out


def test_refused_by_the_guard_until_forced(
    run: Path, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that is worse on the users held out is published only by force."""
    found = iter([0.2, 0.2, 0.15])  # before, on all and on those held out; after

    def measured(*_: Any) -> dict[str, Any]:
        return {"sessions": 400, "recall@10": 0.0, "ndcg@10": next(found)}

    monkeypatch.setattr("onerec.pipeline.update._measured", measured)
    config = UpdateConfig(guard=0.2)
    refused = r"update 0001 is refused: NDCG@10 on 400 .* 0\.1500 after .* at least 0\.1600"
    with pytest.raises(OneRecError, match=refused):
        update(run, world / "day2", config=config)
    folder = run / "updates/0001"
    assert not (folder / "export").exists()
    assert not (run / "updates/latest").exists()
    assert [line["published"] for line in read_lines(run)] == [False]
    with pytest.raises(OneRecError, match="give these rows again, or remove the folder"):
        update(run, world / "day3")
    line = update(run, world / "day2", config=config, force=True)
    assert line is not None
    assert line["published"]
    assert "held out" in line["refused"]
    assert (run / "updates/latest/export/engine.bin").is_file()


def test_stopped_at_any_stage_the_same_command_goes_on(
    run: Path, world: Path, tmp_path: Path
) -> None:
    whole = Path(shutil.copytree(run, tmp_path / "whole"))
    update(whole, world / "day2")
    command = [sys.executable, "-m", "onerec", "update", "--data", str(world / "day2"), "--out"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    version = run / "updates/0001"
    for stage in ("sessions", ".pretrain.partial/checkpoints"):
        process = subprocess.Popen(
            [*command, str(run)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=env
        )
        while not (version / stage).exists() and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not read_lines(run)
    update(run, world / "day2")
    recover_directory(version / "export")
    assert contents(version) == contents(whole / "updates/0001")
    assert len(read_lines(run)) == 1


def test_the_report_has_a_line_a_day(ran: Path, updated: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(updated, tmp_path / "run", symlinks=True))
    shutil.copytree(ran.parent / "report", out / "report")
    made = pipeline.make_stage("report", Settings.load(out / "config.yaml"), out)
    assert not made.skipped
    page = (out / "report/report.html").read_text()
    (line,) = read_lines(out)
    assert '<section id="days">' in page
    assert f"<td>0001</td><td>{line['time'][:10]}" in page
    assert f"{line['check']['ndcg@10']:.4f}" in page
    assert '<section id="days">' not in (ran.parent / "report/report.html").read_text()


def test_what_cannot_be_updated_is_refused(run: Path, world: Path, tmp_path: Path) -> None:
    with pytest.raises(OneRecError, match="wanted the directory of a finished `onerec run`"):
        update(tmp_path, world / "day2")
    with pytest.raises(OneRecError, match="found nothing"):
        update(run, tmp_path / "missing")
    (tmp_path / "gone.txt").write_text("1\n")
    with pytest.raises(OneRecError, match=r"--remove .*gone\.txt: ids: 1 of 1 are not in"):
        update(run, world / "day2", remove=tmp_path / "gone.txt")
    (tmp_path / "gone.txt").write_text("one\n")
    with pytest.raises(OneRecError, match="row 0: wanted an integer item id, got 'one'"):
        update(run, world / "day2", remove=tmp_path / "gone.txt")
    (run / "sessions/basis.npz").unlink()
    with pytest.raises(OneRecError, match=r"basis\.npz is missing"):
        update(run, world / "day2")


def test_a_day_of_broken_rows_is_refused(updated: Path, world: Path, tmp_path: Path) -> None:
    """Items under each other's ids: yesterday's network makes nothing of them."""
    out = Path(shutil.copytree(updated, tmp_path / "run", symlinks=True))
    shutil.copytree(world / "day3", tmp_path / "day3")
    path = tmp_path / "day3/interactions.parquet"
    rows = pq.read_table(path)
    shuffled = np.random.default_rng(0).permutation(rows["item_id"].to_numpy())
    at = rows.schema.get_field_index("item_id")
    pq.write_table(rows.set_column(at, "item_id", pa.array(shuffled)), path)
    line = read_lines(out)[0]
    with pytest.raises(OneRecError, match=r"update 0002 is refused: the network before.*broken\?"):
        update(out, tmp_path / "day3", config=UpdateConfig(day_guard=0.1, guard=1.0))
    assert read_lines(out)[0] == line


def test_a_run_of_sessions_whose_network_knows_no_items(
    ran_sessions: Path, world: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(ran_sessions, tmp_path / "run"))
    line = update(out, world / "day2")
    assert line is not None
    assert "mixture" not in line
    assert line["pretrain"]["new_samples"] > 0
    served = Recommender.from_exported(out / "updates/0001/export")
    ids = served.catalog.item_ids[-NEW:].tolist()
    found = served.rank([[], ids], 96, exclude_history=False)
    assert set(ids) <= set(found[0])


def test_two_servers_change_together_or_not_at_all(run: Path, world: Path, tmp_path: Path) -> None:
    """Servers of the run serve the update; where a third refuses, nobody does."""
    export_run(pipeline.Inputs(run), run / "pretrain/model", run / "export")
    first = Recommender.from_exported(run / "export")
    free = ServeConfig()
    held = ServeConfig(exports=str(tmp_path / "elsewhere"))
    servers = [Server(first, config, TOKEN) for config in (free, free, held)]
    urls = [f"http://127.0.0.1:{server.port}" for server in servers]

    def sources() -> list[str]:
        return [server.send("GET", "/v1/version")[1]["source"] for server in servers]

    try:
        with pytest.raises(OneRecError, match=r"answered 422: .*wanted a folder below"):
            update(run, world / "day2", servers=urls, token=ADMIN)
        assert sources() == ["first"] * 3
        assert read_lines(run) == []  # the update is not finished
        line = update(run, world / "day2", servers=urls[:2], token=ADMIN)
        folder = str((run / "updates/0001/export").resolve())
        assert sources() == [folder, folder, "first"]
        assert line is not None
        assert line["served"] == urls[:2]
        catalog = Catalog.load(folder)
        body = {"history": catalog.item_ids[-NEW:].tolist(), "k": 5}
        status, answer, _ = servers[0].send("POST", "/v1/rank", body)
        assert status == 200, answer
        # The same command when a server came anew with the old export.
        assert servers[1].send("POST", "/admin/rollback")[0] == 200
        assert update(run, world / "day2", servers=urls[:2], token=ADMIN) == line
        assert sources() == [folder, folder, "first"]
    finally:
        for server in servers:
            server.stop()


def test_partitions_and_a_table_of_all_items(run: Path, world: Path, tmp_path: Path) -> None:
    """The log as it grows by a partition a day, beside the items of all days."""
    for day in ("base", "day2"):
        (tmp_path / f"log/day={day}").mkdir(parents=True)
        source = world / day / "interactions.parquet"
        shutil.copy(source, tmp_path / f"log/day={day}/part-0.parquet")
    other = Path(shutil.copytree(run, tmp_path / "other"))
    line = update(run, tmp_path / "log", items=world / "whole")
    assert line is not None
    assert line["sessions"]["known_rows"] > 0
    update(other, world / "day2")
    first, second = (one / "updates/0001" for one in (run, other))
    for name in ("sessions/sequences.parquet", "pretrain/model/model.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_items_of_their_own_file(run: Path, world: Path, tmp_path: Path) -> None:
    """Rows and items apart give the update that a folder of both gives."""
    rows = tmp_path / "rows.parquet"
    shutil.copy(world / "day2/interactions.parquet", rows)
    other = Path(shutil.copytree(run, tmp_path / "other"))
    update(run, rows, items=world / "day2/items.parquet")
    update(other, world / "day2")
    first, second = (one / "updates/0001/sessions" for one in (run, other))
    for name in ("embeddings.npy", "items.parquet", "sequences.parquet", "sessions.parquet"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_replay_and_windows(ran: Path) -> None:
    samples = SessionSet.load(ran / "sessions").samples("train")
    ends = samples.history_end + 1
    last = np.array([ends[samples.user_row == user].max() for user in samples.user_row])
    learn = np.flatnonzero(ends == last)[:20]  # the last item of twenty users
    chosen = chosen_samples(samples, learn, 0.5, seed=0, window=4)
    active = np.unique(samples.user_row[learn])
    assert set(active) <= set(chosen.user_row.tolist())
    assert len(chosen) == len(np.unique(chosen.user_row)) == 2 * len(active)
    begin = samples.history_begin[
        [np.flatnonzero(samples.user_row == u)[0] for u in chosen.user_row]
    ]
    # One new item needs one window of four prefixes, less where the user has fewer items.
    np.testing.assert_array_equal(
        chosen.history_begin, np.maximum(begin, chosen.history_end + 1 - 1 - 4)
    )
    plain = chosen_samples(samples, learn, 0.2, seed=0, window=None)
    assert len(plain) == len(learn) + round(len(learn) * 0.25)


class Stub(HTTPServer):
    """The routes of a server that an update calls."""

    def __init__(self, source: str, refuses: str = "") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.sources, self.refuses, self.asked = [source], refuses, 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Stub

    def do_GET(self) -> None:
        self._answer(200, self._told())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        stub = self.server
        if self.headers["Authorization"] != "Bearer open":
            self._answer(401, {"detail": "wanted a token"})
        elif self.path == "/admin/swap" and stub.refuses:
            stub.asked += 1
            self._answer(422, {"detail": stub.refuses})
        elif self.path == "/admin/swap":
            stub.sources.append(body["folder"])
            self._answer(200, self._told())
        else:
            stub.sources.pop()
            self._answer(200, self._told())

    def _told(self) -> dict[str, Any]:
        return {"source": self.server.sources[-1], "version": len(self.server.sources)}

    def _answer(self, status: int, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def stubs() -> Iterator[list[Stub]]:
    made = [Stub("old"), Stub("old"), Stub("old", refuses="engine.bin: broken")]
    yield made
    for stub in made:
        stub.shutdown()
        stub.server_close()


def test_all_servers_change_or_none(stubs: list[Stub], tmp_path: Path) -> None:
    urls = [stub.url for stub in stubs]
    lines: list[str] = []
    with pytest.raises(OneRecError, match=r"answered 422: engine\.bin: broken; the servers serve"):
        swap_all(urls, tmp_path, "open", lines.append)
    assert [stub.sources for stub in stubs] == [["old"]] * 3
    assert stubs[2].asked == 1
    swap_all(urls[:2], tmp_path, "open", lines.append)
    assert [stub.sources for stub in stubs[:2]] == [["old", str(tmp_path)]] * 2
    swap_all(urls[:2], tmp_path, "open", lines.append)  # they serve it: not asked again
    assert [stub.sources for stub in stubs[:2]] == [["old", str(tmp_path)]] * 2
    with pytest.raises(OneRecError, match=r"no answer .* no server was changed"):
        swap_all([urls[0], "http://127.0.0.1:9"], tmp_path / "next", "open", lines.append)
    assert stubs[0].sources == ["old", str(tmp_path)]
    with pytest.raises(OneRecError, match="ONEREC_ADMIN_TOKEN"):
        swap_all(urls, tmp_path, None, lines.append)
