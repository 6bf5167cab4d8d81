"""Every command of docs/logs.md runs on a tiny file of the form that it is for."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from onerec.cli.main import main
from onerec.report import plots

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "logs.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## \d+\. (.*?)$(.*?)(?=^## )", PAGE, re.S | re.M))
TINY = shlex.split(
    "--model.d_model 16 --model.d_ff 32 --model.encoder_layers 1 --model.item_negatives 0 "
    "--model.history_length 8 --train.steps 2 --train.eval_every 0 --train.num_threads 1 "
    "--train.batch_size 16 --reward.max_steps 2 --reward.min_positives 5 --reward.d_model 8 "
    "--reward.n_heads 2 --reward.batch_size 32 --align.iterations 1 --align.steps 1 "
    "--align.candidates 8 --align.rate 0.5 "
    "--align.monitor 4 --align.monitor_beam 4 --align.min_gap 0.0001 --evaluate.max_users 20 "
    "--evaluate.resamples 5 --evaluate.latency_requests 0 --evaluate.unmasked false "
    "--evaluate.sample_sessions 2 --recommend.users 3"
)
DAY = 86_400_000
START = 1_717_200_000_000  # 2024-06-01
USERS, ITEMS, TAKEN = 30, 24, 10

Rows = list[tuple[int, int, int, int]]  # user, item, ms, number of the row within the user


def walks() -> Rows:
    rng, rows = np.random.default_rng(0), []
    for user in range(USERS):
        walk = (rng.integers(ITEMS) + np.cumsum(rng.integers(1, 3, TAKEN))) % ITEMS
        rows += [(user, int(i), START + DAY * n + 60_000 * user, n) for n, i in enumerate(walk)]
    return rows


def text(path: str, header: str, line: Callable[[int, int, int, int], str]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    lines = [line(*row) for row in walks()]
    Path(path).write_text("\n".join([header, *lines] if header else lines) + "\n", encoding="utf-8")


def iso(ms: int) -> str:
    return str(np.datetime64(ms, "ms").astype("datetime64[s]"))


def movielens() -> None:
    text("ml-100k/u.data", "", lambda u, i, t, n: f"{u}\t{i}\t{1 + n % 5}\t{t // 1000}")
    films = [
        f"{i}|Film {i} (1995)|01-Jan-1995||url|" + "|".join("01"[i % 2] * 19) for i in range(ITEMS)
    ]
    Path("ml-100k/u.item").write_text("\n".join(films) + "\n", encoding="latin-1")


def purchases() -> None:
    text("purchases.csv", "customer,sku,bought_at", lambda u, i, t, n: f"c{u},sku-{i},{iso(t)}")


def clicks() -> None:
    kinds = ("view", "cart", "purchase")
    text(
        "events.csv",
        "user_id,item_id,event_type,timestamp",
        lambda u, i, t, n: f"u{u},i{i},{kinds[n % 3]},{t}",
    )


def baskets() -> None:
    text(
        "orders.csv",
        "household,product,ordered_at,order_id",
        lambda u, i, t, n: f"h{u},p{i},{iso(START + DAY * (n // 3) + 60_000 * u)},o{u}-{n // 3}",
    )


def kuairand() -> None:
    header = (
        "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,"
    )
    header += "is_hate,long_view,play_time_ms,duration_ms,profile_stay_time,comment_stay_time,"
    header += "is_profile_enter,is_rand,tab"

    def line(u: int, i: int, t: int, n: int) -> str:
        like, watched = int(n % 3 == 0), 5_000 + 5_000 * ((u + n) % 4)
        return (
            f"{u},{i},20220422,100,{t - 2 * 365 * DAY},1,{like},0,0,0,0,1,{watched},20000,0,0,0,0,1"
        )

    text("KuaiRand-Pure/data/log_standard_4_08_to_4_21_pure.csv", header, line)
    features = [
        "video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,"
    ]
    features[0] += "server_width,server_height,music_id,music_type,tag"
    features += [f"{i},{i % 5},NORMAL,2022-04-01,x,1,20000,1,1,1,1,{i % 4}" for i in range(ITEMS)]
    Path("KuaiRand-Pure/data/video_features_basic_pure.csv").write_text("\n".join(features) + "\n")


def seconds() -> None:
    text("ratings.csv", "uid,film,when", lambda u, i, t, n: f"{u},{i},{t // 1000}")


def json_lines() -> None:
    def line(u: int, i: int, t: int, n: int) -> str:
        row = {"user_id": f"u{u}", "item_id": f"i{i}", "timestamp": t}
        return json.dumps({**row, "watch_time_ms": 20_000 + 1000 * (n % 4)})

    text("events.jsonl", "", line)


def recbole() -> None:
    header = "user_id:token\titem_id:token\ttimestamp:float"
    text("ml-recbole/ml.inter", header, lambda u, i, t, n: f"{u}\t{i}\t{t // 1000}.0")
    items = ["item_id:token\tmovie_title:token_seq\tclass:token_seq"]
    items += [f"{i}\tFilm {i}\tDrama War" for i in range(ITEMS)]
    Path("ml-recbole/ml.item").write_text("\n".join(items) + "\n")


def parts() -> None:
    for day in range(TAKEN):
        of_day = [(f"u{u}", f"i{i}", t) for u, i, t, n in walks() if n == day]
        folder = Path(f"log/dt=2024-06-{day + 1:02d}")
        folder.mkdir(parents=True)
        columns = map(list, zip(*of_day, strict=True))
        table = pa.table(dict(zip(("user_id", "item_id", "timestamp"), columns, strict=True)))
        pq.write_table(table, folder / "part-0.parquet")


FILES: dict[str, Callable[[], None]] = {
    "MovieLens": movielens,
    "Purchases": purchases,
    "Clicks with event types": clicks,
    "Baskets": baskets,
    "KuaiRand": kuairand,
    "CSV with times in seconds": seconds,
    "JSON lines": json_lines,
    "RecBole's atomic files": recbole,
    "A folder of parts": parts,
}
# What the log must have become where it is not learned item by item: rule, most items of a session.
BECOMES: dict[str, tuple[str, int]] = {
    "Baskets": ("request", 5),
    "KuaiRand": ("next", 5),
    "Clicks with event types": ("next", 1),
}


def test_each_log_of_the_page_is_tested() -> None:
    assert set(SECTIONS) == {*FILES, "A DataFrame"}
    assert len(SECTIONS) == 10


@pytest.mark.parametrize("name", FILES, ids=lambda name: name.replace(" ", "-"))
def test_the_command_of_the_page(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plots, "_svg", lambda *args, **options: "<svg></svg>")
    FILES[name]()
    for code in re.findall(r"```python\n(.*?)```", SECTIONS[name], re.S):
        exec(code, {})
    (command,) = re.findall(r"```bash\n(.*?)```", SECTIONS[name], re.S)
    program, *argv = shlex.split(command.replace("\\\n", " "))
    assert program == "onerec"
    assert main([*argv, *TINY, "--json"]) == 0, capsys.readouterr().err
    stages = json.loads(capsys.readouterr().out)["stages"]
    rule, length = BECOMES.get(name, ("next", 1))
    assert (stages["sessions"]["rule"], stages["sessions"]["session_length"]) == (rule, length)
    assert stages["sessions"]["users"] == USERS
    assert stages["sessions"]["items"] == ITEMS
    assert ("align" in stages) == (name == "KuaiRand"), "only whole sessions with feedback"
    out = Path(argv[argv.index("--out") + 1])
    rows = pq.read_table(out / "recommend" / "recommendations.parquet").to_pylist()
    assert len({row["user_id"] for row in rows}) == 3
    if name in ("MovieLens", "RecBole's atomic files"):
        assert all(row["text"].startswith("Film ") for row in rows)


def test_the_frame_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pandas")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plots, "_svg", lambda *args, **options: "<svg></svg>")
    purchases()
    (code,) = re.findall(r"```python\n(.*?)```", SECTIONS["A DataFrame"], re.S)
    small: dict[str, Any] = {
        "model": {"d_model": 16, "d_ff": 32, "encoder_layers": 1, "item_negatives": 0},
        "train": {"steps": 2, "eval_every": 0, "num_threads": 1},
        "evaluate": {"resamples": 5, "latency_requests": 0, "unmasked": False},
    }
    space: dict[str, Any] = {"small": small}
    exec(code.replace('out="runs/frame"', 'out="runs/frame", **small'), space)
    printed = capsys.readouterr().out
    assert "item_id" in printed
    assert "sku-" in printed


def test_flags_of_the_page_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    known = set(re.findall(r"--[\w.]+", capsys.readouterr().out))
    used = set(re.findall(r"(--(?:sessions|train|evaluate|recommend|preset)[\w.]*)", PAGE))
    assert len(used) > 8
    assert used <= known
