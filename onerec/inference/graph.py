"""Sessions on CUDA without the host: from history codes to the best sessions in one captured graph.

Everything that a session needs, encoder, steps and beam search, is recorded once for a bucket of
sizes and replayed as a whole; what differs between requests (histories, their lengths, denied
items, the address of the trie) is read from device memory. Compiled, not yet run on a GPU.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from onerec.inference.decoding import TorchDecoder
from onerec.model.cache import Memory
from onerec.model.feed_forward import MoE
from onerec.model.layers import DecoderLayer
from onerec.model.onerec import OneRec
from onerec.ops import BeamResult, ancestry_attention, cross_attention
from onerec.ops.moe.reference import activate
from onerec.trie import (
    EVERY_TAG,
    SCORINGS,
    DeviceTrie,
    SidTrie,
    allow_masks,
    check_scoring,
)

_Ints = npt.NDArray[np.int64]
_capturing = threading.Lock()  # a process can capture one graph at a time


class Bucket(NamedTuple):
    """What one program is made for.

    Attributes:
        batch: Requests B.
        history: Items of a history.
        width: Beams of a request M.
        items: Items of a session m.
        dead: Dead edges of all requests and levels together.
        scoring: As for `onerec.ops.BeamSearch`.
        temperature: As for `onerec.ops.BeamSearch`.
    """

    batch: int
    history: int
    width: int
    items: int
    dead: int
    scoring: str = "full_softmax"
    temperature: float = 1.0


class Requests(NamedTuple):
    """What sessions are wanted for, at most as many as a bucket's.

    Attributes:
        codes: The history of each request, int64 [S, L], or [S, L + 1] (`item_column`).
        allow: uint64 [B], the tags of which an item must have one, as bits.
        dead: For each level and request the edges not to be taken, int64, ascending.
    """

    codes: Sequence[_Ints]
    allow: npt.NDArray[np.uint64]
    dead: Sequence[Sequence[_Ints]]


class SessionProgram:
    """The sessions of one bucket with static shapes; nothing in `run` waits for the device.

    Args:
        network: In evaluation mode.
        bucket: The sizes.

    Attributes:
        host: int64, all that differs between runs, in pinned memory on CUDA; see `fill`.
        inputs: The same on the device.
    """

    def __init__(self, network: OneRec, bucket: Bucket) -> None:
        self.network, self.bucket = network, bucket
        config, device = network.config, network.start.device
        batch = bucket.batch
        columns = config.levels + network.item_column
        shapes = {
            "trie": (1 + config.levels,),
            "widths": (batch,),
            "allow": (batch,),
            "offsets": (config.levels, batch + 1),
            "history": (batch, bucket.history, columns),
            "dead": (bucket.dead,),
        }
        ends = np.cumsum([np.prod(shape) for shape in shapes.values()]).tolist()
        self.host = torch.zeros(ends[-1], dtype=torch.int64, pin_memory=device.type == "cuda")
        self.inputs = self.host.to(device)
        starts = dict(zip(shapes, [0, *ends], strict=False))
        self._views = [
            {
                name: flat[starts[name] :][: int(np.prod(shape))].view(shape)
                for name, shape in shapes.items()
            }
            for flat in (self.host, self.inputs)
        ]

    def fill(self, trie: DeviceTrie, requests: Requests) -> None:
        """Sends other requests to the device; no beam lives in the places left over.

        Args:
            trie: On the device; must live until the run has ended.
            requests: That fit the bucket.
        """
        codes, allow, dead = requests
        host = self._views[0]
        host["trie"].copy_(trie.addresses())
        host["widths"].zero_()[: len(codes)] = self.bucket.width
        host["allow"].numpy().view(np.uint64).fill(EVERY_TAG)
        host["allow"].numpy().view(np.uint64)[: len(codes)] = allow
        history = host["history"].fill_(-1).numpy()
        for row, known in enumerate(codes):
            history[row, : len(known)] = known
        lists = [edges for level in dead for edges in level]
        empty = np.zeros(self.bucket.batch - len(codes), dtype=np.int64)
        used = 0
        for level, edges in zip(host["offsets"].numpy(), dead, strict=True):
            level[:] = used + np.cumsum([0, *map(len, edges), *empty])
            used = int(level[-1])
        if used:
            host["dead"][:used] = torch.from_numpy(np.concatenate(lists))
        whole = self.host.numel() - self.bucket.dead + used
        self.inputs[:whole].copy_(self.host[:whole], non_blocking=True)

    @torch.inference_mode()
    def run(self, trie: DeviceTrie | None = None) -> Tensor:
        """Whole sessions for the requests that were filled in.

        Args:
            trie: The one that was filled in, off CUDA; there its address is read.

        Returns:
            int64 [B, M, 2 m L + 1], for each session the edges and then the codes of its items, and
            the bits of its score (float64, -inf for a dead row), best first.
        """
        network, (batch, _, width, items, _, scoring, temperature) = self.network, self.bucket
        config, inputs = network.config, self._views[1]
        levels, codes = config.levels, items * config.levels
        times = items * (levels + 1)
        memory = network.encode(inputs["history"])
        lengths = memory.mask.sum(dim=(1, 2, 3), dtype=torch.int32)
        like = network.start
        heads = (config.n_heads, config.d_model // config.n_heads)
        # Every slot is written before an ancestor is looked up in it.
        caches = [
            (
                like.new_empty(batch, times, width, *heads),
                like.new_empty(batch, times, width, *heads),
            )
            for _ in network.decoder
        ]
        # Of each beam: edges and codes so far, and the slot that holds each of its tokens.
        past = torch.zeros(batch, 1, 2 * codes + times, dtype=torch.int64, device=like.device)
        scores = torch.zeros(batch, 1, dtype=torch.float64, device=like.device)
        nodes = torch.zeros_like(past[..., 0])
        tokens = nodes
        own = torch.arange(width, device=like.device).unsqueeze(-1)
        tags = None if trie is None or not trie.tags else trie.tags
        start = 0
        for step in range(codes):
            item, level = divmod(step, levels)
            x = self._embed(tokens, start, level)
            new = x.shape[2]
            slots = past[..., 2 * codes : 2 * codes + start + new]
            slots[..., start:] = own[: past.shape[1]]
            logits = self._decode(x, caches, slots, start, memory, lengths, level)
            parents, tokens, nodes, scores, _ = torch.ops.onerec.beam_step(
                logits,
                scores,
                nodes,
                inputs["trie"] if trie is None else trie.data,
                level,
                width,
                SCORINGS.index(scoring),
                temperature,
                torch.get_num_threads(),
                inputs["widths"],
                inputs["dead"],
                inputs["offsets"][level],
                None if tags is None else tags[level],
                inputs["allow"],
                past,
                item,
                inputs["offsets"][-1],
                None if tags is None else tags[-1],
            )
            past = past.gather(1, parents.unsqueeze(-1).expand(-1, -1, past.shape[2]))
            past[..., step] = nodes
            past[..., codes + step] = tokens
            if level + 1 == levels:  # back to the root; -1 is a dead beam
                nodes = nodes.clamp(max=0)
            start += new
        return torch.cat([past[..., : 2 * codes], scores.view(torch.int64).unsqueeze(-1)], dim=-1)

    def _embed(self, tokens: Tensor, start: int, level: int) -> Tensor:
        """[B, R, n, d]: the codes [B, R] just chosen, at the time `start`, and a BOS if due.

        Args:
            tokens: Not read before the first item; -1 is read as 0.
            start: Time of the first of the n tokens.
            level: Level of the code that comes next.
        """
        network = self.network
        size, levels = network.config.codebook_size, network.config.levels
        time = network.time.weight
        if start == 0:
            return (network.bos + time[0]).expand(*tokens.shape, 1, -1)
        before = (level - 1) % levels
        rows = network.session_codes.weight[before * size : (before + 1) * size]
        x = (F.embedding(tokens.clamp(min=0), rows) + time[start]).unsqueeze(2)
        if level:
            return x
        return torch.cat([x, (network.bos + time[start + 1]).expand_as(x)], dim=2)

    def _decode(
        self,
        x: Tensor,
        caches: list[tuple[Tensor, Tensor]],
        slots: Tensor,
        start: int,
        memory: Memory,
        lengths: Tensor,
        level: int,
    ) -> Tensor:
        """Logits [B, R, K] of `level` after new tokens [B, R, n, d]; as `OneRec.decode`."""
        network = self.network
        shape = x.shape
        x = x.reshape(-1, shape[-1]).contiguous()  # written to below
        for layer, own, keys, values in zip(
            network.decoder, caches, memory.keys, memory.values, strict=True
        ):
            attention, cross = layer.attention, layer.cross
            qkv = attention.qkv(layer.attention_norm(x))
            qkv = qkv.view(*shape[:3], 3, attention.heads, -1)
            y = ancestry_attention(qkv, *own, slots, start)
            x.addmm_(y.flatten(0, 2), attention.out.weight.T)
            q = cross.q(layer.cross_norm(x)).view(len(keys), -1, cross.heads, qkv.shape[-1])
            y = cross_attention(q, keys, values, lengths)
            x.addmm_(y.flatten(0, 1), cross.out.weight.T)
            _feed_forward(layer, x)
        return F.linear(network.decoder_norm(x.view(shape)[:, :, -1]), network.head(level))


def _feed_forward(layer: DecoderLayer, x: Tensor) -> None:
    """Adds the layer's feed-forward part to x [T, d]."""
    ffn, normed = layer.ffn, layer.ffn_norm(x)
    if isinstance(ffn, MoE):
        # The other ways wait for the device to say how many rows an expert has.
        y, _ = ffn(normed, backend="triton" if x.is_cuda else "auto")
        x += y
    else:
        x.addmm_(activate(ffn.w13(normed), ffn.activation), ffn.w2.weight.T)


class GraphModel:
    """A network on a device and the graphs of its sessions, which all catalogues of it share.

    A bucket's graph is captured when it is first met (`Recommender.warmup` does so ahead). Graphs
    share one pool of memory, so sessions run one after another; threads wait for their turn.

    Args:
        network: Moved to `device` and put into evaluation mode.
        device: Where it runs. Elsewhere than on CUDA the same program runs without a graph, which
            is of use to tests alone.
        dtype: Type to cast the weights to; None leaves them.
        max_graphs: Graphs kept; the one not used for longest goes first.

    Raises:
        ValueError: Weights of a type that the kernels lack.
    """

    def __init__(
        self,
        network: OneRec,
        *,
        device: str | torch.device,
        dtype: torch.dtype | None = None,
        max_graphs: int = 64,
    ) -> None:
        wanted = network.start.dtype if dtype is None else dtype
        if wanted not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(
                f"dtype must be float32, float16 or bfloat16 for backend 'graph', got {wanted}"
            )
        self.network = network.to(device=device, dtype=dtype).eval()
        self.config, self.device = network.config, network.start.device
        self.max_graphs = max_graphs
        self._programs: OrderedDict[Bucket, tuple[SessionProgram, Any, Tensor, Tensor]]
        self._programs = OrderedDict()
        self._pool: Any = None
        self._lock = threading.Lock()

    def history_sizes(self) -> list[int]:
        """Items of a history that buckets are made for, ascending."""
        longest, sizes = self.config.history_length, [32]
        while sizes[-1] < longest:
            sizes.append(2 * sizes[-1])
        return [*sizes[:-1], longest]

    def sessions(self, bucket: Bucket, trie: DeviceTrie, requests: Requests) -> Tensor:
        """`SessionProgram.run` for these requests, which fit the bucket, as a new CPU tensor."""
        with self._lock:
            if self.device.type == "cuda":
                with torch.cuda.device(self.device):
                    return self._replay(bucket, trie, requests)
            program = SessionProgram(self.network, bucket)
            program.fill(trie, requests)
            return program.run(trie)

    def _replay(self, bucket: Bucket, trie: DeviceTrie, requests: Requests) -> Tensor:
        known = self._programs.get(bucket)
        program = SessionProgram(self.network, bucket) if known is None else known[0]
        program.fill(trie, requests)
        if known is None:
            known = self._capture(program)
            while len(self._programs) >= self.max_graphs:
                self._programs.popitem(last=False)
            self._programs[bucket] = known
        self._programs.move_to_end(bucket)
        _, graph, out, host = known
        graph.replay()
        host.copy_(out, non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        done.synchronize()
        return host.clone()

    def _capture(self, program: SessionProgram) -> tuple[SessionProgram, Any, Tensor, Tensor]:
        """The program, its graph, the graph's result and pinned memory for it."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles kernels, makes the libraries' workspaces
            program.run()
        torch.cuda.current_stream().wait_stream(stream)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with _capturing, torch.cuda.graph(graph, self._pool, capture_error_mode="thread_local"):
            out = program.run()
        return program, graph, out, torch.empty(out.shape, dtype=out.dtype, pin_memory=True)


class GraphDecoder(TorchDecoder):
    """Sessions of a `GraphModel` under a trie; what no graph has is done as `TorchDecoder` does.

    Args:
        graphs: The network and its graphs.
        trie: The allowed semantic ids; copied to the device.
    """

    def __init__(self, graphs: GraphModel, trie: SidTrie) -> None:
        super().__init__(graphs.network, trie, graphs.device)
        self.graphs = graphs
        self._on_device = DeviceTrie(trie, graphs.device)

    def search(
        self,
        codes: Sequence[_Ints],
        deny: Sequence[_Ints],
        allow_tags: Sequence[int | None] | None = None,
        *,
        beam_width: int,
        session_length: int,
        **options: Any,
    ) -> BeamResult:
        """The best sessions of each request.

        Args:
            codes: For each request its history, int64 [S, L], or [S, L + 1] (`item_column`).
            deny: For each request leaf ids never to give.
            allow_tags: As for `onerec.ops.BeamSearch`.
            beam_width: M.
            session_length: m.
            options: `scoring` and `temperature` of `onerec.ops.BeamSearch`.

        Raises:
            ValueError: An argument out of range.
        """
        longest = self.model.config.session_length
        if not 1 <= session_length <= longest:
            raise ValueError(
                f"session_length must lie in 1..{longest} (the model's), got {session_length}"
            )
        levels = self.trie.levels
        allow = allow_masks(allow_tags, len(codes), self.trie)
        gone = [np.union1d(self.trie.removed, leaves) for leaves in deny]
        dead = [
            [self._dead(level, *both) for both in zip(gone, allow, strict=True)]
            for level in range(levels)
        ]
        bucket = Bucket(
            _grown(len(codes), 1),
            next(size for size in self.graphs.history_sizes() if size >= max(map(len, codes))),
            beam_width,
            session_length,
            _grown(sum(len(edges) for lists in dead for edges in lists), 1024),
            **options,
        )
        check_scoring(bucket.scoring, bucket.temperature)
        found = self.graphs.sessions(bucket, self._on_device, Requests(codes, allow, dead))
        found = found[: len(codes)]
        count = session_length * levels
        path, tokens = found[..., :count], found[..., count:-1]
        scores = found[..., -1].contiguous().view(torch.float64)
        live = scores > float("-inf")
        shape = (*live.shape, session_length, levels)
        return BeamResult(
            torch.where(live[..., None, None], tokens.view(shape), -1).int(),
            torch.where(live[..., None], path.view(shape)[..., -1], -1),
            scores.float(),
            live.sum(dim=1, dtype=torch.int32),
        )

    def _dead(self, level: int, leaves: _Ints, allow: np.uint64) -> _Ints:
        """Edges of a level below which `leaves`, removed ones among them, leave none allowed."""
        if not len(leaves):
            return leaves
        return self.trie.native.dead_edges(level, int(allow), leaves.ctypes.data, len(leaves))


def _grown(needed: int, least: int) -> int:
    """The smallest `least` times a power of two that is enough."""
    while least < needed:
        least *= 2
    return least
