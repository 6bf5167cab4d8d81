"""The reward model: padding never matters, sessions do not see one another, weights are undone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from onerec.errors import DataError
from onerec.model import RewardModel, RewardModelConfig

CONFIG = RewardModelConfig(
    n_items=30,
    feature_dim=6,
    targets=("swt", "like"),
    weights=(1.0, 0.5),
    base_rates=(0.3, 0.02),
    positive_weights=(1.0, 7.0),
    history_length=9,
    session_length=4,
    d_model=16,
    n_heads=2,
    tower_width=8,
)


def make(labels: str = "item", wide: bool = False) -> RewardModel:
    torch.manual_seed(0)
    model = RewardModel(replace(CONFIG, labels=labels, wide=wide)).eval()
    with torch.no_grad():
        model.item_features.normal_()
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


HISTORY = torch.tensor([[3, 7, 29, 4], [5, -1, -1, -1], [-1, -1, -1, -1]])
SESSIONS = torch.tensor([[[1, 2, 3], [4, 5, -1]], [[8, 8, 0], [9, -1, -1]], [[7, 6, 5], [1, 2, 3]]])


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("labels", ["item", "session"])
def test_padding_and_neighbours_do_not_matter(labels: str, wide: bool) -> None:
    model = make(labels, wide)
    whole = model.predict(HISTORY, SESSIONS)
    assert whole.shape == (3, 2, 2)
    assert ((whole > 0) & (whole < 1)).all()
    for row, history in enumerate(HISTORY):
        for number, session in enumerate(SESSIONS[row]):
            alone = model.predict(history[history >= 0][None], session[session >= 0][None, None])
            torch.testing.assert_close(alone[0, 0], whole[row, number], rtol=1e-5, atol=1e-6)


def test_the_wide_part_is_linear_in_features_and_history_length() -> None:
    model = make(wide=True)
    with_it = model(HISTORY, SESSIONS)
    assert model.wide is not None
    weight = model.wide.weight.clone()
    with torch.no_grad():
        model.wide.weight.zero_()
    length = torch.tensor([4.0, 1.0, 0.0])
    for row in range(3):
        own = model.item_features[SESSIONS[row].clamp(min=0)]
        wanted = own @ weight[:, :-1].T + weight[:, -1] * torch.log1p(length[row])
        found = (with_it - model(HISTORY, SESSIONS))[row]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert not RewardModel(replace(CONFIG, wide=True)).wide.weight.any()  # type: ignore[union-attr]


def test_order_history_and_company_matter() -> None:
    model = make()
    base = model.predict(HISTORY[:1], SESSIONS[:1, :1])
    turned = model.predict(HISTORY[:1], SESSIONS[:1, :1].flip(-1))
    younger = model.predict(HISTORY[:1].flip(-1), SESSIONS[:1, :1])
    for other in (turned, younger, model.predict(HISTORY[2:], SESSIONS[:1, :1])):
        assert (other - base).abs().max() > 1e-4
    logits = model(HISTORY[:1], SESSIONS[:1, :1])
    changed = SESSIONS[:1, :1].clone()
    changed[0, 0, 2] = 17
    assert (model(HISTORY[:1], changed) - logits)[0, 0, 0].abs().max() > 1e-4


def test_the_weight_of_positives_is_taken_out() -> None:
    model = make()
    logits = torch.tensor([[0.0, 0.0]])
    p = model.probabilities(logits)[0]
    # Odds of 1 with positives that count 7 times are odds of 1 / 7.
    assert p.tolist() == pytest.approx([0.5, 1 / 8])


def test_score_is_the_weighted_lift() -> None:
    model = make()
    p = model.predict(HISTORY, SESSIONS)
    wanted = (p[..., 0] / 0.3 + 0.5 * p[..., 1] / 0.02) / 1.5
    torch.testing.assert_close(model.score(HISTORY, SESSIONS), wanted)


def test_towers_start_at_the_base_rates() -> None:
    p = RewardModel(CONFIG).eval().predict(HISTORY, SESSIONS)
    torch.testing.assert_close(p, torch.tensor(CONFIG.base_rates).expand_as(p), rtol=0.3, atol=0.0)


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    again = RewardModel.from_pretrained(tmp_path)
    assert again.config == model.config
    assert torch.equal(again.score(HISTORY, SESSIONS), model.score(HISTORY, SESSIONS))
    (tmp_path / "config.json").write_text('{"model_type": "onerec"}')
    with pytest.raises(DataError, match="model_type"):
        RewardModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("history", "sessions", "words"),
    [
        (torch.tensor([[30]]), SESSIONS[:1], "history must hold item indices"),
        (HISTORY[:1], torch.full((1, 1, 5), 2), r"1 to 4\]"),
        (HISTORY[:1], SESSIONS, r"sessions must be \[1"),
        (torch.zeros(1, 10, dtype=torch.int64), SESSIONS[:1], "at most 9"),
    ],
)
def test_wrong_input_is_named(history: torch.Tensor, sessions: torch.Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()(history, sessions)
