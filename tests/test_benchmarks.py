"""The benchmarks' own habits: a wrong result is never timed, and records become pages."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]

SUITE = """
import time
import pytest

def same(result, expected):
    assert result == expected

def test_right(compare):
    compare(
        {"ours": lambda: sum(range(100)), "loop": lambda: 4950},
        check=same, work={"Gnumber/s": 100e-9}, facts={"numbers": 100}, calls=10, seconds=0.01,
    )

class Slow:
    def prepare(self):
        self.ready = 0
        time.sleep(0.01)
    def __call__(self):
        self.ready += 1
        assert self.ready == 1
        return 1

def test_prepared(compare):
    compare({"ours": Slow()}, check=same, expected=1, calls=2, steps=4, seconds=0.01)

def test_wrong(compare):
    compare({"ours": lambda: 1, "reference": lambda: 2}, check=same)

def test_wrong_peer(compare):
    compare(
        {"ours": lambda: 1, "peer": lambda: 2}, check=same, expected=1,
        facts=lambda: {"beams": 4}, seconds=0.01,
    )

def test_alone(compare):
    compare({"ours": lambda: 1}, check=same)

@pytest.mark.gpu
def test_elsewhere(compare):
    compare({"ours": lambda: 1, "reference": lambda: 1}, check=same, seconds=0.01)
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, object]]]:
    """What pytest printed, and the benchmarks that were recorded."""
    folder = tmp_path_factory.mktemp("benchmarks")
    shutil.copy(ROOT / "benchmarks" / "conftest.py", folder)
    (folder / "bench_sums.py").write_text(SUITE)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a CUDA device\n")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", "bench_sums.py"]
    ended = subprocess.run(
        [*command, "--benchmark-json=record.json"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    record = json.loads((folder / "record.json").read_text())
    return ended.stdout, record["benchmarks"]


def test_only_a_right_result_is_timed(
    measured: tuple[str, list[dict[str, object]]],
) -> None:
    output, benchmarks = measured
    assert "3 failed, 2 passed, 1 deselected" in output
    assert "wanted `expected` or a second provider" in output
    names = [entry["name"] for entry in benchmarks]
    assert names == ["test_right", "test_prepared", "test_wrong_peer"]


def test_a_wrong_peer_is_named_and_the_others_are_timed(
    measured: tuple[str, list[dict[str, object]]],
) -> None:
    info = measured[1][2]["extra_info"]
    assert isinstance(info, dict)
    assert list(info["providers"]) == ["ours"]
    assert info["wrong"] == {"peer": "AssertionError: assert 2 == 1"}
    assert info["facts"] == {"beams": 4}


def test_every_provider_has_its_median_spread_and_rate(
    measured: tuple[str, list[dict[str, object]]],
) -> None:
    info = measured[1][0]["extra_info"]
    assert isinstance(info, dict)
    assert list(info["providers"]) == ["ours", "loop"]
    assert info["rounds"] >= 5
    assert info["facts"] == {"numbers": 100}
    for times in info["providers"].values():
        assert 0 < times["p20_s"] <= times["median_s"] <= times["p80_s"]
        assert times["p80_s"] <= times["p99_s"]
        assert times["rates"]["Gnumber/s"] == pytest.approx(100e-9 / times["median_s"])


def test_preparation_is_not_timed(measured: tuple[str, list[dict[str, object]]]) -> None:
    info = measured[1][1]["extra_info"]
    assert isinstance(info, dict)
    assert info["providers"]["ours"]["median_s"] < 1e-3


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """benchmarks/results.py, working in a folder of its own."""
    spec = importlib.util.spec_from_file_location("results", ROOT / "benchmarks" / "results.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(module, "IMAGES", tmp_path / "images")
    return module


def record(device: str, median: float) -> dict[str, object]:
    times: dict[str, object] = {
        "median_s": median,
        "p20_s": median / 2,
        "p80_s": median * 2,
        "p99_s": median * 3,
    }
    times["rates"] = {"GB/s": 12.3}
    return {
        "datetime": "2030-01-02T03:04:05",
        "commit": {"id": "0123456789abcdef", "time": "", "dirty": True},
        "environment": {
            "onerec": "9.9.9",
            "python": "3.11.0",
            "packages": {"torch": "2.0", "numpy": "2.1", "triton": None},
            "torch": {"threads": 2},
            "native": {"isa": "avx2"},
            "cpu": {"name": "Some CPU (R)", "usable_cores": 4},
            "gpus": [{"name": "Some GPU"}],
        },
        "benchmarks": [
            {
                "suite": "sums",
                "name": "right[n100]",
                "device": device,
                "rounds": 5,
                "facts": {"beams": 4},
                "providers": {"ours": times, "peer": {**times, "median_s": 3 * median}},
            }
        ],
    }


def test_a_record_is_kept_under_its_device_and_rendered(results: ModuleType) -> None:
    assert results.store(record("cpu", 0.5)).name == "some-cpu-r-4-cores-avx2.json"
    assert results.store(record("cuda", 2e-6)).name == "some-gpu.json"
    results.store(record("cpu", 0.25))  # the same device again: the older record goes
    page = results.page()
    assert page.count("\n## sums\n") == 1
    assert "\nSome CPU (R), 4 cores, avx2. onerec" in page
    assert "\nSome GPU. onerec" in page
    assert "onerec 9.9.9 at commit `0123456789` with uncommitted changes, 2030-01-02" in page
    assert "| right[n100] | ours | 250 ms | 125 ms .. 500 ms | 1.00 | 12.3 GB/s, beams 4 |" in page
    assert "|  | peer | 750 ms | 125 ms .. 500 ms | 3.00 | 12.3 GB/s |" in page
    assert "| right[n100] | ours | 2 us |" in page
    assert page.count("right[n100]") == 2


def test_the_page_opens_with_the_best_peer(results: ModuleType) -> None:
    made = record("cpu", 0.5)
    entries = made["benchmarks"]
    assert isinstance(entries, list)
    times = entries[0]["providers"]["ours"]
    providers = {
        "onerec": {**times, "median_s": 2e-3},
        "loop": {**times, "median_s": 9e-3},
        "F.grouped_mm": {**times, "median_s": 5e-3},
        "onerec torch": {**times, "median_s": 4e-3},
    }
    name, facts = "forward[small-1-fp32]", {"floor_s": 1e-3}
    entries[0] = {**entries[0], "suite": "moe", "name": name, "facts": facts}
    entries[0]["providers"] = providers
    results.store(made)
    line = "| 2 ms | F.grouped_mm, 5 ms | 2.5 | 2.0 |"
    page = results.page()
    assert f"24 experts of 512 x 2,048, 1 token | Some CPU (R), 4 cores, avx2 {line}" in page
    assert page.index(line) < page.index("\n## moe\n")


def test_scaling_is_drawn_and_shown(results: ModuleType, tmp_path: Path) -> None:
    made = record("cpu", 0.5)
    entries = made["benchmarks"]
    assert isinstance(entries, list)
    for value in (1, 10, 100):
        entries.append({**entries[0], "facts": {"axis": "items", "value": value}, "rounds": 100})
    results.store(made)
    results.plot(made)
    assert "items" in (tmp_path / "images" / "sums-some-cpu-r-4-cores-avx2.svg").read_text()
    page = results.page()
    assert "![Time of a call, one number varied](images/sums-some-cpu-r-4-cores-avx2.svg)" in page
    assert page.count("right[n100]") == 1  # the table does not repeat the drawing


@pytest.mark.parametrize("script", [("results.py", "render"), ("quality_page.py",)])
def test_a_page_is_what_its_records_give(script: tuple[str, ...]) -> None:
    command = [sys.executable, f"benchmarks/{script[0]}", *script[1:], "--check"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
