"""RQ-VAE: codes in use, error, unique ids, the two estimators, files."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from onerec.errors import DataError
from onerec.tokenizer import RQVAE
from onerec.tokenizer.rqvae import _rotated, _spread

SMALL: dict[str, Any] = {
    "levels": 3,
    "codebook_size": 32,
    "hidden": (32,),
    "dim": 8,
    "epochs": 40,
    "batch_size": 128,
    "lr": 3e-3,
    "random_state": 0,
}


def clusters(n: int = 600, seed: int = 0) -> np.ndarray:
    """Unit vectors in two layers of clusters, and a column that never changes."""
    rng = np.random.default_rng(seed)
    coarse = rng.normal(size=(12, 20))[rng.integers(12, size=n)]
    fine = 0.5 * rng.normal(size=(40, 20))[rng.integers(40, size=n)]
    x = coarse + fine + 0.05 * rng.normal(size=(n, 20))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return np.concatenate([x, np.full((n, 1), 7.0)], axis=1).astype(np.float32)


@pytest.fixture(scope="module")
def fitted() -> RQVAE:
    return RQVAE(**SMALL, distinct="distinct").fit(clusters())


def test_codes_are_in_use_and_say_much_of_the_item(fitted: RQVAE) -> None:
    report = fitted.report_
    assert min(report["utilisation"]) >= 0.8
    spread = clusters().var(axis=0).sum()
    assert report["mse"] < 0.35 * spread
    assert report["mse_per_level"] == sorted(report["mse_per_level"], reverse=True)
    assert report["unique_share"] == 1.0
    assert fitted.sids_.shape == (600, 3)


def test_encode_is_the_nearest_code_level_by_level(fitted: RQVAE) -> None:
    x = clusters(50, seed=1)
    with torch.no_grad():
        residual = fitted._net.latent(torch.from_numpy(x)).numpy()
    for level, table in enumerate(fitted.codebooks_):
        distance = np.linalg.norm(residual[:, None] - table[None], axis=2)
        nearest = distance.argmin(axis=1)
        assert (fitted.encode(x)[:, level] == nearest).all()
        residual = residual - table[nearest]


@pytest.mark.parametrize("fields", [{"estimator": "rotation"}, {"sinkhorn": 0.05}], ids=str)
def test_options_learn_too(fields: dict[str, Any]) -> None:
    found = RQVAE(**{**SMALL, **fields}).fit(clusters())
    assert found.report_["mse"] < 0.4 * clusters().var(axis=0).sum()
    assert min(found.report_["utilisation"]) >= 0.8


def test_equal_seeds_give_equal_ids_and_leave_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    x, fields = clusters(200), {**SMALL, "epochs": 3, "distinct": "rank"}
    a, b = RQVAE(**fields).fit(x), RQVAE(**fields).fit(x)
    assert (a.sids_ == b.sids_).all()
    assert torch.equal(torch.get_rng_state(), state)
    assert len(np.unique(a.sids_, axis=0)) == 200
    assert (a.encode(x)[:, :3] == a.sids_[:, :3]).all()
    np.testing.assert_array_equal(a.decode(a.sids_), a.decode(a.sids_[:, :3]))


def test_rotation_takes_z_to_q_and_its_gradient_along() -> None:
    z = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    q = torch.randn(5, 4, dtype=torch.float64)
    out = _rotated(z, q)
    torch.testing.assert_close(out, q)
    # A gradient along q comes back along z: their angle is kept.
    (grad,) = torch.autograd.grad(out, z, q)
    cosine = torch.nn.functional.cosine_similarity(grad, z.detach(), dim=1)
    torch.testing.assert_close(cosine, torch.ones(5, dtype=torch.float64))


def test_sinkhorn_spreads_what_the_nearest_code_would_crowd() -> None:
    cost = torch.rand(64, 8) + torch.arange(8) * 3.0
    chosen = (-_spread(cost, 0.01)).argmin(dim=1)
    assert torch.bincount(chosen, minlength=8).max() <= 16


def test_what_is_saved_codes_alike(fitted: RQVAE, tmp_path: Any) -> None:
    fitted.save_pretrained(tmp_path)
    loaded = RQVAE.from_pretrained(tmp_path)
    x = clusters(30, seed=2)
    assert (loaded.encode(x) == fitted.encode(x)).all()
    np.testing.assert_array_equal(loaded.decode(fitted.sids_), fitted.decode(fitted.sids_))
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(DataError, match=r"model\.safetensors"):
        RQVAE.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match=r"config\.json"):
        RQVAE.from_pretrained(tmp_path)


def test_wrong_input_is_refused(fitted: RQVAE) -> None:
    with pytest.raises(ValueError, match="at least codebook_size = 32"):
        RQVAE(**SMALL).fit(clusters(10))
    broken = clusters(40)
    broken[3, 1] = np.nan
    for call in (RQVAE(**SMALL).fit, fitted.encode):
        with pytest.raises(
            ValueError, match="X: wanted finite values, got NaN or infinity in row 3"
        ):
            call(broken)
    with pytest.raises(ValueError, match="wanted 21 columns"):
        fitted.encode(np.zeros((2, 5), np.float32))
    with pytest.raises(ValueError, match=r"codes in 0\.\.31"):
        fitted.decode(np.full((2, 3), 32))
    with pytest.raises(RuntimeError, match="call fit"):
        RQVAE().encode(clusters(5))
    with pytest.raises(ValueError, match="estimator"):
        RQVAE(estimator="other")  # type: ignore[arg-type]
