"""Padded batches of semantic ids from ragged samples, addressable by step."""

from __future__ import annotations

import math
import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from onerec.ragged import padded

if TYPE_CHECKING:
    from onerec.data.session_set import Samples


_STEP_ITEMS = 1536  # target items of a step where nobody says how many samples it has


class Batch(NamedTuple):
    """One process's share of a micro-batch.

    Attributes:
        history: int64 [b, S, L], semantic ids, oldest first, -1 past a history's end; S >= 1 is the
            longest history of this share. With `item_column` [b, S, L + 1]: the item's index last.
        target: int64 [b, m, L], -1 past a session's end; of `PrefixBatches` [b, S, m, L], the
            session after each prefix. With `item_column` [..., L + 1].
        items: Target items in this share.
    """

    history: torch.Tensor
    target: torch.Tensor
    items: int


class SessionBatches:
    """Batches of a training set in a fixed pseudo-random order.

    Every epoch is a permutation drawn from (seed, epoch), sorted by history length within
    `bucket_batches` batches and cut into ceil(n / batch_size) batches, which are shuffled again;
    where n is no multiple of `batch_size`, the first samples of the permutation fill the last
    batch. Any step can be asked for without reading those before it, and the global batch of a step
    is the same however many processes share it: process r takes rows r, r + world_size, ... of
    each micro-batch.

    Args:
        samples: What to draw from.
        sids: int [N, L], semantic id of every item index, all >= 0.
        history_length: Last items of a history that are kept.
        session_length: First items of a target that are kept (m).
        batch_size: Samples per optimizer step, over all processes and micro-batches; None: the
            power of two with which a step has about 1,536 target items, 16 to 1,024.
        micro_batches: Parts a step is computed in.
        rank: This process, 0 <= rank < world_size.
        world_size: Number of processes.
        seed: Of the order.
        bucket_batches: Batches that are sorted by length together; 1 turns it off.
        item_column: Put the item's index behind its codes.

    Raises:
        ValueError: On no samples, an empty target, item indices without a semantic id, or a
            `batch_size` that cannot be shared out evenly.
    """

    _gather: _Gather

    def __init__(
        self,
        samples: Samples,
        sids: npt.NDArray[np.integer],
        *,
        history_length: int,
        session_length: int,
        batch_size: int | None,
        micro_batches: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        bucket_batches: int = 32,
        item_column: bool = False,
    ) -> None:
        self._gather = self._gatherer(
            samples, sids, history_length, session_length, item_column=item_column
        )
        shares = micro_batches * world_size
        if batch_size is None:
            few = 2 ** round(math.log2(_STEP_ITEMS / self._gather.target_lengths.mean()))
            batch_size = -(-min(max(few, 16), 1024) // shares) * shares
        if batch_size % shares:
            raise ValueError(
                f"batch_size: wanted a multiple of grad_accumulation x processes = {micro_batches}"
                f" x {world_size}, got {batch_size}"
            )
        self.batch_size = batch_size
        self.item_column = item_column
        self.micro_batches = micro_batches
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.bucket_batches = bucket_batches
        self.steps_per_epoch = -(-len(self._gather.history_lengths) // batch_size)
        self._plan_epoch = -1
        self._plan = np.empty((0, batch_size), np.int64)

    @staticmethod
    def _gatherer(*args: Any, **options: Any) -> _Gather:
        return _Gather(*args, **options)

    def rows(self, step: int) -> npt.NDArray[np.int64]:
        """Sample numbers [batch_size] of the global batch of `step`."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._plan_epoch:
            self._plan = self._draw(epoch)
            self._plan_epoch = epoch
        row: npt.NDArray[np.int64] = self._plan[position]
        return row

    def _draw(self, epoch: int) -> npt.NDArray[np.int64]:
        rng = np.random.default_rng([self.seed, epoch])
        lengths = self._gather.history_lengths
        size = self.steps_per_epoch * self.batch_size
        order = np.resize(rng.permutation(len(lengths)), size)
        if self.bucket_batches > 1:
            bucket = np.arange(size) // (self.bucket_batches * self.batch_size)
            key = bucket * (int(lengths.max()) + 1) + lengths[order]
            order = order[np.argsort(key, kind="stable")]
        return order.reshape(-1, self.batch_size)[rng.permutation(self.steps_per_epoch)]

    def step_items(self, step: int) -> int:
        """Target items in the global batch of `step`: what its mean loss is taken over."""
        return int(self._gather.target_lengths[self.rows(step)].sum())

    def step_tokens(self, step: int) -> int:
        """Semantic-id codes read and predicted in the global batch of `step`, without padding."""
        rows = self.rows(step)
        items = self._gather.history_lengths[rows].sum() + self._gather.target_lengths[rows].sum()
        return int(items) * self._gather.levels

    def share(self, step: int, micro: int = 0) -> npt.NDArray[np.int64]:
        """Sample numbers of this process's share of micro-batch `micro` of `step`."""
        return self.rows(step).reshape(self.micro_batches, -1)[micro, self.rank :: self.world_size]

    def batch(self, step: int, micro: int = 0) -> Batch:
        """The padded batch of `share`."""
        return self.take(self.share(step, micro))

    def take(self, rows: npt.NDArray[np.int64]) -> Batch:
        """The padded batch of any samples."""
        return self._gather(rows)


class PrefixBatches(SessionBatches):
    """Batches of whole users, in which every prefix of the sequence supervises the next session.

    Built from the training sessions of the rule "next", whose targets continue their histories: a
    user's sessions are put together to one sequence x_0 .. x_T. A sequence of more than
    `history_length` prefixes is cut into windows of so many, counted from its end, so that every
    item is a target; the prefixes of a window begin where the window does. Arguments as in
    `SessionBatches`, with windows for samples, except that `bucket_batches` means nothing: most
    targets are of few users, whose steps would weigh no more than the others if they had batches of
    their own. Windows are sorted by length within a batch, so that its micro-batches have little
    padding.

    Raises:
        ValueError: A target is not what follows its history.
    """

    @staticmethod
    def _gatherer(*args: Any, **options: Any) -> _Gather:
        return _GatherPrefixes(*args, **options)

    def _draw(self, epoch: int) -> npt.NDArray[np.int64]:
        rng = np.random.default_rng([self.seed, epoch])
        lengths = self._gather.history_lengths
        size = self.steps_per_epoch * self.batch_size
        batches = np.resize(rng.permutation(len(lengths)), size).reshape(-1, self.batch_size)
        order = np.argsort(lengths[batches], axis=1, kind="stable")
        return np.take_along_axis(batches, order, axis=1)


class OrderedBatches:
    """Every sample once, longest history first, for validation; process r takes every
    `world_size`-th sample. Arguments as in `SessionBatches`, `batch_size` per process."""

    def __init__(
        self,
        samples: Samples,
        sids: npt.NDArray[np.integer],
        *,
        history_length: int,
        session_length: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        item_column: bool = False,
    ) -> None:
        self._gather = _Gather(
            samples, sids, history_length, session_length, item_column=item_column
        )
        order = np.argsort(-self._gather.history_lengths, kind="stable")[rank::world_size]
        self._parts = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, index: int) -> Batch:
        return self._gather(self._parts[index])


class _Gather:
    """Sample numbers -> padded batch."""

    def __init__(
        self,
        samples: Samples,
        sids: npt.NDArray[np.integer],
        history_length: int,
        session_length: int,
        *,
        item_column: bool = False,
    ) -> None:
        sids = np.asarray(sids)
        if sids.ndim != 2 or not np.issubdtype(sids.dtype, np.integer):
            raise ValueError(
                f"sids: wanted integers of shape [N, L], got {sids.dtype} {list(sids.shape)}"
            )
        if sids.size == 0 or sids.min() < 0:
            raise ValueError("sids: wanted at least one item and no negative code")
        if len(samples) == 0:
            raise ValueError("samples: wanted at least one sample, got none")
        for name in ("sequence_values", "target_values"):
            values = getattr(samples, name)
            if len(values) and not 0 <= values.min() <= values.max() < len(sids):
                raise ValueError(
                    f"samples.{name}: wanted values in 0..{len(sids) - 1}, the rows of sids, got "
                    f"{values.min()}..{values.max()}"
                )
        offsets = np.asarray(samples.target_offsets, np.int64)
        targets = np.diff(offsets)
        if targets.min() < 1:
            raise ValueError(f"sample {int(targets.argmin())} has no target item; wanted 1 or more")
        end = np.asarray(samples.history_end, np.int64)
        begin = np.maximum(np.asarray(samples.history_begin, np.int64), end - history_length)
        self.levels: int = sids.shape[1]
        self.session_length = session_length
        self.history_lengths = end - begin
        self.target_lengths: npt.NDArray[np.int64] = np.minimum(targets, session_length)
        self._history_begin = begin
        self._target_begin = offsets[:-1]
        # One value more, so that an empty log can be addressed too.
        self._history_values = np.append(samples.sequence_values, np.int32(0))
        self._target_values = np.asarray(samples.target_values)
        # Padding is item -1, which numpy reads as the last row.
        table = np.vstack([sids, np.full((1, self.levels), -1)]).astype(np.int64)
        if item_column:
            column = np.append(np.arange(len(sids)), -1)
            table = np.concatenate([table, column[:, None]], axis=1)
        self._table = table

    def __call__(self, rows: npt.NDArray[np.int64]) -> Batch:
        lengths = self.history_lengths[rows]
        longest = max(1, int(lengths.max(initial=0)))
        history = padded(self._history_values, self._history_begin[rows], lengths, longest)
        lengths = self.target_lengths[rows]
        target = padded(self._target_values, self._target_begin[rows], lengths, self.session_length)
        return Batch(
            torch.from_numpy(self._table[history]),
            torch.from_numpy(self._table[target]),
            int(lengths.sum()),
        )


class _GatherPrefixes(_Gather):
    """Window numbers -> a padded batch with a target for every prefix."""

    def __init__(
        self,
        samples: Samples,
        sids: npt.NDArray[np.integer],
        history_length: int,
        session_length: int,
        *,
        item_column: bool = False,
    ) -> None:
        super().__init__(samples, sids, history_length, session_length, item_column=item_column)
        ends = np.asarray(samples.history_end, np.int64)
        offsets = np.asarray(samples.target_offsets, np.int64)
        sizes = np.diff(offsets)
        follows = np.repeat(ends - offsets[:-1], sizes) + np.arange(offsets[-1])
        if follows.max() >= len(samples.sequence_values) or not np.array_equal(
            samples.sequence_values[follows], self._target_values
        ):
            raise ValueError(
                "samples: wanted targets that follow their histories in the user's sequence "
                "(sessions of the rule 'next'), for every prefix is to be supervised"
            )
        users, row = np.unique(samples.user_row, return_inverse=True)
        last = np.zeros(len(users), np.int64)
        np.maximum.at(last, row, ends + sizes)
        begin = np.full(len(users), np.iinfo(np.int64).max)
        np.minimum.at(begin, row, np.asarray(samples.history_begin, np.int64))
        windows = -(-(last - begin - 1) // history_length)
        back = np.arange(windows.sum()) - np.repeat(np.cumsum(windows) - windows, windows)
        last = np.repeat(last, windows) - back * history_length
        begin = np.maximum(np.repeat(begin, windows), last - history_length - 1)
        self._history_begin = begin
        self.history_lengths = last - begin - 1
        wanted = np.arange(1, session_length + 1)
        # A prefix near the end has fewer than m items after it.
        full = np.cumsum(wanted)
        self.target_lengths = np.where(
            self.history_lengths >= session_length,
            full[-1] + (self.history_lengths - session_length) * session_length,
            full[np.minimum(self.history_lengths, session_length) - 1],
        )

    def __call__(self, rows: npt.NDArray[np.int64]) -> Batch:
        lengths = self.history_lengths[rows]
        longest = int(lengths.max())
        sequence = padded(
            self._history_values,
            self._history_begin[rows],
            lengths + 1,
            longest + self.session_length,
        )
        target = np.lib.stride_tricks.sliding_window_view(
            sequence[:, 1:], self.session_length, axis=1
        )
        history = np.where(np.arange(longest) < lengths[:, None], sequence[:, :longest], -1)
        return Batch(
            torch.from_numpy(self._table[history]),
            torch.from_numpy(self._table[target]),
            int(self.target_lengths[rows].sum()),
        )


def fingerprint(samples: Samples, sids: npt.NDArray[np.integer]) -> str:
    """A short checksum of everything that batches are made of."""
    checksum = 0
    for values in (
        samples.sequence_values,
        samples.history_begin,
        samples.history_end,
        samples.target_offsets,
        samples.target_values,
        sids,
    ):
        checksum = zlib.crc32(np.ascontiguousarray(values).data, checksum)
    return f"{checksum:08x}"
