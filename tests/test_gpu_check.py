"""The run of what needs a GPU: whatever befalls one test, the others run and are recorded."""

from __future__ import annotations

import json
import time
from pathlib import Path

import gpu_check
import pytest
import results

SUITE = """
import os
import signal
import sys
import time
import types

import pytest

pytestmark = pytest.mark.gpu

def measure(benchmark, **more):
    benchmark.pedantic(lambda: None)
    times = dict(median_s=0.002, p20_s=0.001, p80_s=0.003, p99_s=0.004, rates={})
    providers = {"ours": times, "peer": {**times, "median_s": 0.006}}
    benchmark.extra_info.update(device="cuda", rounds=5, facts={}, providers=providers, **more)

def test_right(benchmark):
    measure(benchmark)

def test_wrong():
    assert 1 == 2, "one is not two"

def test_hangs():
    time.sleep(600)

def test_crashes():
    os.kill(os.getpid(), signal.SIGSEGV)

def test_device_is_lost():
    def synchronize():
        raise RuntimeError("illegal memory access")

    cuda = types.SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize)
    sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)

def test_skipped():
    pytest.skip("no peer")

def test_peer_is_wrong(benchmark):
    measure(benchmark, wrong={"other peer": "AssertionError: 3"})
    raise AssertionError("wrong: other peer")

def test_right_too(benchmark):
    measure(benchmark)
"""
ABOUT = {
    "onerec": "9.9.9",
    "python": "3.12.0",
    "packages": {"torch": "2.0"},
    "torch": {"threads": 2},
    "gpus": [{"name": "Some GPU"}],
}


def job(folder: Path, name: str, text: str) -> gpu_check.Job:
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a CUDA device\n")
    path = folder / f"{name}.py"
    path.write_text(text)
    return gpu_check.Job(name.removeprefix("bench_"), str(path), each=10)


@pytest.mark.slow
def test_the_rest_runs_and_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "environment", lambda: ABOUT)
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    suite = job(tmp_path, "bench_sums", SUITE)
    broken = job(tmp_path, "test_broken", "import nothing_of_that_name")
    head = "import pytest\n@pytest.mark.gpu\n@pytest.mark.parametrize('n', range(3))\n"
    plain = job(tmp_path, "test_plain", f"{head}def test_number(n): assert n < 2\n")
    parts = [plain._replace(part=f"{i}/2") for i in range(2)]
    found = gpu_check.check([broken, *parts], [suite], minutes=5, logs=tmp_path / "logs", workers=2)
    outcome = {note["test"].split("::")[-1]: note["outcome"] for note in found}
    assert outcome == {
        "test_broken": "died",
        "test_number[0]": "passed",
        "test_number[1]": "passed",
        "test_number[2]": "failed",
        "test_right": "passed",
        "test_wrong": "failed",
        "test_hangs": "hung",
        "test_crashes": "died",
        "test_device_is_lost": "failed",
        "test_skipped": "skipped",
        "test_peer_is_wrong": "failed",
        "test_right_too": "passed",
    }
    assert len(found) == len(outcome)
    record = json.loads((tmp_path / "results" / "some-gpu-sums.json").read_text())
    assert [e["name"] for e in record["benchmarks"]] == ["right", "peer_is_wrong", "right_too"]
    assert {f["name"]: (f["outcome"], f["message"]) for f in record["failed"]} == {
        "wrong": ("failed", "AssertionError: one is not two"),
        "hangs": ("hung", "took over 10 s"),
        "crashes": ("died", "died of SIGSEGV"),
        "device_is_lost": ("failed", "RuntimeError: illegal memory access"),
        "peer_is_wrong": ("failed", "AssertionError: wrong: other peer"),
    }
    page = results.page()
    assert "\nhangs hung: took over 10 s" in page
    assert "|  | other peer | wrong |  |  | AssertionError: 3 |" in page
    told = gpu_check.summary(found)
    assert "bench_sums right: ours 2 ms, peer 6 ms" in told
    assert told.endswith("\n4 passed, 4 failed, 2 died, 1 hung, 1 skipped")
    output = (tmp_path / "logs" / "output.log").read_text()
    assert "in test_hangs" in output  # where it was
    assert "nothing_of_that_name" in output


def test_what_has_no_time_left_is_not_run(tmp_path: Path) -> None:
    late = job(tmp_path, "test_late", "def test_nothing(): pass")
    (note,) = gpu_check.run(late, tmp_path, time.monotonic() - 1)
    assert (note["test"], note["outcome"]) == ("test_late", "not run")


@pytest.mark.parametrize(
    ("outcomes", "status"),
    [(["passed", "skipped"], 0), (["passed", "hung"], 1), (["skipped"], 1), ([], 1)],
    ids=str,
)
def test_status(outcomes: list[str], status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [{"test": "a.py::b", "outcome": o, "seconds": 0.0, "message": ""} for o in outcomes]
    monkeypatch.setattr(gpu_check, "check", lambda *_, **__: found)
    monkeypatch.setattr("sys.argv", ["gpu_check.py", "moe"])
    with pytest.raises(SystemExit) as left:
        gpu_check.main()
    assert left.value.code == status


def test_names_choose_suites_and_tests() -> None:
    tests, suites = gpu_check.jobs([])
    assert [suite.name for suite in suites] == ["beam", "moe", "graph", "training", "kmeans"]
    assert len(tests) > 8
    assert {test.path for test in tests} >= {"tests/kernels/test_moe_experts.py"}
    tests, suites = gpu_check.jobs(["moe", "tests/ops/test_moe.py", "benchmarks/bench_beam.py::x"])
    assert [suite.name for suite in suites] == ["moe", "benchmarks/bench_beam.py::x"]
    assert [test.path for test in tests] == ["tests/ops/test_moe.py"]
    with pytest.raises(ValueError, match="bean: wanted a path or one of beam, moe"):
        gpu_check.jobs(["bean"])
