from collections.abc import Callable
from typing import TypedDict

import numpy as np
import numpy.typing as npt

class CudaInfo(TypedDict):
    built: bool
    devices: int
    problem: str

def version() -> str: ...
def isa() -> str: ...
def isas() -> list[str]: ...
def set_isa(name: str) -> None: ...
def cuda_info() -> CudaInfo: ...

class TrieFormatError(RuntimeError): ...

class Trie:
    levels: int
    codebook_size: int
    n_leaves: int
    address: int
    nbytes: int
    @staticmethod
    def build(sids: int, n: int, row_stride: int, levels: int, codebook_size: int) -> Trie: ...
    @staticmethod
    def load(path: str) -> Trie: ...
    @staticmethod
    def from_bytes(data: bytes) -> Trie: ...
    def save(self, path: str) -> None: ...
    def level_stats(self, level: int) -> tuple[int, int, int, int]: ...
    n_live: int
    has_tags: bool
    def removed(self) -> npt.NDArray[np.int64]: ...
    def tags(self, level: int) -> npt.NDArray[np.uint64]: ...
    def without(self, leaves: int, n: int) -> Trie: ...
    def with_tags(self, tags: int) -> Trie: ...
    def with_sids(self, sids: int, n: int, row_stride: int, tags: int) -> Trie: ...
    def dead_edges(self, level: int, allow: int, leaves: int, n: int) -> npt.NDArray[np.int64]: ...
    def lookup(
        self, prefixes: int, n: int, row_stride: int, depth: int, nodes: int, num_threads: int
    ) -> None: ...
    def bitmask(self, nodes: int, n: int, depth: int, words: int) -> None: ...
    def leaf_sids(self, leaves: int, n: int, sids: int) -> None: ...

class LiveTrie:
    def __init__(self, trie: Trie) -> None: ...
    def pin(self) -> tuple[int, Trie]: ...
    def insert(self, sids: int, n: int, row_stride: int, tags: int) -> int: ...
    def remove(self, sids: int, n: int, row_stride: int) -> int: ...
    def fold(self) -> int: ...
    def swap(self, trie: Trie) -> int: ...
    def rollback(self) -> int: ...

class BalancedWork(TypedDict):
    cost: float
    dual: float
    gap: float
    moves: int
    passes: int
    sweeps: int
    pass_seconds: float
    price_seconds: float
    finish_seconds: float

class BalancedFit(BalancedWork):
    inertia: float
    iterations: int
    converged: bool

def balanced_kmeans_fit(
    x: int,
    rows: int,
    columns: int,
    stride: int,
    clusters: int,
    method: str,
    max_iter: int,
    tolerance: float,
    seed: int,
    num_threads: int,
    memory_budget: int,
    centers_given: bool,
    centers: int,
    prices: int,
    labels: int,
    steps_done: int,
    inertia_done: float,
    on_iteration: Callable[[int, float], None] | None,
    cuda_device: int,
) -> BalancedFit: ...
def balanced_assign(
    x: int,
    rows: int,
    columns: int,
    stride: int,
    centers: int,
    clusters: int,
    seed: int,
    num_threads: int,
    memory_budget: int,
    prices_given: bool,
    prices: int,
    labels: int,
    labels_given: bool = False,
    cuda_device: int = -1,
) -> BalancedWork: ...
def priced_argmin(
    x: int,
    rows: int,
    columns: int,
    stride: int,
    centers: int,
    clusters: int,
    prices: int,
    num_threads: int,
    labels: int,
    distances: int,
    cuda_device: int = -1,
) -> None: ...
def capped_assign(
    x: int,
    rows: int,
    columns: int,
    stride: int,
    centers: int,
    clusters: int,
    prices: int,
    groups: int,
    cap: int,
    num_threads: int,
    labels: int,
) -> None: ...
def assign_within(
    x: int,
    rows: int,
    columns: int,
    stride: int,
    centers: int,
    clusters: int,
    prices: int,
    room: int,
    num_threads: int,
    labels: int,
) -> None: ...
def beam_step(
    trie: int,
    trie_bytes: int,
    level: int,
    logits: int,
    type: int,
    batch_stride: int,
    row_stride: int,
    batch: int,
    rows: int,
    scores: int,
    nodes: int,
    widths: int,
    dead: int,
    dead_offsets: int,
    tags: int,
    allow: int,
    paths: int,
    path_size: int,
    items: int,
    leaf_offsets: int,
    leaf_tags: int,
    scoring: int,
    temperature: float,
    width: int,
    out_parents: int,
    out_tokens: int,
    out_nodes: int,
    out_scores: int,
    out_valid: int,
    num_threads: int,
) -> None: ...
def legal_logits(
    hidden: int,
    batch_stride: int,
    row_stride: int,
    size: int,
    beams: int,
    head: int,
    head_stride: int,
    rows: int,
    codes: int,
    count: int,
    logits: int,
    num_threads: int,
) -> None: ...
def cuda_beam_step_bytes(batch: int, rows: int, items: int) -> int: ...
def cuda_beam_step(
    trie: int,
    codebook_size: int,
    level: int,
    logits: int,
    type: int,
    batch_stride: int,
    row_stride: int,
    batch: int,
    rows: int,
    scores: int,
    nodes: int,
    widths: int,
    dead: int,
    dead_offsets: int,
    tags: int,
    allow: int,
    paths: int,
    path_size: int,
    items: int,
    leaf_offsets: int,
    leaf_tags: int,
    scoring: int,
    temperature: float,
    width: int,
    out_parents: int,
    out_tokens: int,
    out_nodes: int,
    out_scores: int,
    out_valid: int,
    workspace: int,
    stream: int,
) -> None: ...

class BeamSearch:
    def __init__(
        self,
        trie: Trie,
        batch: int,
        width: int,
        items: int,
        scoring: int,
        temperature: float,
        num_threads: int,
        ramp: list[int],
    ) -> None: ...
    def reset(
        self, deny: int, offsets: int, allow: int, widths: int, trie: Trie | None
    ) -> None: ...
    rows: int
    def legal(self) -> tuple[int, int]: ...
    def step_legal(self, logits: int, count: int) -> None: ...
    def step(
        self, logits: int, type: int, batch_stride: int, row_stride: int, rows: int
    ) -> None: ...
    def state(self, parents: int, tokens: int, scores: int, valid: int) -> None: ...
    def items(self, items: int) -> None: ...
    def sids(self, sids: int) -> None: ...

def packed_bytes(n: int, k: int, type: int) -> int: ...
def advise_large_pages(data: int, bytes: int) -> None: ...
def pack_weights(
    w: int, n: int, k: int, row_stride: int, type: int, packed: int, num_threads: int
) -> None: ...
def packed_gemm(
    x: int,
    rows: int,
    x_stride: int,
    packed: int,
    n: int,
    k: int,
    type: int,
    y: int,
    y_stride: int,
    add: bool,
    num_threads: int,
) -> None: ...

class EngineFormatError(RuntimeError): ...

class EngineModel:
    nbytes: int
    item_sids: int
    config: dict[str, int | float]
    @staticmethod
    def build(
        fields: dict[str, int | float], tensors: dict[str, tuple[int, int]], num_threads: int
    ) -> EngineModel: ...
    @staticmethod
    def load(path: str) -> EngineModel: ...
    def save(self, path: str) -> None: ...

def save_catalog(
    path: str,
    n: int,
    leaves: int,
    leaf_of_item: int,
    text: bool,
    ids: int,
    offsets: int,
    tags: int,
    engine: int,
    trie: int,
    mixture: int,
) -> None: ...
def save_mixture(
    path: str,
    n: int,
    place: int,
    masked: list[float],
    unmasked: list[float],
    lists: list[tuple[int, int, int]],
    parts: list[tuple[int, int, int, int, int, int]],
) -> None: ...

class Engine:
    def __init__(self, model: EngineModel, trie: Trie) -> None: ...
    def run(
        self,
        history: int,
        offsets: int,
        deny: int,
        deny_offsets: int,
        allow: int,
        batch: int,
        width: int,
        session_length: int,
        scoring: int,
        temperature: float,
        num_threads: int,
        items: int,
        sids: int,
        scores: int,
        valid: int,
    ) -> None: ...
    def item_scores(
        self, history: int, offsets: int, batch: int, num_threads: int, scores: int
    ) -> None: ...
    def item_log_probs(
        self,
        history: int,
        offsets: int,
        batch: int,
        items: int,
        count: int,
        num_threads: int,
        scores: int,
    ) -> None: ...

class PackedExperts:
    def __init__(
        self,
        gate: int,
        up: int,
        down: int,
        type: int,
        activation: int,
        count: int,
        width: int,
        hidden: int,
    ) -> None: ...
    def workspace(self, tokens: int, slots: int) -> int: ...
    def forward(
        self,
        x: int,
        tokens: int,
        x_stride: int,
        ids: int,
        gates: int,
        slots: int,
        first: int,
        workspace: int,
        y: int,
        num_threads: int,
    ) -> None: ...
