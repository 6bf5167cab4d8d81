"""Bad input, bad files, a full disk: one clear message, the right exit code, nothing lost."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from onerec.cli.main import main

Start = Callable[..., "subprocess.CompletedProcess[str]"]
Contents = Callable[[Path], dict[str, str]]
Finished = tuple[Path, dict[str, Any]]


def truncate(log: Path) -> None:
    path = log / "interactions.parquet"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change(path: Path, make: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(make(pq.read_table(path)), path)


def drop_column(log: Path) -> None:
    change(log / "interactions.parquet", lambda t: t.drop_columns(["item_id"]))


def wrong_type(log: Path) -> None:
    def as_text(table: pa.Table) -> pa.Table:
        at = table.column_names.index("timestamp")
        return table.set_column(at, "timestamp", table["timestamp"].cast(pa.string()))

    change(log / "interactions.parquet", as_text)


def null_user(log: Path) -> None:
    def with_null(table: pa.Table) -> pa.Table:
        at = table.column_names.index("user_id")
        values = table["user_id"].to_pylist()
        values[7] = None
        return table.set_column(at, "user_id", pa.array(values, table["user_id"].type))

    change(log / "interactions.parquet", with_null)


def short_vectors(log: Path) -> None:
    vectors = np.load(log / "embeddings.npy")
    np.save(log / "embeddings.npy", vectors[:-3])


def nan_vectors(log: Path) -> None:
    vectors = np.load(log / "embeddings.npy")
    vectors[5, 1] = np.nan
    np.save(log / "embeddings.npy", vectors)


def unknown_items(log: Path) -> None:
    change(log / "items.parquet", lambda t: t.slice(1))
    np.save(log / "embeddings.npy", np.load(log / "embeddings.npy")[1:])


def no_rows(log: Path) -> None:
    change(log / "interactions.parquet", lambda t: t.slice(0, 0))


def no_log(log: Path) -> None:
    (log / "interactions.parquet").unlink()


def nothing(log: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("harm", "flags", "words"),
    [
        (truncate, [], ["interactions.parquet", "cut short"]),
        (drop_column, [], ["interactions.parquet", "'item_id'", "missing"]),
        (wrong_type, [], ["interactions.parquet", "'timestamp'", "wanted integers", "string"]),
        (null_user, [], ["interactions.parquet", "'user_id'", "row 7"]),
        (short_vectors, [], ["embeddings.npy", "117"]),
        (nan_vectors, [], ["embeddings.npy", "row 5"]),
        (unknown_items, [], ["interactions.parquet", "'item_id'", "row "]),
        (no_rows, [], ["interactions.parquet", "no rows"]),
        (no_log, [], ["interactions.parquet", "no such file"]),
        (nothing, ["--sessions.min_history", "100000"], ["no train session is left"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_bad_log(
    harm: Callable[[Path], None],
    flags: list[str],
    words: list[str],
    finished: Finished,
    run_copy: Path,
    settings: Path,
    tmp_path: Path,
    contents: Contents,
    capfd: pytest.CaptureFixture[str],
) -> None:
    log = tmp_path / "log"
    shutil.copytree(finished[0] / "world", log)
    (log / "stage.json").unlink()
    harm(log)
    before = contents(run_copy)
    code = main(
        ["run", "--data", str(log), "--out", str(run_copy), "--config", str(settings), *flags]
    )
    shown = capfd.readouterr()
    assert code == 1
    message = shown.err.strip().splitlines()[-1]
    for word in words:
        assert word in message
    assert "Traceback" not in shown.err
    assert contents(run_copy) == before, "an earlier result was touched"


def test_too_few_codes(
    run_copy: Path, contents: Contents, capfd: pytest.CaptureFixture[str]
) -> None:
    before = contents(run_copy)
    assert main(["tokenize", "--out", str(run_copy), "--tokenize.codebook_size", "4"]) == 1
    assert "16 semantic ids, too few for 120" in capfd.readouterr().err.strip().splitlines()[-1]
    assert contents(run_copy) == before, "an earlier result was touched"


def test_more_codes_than_items(run_copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["tokenize", "--out", str(run_copy), "--tokenize.codebook_size", "128"]) == 1
    message = capfd.readouterr().err.strip().splitlines()[-1]
    assert "--tokenize.codebook_size 128: wanted at most the 120 items" in message


def test_one_level_has_as_many_codes_as_items(
    run_copy: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ["--tokenize.levels", "1", "--tokenize.codebook_size", "null", "--json"]
    assert main(["tokenize", "--out", str(run_copy), *flags]) == 0
    assert json.loads(capfd.readouterr().out)["summary"]["codebook_size"] == 120


@pytest.mark.parametrize(
    "name",
    [
        "sessions/sessions.parquet",
        "tokenize/trie.bin",
        "tokenize/catalog.parquet",
        "pretrain/model/model.safetensors",
        "pretrain/model/config.json",
    ],
)
@pytest.mark.parametrize("harm", ["cut", "flip"])
def test_corrupt_stage_is_refused_with_what_to_run(
    name: str, harm: str, run_copy: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = run_copy / name
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    if harm == "cut":
        path.write_bytes(content[:middle])
    else:
        content[middle] ^= 1
        path.write_bytes(content)
    assert main(["evaluate", "--out", str(run_copy), "--evaluate.ks", "[3]"]) == 1
    message = capfd.readouterr().err.strip().splitlines()[-1]
    assert str(path) in message
    assert f"make it again with `onerec {name.split('/')[0]} --out" in message


def test_every_checkpoint_corrupt(
    finished: Finished,
    settings: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import onerec.training

    out = tmp_path / "out"
    for stage in ("world", "sessions", "tokenize"):
        shutil.copytree(finished[0] / stage, out / stage)
    whole = onerec.training.pretrain

    def killed(*arguments: Any, progress: Any, **options: Any) -> Any:
        def stop(done: int, total: int, note: str) -> None:
            if done >= 30:
                raise KeyError("killed")

        return whole(*arguments, progress=stop, **options)

    arguments = ["pretrain", "--out", str(out), "--config", str(settings)]
    monkeypatch.setattr(onerec.training, "pretrain", killed)
    assert main(arguments) == 1
    monkeypatch.undo()
    checkpoints = out / ".pretrain.partial" / "checkpoints"
    for path in checkpoints.rglob("*"):
        if path.is_file():
            path.write_bytes(b"rubbish")
    capfd.readouterr()
    assert main(arguments) == 1
    message = capfd.readouterr().err.strip().splitlines()[-1]
    assert str(checkpoints) in message
    shutil.rmtree(checkpoints)
    assert main(arguments) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("verb", "flags", "limit"),
    [
        ("sessions", ["--sessions.min_history", "2"], 3_000),
        ("tokenize", ["--tokenize.codebook_size", "32"], 1_000),
        ("pretrain", ["--train.seed", "1"], 20_000),
        ("reward", ["--reward.seed", "1"], 3_000),
        ("evaluate", ["--evaluate.ks", "[3]"], 3_000),
        ("recommend", ["--recommend.users", "40"], 500),
        ("report", [], 10_000),
    ],
)
def test_full_disk(
    verb: str,
    flags: list[str],
    limit: int,
    run_copy: Path,
    contents: Contents,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if verb == "report":
        (run_copy / "report" / "stage.json").unlink()
        (run_copy / "report" / "report.html").unlink()
    before = contents(run_copy)
    command = [verb, "--out", str(run_copy), *flags]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        code = main(command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    shown = capfd.readouterr()
    assert code == 1, shown.out + shown.err
    assert "Traceback" not in shown.err
    message = shown.err.strip().splitlines()[-1].lower()
    assert "file too large" in message or "no space" in message
    assert str(run_copy) in message
    assert contents(run_copy) == before, "an earlier result was touched"
    # Space again: the same command goes through.
    assert main([*command, "--json"]) == 0, capfd.readouterr().err
    assert json.loads(capfd.readouterr().out)["skipped"] is False


def test_items_that_the_catalogue_lacks(run_copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A catalogue of other items than the sessions, each whole by itself."""
    path = run_copy / "tokenize" / "catalog.parquet"
    table = pq.read_table(path)
    at = table.column_names.index("item_id")
    ids = table["item_id"].to_pylist()
    ids[3] = "stranger" if isinstance(ids[3], str) else 10**9
    pq.write_table(table.set_column(at, "item_id", pa.array(ids, table["item_id"].type)), path)
    record_path = run_copy / "tokenize" / "stage.json"
    record = json.loads(record_path.read_text())
    del record["outputs"]["catalog.parquet"]
    record_path.write_text(json.dumps(record))
    assert main(["recommend", "--out", str(run_copy), "--recommend.users", "40"]) == 1
    message = capfd.readouterr().err.strip().splitlines()[-1]
    assert (
        f"{path}, column 'item_id', row 3: wanted item {table['item_id'][3].as_py()!r}" in message
    )
