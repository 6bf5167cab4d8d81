"""The network: loss, masking, padding, incremental decoding, balancing, learning."""

from __future__ import annotations

import copy
import math
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from onerec.model import OneRec, OneRecConfig, feed_forward
from onerec.model.feed_forward import MoE
from onerec.ops import moe


def small(**overrides: Any) -> OneRecConfig:
    fields: dict[str, Any] = {
        "codebook_size": 11,
        "session_length": 4,
        "history_length": 6,
        "d_model": 16,
        "n_heads": 2,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "d_ff": 24,
        "n_experts": 4,
        "expert_d_ff": 12,
        "init_std": 0.2,
    }
    return OneRecConfig(**{**fields, **overrides})


def build(seed: int = 0, **overrides: Any) -> OneRec:
    """In float64, so that equalities are sharp."""
    torch.manual_seed(seed)
    return OneRec(small(**overrides)).double().eval()


def batch(config: OneRecConfig) -> tuple[Tensor, Tensor]:
    """Five users: full, shorter history, shorter target, no history, one of each."""
    k, levels = config.codebook_size, config.levels
    generator = torch.Generator().manual_seed(1)
    history = torch.randint(k, (5, config.history_length, levels), generator=generator)
    target = torch.randint(k, (5, config.session_length, levels), generator=generator)
    history[1, 3:] = history[3] = history[4, 1:] = -1
    target[2, 2:] = target[4, 1:] = -1
    return history, target


VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "dense": {"n_experts": 0},
    "untied": {"tie_heads": False, "share_codes": False},
    "renormalised": {"normalize_gates": True, "experts_per_token": 3},
    "relu": {"activation": "relu"},
    "four-levels": {"levels": 4, "session_length": 2},
    "one-level": {"levels": 1, "n_experts": 0},
    "item-history": {"history_tokens": "items"},
}
variants = pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS.keys())


def forward_by_hand(model: OneRec, history: Tensor, target: Tensor) -> Tensor:
    """Log-probabilities [m, L] of one user's session: plain loops over the model's weights."""
    config = model.config
    weights = dict(model.named_parameters())
    width = config.d_model // config.n_heads

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * weights[name]

    def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        out = torch.zeros_like(q)
        for head in range(config.n_heads):
            part = slice(head * width, (head + 1) * width)
            for i in range(len(q)):
                seen = i + 1 if causal else len(k)
                weight = (k[:seen, part] @ q[i, part] / math.sqrt(width)).softmax(0)
                out[i, part] = weight @ v[:seen, part]
        return out

    def glu(x: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
        gate, value = (w13 @ x).chunk(2)
        return w2 @ (gate / (1 + (-gate).exp()) * value)

    def experts(x: Tensor, name: str) -> Tensor:
        p = (weights[f"{name}.router"] @ x).softmax(0)
        best = p.topk(config.experts_per_token).indices
        parts = [p[e] * glu(x, weights[f"{name}.w13"][e], weights[f"{name}.w2"][e]) for e in best]
        return torch.stack(parts).sum(0)

    def code(level: int, value: Tensor) -> Tensor:
        return weights["codes.weight"][level * config.codebook_size + int(value)]

    rows = [weights["start"]]
    items = [row for row in history if row[0] >= 0]
    for place, item in enumerate(items):
        age = weights["age.weight"][len(items) - 1 - place]
        codes = [code(level, value) for level, value in enumerate(item)]
        if config.history_tokens == "items":
            codes = [torch.stack(codes).sum(0)]
        rows += [x + age for x in codes]
    x = torch.stack(rows)
    for n in range(config.encoder_layers):
        at = f"encoder.{n}"
        q, k, v = (norm(x, f"{at}.attention_norm.weight") @ weights[f"{at}.attention.qkv.weight"].T
                   ).chunk(3, -1)  # fmt: skip
        x = x + attention(q, k, v, False) @ weights[f"{at}.attention.out.weight"].T
        hidden = norm(x, f"{at}.ffn_norm.weight")
        w13, w2 = weights[f"{at}.ffn.w13.weight"], weights[f"{at}.ffn.w2.weight"]
        x = x + torch.stack([glu(row, w13, w2) for row in hidden])
    context = norm(x, "encoder_norm.weight")
    rows, wanted = [], []
    for item in target:
        rows.append(weights["bos"])
        for level, value in enumerate(item):
            wanted.append((len(rows) - 1, level, int(value)))
            rows.append(code(level, value))
    x = torch.stack(rows) + weights["time.weight"][: len(rows)]
    for n in range(config.decoder_layers):
        at = f"decoder.{n}"
        q, k, v = (norm(x, f"{at}.attention_norm.weight") @ weights[f"{at}.attention.qkv.weight"].T
                   ).chunk(3, -1)  # fmt: skip
        x = x + attention(q, k, v, True) @ weights[f"{at}.attention.out.weight"].T
        q = norm(x, f"{at}.cross_norm.weight") @ weights[f"{at}.cross.q.weight"].T
        k, v = (context @ weights[f"{at}.cross.kv.weight"].T).chunk(2, -1)
        x = x + attention(q, k, v, False) @ weights[f"{at}.cross.out.weight"].T
        hidden = norm(x, f"{at}.ffn_norm.weight")
        x = x + torch.stack([experts(row, f"{at}.ffn") for row in hidden])
    x = norm(x, "decoder_norm.weight")
    tables = weights["codes.weight"].view(config.levels, config.codebook_size, -1)
    found = [(tables[level] @ x[row]).log_softmax(0)[value] for row, level, value in wanted]
    return torch.stack(found).view(len(target), config.levels)


@pytest.mark.parametrize("history_tokens", ["codes", "items"])
def test_loss_is_equation_4_computed_by_hand(history_tokens: str) -> None:
    model = build(history_tokens=history_tokens)
    history, target = batch(model.config)
    output = model(history, target)
    found = []
    with torch.no_grad():
        for user in range(5):
            session = target[user][target[user, :, 0] >= 0]
            found.append(forward_by_hand(model, history[user], session))
    per_level = -torch.cat(found).mean(dim=0)
    assert output.items == 4 + 4 + 2 + 4 + 1
    torch.testing.assert_close(output.loss_per_level, per_level, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(output.loss, per_level.sum(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["paper-tiny", "0.1b"])
def test_loss_starts_near_log_k(name: str) -> None:
    torch.manual_seed(0)
    config = OneRecConfig.preset(name, codebook_size=512, encoder_layers=1, decoder_layers=1)
    model = OneRec(config)
    codes = torch.randint(512, (40, 6, 3))
    with torch.no_grad():
        output = model(codes[:, :3], codes[:, 1:])
    assert output.loss_per_level.max() < 1.05 * math.log(512)
    assert output.loss_per_level.min() > 0.98 * math.log(512)


@variants
def test_later_codes_do_not_change_earlier_logits(overrides: dict[str, Any]) -> None:
    model = build(**overrides)
    history, target = batch(model.config)
    history, target = history[:1], target[:1]
    before = model.session_logits(history, target).flatten(1, 2)
    for place in range(target[0].numel()):
        other = target.clone()
        other.view(1, -1)[0, place] = (other.view(1, -1)[0, place] + 1) % 11
        after = model.session_logits(history, other).flatten(1, 2)
        # The code at `place` is predicted before it is read.
        torch.testing.assert_close(after[:, : place + 1], before[:, : place + 1])
        if place + 1 < before.shape[1]:
            assert not torch.allclose(after[:, place + 1], before[:, place + 1])


@variants
def test_padding_changes_nothing(overrides: dict[str, Any]) -> None:
    model = build(**overrides)
    history, target = batch(model.config)
    together = model.session_logits(history, target)
    for user in range(5):
        own = history[user : user + 1, : int((history[user, :, 0] >= 0).sum())]
        items = int((target[user, :, 0] >= 0).sum())
        alone = model.session_logits(own, target[user : user + 1, :items])
        torch.testing.assert_close(together[user, :items], alone[0])


@variants
def test_several_sessions_of_one_history_are_each_as_alone(overrides: dict[str, Any]) -> None:
    model = build(**overrides)
    history, target = batch(model.config)
    other = target.flip(0)
    both = torch.stack([target, other], dim=1).flatten(0, 1)
    together = model.session_logits(history, both, copies=2)
    torch.testing.assert_close(together[::2], model.session_logits(history, target))
    torch.testing.assert_close(together[1::2], model.session_logits(history, other))
    with pytest.raises(ValueError, match="target must have 2 rows for each one of history"):
        model.session_logits(history, target, copies=2)


def test_padding_is_in_no_router_statistic_and_no_gradient() -> None:
    model = build()
    history, target = batch(model.config)
    padded = model(history[4:], target[4:])
    alone = model(history[4:, :1], target[4:, :1])
    torch.testing.assert_close(padded.loss, alone.loss)
    for got, want in zip(padded.router, alone.router, strict=True):
        torch.testing.assert_close(got, want, check_dtype=False)
    # BOS and two codes, 2 experts each; the last code predicts nothing.
    assert padded.router.counts.sum(dim=1).tolist() == [6, 6]


def test_all_padding_is_a_loss_of_zero_with_zero_gradients() -> None:
    model = build()
    nothing = torch.full((2, 4, 3), -1)
    output = model(nothing, nothing)
    output.loss.backward()
    assert output.loss.item() == 0
    assert output.items == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_history_is_counted_from_its_latest_item() -> None:
    model = build()
    with torch.no_grad():
        model.age.weight[0] += 5.0
    history, target = batch(model.config)
    changed = model.session_logits(history[:2], target[:2])
    moved = history[:2].clone()
    moved[1, 2] = (moved[1, 2] + 1) % 11  # the latest of a user with three items
    assert not torch.allclose(changed[1], model.session_logits(moved, target[:2])[1])
    embedded = model._embed_history(history[1:2])
    fresh = embedded[0, 7:10] - model.age.weight[0]
    want = model.codes(history[1, 2] + torch.arange(3) * 11)
    torch.testing.assert_close(fresh, want)


@variants
def test_incremental_equals_full(overrides: dict[str, Any]) -> None:
    """Three beams that change their ancestry at every step, a target each."""
    model = build(**overrides)
    config = model.config
    history, _ = batch(config)
    users, beams, levels, items = 5, 3, config.levels, config.session_length
    generator = torch.Generator().manual_seed(5)
    memory = model.encode(history)
    cache = model.new_cache(users, beams, items)
    tokens = torch.zeros(users, 1, 1, dtype=torch.int64)
    paths = torch.zeros(users, 1, 0, dtype=torch.int64)
    storage = [t.data_ptr() for t in (*cache.keys, *cache.values)]
    for step in range(items * levels):
        logits = model.decode(tokens, cache, memory)
        prefix = paths.flatten(0, 1)
        wanted = torch.zeros(len(prefix), items * levels, dtype=torch.int64)
        wanted[:, :step] = prefix
        full = model.session_logits(
            history.repeat_interleave(paths.shape[1], 0), wanted.view(-1, items, levels)
        )
        torch.testing.assert_close(logits.flatten(0, 1), full.flatten(1, 2)[:, step])
        live = paths.shape[1]
        parents = torch.randint(live, (users, beams), generator=generator)
        codes = torch.randint(config.codebook_size, (users, beams), generator=generator)
        paths = torch.cat(
            [paths.gather(1, parents.unsqueeze(-1).expand(-1, -1, step)), codes.unsqueeze(-1)], -1
        )
        cache.choose(parents)
        tokens = codes.unsqueeze(-1)
        if (step + 1) % levels == 0:
            tokens = torch.nn.functional.pad(tokens, (0, 1), value=-7)
    assert storage == [t.data_ptr() for t in (*cache.keys, *cache.values)]


def test_memory_is_not_expanded_per_beam() -> None:
    model = build()
    history, _ = batch(model.config)
    memory = model.encode(history)
    assert [tuple(k.shape) for k in memory.keys] == [(5, 2, 1 + 6 * 3, 8)] * 2
    cache = model.new_cache(5, 7, 4)
    assert cache.keys[0].shape == (5, 16, 7, 2, 8)


def test_decode_refuses_wrong_steps() -> None:
    model = build()
    history, _ = batch(model.config)
    memory = model.encode(history)
    one = torch.zeros(5, 1, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="session_length"):
        model.new_cache(5, 2, 5)
    cache = model.new_cache(5, 2, 1)
    with pytest.raises(ValueError, match="tokens"):
        model.decode(one.expand(5, 2, 1), cache, memory)
    cache = model.new_cache(5, 2, 1)
    for _ in range(3):
        model.decode(one, cache, memory)
    with pytest.raises(ValueError, match="last code"):
        model.decode(one, cache, memory)


@pytest.mark.parametrize("field", ["router_balance_loss", "router_z_loss"])
def test_router_losses_are_added_and_reach_the_router(field: str) -> None:
    history, target = batch(small())
    plain = build()(history, target)
    model = build(**{field: 0.5})
    output = model(history, target)
    if field == "router_z_loss":
        extra = 0.5 * output.router.z_loss.sum()
    else:
        share = output.router.counts / output.router.counts.sum(dim=1, keepdim=True)
        extra = 0.5 * 4 * (share * output.router.mean_probability).sum()
    torch.testing.assert_close(output.loss, plain.loss + extra)
    (gradient,) = torch.autograd.grad(extra, model.decoder[0].ffn.router)
    assert gradient.any()


def test_router_bias_follows_the_load_by_sign() -> None:
    model = build(balancing_rate=0.25)
    model.update_router_bias(torch.tensor([[4, 0, 2, 2], [1, 1, 1, 5]]))
    biases = [layer.ffn.selection_bias.tolist() for layer in model.decoder]
    assert biases == [[-0.25, 0.25, 0, 0], [0.25, 0.25, 0.25, -0.25]]
    off = build(loss_free_balancing=False)
    off.update_router_bias(torch.tensor([[4, 0, 2, 2], [1, 1, 1, 5]]))
    assert not any(layer.ffn.selection_bias.any() for layer in off.decoder)


def test_loss_free_balancing_evens_a_skewed_load() -> None:
    torch.manual_seed(0)
    layer = MoE(small(balancing_rate=2e-3, n_experts=8))
    with torch.no_grad():
        layer.router.normal_(std=0.2)
        layer.router[0] += 0.1  # tokens have a mean, and two experts like it
        layer.router[5] += 0.05

    def route() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            counts = layer(torch.randn(500, 16) + 1.0)[1].counts
        return counts, counts.max() / counts.double().mean()

    before = torch.stack([route()[1] for _ in range(20)]).mean()
    for _ in range(300):
        layer.update_bias(route()[0])
    after = torch.stack([route()[1] for _ in range(20)]).mean()
    assert before > 1.8
    assert after < 1.2


def test_bias_stays_float32_when_the_model_is_cast() -> None:
    model = build()
    model.update_router_bias(torch.tensor([[4, 0, 2, 2], [1, 1, 1, 5]]))
    before = [layer.ffn.selection_bias.clone() for layer in model.decoder]
    model.to(torch.bfloat16)
    for layer, bias in zip(model.decoder, before, strict=True):
        assert layer.ffn.selection_bias.dtype == torch.float32
        assert layer.ffn.selection_bias.equal(bias)
        assert layer.ffn.router.dtype == torch.bfloat16


@pytest.mark.parametrize("how", ["cast", "autocast"])
def test_bfloat16_is_near_float32(how: str) -> None:
    torch.manual_seed(0)
    model = OneRec(small(init_std=0.05))
    history, target = batch(model.config)
    want = model(history, target)
    if how == "cast":
        got = model.to(torch.bfloat16)(history, target)
    else:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = model(history, target)
    got.loss.backward()
    assert got.loss.dtype == torch.float32
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-2, atol=0)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("overrides", [{}, {"n_experts": 0}, {"dropout": 0.1}], ids=str)
def test_learns_a_small_set_by_heart(overrides: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = OneRec(small(d_model=32, expert_d_ff=32, d_ff=32, **overrides))
    history, target = batch(model.config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        output = model.train()(history, target)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        if output.router is not None:
            model.update_router_bias(output.router.counts)
        losses.append(float(output.loss.detach()))
    best = model.eval().session_logits(history, target).argmax(-1)
    known = target[..., 0] >= 0
    assert losses[-1] < 0.1 * losses[0]
    assert best[known].equal(target[known])


def test_loss_curve_is_that_of_the_reference_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    curves = []
    for backend in ("auto", "reference"):
        monkeypatch.setattr(feed_forward, "moe", partial(moe, backend=backend))
        torch.manual_seed(0)
        model = OneRec(small(dropout=0.1)).train()
        history, target = batch(model.config)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        losses = []
        for _ in range(25):
            output = model(history, target)
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
            assert output.router is not None
            model.update_router_bias(output.router.counts)
            losses.append(output.loss.detach())
        curves.append(torch.stack(losses))
    assert curves[0][-1] < 0.8 * curves[0][0]
    torch.testing.assert_close(curves[0], curves[1], rtol=1e-3, atol=0)


def test_packed_experts_follow_the_weights() -> None:
    torch.manual_seed(0)
    model = OneRec(small()).eval()
    history, target = batch(model.config)
    layers = [layer.ffn for layer in model.decoder]
    for _ in range(2):
        want = model.session_logits(history, target)
        assert want.requires_grad
        with torch.inference_mode():
            got = model.session_logits(history, target)
        assert all(layer._packed is not None for layer in layers)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            for layer in layers:
                layer.w2 *= -1.5
    again = copy.deepcopy(model)
    assert again.decoder[0].ffn._packed is None
    model.train()
    assert all(layer._packed is None for layer in layers)


def test_every_parameter_gets_a_gradient() -> None:
    model = build(tie_heads=False, share_codes=False)
    history, target = batch(model.config)
    model(history, target).loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("0.1b", 126_136_320, 126_136_320),
        ("1b", 931_540_992, 170_274_816),
        ("tiger", 3_020_928, 3_020_928),
    ],
)
def test_sizes_of_the_published_presets(name: str, total: int, active: int) -> None:
    with torch.device("meta"):
        model = OneRec(OneRecConfig.preset(name))
    assert model.num_parameters() == total
    assert model.num_parameters(active=True) == active


def mistakes() -> list[tuple[str, Tensor, Tensor]]:
    history, target = batch(small())
    holed = history.clone()
    holed[1, 1] = -1
    half = target.clone()
    half[0, 3, 2] = -1
    return [
        ("history.*at most 6", torch.cat([history, history], 1), target),
        ("target.*at most 4", history, torch.cat([target, target], 1)),
        ("history.*int64", history.int(), target),
        ("history.*3\\]", history[..., :2], target),
        ("target must have 1 rows for each one of history", history[:3], target),
        ("history.*padded", holed, target),
        ("target.*padded", history, half),
        ("history.*codes 0..10", history + 1, target),
        ("target.*codes 0..10", history, target.masked_fill(target == -1, -2)),
    ]


@pytest.mark.parametrize(("words", "history", "target"), mistakes())
def test_bad_batches_are_refused(words: str, history: Tensor, target: Tensor) -> None:
    with pytest.raises(ValueError, match=words):
        build()(history, target)


@pytest.mark.parametrize(
    "fields",
    [
        {"codebook_size": 0},
        {"n_heads": 3},
        {"n_experts": -1},
        {"experts_per_token": 5},
        {"experts_per_token": 0},
        {"expert_d_ff": 0},
        {"activation": "tanh"},
        {"dropout": 1.0},
    ],
    ids=str,
)
def test_bad_configs_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        small(**fields)


def test_unknown_preset_or_field() -> None:
    with pytest.raises(ValueError, match="'2b'"):
        OneRecConfig.preset("2b")
    with pytest.raises(TypeError, match="color"):
        OneRecConfig.preset("paper-tiny", color=1)


def test_sessions_of_any_length_up_to_the_models() -> None:
    model = build()
    history, target = batch(model.config)
    whole = model.session_logits(history, target)
    for shorter, longer in pairwise(range(1, 5)):
        cut = model.session_logits(history, target[:, :shorter])
        torch.testing.assert_close(cut[0], whole[0, :shorter])
        assert longer > shorter


@pytest.mark.gpu
def test_on_gpu_equals_cpu() -> None:
    model = build(d_model=32).float()
    history, target = batch(model.config)
    want = model(history, target)
    want.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.cuda()
    got = model(history.cuda(), target.cuda())
    got.loss.backward()
    torch.testing.assert_close(got.loss.cpu(), want.loss, rtol=1e-4, atol=0)
    assert got.router.counts.cpu().equal(want.router.counts)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad.cpu(), grads[name], rtol=1e-2, atol=1e-4)


# A catalogue, the causal encoder, the dense head


CATALOG = torch.tensor(
    [[0, 1, 2], [0, 1, 3], [0, 4, 0], [5, 1, 2], [5, 6, 7], [8, 0, 0], [8, 9, 1]]
)


def with_items(seed: int = 0, **overrides: Any) -> OneRec:
    fields: dict[str, Any] = {
        "history_tokens": "items",
        "encoder": "causal",
        "n_items": 7,
        "vector_dim": 5,
        "item_loss": 0.7,
        "legal_softmax": True,
        "decoder_dropout": 0.1,
        "session_length": 1,
    }
    model = build(seed, **{**fields, **overrides})
    vectors = torch.randn(7, 5, generator=torch.Generator().manual_seed(3))
    model.set_catalog(CATALOG, vectors if model.config.vector_dim else None)
    return model


def rows_of(items: Tensor) -> Tensor:
    """Codes and index of items [..]; -1 stays padding."""
    codes = torch.cat([CATALOG, torch.full((1, 3), -1)])[items]
    return torch.cat([codes, items[..., None]], dim=-1)


ITEMS = torch.tensor([[0, 3, 6, 2, 2], [4, 1, 5, -1, -1]])
NODES = {"node_outputs": True, "decoder_start": "state"}
OUTPUTS = pytest.mark.parametrize("outputs", [{}, NODES], ids=["codes", "nodes"])


@torch.no_grad()
@pytest.mark.parametrize("session_length", [1, 2])
@pytest.mark.parametrize("experts", [0, 4])
@OUTPUTS
def test_one_pass_is_every_prefix_by_itself(
    session_length: int, experts: int, outputs: dict[str, Any]
) -> None:
    model = with_items(session_length=session_length, n_experts=experts, **outputs)
    windows = torch.nn.functional.pad(ITEMS[:, 1:], (0, session_length - 1), value=-1)
    windows = windows.unfold(1, session_length, 1)
    output = model(rows_of(ITEMS[:, :-1]), rows_of(windows))
    total, per_level, items = 0.0, torch.zeros(3, dtype=torch.float64), 0
    item_losses = []
    for user in range(2):
        for end in range(1, 5):
            if ITEMS[user, end] < 0:
                continue
            history = rows_of(ITEMS[user : user + 1, :end])
            target = rows_of(windows[user : user + 1, end - 1])
            alone = model(history, target)
            per_level += alone.loss_per_level * alone.items
            items += int(alone.items)
            scores = model.item_scores(history)
            wanted = ITEMS[user, end].view(1)
            item_losses.append(torch.nn.functional.cross_entropy(scores, wanted))
            total += float(alone.loss_per_level.sum() * alone.items)
            if session_length == 1:
                probs = model.item_log_probs(history, torch.arange(7)[None])
                # The softmax over legal codes leaves nothing to ids that no item has.
                torch.testing.assert_close(probs.double().exp().sum(), torch.tensor(1.0).double())
                assert abs(float(probs[0, wanted] + alone.loss_per_level.sum())) < 1e-5
    assert output.items == items
    torch.testing.assert_close(output.loss_per_level, per_level / items)
    wanted_loss = total / items + 0.7 * torch.stack(item_losses).mean()
    torch.testing.assert_close(output.loss, wanted_loss)


def test_the_future_changes_no_prefix() -> None:
    model = with_items()
    history = rows_of(ITEMS[:1, :-1])
    context, _ = model._encode(history)
    changed = history.clone()
    changed[:, 3] = rows_of(torch.tensor([5]))
    other, _ = model._encode(changed)
    torch.testing.assert_close(context[:, :4], other[:, :4])
    assert not torch.allclose(context[:, 4], other[:, 4])


@OUTPUTS
def test_decoding_a_causal_model_is_teacher_forcing(outputs: dict[str, Any]) -> None:
    model = with_items(session_length=2, **outputs)
    history = rows_of(ITEMS[:, :4])
    target = rows_of(torch.tensor([[1, 5], [6, 0]]))
    wanted = model.session_logits(history, target)
    memory, cache = model.encode(history), model.new_cache(2, 1, 2)
    tokens = torch.zeros(2, 1, 1, dtype=torch.int64)
    for item in range(2):
        for level in range(3):
            logits = model.decode(tokens, cache, memory)
            torch.testing.assert_close(logits[:, 0], wanted[:, item, level])
            tokens = target[:, item, level].view(2, 1, 1)
        tokens = torch.nn.functional.pad(tokens, (0, 1))


@pytest.mark.parametrize(
    "fields",
    [{"encoder": "bidirectional"}, {"item_negatives": 30}, {"encoder": "bidirectional", **NODES}],
    ids=str,
)
def test_items_need_no_causal_encoder_nor_the_whole_catalogue(fields: dict[str, Any]) -> None:
    model = with_items(**fields).train()
    history, target = rows_of(ITEMS[:, :4]), rows_of(torch.tensor([[1], [6]]))
    model(history, target).loss.backward()
    assert model.items is not None
    assert model.items.weight.grad is not None
    assert model.vectors is not None
    assert model.vectors.weight.grad is not None


def test_outputs_of_nodes_by_hand() -> None:
    model = with_items(**NODES).eval()
    history = rows_of(ITEMS[:1, :3])
    target = rows_of(torch.tensor([[5]]))
    hidden, _, _ = model._session_hidden(history, target)
    table, total = model.item_table(), 0.0
    for level in range(3):
        state, prefix = hidden[0, 0, level], CATALOG[5, :level]
        inside = (CATALOG[:, :level] == prefix).all(dim=1)
        scores = {}
        for code in CATALOG[inside, level].unique().tolist():
            below = inside & (CATALOG[:, level] == code)
            scores[code] = state @ (model.head(level)[code] + table[below].mean(dim=0))
        wanted = scores[int(CATALOG[5, level])] - torch.stack([*scores.values()]).logsumexp(dim=0)
        total = total + wanted
        logits = model.session_logits(history, target)[0, 0, level]
        assert set(torch.isfinite(logits).nonzero().flatten().tolist()) == set(scores)
        for code, score in scores.items():
            torch.testing.assert_close(logits[code], score.to(logits.dtype))
    found = model.item_log_probs(history, torch.tensor([[5]]))[0, 0]
    torch.testing.assert_close(found, torch.as_tensor(total).to(found.dtype))


def test_every_item_below_the_siblings_of_a_target_is_trained() -> None:
    model = with_items(item_loss=0.0, **NODES)
    model(rows_of(ITEMS[:1, :1]), rows_of(torch.tensor([[[3]]]))).loss.backward()
    assert model.items is not None
    assert model.items.weight.grad is not None
    assert (model.items.weight.grad.abs().sum(dim=1) > 0).all()


def test_an_item_outside_the_catalogue_is_read_by_its_codes() -> None:
    model = with_items()
    known = rows_of(torch.tensor([[0, 3]]))
    cold = known.clone()
    cold[0, 1, 3] = -1
    assert not torch.allclose(model.item_scores(known), model.item_scores(cold))
    same = with_items(vector_dim=0)
    with torch.no_grad():
        assert same.items is not None
        same.items.weight[3] = 0
    torch.testing.assert_close(same.item_scores(known), same.item_scores(cold))


@OUTPUTS
def test_the_catalogue_is_saved_with_the_weights(tmp_path: Any, outputs: dict[str, Any]) -> None:
    model = with_items(**outputs).float()
    model.save_pretrained(tmp_path)
    loaded = OneRec.from_pretrained(tmp_path)
    history = rows_of(ITEMS[:, :4])
    torch.testing.assert_close(
        loaded.item_log_probs(history, torch.arange(7).expand(2, 7)),
        model.item_log_probs(history, torch.arange(7).expand(2, 7)),
    )


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"encoder": "causal", "history_tokens": "codes"}, "history_tokens must be 'items'"),
        ({"item_loss": 1.0}, "n_items must be given for item_loss"),
        ({"node_outputs": True}, "legal_softmax must be on for node_outputs"),
        ({"decoder_start": "state", "history_tokens": "codes"}, "history_tokens must be 'items'"),
        ({"decoder_start": "end"}, "decoder_start must be"),
        ({"encoder": "sideways"}, "encoder must be"),
        ({"item_dropout": 1.0}, "item_dropout must lie"),
    ],
)
def test_settings_that_do_not_fit_are_refused(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        small(**fields)


def test_a_catalogue_that_does_not_fit_is_refused() -> None:
    model = with_items()
    with pytest.raises(ValueError, match="sids must be"):
        model.set_catalog(CATALOG[:5])
    with pytest.raises(ValueError, match="vectors must be given"):
        model.set_catalog(CATALOG)
    with pytest.raises(ValueError, match="item indices"):
        model.item_scores(torch.tensor([[[0, 1, 2, 7]]]))
