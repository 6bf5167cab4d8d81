"""Runs what needs a GPU and keeps what it finds as it goes: a failure costs its own figure alone.

python benchmarks/gpu_check.py                              # every test and suite
python benchmarks/gpu_check.py beam moe tests/ops/test_moe.py   # these suites and tests

Each test file and each suite has a process of its own, in which this module is a pytest plugin that
notes every test as it starts and ends. A test that takes too long, a process that dies and a device
that answers no more so cost one test: the others go on in a new process. Test files run side by
side, suites one after the other, the most important first, each followed by its record in
benchmarks/results/. The status is 0 when everything has run and passed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
LOST = 70  # exit status of a process whose device answers no more
NO_TIME = "no time was left"
RESTARTS = 8  # processes after the first that one job may use up
PARTS = {"tests/kernels/test_moe_experts.py": 3}  # half of all kernels to be compiled
SUITES = {  # in order; seconds for one benchmark and for all of the suite
    "beam": (40, 120),
    "moe": (60, 150),
    "graph": (60, 150),
    "training": (60, 90),
    "kmeans": (150, 240),
}
Note = dict[str, Any]


class Job(NamedTuple):
    """Tests that one process after another runs.

    Attributes:
        name: Of the suite, or what pytest gets.
        path: What pytest gets.
        each: Seconds that a test may take.
        whole: Seconds for all of them.
        part: Of the tests every second one, say, from the first on: "0/2".
        threads: OMP_NUM_THREADS; None leaves it.
    """

    name: str
    path: str
    each: float = 60
    whole: float = 200
    part: str = "0/1"
    threads: int | None = None


# The plugin


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--notes", help="file for what becomes of each test, one JSON value a line")
    parser.addoption("--part", default="0/1")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Notes(config))


def settle() -> None:
    """Waits for the device, so that what goes wrong there is told here."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


class Notes:
    """Writes a line when a test starts and one when it ends; without a device the process ends."""

    def __init__(self, config: pytest.Config) -> None:
        self.path = Path(config.getoption("notes"))
        self.part = [int(number) for number in config.getoption("part").split("/")]
        self.note: Note = {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        known = {note["test"] for note in read(self.path) if "test" in note}
        place, parts = self.part
        mine = items[place::parts]
        write(self.path, collected=[item.nodeid for item in mine])
        items[:] = [item for item in mine if item.nodeid not in known]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        write(self.path, start=nodeid)
        self.note = {"test": nodeid, "outcome": "passed", "seconds": 0.0, "message": ""}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Iterator[None]:
        result = yield
        settle()
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Iterator[None]:
        report: Any = yield
        self.note["seconds"] += call.duration
        if report.outcome != "passed" and self.note["outcome"] != "failed":
            assert call.excinfo is not None
            message = call.excinfo.exconly().splitlines()[0]
            self.note |= {"outcome": report.outcome, "message": message}
            self.note["text"] = report.longreprtext[-8000:]
        found = getattr(getattr(item, "funcargs", {}).get("benchmark"), "extra_info", {})
        if "providers" in found:
            self.note["figures"] = dict(found)
        return report

    def pytest_runtest_logfinish(self) -> None:
        write(self.path, **self.note)
        if self.note["outcome"] == "failed":
            try:
                settle()
            except Exception as error:
                print(f"\nthe device answers no more: {error}", flush=True)
                os._exit(LOST)


def write(path: Path, **note: Any) -> None:
    with path.open("a") as file:
        file.write(json.dumps({**note, "at": time.time()}, default=float) + "\n")


def read(path: Path) -> list[Note]:
    """The notes in a file; a line that is being written is left out."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


# The processes


def attempt(job: Job, notes: Path, output: Path, end: float) -> str:
    """Runs a job's tests that have no note yet in a process, which may end before they do.

    Returns:
        How it ended, "" if all went on to the end of the tests.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "gpu_check"]
    # A warning of another version of a package must not cost a figure.
    command += ["-W", "default", "-p", "no:cacheprovider", "--benchmark-quiet"]
    command += ["--notes", str(notes), "--part", job.part, job.path]
    paths = [str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    if job.threads is not None:
        environment["OMP_NUM_THREADS"] = str(job.threads)
    begin = time.time()
    with output.open("ab") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
        )
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(0.2)
            break
        since = max([begin, *(note["at"] for note in read(notes)[-1:])])
        late = time.time() > since + job.each
        if late or time.monotonic() > end:
            stop(process)
            return f"took over {job.each:g} s" if late else NO_TIME
    if code in (0, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        return ""
    return f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"


def stop(process: subprocess.Popen[bytes]) -> None:
    """Kills a process and its children; first in a way that makes it say where it is."""
    for kind in (signal.SIGABRT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, kind)
            process.wait(10)
            return


def how(why: str) -> str:
    """The outcome of a test that did not end, from what `attempt` says."""
    return "hung" if why.startswith("took") else "cut off" if why == NO_TIME else "died"


def run(job: Job, folder: Path, end: float) -> list[Note]:
    """What became of each test of a job, by the time `end` of `time.monotonic`."""
    name = f"{job.path}-{job.part}".replace("/", "-")
    notes, output = folder / f"{name}.jsonl", folder / f"{name}.log"
    end = min(end, time.monotonic() + job.whole)
    for _ in range(1 + RESTARTS):
        why = attempt(job, notes, output, end) if time.monotonic() < end else NO_TIME
        found = read(notes)
        ended = {note["test"] for note in found if "test" in note}
        started = [note["start"] for note in found if "start" in note]
        collected = next((note["collected"] for note in found if "collected" in note), [])
        if started and started[-1] not in ended:
            seconds = time.time() - found[-1]["at"]
            write(notes, test=started[-1], outcome=how(why), seconds=seconds, message=why)
            ended.add(started[-1])
        elif why and not collected:
            outcome = "not run" if why == NO_TIME else how(why)
            write(notes, test=job.name, outcome=outcome, seconds=0.0, message=why)
        if not why or not collected or len(ended) == len(collected) or time.monotonic() > end:
            break
    for test in collected:
        if test not in ended:
            write(notes, test=test, outcome="not run", seconds=0.0, message=why)
    return [note for note in read(notes) if "test" in note]


def keep(logs: Path, job: Job, folder: Path, found: list[Note]) -> None:
    """Appends a job's notes and output to those of the others, and says how it went."""
    with (logs / "notes.jsonl").open("a") as file:
        file.writelines(json.dumps({"job": job.name, **note}) + "\n" for note in found)
    name = f"{job.path}-{job.part}".replace("/", "-")
    with (logs / "output.log").open("a") as file:
        file.write(f"\n=== {job.name} {job.part}\n")
        if (folder / f"{name}.log").exists():
            file.write((folder / f"{name}.log").read_text(errors="replace"))
    seconds = sum(note["seconds"] for note in found)
    print(f"{job.name}: {counted(found)}, {seconds:.0f} s in them", flush=True)


def counted(found: list[Note]) -> str:
    """Such as "12 passed, 1 hung"."""
    count = Counter(note["outcome"] for note in found)
    return ", ".join(f"{number} {outcome}" for outcome, number in count.most_common()) or "no tests"


# The records


def commit() -> dict[str, Any]:
    """The commit of this tree; ONEREC_COMMIT names it where the tree came without its history."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    if (ROOT / ".git").exists() and (known := git("rev-parse", "HEAD")):
        changed = bool(git("status", "--porcelain", "--untracked-files=no"))
        return {"id": known, "time": git("show", "-s", "--format=%cI"), "dirty": changed}
    return {"id": os.environ.get("ONEREC_COMMIT", "unknown"), "time": None, "dirty": None}


def environment() -> dict[str, Any]:
    """`environment.published` of a process of its own, so that this one leaves the device alone."""
    code = (
        "import json; from onerec.environment import published as found;print(json.dumps(found()))"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    made: dict[str, Any] = json.loads(done.stdout)
    return made


def record(suite: str, found: list[Note], about: dict[str, Any]) -> dict[str, Any]:
    """A suite's record: the figures that there are, and what has none or is wrong."""

    def name(note: Note) -> str:
        return str(note["test"]).split("::")[-1].removeprefix("test_")

    return {
        "datetime": datetime.now(UTC).isoformat(),
        **about,
        "benchmarks": [
            {"suite": suite, "name": name(note), **note["figures"]}
            for note in found
            if "figures" in note
        ],
        "failed": [
            {
                "suite": suite,
                "name": name(note),
                "outcome": note["outcome"],
                "message": note["message"].replace(f"{ROOT}/", ""),
            }
            for note in found
            if note["outcome"] not in ("passed", "skipped")
        ],
    }


def check(
    tests: list[Job], suites: list[Job], *, minutes: float, logs: Path, workers: int
) -> list[Note]:
    """Runs tests side by side and then the suites, and keeps a record of each whole suite.

    Args:
        tests: Jobs of tests.
        suites: Jobs of benchmarks; one has a record if its name is a suite's, not a path.
        minutes: What has not run by then does not run.
        logs: Folder for notes.jsonl and output.log.
        workers: Jobs of tests at a time.

    Returns:
        What became of each test.
    """
    import results

    end = time.monotonic() + 60 * minutes
    logs.mkdir(parents=True, exist_ok=True)
    for file in ("notes.jsonl", "output.log"):
        (logs / file).write_text("")
    everything = []
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(workers) as pool:
        folder = Path(temporary)
        about = {"commit": commit()}
        told = pool.submit(environment)
        done = pool.map(lambda job: run(job, folder, end), tests)
        for job, found in zip(tests, done, strict=True):
            keep(logs, job, folder, found)
            everything += found
        about["environment"] = told.result()
        for job in suites:
            found = run(job, folder, end)
            keep(logs, job, folder, found)
            everything += found
            made = record(job.name, found, about)
            if job.name != job.path and made["benchmarks"]:
                print(results.store(made, [job.name]), flush=True)
    return everything


def summary(found: list[Note], most: int = 60) -> str:
    """The median of every provider, then what did not pass, then how many did."""
    from onerec.cli.bench import duration

    lines = []
    for note in found:
        if "figures" in note:
            name = note["test"].split("/")[-1].replace(".py::test_", " ")
            told = [
                f"{provider} {duration(times['median_s'])}"
                for provider, times in note["figures"]["providers"].items()
            ]
            lines.append(f"{name}: {', '.join(told)}")
    bad = [note for note in found if note["outcome"] not in ("passed", "skipped")]
    lines += [f"{n['outcome']}: {n['test']}: {n['message'][:200]}" for n in bad[:most]]
    if len(bad) > most:
        lines.append(f"and {len(bad) - most} more")
    lines.append(counted(found))
    return "\n".join(lines)


def jobs(names: list[str]) -> tuple[list[Job], list[Job]]:
    """Jobs of the tests and of the suites with these names or paths; of all if there are none.

    Raises:
        ValueError: A name that is no suite's with such benchmarks and no path.
    """
    folder = ROOT / "benchmarks"
    known = {
        path.stem.removeprefix("bench_"): str(path.relative_to(ROOT))
        for path in sorted(folder.glob("bench_*.py"))
        if "mark.gpu" in path.read_text()
    }
    known = {name: known[name] for name in [*SUITES, *known] if name in known}
    if not names:
        files = sorted((ROOT / "tests").rglob("test_*.py"))
        names = [str(p.relative_to(ROOT)) for p in files if "mark.gpu" in p.read_text()]
        names = [*sorted(names, key=lambda name: name not in PARTS), *known]
    tests, suites = [], []
    for name in names:
        if name in known:
            suites.append(Job(name, known[name], *SUITES.get(name, ())))
        elif not (ROOT / name.split("::")[0]).exists():
            raise ValueError(f"{name}: wanted a path or one of {', '.join(known)}")
        elif name.startswith("benchmarks/"):
            suites.append(Job(name, name, 150, 200))
        else:
            parts = PARTS.get(name, 1)
            tests += [Job(name, name, part=f"{i}/{parts}", threads=2) for i in range(parts)]
    return tests, suites


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="suites, or what pytest takes; all by default")
    parser.add_argument("--minutes", type=float, default=8, help="what is left then does not run")
    parser.add_argument("--logs", type=Path, default=ROOT / "build" / "gpu-check")
    options = parser.parse_args()
    try:
        tests, suites = jobs(options.names)
    except ValueError as error:
        parser.error(str(error))
    workers = os.cpu_count() or 1
    begin = time.monotonic()
    found = check(tests, suites, minutes=options.minutes, logs=options.logs, workers=workers)
    print(f"\n{summary(found)} in {time.monotonic() - begin:.0f} s; see {options.logs}")
    outcomes = {note["outcome"] for note in found}
    sys.exit(not {"passed"} <= outcomes <= {"passed", "skipped"})


if __name__ == "__main__":
    main()
