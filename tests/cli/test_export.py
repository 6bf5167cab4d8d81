"""`onerec export`: a run's model and catalogue as a folder that serves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from onerec import OneRec, OneRecConfig, Recommender
from onerec.cli.main import main
from onerec.pipeline.stage import run_stage
from onerec.tokenizer import Catalog


def test_exports_what_a_run_serves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    shape = OneRecConfig.preset("paper-tiny", codebook_size=16, init_std=0.3)
    models = {name: OneRec(shape).eval() for name in ("pretrain", "align")}
    catalog = Catalog.build(list(range(40)), np.random.default_rng(0).integers(0, 16, (40, 3)), 16)
    catalog.save(tmp_path / "tokenize")
    inputs: dict[str, str] = {}
    # Of an alignment that took no iteration, the model is the pretrained one.
    for name, chosen, served in (
        ("pretrain", None, "pretrain"),
        ("align", 0, "pretrain"),
        ("align", 2, "align"),
    ):
        model = models[served]

        def build(folder: Path, name: str = name, chosen: int | None = chosen) -> dict[str, Any]:
            models[name].save_pretrained(folder / "model")
            return {"chosen": chosen}

        config = {"chosen": chosen}
        made = run_stage(
            tmp_path, name, config=config, inputs=inputs, code=[], build=build, say=print
        )
        if name == "pretrain":
            inputs = {name: made.record.fingerprint}
        capsys.readouterr()
        assert main(["export", str(tmp_path), "--json"]) == 0
        record = json.loads(capsys.readouterr().out)
        assert (record["items"], record["dtype"]) == (40, "float32")
        exported = Recommender.from_exported(tmp_path / "export")
        assert exported.rank([[3]], 5) == Recommender(model, catalog, backend="torch").rank(
            [[3]], 5
        )

    half = tmp_path / "half"
    assert main(["export", str(tmp_path), "--to", str(half), "--dtype", "bfloat16"]) == 0
    assert "bfloat16" in capsys.readouterr().out
    assert (half / "engine.bin").stat().st_size < 0.7 * record["engine_bytes"]


def test_a_folder_of_something_else_is_not_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = OneRecConfig.preset("paper-tiny", codebook_size=16)
    OneRec(shape).save_pretrained(tmp_path / "model")
    catalog = Catalog.build([1, 2], [[1, 2, 3], [4, 5, 6]], 16)
    catalog.save(tmp_path / "tokenize")
    (tmp_path / "tokenize" / "quantizer").mkdir()
    command = ["export", str(tmp_path), "--model", str(tmp_path / "model"), "--to"]
    assert main([*command, str(tmp_path / "tokenize")]) == 1
    assert "no engine.bin: choose another folder" in capsys.readouterr().err
    assert (tmp_path / "tokenize" / "quantizer").is_dir()
    (tmp_path / "empty").mkdir()
    for _ in range(2):
        assert main([*command, str(tmp_path / "empty")]) == 0


def test_tags_of_the_items_are_exported_as_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, out = tmp_path / "log", tmp_path / "out"
    log.mkdir()
    rows = range(400)
    columns = {"user_id": [n % 9 for n in rows], "item_id": [n * 7 % 20 for n in rows]}
    pq.write_table(pa.table({**columns, "timestamp": list(rows)}), log / "interactions.parquet")
    tags = [["even" if n % 2 == 0 else "odd", f"of {n % 4}"] for n in range(20)]
    items = pa.table({"item_id": list(range(20)), "tags": tags})
    pq.write_table(items, log / "items.parquet")
    flags = ["--out", str(out), "--sessions.rule", "next", "--sessions.split", "last"]
    assert main(["sessions", "--data", str(log), *flags]) == 0
    assert main(["tokenize", "--out", str(out), "--tokenize.levels", "2"]) == 0
    torch.manual_seed(0)
    catalog = Catalog.load(out / "tokenize")
    size = {"codebook_size": catalog.codebook_size, "levels": 2}
    OneRec(OneRecConfig.preset("paper-tiny", **size)).save_pretrained(tmp_path / "model")
    export = ["export", str(out), "--model", str(tmp_path / "model")]
    capsys.readouterr()

    assert main([*export, "--tags"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert told.endswith("tags even, odd, of 0, of 1, of 2, of 3")
    recommender = Recommender.from_exported(out / "export")
    for tag, wanted in (("odd", range(1, 20, 2)), ("of 2", range(2, 20, 4))):
        assert sorted(recommender.rank([[]], 20, allow_tags=[[tag]])[0]) == list(wanted)
    assert main([*export, "--json", "--tags", "odd", "of 2"]) == 0
    assert json.loads(capsys.readouterr().out)["tags"] == ["odd", "of 2"]
    assert main([*export, "--tags", "odds"]) == 1
    assert "no item has the tag 'odds' (did you mean odd?)" in capsys.readouterr().err
    assert main([*export, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tags"] == []

    many = [[f"{n}{letter}" for letter in "abcd"] for n in range(20)]
    pq.write_table(items.set_column(1, "tags", [many]), log / "items.parquet")
    assert main(["sessions", "--data", str(log), *flags]) == 0
    assert main([*export, "--tags"]) == 1
    told = "--tags: words: wanted at most 63 tags, got 80 different ones; choose some: --tags WORD"
    assert told in capsys.readouterr().err
    pq.write_table(items.drop_columns(["tags"]), log / "items.parquet")
    assert main(["sessions", "--data", str(log), *flags]) == 0
    assert main([*export, "--tags"]) == 1
    assert "--tags: the items have none" in capsys.readouterr().err


def test_a_folder_without_a_run_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path)]) == 1
    assert "onerec pretrain --out" in capsys.readouterr().err
    assert main(["serve", str(tmp_path)]) == 1
    assert str(tmp_path) in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["serve", str(tmp_path), "--max_queue", "0"])
    assert ended.value.code == 2
    assert "max_queue: wanted at least 1, got 0" in capsys.readouterr().err
