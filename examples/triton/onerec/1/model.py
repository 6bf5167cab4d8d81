"""The native engine behind Triton Inference Server; see ../config.pbtxt."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from onerec import Recommender


class TritonPythonModel:
    """One process of the server: loads an exported folder, answers batches of requests."""

    def initialize(self, args: dict[str, str]) -> None:
        parameters = json.loads(args["model_config"])["parameters"]
        settings = {name: value["string_value"] for name, value in parameters.items()}
        self.recommender = Recommender.from_exported(
            settings["folder"], num_threads=int(settings["num_threads"])
        )
        self.beam_width = int(settings["beam_width"])
        self.num_sessions = int(settings["num_sessions"])
        self.text = self.recommender.catalog.item_ids.dtype == object
        self.recommender.warmup(beam_width=self.beam_width)

    def execute(self, requests: list[Any]) -> list[Any]:
        """All users of all requests in one call of the engine; a response a request, in order."""
        histories: list[list[Any]] = []
        exclude: list[list[Any]] = []
        users, failures = [], {}
        for place, request in enumerate(requests):
            try:
                rows = self._ids(request, "history")
                denied = self._ids(request, "exclude") or [[]] * len(rows)
                if len(denied) != len(rows):
                    raise ValueError(f"exclude: wanted {len(rows)} rows, got {len(denied)}")
            except ValueError as error:
                failures[place] = pb_utils.TritonError(str(error))
                rows = denied = []
            histories += rows
            exclude += denied
            users.append(len(rows))
        found = self.recommender.recommend(
            histories,
            exclude=exclude,
            beam_width=self.beam_width,
            num_sessions=self.num_sessions,
        )
        responses, first = [], 0
        for place, count in enumerate(users):
            mine = found[first : first + count]
            first += count
            if place in failures:
                responses.append(pb_utils.InferenceResponse([], failures[place]))
            else:
                responses.append(pb_utils.InferenceResponse(self._tensors(mine)))
        return responses

    def _ids(self, request: Any, name: str) -> list[list[Any]]:
        tensor = pb_utils.get_input_tensor_by_name(request, name)
        if tensor is None:
            return []
        rows = [[item.decode() for item in row] for row in np.atleast_2d(tensor.as_numpy())]
        if self.text:
            return rows
        return [[int(item) for item in row if item.lstrip("-").isdecimal()] for row in rows]

    def _tensors(self, found: list[Any]) -> list[Any]:
        length = self.recommender.config.session_length
        shape = (len(found), self.num_sessions, length)
        items = np.full(shape, b"", dtype=object)
        scores = np.full(shape[:2], -np.inf, dtype=np.float32)
        for row, one in enumerate(found):
            for place, (session, score) in enumerate(zip(one.item_ids, one.scores, strict=True)):
                items[row, place, : len(session)] = [str(item).encode() for item in session]
                scores[row, place] = score
        return [pb_utils.Tensor("items", items), pb_utils.Tensor("scores", scores)]
