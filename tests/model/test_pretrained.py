"""Saved folders: equal after loading, whole or absent, clear about what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from onerec.errors import DataError
from onerec.model import OneRec, OneRecConfig


def build(**overrides: Any) -> OneRec:
    torch.manual_seed(0)
    fields = {"codebook_size": 7, "d_model": 16, "d_ff": 8, "expert_d_ff": 8, "n_experts": 3}
    return OneRec(OneRecConfig.preset("paper-tiny", **{**fields, **overrides}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("overrides", [{}, {"n_experts": 0, "tie_heads": False}], ids=str)
def test_loaded_equals_saved(tmp_path: Path, dtype: torch.dtype, overrides: dict[str, Any]) -> None:
    model = build(**overrides).to(dtype).eval()
    if model.config.n_experts:
        model.update_router_bias(torch.tensor([[3, 0, 0], [0, 5, 1]]))
    model.save_pretrained(tmp_path / "model")
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    loaded = OneRec.from_pretrained(tmp_path / "model")
    assert loaded.config == model.config
    assert not loaded.training
    for (name, want), (other, got) in zip(
        model.state_dict().items(), loaded.state_dict().items(), strict=True
    ):
        assert name == other
        assert got.dtype == want.dtype
        assert got.equal(want)
    codes = torch.randint(7, (2, 3, 3))
    assert loaded.session_logits(codes, codes).equal(model.session_logits(codes, codes))
    loaded.train()(codes, codes).loss.backward()  # it can be trained on
    assert loaded.codes.weight.grad is not None


def test_saving_twice_replaces_and_leaves_nothing_behind(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    other = build()
    with torch.no_grad():
        other.bos.fill_(3.0)
    other.save_pretrained(tmp_path)
    assert OneRec.from_pretrained(tmp_path).bos.equal(other.bos)
    assert len(list(tmp_path.iterdir())) == 2


def test_failed_save_keeps_the_earlier_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build()
    first.save_pretrained(tmp_path)

    def full_disk(*_args: object, **_kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("onerec.model.pretrained.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        build(d_model=32).save_pretrained(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert OneRec.from_pretrained(tmp_path).bos.equal(first.bos)


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size]) and None


def change_config(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


def change_weights(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        edit(state)
        save_file(state, folder / "model.safetensors")

    return change


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (remove("config.json"), "config.json: missing"),
        (remove("model.safetensors"), "model.safetensors: missing"),
        (write("config.json", b"{"), "config.json: not JSON"),
        (write("config.json", b"\xff\xfe"), "config.json: not JSON"),
        (write("config.json", b"[]"), "model_type must be 'onerec', got None"),
        (change_config(model_type="bert"), "model_type must be 'onerec', got 'bert'"),
        (change_config(color=1), r"unknown fields \['color'\]"),
        (change_config(n_heads=3), "n_heads must divide d_model"),
        (change_config(d_model="wide"), "config.json: "),
        (change_config(expert_d_ff=16), r"w13 must be \[3, 32, 16\], got \[3, 16, 16\]"),
        (change_config(n_experts=0), "missing .*ffn.w13.weight.* unexpected .*ffn.router"),
        (cut("model.safetensors", 100), "not a whole safetensors file"),
        (cut("model.safetensors", 5000), "not a whole safetensors file"),
        (write("model.safetensors", b""), "not a whole safetensors file"),
        (change_weights(lambda s: s.pop("bos")), "missing .*bos"),
        (change_weights(lambda s: s.update(x=torch.zeros(1))), "unexpected .*x"),
        (change_weights(lambda s: s.update(bos=torch.zeros(3))), r"bos must be \[16\], got \[3\]"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Callable[[Path], None], words: str) -> None:
    build().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError, match=words) as error:
        OneRec.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_no_such_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="no such folder, nor a Hub"):
        OneRec.from_pretrained(tmp_path / "not" / "here")

    def offline(*_args: object, **_kwargs: object) -> None:
        raise OSError("no route")

    monkeypatch.setattr("onerec.model.pretrained.snapshot_download", offline)
    with pytest.raises(DataError, match=r"someone/model: no such folder.*no route"):
        OneRec.from_pretrained("someone/model")


def test_a_hub_repository_is_a_folder_once_it_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build()
    model.save_pretrained(tmp_path)
    asked = {}

    def download(name: str, **kwargs: Any) -> str:
        asked.update(name=name, **kwargs)
        return str(tmp_path)

    monkeypatch.setattr("onerec.model.pretrained.snapshot_download", download)
    assert OneRec.from_pretrained("someone/model", revision="v2").bos.equal(model.bos)
    assert asked["name"] == "someone/model"
    assert asked["revision"] == "v2"
    assert asked["allow_patterns"] == ["config.json", "model.safetensors"]
