"""`onerec export`: a run's model and catalogue as a folder that serves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from onerec import OneRec, OneRecConfig, Recommender
from onerec.cli.main import main
from onerec.cli.stage import run_stage
from onerec.tokenizer import Catalog


def test_exports_what_a_run_serves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    config = OneRecConfig.preset("tiny", codebook_size=16, init_std=0.3)
    models = {name: OneRec(config).eval() for name in ("pretrain", "align")}
    catalog = Catalog.build(list(range(40)), np.random.default_rng(0).integers(0, 16, (40, 3)), 16)
    catalog.save(tmp_path / "tokenize")
    inputs: dict[str, str] = {}
    for name, model in models.items():

        def build(folder: Path, model: OneRec = model) -> dict[str, Any]:
            model.save_pretrained(folder / "model")
            return {}

        made = run_stage(tmp_path, name, config={}, inputs=inputs, code=[], build=build, say=print)
        inputs = {name: made.record.fingerprint}
        capsys.readouterr()
        assert main(["export", str(tmp_path), "--json"]) == 0
        record = json.loads(capsys.readouterr().out)
        assert (record["items"], record["dtype"]) == (40, "float32")
        exported = Recommender.from_exported(tmp_path / "export")
        assert exported.rank([[3]], 5) == Recommender(model, catalog).rank([[3]], 5)

    half = tmp_path / "half"
    assert main(["export", str(tmp_path), "--to", str(half), "--dtype", "bfloat16"]) == 0
    assert "bfloat16" in capsys.readouterr().out
    assert (half / "engine.bin").stat().st_size < 0.7 * record["engine_bytes"]


def test_a_folder_without_a_run_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path)]) == 1
    assert "onerec pretrain --out" in capsys.readouterr().err
    assert main(["serve", str(tmp_path)]) == 1
    assert str(tmp_path) in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["serve", str(tmp_path), "--max_queue", "0"])
    assert ended.value.code == 2
    assert "max_queue must be at least 1, got 0" in capsys.readouterr().err
