"""The examples run as they stand and print what they promise."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from onerec import OneRec, OneRecConfig, Recommender
from onerec.inference.exported import export
from onerec.tokenizer import Catalog

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def printed(name: str, *arguments: str) -> str:
    warnings = ["-W", "error", "-W", "ignore::DeprecationWarning"]  # other libraries' own
    command = [sys.executable, *warnings, str(EXAMPLES / name), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_own_log_learns_the_topic_of_a_user(tmp_path: Path) -> None:
    sessions = printed("own_log.py", str(tmp_path / "new")).splitlines()[-2:]
    topics = re.findall(r"video \d+ about topic (\d)", "\n".join(sessions))
    assert len(topics) == 10
    assert topics.count("3") >= 8
    assert (tmp_path / "new" / "catalog" / "trie.bin").is_file()


def test_own_model_gets_legal_items_only() -> None:
    text = printed("own_model.py")
    leaves = [int(leaf) for leaf in re.findall(r"leaf (\d+)", text)]
    items = int(text.split()[0].replace(",", ""))
    assert len(leaves) == 4
    assert all(0 <= leaf < items for leaf in leaves)
    assert all(len(set(leaves[i : i + 2])) == 2 for i in (0, 2))


class Tensor:
    """Triton's tensor."""

    def __init__(self, name: str, values: Any) -> None:
        self._name, self._values = name, values

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> Any:
        return self._values


@pytest.fixture
def triton_model(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example's module beside a stand-in of what Triton gives to Python models."""
    utils: Any = ModuleType("triton_python_backend_utils")
    utils.Tensor = Tensor
    utils.TritonError = RuntimeError
    utils.InferenceResponse = lambda tensors, error=None: SimpleNamespace(
        tensors={t.name(): t.as_numpy() for t in tensors}, error=error
    )
    utils.get_input_tensor_by_name = lambda request, name: request.get(name)
    monkeypatch.setitem(sys.modules, utils.__name__, utils)
    path = EXAMPLES / "triton/onerec/1/model.py"
    spec = importlib.util.spec_from_file_location("triton_model", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("text", [True, False], ids=["text", "integers"])
def test_triton_model_answers_a_batch_of_requests(
    triton_model: ModuleType, text: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = OneRecConfig.preset("paper-tiny", codebook_size=16, session_length=2, init_std=0.3)
    ids: list[Any] = [f"v{i}" for i in range(60)] if text else list(range(-30, 30))
    sids = np.random.default_rng(0).integers(0, 16, (60, 3))
    export(OneRec(config).eval(), Catalog.build(ids, sids, 16), tmp_path / "export")
    written = (EXAMPLES / "triton/onerec/config.pbtxt").read_text()
    names = re.findall(r'key: "(\w+)" value: { string_value: "([^"]*)"', written)
    parameters = {name: {"string_value": value} for name, value in names}
    parameters["folder"]["string_value"] = str(tmp_path / "export")
    parameters["num_sessions"]["string_value"] = "3"
    model = triton_model.TritonPythonModel()
    model.initialize({"model_config": json.dumps({"parameters": parameters})})

    def tensor(name: str, rows: list[list[Any]]) -> dict[str, Tensor]:
        values = [[str(item).encode() for item in row] for row in rows]
        return {name: Tensor(name, np.array(values, dtype=object))}

    one, two = [ids[3], ids[5]], [ids[40], ""]
    responses = model.execute(
        [
            tensor("history", [one, two]),
            {"history": Tensor("history", np.array([[b"\xff"]], dtype=object))},
            {**tensor("history", [one]), **tensor("exclude", [[ids[7], "nobody"]])},
        ]
    )
    wanted = Recommender.from_exported(tmp_path / "export").recommend(
        [one, [ids[40]], one], exclude=[[], [], [ids[7]]], num_sessions=3
    )
    assert responses[1].error is not None
    items = np.concatenate([responses[0].tensors["items"], responses[2].tensors["items"]])
    scores = np.concatenate([responses[0].tensors["scores"], responses[2].tensors["scores"]])
    for row, expected in enumerate(wanted):
        assert [[i.decode() for i in session] for session in items[row]] == [
            [str(item) for item in session] for session in expected.item_ids
        ]
        assert scores[row].tolist() == expected.scores


def test_the_notebook() -> None:
    """Its cells in order, in one namespace, as a kernel runs them."""
    pytest.importorskip("pandas")
    notebook = json.loads((EXAMPLES / "dataframe.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    assert not any(c.get("outputs") for c in notebook["cells"]), "outputs are of one machine"
    space: dict[str, Any] = {}
    values = []
    for cell in cells:
        *body, last = ast.parse(cell).body
        exec(compile(ast.Module(body, []), "cell", "exec"), space)
        if isinstance(last, ast.Expr):
            values.append(eval(compile(ast.Expression(last.value), "cell", "eval"), space))
        else:
            exec(compile(ast.Module([last], []), "cell", "exec"), space)
    head, table, picks, by_history = values[:4]
    assert list(head.columns) == ["user_id", "item_id", "timestamp"]
    assert table.loc["model", "ndcg@10"] > 2 * table.loc["popularity", "ndcg@10"]
    assert list(picks["user_id"]) == ["user-0"] * 3 + ["user-1"] * 3
    assert all(picks["text"].str.startswith("The film number "))
    assert "film-13" in set(by_history["item_id"])
    assert space["again"].recommend(user_ids=["user-0"], k=3)["item_id"].to_pylist() == list(
        picks["item_id"][:3]
    )
