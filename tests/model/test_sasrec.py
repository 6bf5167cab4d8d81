"""SASRec: causality, losses against plain ones, learning."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from onerec.model.item_loss import item_cross_entropy, sampled_item_cross_entropy
from onerec.model.sasrec import SASRec, SASRecConfig


def build(**fields: object) -> SASRec:
    torch.manual_seed(0)
    config = SASRecConfig(**{"n_items": 13, "history_length": 6, "d_model": 8, **fields})  # type: ignore[arg-type]
    return SASRec(config).double().eval()


HISTORY = torch.tensor([[3, 5, 2, 9], [7, 1, -1, -1]])[..., None]
TARGET = torch.tensor([[5, 2, 9, 12], [1, 0, -1, -1]])[..., None, None]


def test_loss_is_that_of_each_prefix_alone() -> None:
    model = build()
    output = model(HISTORY, TARGET)
    losses = []
    for row in range(2):
        for end in range(1, 5):
            if TARGET[row, end - 1] >= 0:
                scores = model.scores(HISTORY[row : row + 1, :end])
                losses.append(F.cross_entropy(scores, TARGET[row, end - 1, 0]))
    torch.testing.assert_close(output.loss, torch.stack(losses).mean())
    assert output.items == 6
    last = model(HISTORY, torch.tensor([[[12]], [[0]]])).loss
    torch.testing.assert_close(last, (losses[3] + losses[5]) / 2)


def test_binary_loss_spares_what_the_user_has() -> None:
    model = build(loss="bce", negatives=3)
    torch.manual_seed(5)
    output = model(HISTORY, TARGET)
    torch.manual_seed(5)
    rows = model._states(HISTORY)[TARGET[..., 0, 0] >= 0]
    drawn = torch.randint(13, (6, 3))
    wanted = torch.tensor([5, 2, 9, 12, 1, 0])
    user = [0, 0, 0, 0, 1, 1]
    total = torch.zeros((), dtype=torch.float64)
    for i, state in enumerate(rows):
        total -= F.logsigmoid(state @ model.items.weight[wanted[i]])
        for item in drawn[i]:
            if item != wanted[i] and item not in HISTORY[user[i]]:
                total -= F.logsigmoid(-(state @ model.items.weight[item]))
    torch.testing.assert_close(output.loss, total / 6)


def test_cross_entropy_in_parts_has_the_gradients_of_the_plain_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("onerec.model.item_loss._CELLS", {"cpu": 100})  # parts of 3 rows
    monkeypatch.setattr("onerec.model.item_loss._TILE", {"cpu": 7})
    x = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    table = torch.randn(29, 5, dtype=torch.float64, requires_grad=True)
    y = torch.randint(29, (11,))
    plain = F.cross_entropy(x @ table.T, y)
    wanted = torch.autograd.grad(3 * plain, (x, table))
    loss = item_cross_entropy(x, table, y)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(torch.autograd.grad(3 * loss, (x, table)), wanted)
    with torch.no_grad():
        torch.testing.assert_close(item_cross_entropy(x, table, y), loss)
    with torch.autocast("cpu", torch.bfloat16):
        rough = item_cross_entropy(x.bfloat16(), table.float(), y)
    torch.testing.assert_close(rough, loss.float(), rtol=0.03, atol=0)
    got = torch.autograd.grad(3 * rough, (x, table))
    torch.testing.assert_close(got, wanted, rtol=0.1, atol=0.01)


def test_sampled_cross_entropy_estimates_the_whole_one() -> None:
    x, table = torch.randn(4, 6) * 0.3, torch.randn(40, 6)
    y = torch.tensor([0, 7, 7, 39])
    whole = F.cross_entropy(x @ table.T, y)
    # Every other item once: the estimate is exact.
    for row in range(4):
        others = torch.tensor([i for i in range(40) if i != y[row]])
        got = sampled_item_cross_entropy(
            x[row : row + 1], table[y[row : row + 1]], table[others], torch.zeros(1, 39).bool(), 40
        )
        torch.testing.assert_close(
            got, F.cross_entropy(x[row : row + 1] @ table.T, y[row : row + 1])
        )
    drawn = torch.randint(40, (4000,))
    got = sampled_item_cross_entropy(x, table[y], table[drawn], y[:, None] == drawn, 40)
    assert abs(got - whole) < 0.05


@pytest.mark.parametrize("fields", [{}, {"negatives": 8}, {"loss": "bce", "negatives": 2}], ids=str)
def test_it_learns_a_cycle(fields: dict[str, object]) -> None:
    model = build(d_model=16, dropout=0.0, **fields).float().train()
    start = torch.arange(13)
    rows = (start[:, None] + torch.arange(6)) % 13
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        model(rows[:, :5, None], rows[:, 1:, None, None]).loss.backward()
        optimizer.step()
    scores = model.eval().scores(rows[:, :5, None])
    # Its own items are no negatives of a user, so the binary loss leaves them where they are.
    best = scores.scatter(1, rows[:, :5], float("-inf")).argmax(dim=1)
    assert (best == rows[:, 5]).float().mean() > 0.9


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="negatives must be at least 1 with 'bce'"):
        SASRecConfig(5, loss="bce")
    with pytest.raises(ValueError, match="n_heads must divide"):
        SASRecConfig(5, d_model=6, n_heads=4)
