"""Batches: padding, order, sharing out, addressing by step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec.data.session_set import Samples
from onerec.training.batches import (
    OrderedBatches,
    PrefixBatches,
    SessionBatches,
    fingerprint,
)

ITEMS, LEVELS = 50, 3


def make_samples(n: int, seed: int = 0, longest: int = 30, targets: int = 5) -> Samples:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, longest, n)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    sizes = rng.integers(1, targets + 1, n)
    return Samples(
        sequence_values=rng.integers(0, ITEMS, bounds[-1], dtype=np.int32),
        history_begin=bounds[:-1],
        history_end=bounds[1:],
        target_values=rng.integers(0, ITEMS, sizes.sum(), dtype=np.int32),
        target_offsets=np.concatenate([[0], np.cumsum(sizes)]),
        user_row=np.arange(n, dtype=np.int32),
        timestamp=np.zeros(n, np.int64),
    )


def make_sids(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 8, (ITEMS, LEVELS), dtype=np.int32)


def plain_rows(samples: Samples, sids: np.ndarray, rows: np.ndarray, n: int, m: int) -> list[Any]:
    """What a batch must hold, sample by sample: (history codes, target codes)."""
    return [
        (
            sids[samples.history(row)[-n:]].tolist() if n else [],
            sids[samples.target(row)[:m]].tolist(),
        )
        for row in rows
    ]


def unpadded(batch: Any) -> list[Any]:
    """The samples of a batch without padding, after checking that padding is at the end."""
    out = []
    for history, target in zip(batch.history, batch.target, strict=True):
        pair = []
        for codes in (history, target):
            real = codes[:, 0] >= 0
            length = int(real.sum())
            assert real[:length].all()
            assert (codes[length:] == -1).all()
            pair.append(codes[:length].tolist())
        out.append(tuple(pair))
    return out


OPTIONS = {"history_length": 20, "session_length": 4, "batch_size": 12}


def test_values_against_plain_python():
    samples, sids = make_samples(101), make_sids()
    batches = SessionBatches(samples, sids, **OPTIONS, seed=3)
    for step in range(2 * batches.steps_per_epoch):
        rows, batch = batches.rows(step), batches.batch(step)
        wanted = plain_rows(samples, sids, rows, 20, 4)
        assert unpadded(batch) == wanted
        assert batch.history.dtype == batch.target.dtype == torch.int64
        assert batch.history.shape[1] == max(1, max(len(history) for history, _ in wanted))
        assert batch.target.shape[1:] == (4, LEVELS)
        items = sum(len(target) for _, target in wanted)
        assert batch.items == batches.step_items(step) == items
        codes = LEVELS * (items + sum(len(history) for history, _ in wanted))
        assert batches.step_tokens(step) == codes


@settings(deadline=None, max_examples=30)
@given(
    n=st.integers(1, 70),
    batch_size=st.sampled_from([1, 4, 12, 100]),
    bucket=st.integers(1, 5),
    seed=st.integers(0, 3),
)
def test_an_epoch_holds_every_sample(n: int, batch_size: int, bucket: int, seed: int):
    samples, sids = make_samples(n), make_sids()
    batches = SessionBatches(
        samples,
        sids,
        **{**OPTIONS, "batch_size": batch_size},
        seed=seed,
        bucket_batches=bucket,
    )
    steps = batches.steps_per_epoch
    assert steps == -(-n // batch_size)
    for epoch in range(2):
        rows = np.concatenate([batches.rows(epoch * steps + step) for step in range(steps)])
        times = np.bincount(rows, minlength=n)
        assert len(rows) == steps * batch_size
        # Whole rounds over all samples; only the last batch is filled up.
        assert times.min() >= 1
        assert times.max() - times.min() <= 1


def test_order_depends_on_seed_and_epoch_alone():
    samples, sids = make_samples(200), make_sids()
    steps = SessionBatches(samples, sids, **OPTIONS).steps_per_epoch

    def order(seed: int, epoch: int) -> list[int]:
        batches = SessionBatches(samples, sids, **OPTIONS, seed=seed)
        first = epoch * steps
        return [int(row) for step in range(steps) for row in batches.rows(first + step)]

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_any_step_without_those_before_it():
    samples, sids = make_samples(100), make_sids()
    whole = SessionBatches(samples, sids, **OPTIONS, seed=5)
    seen = [whole.batch(step) for step in range(25)]
    for step in (24, 3, 17, 0):
        fresh = SessionBatches(samples, sids, **OPTIONS, seed=5).batch(step)
        assert torch.equal(fresh.history, seen[step].history)
        assert torch.equal(fresh.target, seen[step].target)


@pytest.mark.parametrize(("world", "micro"), [(1, 3), (2, 1), (3, 2), (4, 3)])
def test_processes_and_micro_batches_share_the_same_global_batch(world: int, micro: int):
    samples, sids = make_samples(90), make_sids()
    one = SessionBatches(samples, sids, **OPTIONS, seed=1)
    shares = [
        SessionBatches(
            samples, sids, **OPTIONS, seed=1, micro_batches=micro, rank=rank, world_size=world
        )
        for rank in range(world)
    ]
    for step in range(one.steps_per_epoch + 2):
        parts = [share.batch(step, part) for part in range(micro) for share in shares]
        together = [row for part in parts for row in unpadded(part)]
        assert sorted(together) == sorted(unpadded(one.batch(step)))
        assert {len(part.target) for part in parts} == {12 // (world * micro)}
        assert sum(part.items for part in parts) == one.step_items(step)
        assert {share.step_items(step) for share in shares} == {one.step_items(step)}


def test_bucketing_saves_padding():
    samples, sids = make_samples(600, longest=100), make_sids()

    def padding(bucket: int) -> float:
        batches = SessionBatches(
            samples,
            sids,
            history_length=100,
            session_length=4,
            batch_size=12,
            bucket_batches=bucket,
        )
        read = [batches.batch(step).history[..., 0] for step in range(batches.steps_per_epoch)]
        return sum(int((b < 0).sum()) for b in read) / sum(b.numel() for b in read)

    assert padding(1) > 0.3
    assert padding(25) < 0.1


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ordered_batches_hold_every_sample_once(world: int):
    samples, sids = make_samples(41), make_sids()
    read = []
    for rank in range(world):
        batches = OrderedBatches(samples, sids, **OPTIONS, rank=rank, world_size=world)
        read += [row for index in range(len(batches)) for row in unpadded(batches[index])]
    assert sorted(read) == sorted(plain_rows(samples, sids, np.arange(41), 20, 4))


def test_more_processes_than_validation_samples():
    samples, sids = make_samples(2), make_sids()
    sizes = [
        len(OrderedBatches(samples, sids, **OPTIONS, rank=rank, world_size=4)) for rank in range(4)
    ]
    assert sizes == [1, 1, 0, 0]


def test_a_log_without_any_history():
    samples, sids = make_samples(7, longest=1), make_sids()
    batch = SessionBatches(samples, sids, **{**OPTIONS, "batch_size": 7}).batch(0)
    assert batch.history.shape == (7, 1, LEVELS)
    assert (batch.history == -1).all()
    assert sorted(unpadded(batch)) == sorted(plain_rows(samples, sids, np.arange(7), 20, 4))


def with_(samples: Samples, **changes: Any) -> Samples:
    return Samples(**{**vars(samples), **changes})


@pytest.mark.parametrize(
    ("samples", "sids", "options", "message"),
    [
        (make_samples(9), make_sids()[:40], {}, r"sequence_values: wanted values in 0\.\.39"),
        (make_samples(9), make_sids() * 1.0, {}, "sids: wanted integers .* got float64"),
        (make_samples(9), make_sids()[:, 0], {}, r"shape \[N, L\], got int32 \[50\]"),
        (make_samples(9), make_sids() - 1, {}, "no negative code"),
        (make_samples(9), make_sids(), {"micro_batches": 5}, "multiple of .* 5 x 1, got 12"),
        (make_samples(9).take([]), make_sids(), {}, "at least one sample"),
        (
            with_(make_samples(2), target_offsets=np.array([0, 0, 1])),
            make_sids(),
            {},
            "sample 0 has no target item",
        ),
    ],
    ids=["item", "float", "flat", "negative", "shares", "none", "empty-target"],
)
def test_bad_input_is_named(samples: Samples, sids: Any, options: Any, message: str):
    with pytest.raises(ValueError, match=message):
        SessionBatches(samples, sids, **OPTIONS, **options)


def test_fingerprint_sees_every_part():
    samples, sids = make_samples(20), make_sids()
    base = fingerprint(samples, sids)
    assert fingerprint(make_samples(20), sids) == base
    for name in ("sequence_values", "history_begin", "history_end", "target_values"):
        changed = getattr(samples, name).copy()
        changed[3] += 1
        assert fingerprint(with_(samples, **{name: changed}), sids) != base
    assert fingerprint(samples, make_sids(1)) != base


def user_samples(lengths: list[int], m: int, seed: int = 0) -> Samples:
    """Every window of the next m items of users with so many items, as the rule "next" makes."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, ITEMS, sum(lengths), dtype=np.int32)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    rows = [
        (user, bounds[user], bounds[user] + at, min(m, length - at))
        for user, length in enumerate(lengths)
        for at in range(1, length)
    ]
    user, begin, end, size = (np.array(column) for column in zip(*rows, strict=True))
    targets = [values[e : e + s] for e, s in zip(end, size, strict=True)]
    return Samples(
        sequence_values=values,
        history_begin=begin,
        history_end=end,
        target_values=np.concatenate(targets),
        target_offsets=np.concatenate([[0], np.cumsum(size)]),
        user_row=user.astype(np.int32),
        timestamp=np.zeros(len(user), np.int64),
    )


@pytest.mark.parametrize("m", [1, 3])
def test_prefix_batches_hold_every_sample_once(m: int) -> None:
    samples, sids = user_samples([2, 7, 4, 9, 3], m), make_sids()
    batches = PrefixBatches(
        samples,
        sids,
        history_length=20,
        session_length=m,
        batch_size=5,
        micro_batches=5,
        item_column=True,
    )
    assert batches.steps_per_epoch == 1
    found = []
    items = 0
    for micro in range(5):
        history, target, count = batches.batch(0, micro)
        items += count
        assert count == int((target[..., 0] >= 0).sum())
        for row in range(len(history)):
            for at in range(history.shape[1]):
                wanted = target[row, at][target[row, at, :, 0] >= 0]
                if len(wanted):
                    prefix = history[row, : at + 1]
                    assert (prefix[:, :LEVELS].numpy() == sids[prefix[:, -1]]).all()
                    found.append((prefix[:, -1].tolist(), wanted[:, -1].tolist()))
    assert items == batches.step_items(0)
    plain = [(samples.history(i).tolist(), samples.target(i).tolist()) for i in range(len(samples))]
    assert sorted(found) == sorted(plain)


def test_prefix_batches_keep_the_latest_prefixes() -> None:
    samples, sids = user_samples([9], 1), make_sids()
    batches = PrefixBatches(samples, sids, history_length=4, session_length=1, batch_size=1)
    history, target, items = batches.batch(0)
    values = samples.sequence_values
    assert items == 4
    assert history[0].tolist() == sids[values[4:8]].tolist()
    assert target[0, :, 0].tolist() == sids[values[5:9]].tolist()


def test_prefixes_need_targets_that_follow() -> None:
    samples = make_samples(5)
    with pytest.raises(ValueError, match="rule 'next'"):
        PrefixBatches(samples, make_sids(), history_length=4, session_length=5, batch_size=1)


def test_a_long_sequence_is_cut_into_windows_that_predict_every_item() -> None:
    items = np.arange(24, dtype=np.int32) % ITEMS
    ends = np.arange(1, 24)
    samples = Samples(
        sequence_values=items,
        history_begin=np.zeros(23, np.int64),
        history_end=ends.astype(np.int64),
        target_values=items[1:],
        target_offsets=np.arange(24, dtype=np.int64),
        user_row=np.zeros(23, np.int32),
        timestamp=np.zeros(23, np.int64),
    )
    batches = PrefixBatches(
        samples,
        np.arange(ITEMS)[:, None],
        history_length=10,
        session_length=1,
        batch_size=3,
    )
    assert batches.steps_per_epoch == 1
    batch = batches.batch(0)
    assert sorted((batch.history[..., 0] >= 0).sum(dim=1).tolist()) == [3, 10, 10]
    assert batch.items == 23
    real = batch.target[..., 0, 0] >= 0
    assert sorted(batch.target[..., 0, 0][real].tolist()) == sorted(items[1:].tolist())
    for history, target in zip(batch.history[..., 0], batch.target[..., 0, 0], strict=True):
        seen = history[history >= 0]
        assert torch.equal(target[: len(seen) - 1], seen[1:]), "each prefix is followed by its item"


@pytest.mark.parametrize(("targets", "shares", "size"), [(1, 4, 1024), (6, 4, 256), (400, 4, 16)])
def test_a_batch_without_a_size_follows_the_targets(targets: int, shares: int, size: int) -> None:
    count = 40
    samples = Samples(
        sequence_values=np.zeros(count, np.int32),
        history_begin=np.arange(count, dtype=np.int64),
        history_end=np.arange(count, dtype=np.int64) + 1,
        target_values=np.zeros(count * targets, np.int32),
        target_offsets=np.arange(count + 1, dtype=np.int64) * targets,
        user_row=np.arange(count, dtype=np.int32),
        timestamp=np.zeros(count, np.int64),
    )
    batches = SessionBatches(
        samples,
        make_sids(),
        history_length=4,
        session_length=500,
        batch_size=None,
        micro_batches=shares,
    )
    assert batches.batch_size == size
