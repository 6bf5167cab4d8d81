"""Ray Serve: two replicas answer what the recommender says."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ray = pytest.importorskip("ray", reason='needs the extra "ray"')
pytest.importorskip("ray.serve", reason='needs the extra "ray"')

from onerec import OneRec, OneRecConfig, Recommender  # noqa: E402
from onerec.inference.exported import export  # noqa: E402
from onerec.serving.config import ServeConfig  # noqa: E402
from onerec.serving.ray import deployment  # noqa: E402
from onerec.tokenizer import Catalog  # noqa: E402

K = 16


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_two_replicas_answer_what_the_recommender_says(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = OneRecConfig.preset("paper-tiny", codebook_size=K, session_length=2, init_std=0.3)
    sids = np.random.default_rng(0).integers(0, K, (60, 3))
    export(OneRec(config).eval(), Catalog.build(range(60), sids, K), tmp_path / "export")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def send(history: list[int]) -> tuple[int, Any]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/recommend",
            json.dumps({"history": history, "beam_width": 8}).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    ray.init(num_cpus=2, include_dashboard=False, logging_level="error")
    try:
        ray.serve.start(http_options={"host": "127.0.0.1", "port": port})
        made = deployment(str(tmp_path / "export"), ServeConfig(num_threads=1), num_replicas=2)
        ray.serve.run(made)
        state = ray.serve.status().applications["default"].deployments["onerec"]
        assert state.replica_states == {"RUNNING": 2}
        histories = [[i, 59 - i] for i in range(20)]
        with ThreadPoolExecutor(4) as pool:
            got = list(pool.map(send, histories))
        wanted = Recommender.from_exported(tmp_path / "export").recommend(histories, beam_width=8)
        for (status, body), one in zip(got, wanted, strict=True):
            assert status == 200
            assert [s["items"] for s in body["sessions"]] == one.item_ids
        assert send(["a"])[0] == 422  # type: ignore[list-item]
    finally:
        ray.serve.shutdown()
        ray.shutdown()
