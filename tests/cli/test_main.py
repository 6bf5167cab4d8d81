"""The command itself: help, exit codes, one message for an error."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import onerec
from onerec import environment
from onerec.cli import bench, env
from onerec.cli.command import parse_command
from onerec.cli.main import VERBS, describe, main
from onerec.errors import DataError


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {verb} " in shown for verb in VERBS)


def test_no_verb_is_wrong_usage() -> None:
    assert main([]) == 2


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"onerec {onerec.__version__}\n"


def test_unknown_verb_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokenise"]) == 2
    assert "did you mean 'tokenize'?" in capsys.readouterr().err


def test_help_fits_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if len(line) > 80] == []


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys; from onerec.cli.main import main; code = main(['--help'])\n"
        "sys.exit(code or ('torch' in sys.modules) * 3)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_readable_help(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: onerec {verb} ")
    assert [line for line in shown.splitlines() if len(line) > 80] == []
    assert "--json" in shown
    undescribed = [
        line
        for line in shown.splitlines()
        if line.startswith("  --") and line.rstrip().endswith(tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
    ]
    lines = shown.splitlines()
    for line in undescribed:  # the help of a long option stands on the next line
        after = lines[lines.index(line) + 1]
        assert after.startswith("        "), line
        assert not after.strip().startswith("(type"), f"no help for {line}"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["env", "--jsn"], "did you mean --json?"),
        (["recommend", "--out", "x", "--users", "9"], "did you mean --recommend.users?"),
        (["tokenize"], "--out DIR is needed"),
        (
            ["sessions", "--out", "x", "--columns", "user_id=uid"],
            "columns: wanted --columns.NAME VALUE, got user_id=uid",
        ),
        (["tokenize", "--out", "x", "--tokenize.levels", "three"], "tokenize.levels"),
        (
            ["tokenize", "--out", "x", "--tokenize.levels", "0"],
            "tokenize.levels: wanted at least 1, got 0",
        ),
        (["tokenize", "--out", "x", "--tokenize.level", "3"], "did you mean --tokenize.levels?"),
        (
            ["run", "--out", "x", "--preset", "huge"],
            "preset: wanted ['items', 'paper-tiny', '0.1b', '1b'], got huge",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_is_one_message_and_code_2(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert words in message
    assert len(message.splitlines()) == 2


def test_config_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "settings.yaml"
    base = ["tokenize", "--out", str(tmp_path / "out"), "--config", str(path)]
    assert main(base) == 1
    assert "No such file" in capsys.readouterr().err
    path.write_text("tokenize: [1, 2")
    assert main(base) == 1
    assert "not YAML" in capsys.readouterr().err
    path.write_text("tokenize:\n  levls: 2\n")
    with pytest.raises(SystemExit) as ended:
        main(base)
    assert ended.value.code == 2
    assert "levls" in capsys.readouterr().err
    path.write_text("tokenize:\n  levels: 4\n  codebook_size: 16\n")
    flags = [*base[1:], "--tokenize.codebook_size", "32"]
    settings = parse_command("tokenize", "", flags, ["tokenize"]).settings
    assert (settings.tokenize.levels, settings.tokenize.codebook_size) == (4, 32)


def test_own_names_and_settings_are_kept_once_a_stage_stands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, out = tmp_path / "log", tmp_path / "out"
    log.mkdir()
    columns = {"uid": [n % 4 for n in range(40)], "video": [n % 5 for n in range(40)]}
    table = {**columns, "ts": list(range(40)), "clock": list(range(40))}
    pq.write_table(pa.table(table), log / "interactions.parquet")
    sessions = ["sessions", "--out", str(out)]
    names = ["--data", str(log), "--columns.user_id", "uid", "--columns.item_id", "video"]
    rule = ["--sessions.rule", "next", "--sessions.split", "last", "--sessions.length", "2"]
    assert main([*sessions, *names, *rule, "--columns.timestamp", "time"]) == 1
    told = capsys.readouterr().err
    assert "column 'time': the column is missing; the file has uid, video, ts, clock" in told
    assert not (out / "config.yaml").exists()
    assert main([*sessions, *names, *rule, "--columns.timestamp", "ts"]) == 0
    kept = (out / "config.yaml").read_text()
    assert "columns:\n  user_id: uid\n  item_id: video\n  timestamp: ts\n" in kept
    assert main([*sessions, "--sessions.min_history", "90"]) == 1
    assert "no train session is left" in capsys.readouterr().err
    assert (out / "config.yaml").read_text() == kept
    run = ["run", "--out", str(out), "--data", str(log), "--sessions.min_history", "90"]
    assert main([*run, *names[2:], *rule, "--columns.timestamp", "ts"]) == 1
    assert (out / "config.yaml").read_text() == kept
    assert main(sessions) == 0
    assert "unchanged, skipped" in capsys.readouterr().err
    assert main([*sessions, "--columns.timestamp", "clock"]) == 0
    assert '"timestamp": "clock"}) changed, making it again' in capsys.readouterr().err
    items = {"video": list(range(5)), "title": list("abcde"), "genre": list("xyxyx")}
    pq.write_table(pa.table(items), log / "items.parquet")
    own = ["--columns.items.item_id", "video", "--columns.items.text=title", "--columns.items.tags"]
    assert main([*sessions, *own, "genre"]) == 0
    capsys.readouterr()
    assert "  items.text: title\n  items.tags: genre\n" in (out / "config.yaml").read_text()
    assert pq.read_table(out / "sessions/items.parquet")["tags"].to_pylist()[:2] == [["x"], ["y"]]
    assert main([*sessions, "--columns.items.tags", "null"]) == 0
    assert "items.tags" not in (out / "config.yaml").read_text()
    assert pq.read_table(out / "sessions/items.parquet")["tags"].to_pylist()[:2] == [[], []]
    with pytest.raises(SystemExit):
        main([*sessions, "--columns.items.tags"])
    assert "--columns: expected one argument" in capsys.readouterr().err
    assert main(["sessions", "--out", str(tmp_path / "new"), *names[2:]]) == 1
    assert "--data, which was not given" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("preset", "lr", "width", "steps"), [("paper-tiny", 3e-3, 64, 1500), ("1b", 2e-4, 1024, None)]
)
def test_a_preset_brings_its_learning_rate_and_steps(
    preset: str, lr: float, width: int, steps: int | None, tmp_path: Path
) -> None:
    argv = ["--out", str(tmp_path), "--preset", preset]
    settings = parse_command("pretrain", "", argv, ("model", "train")).settings
    assert (settings.train.lr, settings.model["d_model"]) == (lr, width)
    assert settings.train.max_steps == steps
    assert settings.align.lr < settings.train.lr
    assert (settings.align.max_steps is None) == (steps is None)


def test_verbs_that_no_preset_changes_do_not_take_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sessions", "--out", "x", "--preset", "1b"])
    assert "unrecognized arguments: --preset" in capsys.readouterr().err


def test_another_preset_keeps_what_was_chosen(tmp_path: Path) -> None:
    argv, sections = ["--out", str(tmp_path)], ("model", "train")
    first = parse_command("pretrain", "", [*argv, "--train.epochs", "3"], sections)
    first.settings.save(tmp_path / "config.yaml")
    settings = parse_command("pretrain", "", [*argv, "--preset", "1b"], sections).settings
    assert (settings.model["d_model"], settings.train.lr, settings.train.epochs) == (1024, 2e-4, 3)


def test_errors_are_told_in_one_line() -> None:
    assert describe(DataError("a.parquet:\nno column")) == "a.parquet: no column"
    assert describe(FileNotFoundError(2, "No such file", "x")) == "x: No such file"
    assert describe(KeyError("x")) == "KeyError: 'x'"
    assert describe(MemoryError()) == "out of memory."


def test_unexpected_error_has_no_traceback_without_debug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise KeyError("lost")

    monkeypatch.setattr(env, "collect", fail)
    assert main(["env"]) == 1
    assert capsys.readouterr().err == "onerec env: KeyError: 'lost' (--debug shows where)\n"
    assert main(["env", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_interrupt_is_one_line_and_code_130() -> None:
    code = (
        "import sys, time; from onerec.cli import env, main\n"
        "def wait(): print('waiting', flush=True); time.sleep(60)\n"
        "env.collect = wait; sys.exit(main.main(['env']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=30)
    assert process.returncode == 130
    assert message.startswith("onerec: interrupted")
    assert len(message.splitlines()) == 1


def test_env_survives_broken_probes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise OSError("no /proc here")

    for probe in ("_native", "_torch", "_gpus", "_cpu", "_memory"):
        monkeypatch.setattr(environment, probe, broken)
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["memory"] == {"problem": "OSError: no /proc here"}
    assert found["onerec"] == onerec.__version__
    assert main(["env"]) == 0


def test_env_tells_the_native_build(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["native"]["loaded"] is True
    assert found["native"]["isa"] in found["native"]["isas"]
    assert set(found["native"]["cuda"]) == {"built", "devices", "problem"}
    assert found["cpu"]["usable_cores"] >= 1


def test_bench_outside_a_source_tree(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(onerec, "__file__", str(tmp_path / "onerec" / "__init__.py"))
    assert main(["bench"]) == 1
    assert "part of the source tree" in capsys.readouterr().err


def test_bench_prints_medians(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "benchmarks").mkdir()
    times = {"median_s": 2e-6, "p20_s": 1e-6, "p80_s": 3e-6, "rates": {"GB/s": 7.0}}
    (tmp_path / "benchmarks" / "bench_add.py").write_text(
        "def test_add(benchmark):\n"
        f"    benchmark.extra_info.update(facts={{'rows': 5}}, providers={{'ours': {times}}})\n"
        "    assert benchmark.pedantic(lambda: 1 + 1) == 2\n"
    )
    monkeypatch.setattr(onerec, "__file__", str(tmp_path / "onerec" / "__init__.py"))
    assert main(["bench", "add", "--json"]) == 0
    (row,) = json.loads(capfd.readouterr().out)["benchmarks"]
    assert (row["suite"], row["name"]) == ("add", "add")
    assert row["providers"]["ours"] == times
    assert main(["bench", "add"]) == 0
    shown = capfd.readouterr().out
    assert all(text in shown for text in ("2 us", "1 us .. 3 us", "7 GB/s", "rows 5"))
    with pytest.raises(SystemExit):
        main(["bench", "subtract"])
    assert "one of: add" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2.0, "2 s"), (0.0123, "12.3 ms"), (4.5e-6, "4.5 us"), (3e-9, "3 ns"), (0.0, "0 s")],
)
def test_duration(seconds: float, text: str) -> None:
    assert bench.duration(seconds) == text


def test_a_record_of_benchmarks_names_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEREC_DATA", str(Path("/somewhere/private")))
    monkeypatch.setenv("ONEREC_ISA", "avx2")
    found = environment.published()
    assert found["environment"]["ONEREC_ISA"] == "avx2"
    text = json.dumps(found)
    assert "/somewhere" not in text
    assert sys.prefix not in text
    assert str(Path(onerec.__file__).parent) not in text


def test_text_files_are_utf8_whatever_the_locale(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.mkdir()
    table = {"用户": [n % 6 for n in range(90)], "item_id": [f"é{n % 7}" for n in range(90)]}
    rows = zip(*table.values(), range(90), strict=True)
    text = "用户,item_id,timestamp\n" + "".join(f"{u},{i},{t}\n" for u, i, t in rows)
    (log / "interactions.csv").write_text(text, encoding="utf-8")
    settings = f"data: {log}\ncolumns: {{user_id: 用户}}\n"
    (tmp_path / "c.yaml").write_text(settings, encoding="utf-8")
    words = ["sessions", "--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "out")]
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "onerec", *words],
        env={**os.environ, **plain},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    funnel = (tmp_path / "out" / "sessions" / "funnel.json").read_bytes().decode("utf-8")
    assert json.loads(funnel)["log"]["interactions"] == 90
    assert "user_id:" in (tmp_path / "out" / "config.yaml").read_text(encoding="utf-8")
