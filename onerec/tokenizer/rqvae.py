"""RQ-VAE: semantic ids from a residual-quantised autoencoder, the tokenizer of TIGER."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from onerec.errors import DataError
from onerec.files import atomic_write
from onerec.progress import Progress
from onerec.tokenizer.balanced_kmeans import as_rows, positive, seed_of
from onerec.tokenizer.residual_quantizer import describe_ids, fingerprint, number_collisions

_FORMAT = 1


def _mlp(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for inner, outer in pairwise(widths):
        layers += [nn.Linear(inner, outer), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class _Autoencoder(nn.Module):
    """Encoder, L codebooks on the residuals of its output, decoder."""

    mean: Tensor
    scale: Tensor

    def __init__(
        self, width: int, hidden: Sequence[int], dim: int, levels: int, codes: int
    ) -> None:
        super().__init__()
        self.encoder = _mlp([width, *hidden, dim])
        self.decoder = _mlp([dim, *reversed(hidden), width])
        self.codebooks = nn.Parameter(torch.zeros(levels, codes, dim))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))

    def latent(self, x: Tensor) -> Tensor:
        """[n, dim] of rows [n, d] in the data's own units."""
        out: Tensor = self.encoder((x - self.mean) / self.scale)
        return out

    def quantize(self, z: Tensor, sinkhorn: float = 0.0) -> tuple[Tensor, list[Tensor]]:
        """Codes int64 [n, L] and the residual before each level; `sinkhorn` for the last level."""
        codes, residuals = [], []
        residual = z
        for level, table in enumerate(self.codebooks):
            residuals.append(residual)
            detached = residual.detach()
            cost = table.square().sum(dim=1) - 2 * detached @ table.T
            if sinkhorn and level == len(self.codebooks) - 1:
                squared = cost.detach() + detached.square().sum(dim=1, keepdim=True)
                cost = -_spread(squared, sinkhorn)
            chosen = cost.argmin(dim=1)
            codes.append(chosen)
            residual = residual - table[chosen]
        return torch.stack(codes, dim=1), residuals

    def quantized(self, codes: Tensor) -> Tensor:
        """Sum of the centres [n, dim] that codes [n, up to L] name."""
        return torch.stack([self.codebooks[level][c] for level, c in enumerate(codes.T)]).sum(dim=0)

    def decode(self, z: Tensor) -> Tensor:
        """Rows [n, d] in the data's own units."""
        out: Tensor = self.decoder(z) * self.scale + self.mean
        return out


def _spread(cost: Tensor, epsilon: float, rounds: int = 50) -> Tensor:
    """A soft assignment [n, K] of rows to columns that get equal shares (Sinkhorn and Knopp)."""
    middle, reach = cost.mean(), (cost - cost.mean()).abs().max().clamp(min=1e-12)
    plan = -(cost - middle) / reach / epsilon
    for _ in range(rounds):
        plan = plan - plan.logsumexp(dim=0, keepdim=True)
        plan = plan - plan.logsumexp(dim=1, keepdim=True)
    return plan


def _rotated(z: Tensor, q: Tensor) -> Tensor:
    """q, whose gradient reaches z through the rotation and scaling that take z to q.

    The rotation trick, arXiv 2410.06424, section 4.2, by a Householder product.
    """
    with torch.no_grad():
        z_unit, q_unit = F.normalize(z, dim=1), F.normalize(q, dim=1)
        half = F.normalize(z_unit + q_unit, dim=1)
        ratio = q.norm(dim=1, keepdim=True) / z.norm(dim=1, keepdim=True).clamp(min=1e-12)
    reflected = z - 2 * (z * half).sum(dim=1, keepdim=True) * half
    out: Tensor = ratio * (reflected + 2 * (z * z_unit).sum(dim=1, keepdim=True) * q_unit)
    return out


def _tensor(x: NDArray[np.float32]) -> Tensor:
    """A copy of the rows of X, which must be finite."""
    for row in np.flatnonzero(~np.isfinite(x).all(axis=1))[:1]:
        raise ValueError(f"X: wanted finite values, got NaN or infinity in row {row}")
    return torch.from_numpy(np.array(x, order="C"))


class RQVAE:
    """Semantic ids from an autoencoder with residual quantisation (TIGER, arXiv 2305.05065, 3.1).

    The interface is that of `ResidualQuantizer`. Columns are scaled to mean 0 and variance 1
    (unit vectors otherwise collapse to few codes); codebooks start as centres of k-means, a level
    on the residuals of those before; a code that an epoch did not use starts again at a random
    residual. Loss: squared error of the decoder, plus for each level |sg(r) - c|^2 and
    `commitment` |r - sg(c)|^2, each a mean over dimensions (arXiv 2107.03312).

    Args:
        levels: L.
        codebook_size: K, the codes of each level.
        hidden: Widths between the data and the latent space. TIGER: 512, 256, 128.
        dim: Width of the latent space. TIGER: 32.
        epochs: Passes over the data.
        batch_size: Rows of a step.
        lr: Of AdamW.
        weight_decay: Of AdamW, on the matrices of the encoder and decoder.
        commitment: Weight of the commitment. TIGER: 0.25.
        estimator: How the decoder's gradient passes the codes: "straight_through", or "rotation"
            (arXiv 2410.06424).
        sinkhorn: Above 0, the last level's codes are assigned in training by a soft assignment of
            equal shares with this temperature (LC-Rec, arXiv 2311.09049, uses 0.003).
        distinct: About items with equal ids: "none"; "rank" adds a level that numbers them (TIGER);
            "distinct" moves them to the nearest code of the last level that is free.
        random_state: Seed or generator.
        device: Where it trains.

    Attributes:
        sids_: int32 [N, L], or [N, L + 1] with "rank": ids of the fitted items.
        codebooks_: float32 [L, K, dim], in the latent space.
        report_: As that of `ResidualQuantizer`, without gaps.
    """

    sids_: NDArray[np.int32]
    report_: dict[str, Any]

    def __init__(
        self,
        levels: int = 3,
        codebook_size: int = 256,
        *,
        hidden: Sequence[int] = (512, 256, 128),
        dim: int = 32,
        epochs: int = 200,
        batch_size: int = 1024,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        commitment: float = 0.25,
        estimator: Literal["straight_through", "rotation"] = "straight_through",
        sinkhorn: float = 0.0,
        distinct: Literal["none", "rank", "distinct"] = "none",
        random_state: int | np.random.Generator | None = None,
        device: str = "cpu",
    ) -> None:
        if distinct not in ("none", "rank", "distinct"):
            raise ValueError(f'distinct: wanted "none", "rank" or "distinct", got {distinct!r}')
        if estimator not in ("straight_through", "rotation"):
            raise ValueError(
                f'estimator: wanted "straight_through" or "rotation", got {estimator!r}'
            )
        if sinkhorn < 0:
            raise ValueError(f"sinkhorn: wanted 0 (off) or more, got {sinkhorn}")
        self.levels = positive("levels", levels)
        self.codebook_size = positive("codebook_size", codebook_size)
        self.hidden = tuple(positive("hidden", width) for width in hidden)
        self.dim = positive("dim", dim)
        self.epochs = positive("epochs", epochs)
        self.batch_size = positive("batch_size", batch_size)
        self.lr = lr
        self.weight_decay = weight_decay
        self.commitment = commitment
        self.estimator = estimator
        self.sinkhorn = sinkhorn
        self.distinct = distinct
        self.random_state = random_state
        self.device = device

    @property
    def codebooks_(self) -> NDArray[np.float32]:
        """float32 [L, K, dim]."""
        tables: NDArray[np.float32] = self._fitted("codebooks_").codebooks.detach().cpu().numpy()
        return tables

    def fit(
        self,
        X: ArrayLike | Tensor,
        progress: Progress | None = None,
    ) -> RQVAE:
        """Trains on X [N, d] (taken as float32) and codes its rows.

        Args:
            X: Item vectors.
            progress: Called as `progress(epochs done, all epochs, note)`.

        Raises:
            TypeError: X is not numeric.
            ValueError: X has fewer rows than a level has codes, values that are not finite, or more
                items on an id than there are codes to tell them apart.
        """
        x = _tensor(as_rows(X)).to(self.device)
        if len(x) < self.codebook_size:
            raise ValueError(
                f"X: wanted at least codebook_size = {self.codebook_size} rows, got {len(x)}"
            )
        seed = seed_of(self.random_state)
        with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
            torch.manual_seed(seed)
            self._net = net = _Autoencoder(
                x.shape[1], self.hidden, self.dim, self.levels, self.codebook_size
            ).to(self.device)
            net.mean.copy_(x.mean(dim=0))
            spread = x.std(dim=0, correction=0)
            net.scale.copy_(torch.where(spread > 0, spread, 1.0))
            self._start(x)
            self._train(x, progress)
        net.eval()
        sids = self._codes(x)
        if self.distinct == "distinct":
            sids = self._separated(x, sids)
        self.sids_ = sids
        errors = [
            float(np.square(x.cpu().numpy() - self.decode(sids[:, : level + 1])).sum(1).mean())
            for level in range(self.levels)
        ]
        if self.distinct == "rank":
            # In random order: the items' own order may tell what a model should not know.
            order = np.random.default_rng(seed).permutation(len(x))
            self.sids_ = np.empty((len(x), self.levels + 1), np.int32)
            self.sids_[order] = number_collisions(sids[order], self.codebook_size)
        self.report_ = {"n_items": len(x), "mse": errors[-1], "mse_per_level": errors}
        self.report_.update(describe_ids(self.sids_, self.codebook_size))
        return self

    @torch.no_grad()
    def _start(self, x: Tensor) -> None:
        """Codebooks from k-means on the residuals of the untrained encoder."""
        residual = self._net.latent(x)
        for level in range(self.levels):
            centres = residual[torch.randperm(len(residual), device=x.device)[: self.codebook_size]]
            for _ in range(10):
                nearest = torch.cdist(residual, centres).argmin(dim=1)
                counts = torch.bincount(nearest, minlength=self.codebook_size)[:, None]
                sums = torch.zeros_like(centres).index_add_(0, nearest, residual)
                centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
            self._net.codebooks[level] = centres
            residual = residual - centres[torch.cdist(residual, centres).argmin(dim=1)]

    def _train(self, x: Tensor, progress: Progress | None) -> None:
        net = self._net
        layers = [*net.encoder.parameters(), *net.decoder.parameters()]
        optimizer = torch.optim.AdamW(
            [
                {"params": layers, "weight_decay": self.weight_decay},
                {"params": [net.codebooks], "weight_decay": 0.0},
            ],
            lr=self.lr,
        )
        for epoch in range(self.epochs):
            used = torch.zeros(self.levels, self.codebook_size, dtype=torch.int64, device=x.device)
            total = torch.zeros((), device=x.device)
            for rows in torch.split(torch.randperm(len(x), device=x.device), self.batch_size):
                batch = x[rows]
                z = net.latent(batch)
                codes, residuals = net.quantize(z, self.sinkhorn)
                q = net.quantized(codes)
                if self.estimator == "rotation":
                    passed = _rotated(z, q.detach())
                else:
                    passed = z + (q - z).detach()
                wanted = (batch - net.mean) / net.scale
                loss = F.mse_loss(net.decoder(passed), wanted)
                for level, residual in enumerate(residuals):
                    centre = net.codebooks[level][codes[:, level]]
                    loss = loss + F.mse_loss(centre, residual.detach())
                    loss = loss + self.commitment * F.mse_loss(residual, centre.detach())
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                total += loss.detach() * len(rows)
                for level in range(self.levels):
                    used[level] += torch.bincount(codes[:, level], minlength=self.codebook_size)
            if not torch.isfinite(total):
                raise ValueError(
                    f"lr: the loss is not finite in epoch {epoch + 1}; {self.lr} is high"
                )
            if epoch < self.epochs - 1:
                self._revive(x, used)
            if progress is not None:
                progress(epoch + 1, self.epochs, f"loss {float(total) / len(x):.4f}")

    @torch.no_grad()
    def _revive(self, x: Tensor, used: Tensor) -> None:
        """Puts the codes that an epoch did not use on residuals of random items."""
        dead = used == 0
        if not dead.any():
            return
        rows = torch.randint(len(x), (max(2048, self.codebook_size),), device=x.device)
        _, residuals = self._net.quantize(self._net.latent(x[rows]))
        for level, residual in enumerate(residuals):
            count = int(dead[level].sum())
            self._net.codebooks[level, dead[level]] = residual[:count]

    @torch.no_grad()
    def _codes(self, x: Tensor) -> NDArray[np.int32]:
        parts = [self._net.quantize(self._net.latent(part))[0] for part in torch.split(x, 8192)]
        return torch.cat(parts).cpu().numpy().astype(np.int32)

    @torch.no_grad()
    def _separated(self, x: Tensor, sids: NDArray[np.int32]) -> NDArray[np.int32]:
        """Ids of which no two are equal: later items of an id get the nearest free last code."""
        prefixes = np.unique(sids[:, :-1], axis=0, return_inverse=True)[1].reshape(-1)
        if np.bincount(prefixes).max() > self.codebook_size:
            raise ValueError(
                f'distinct="distinct": {np.bincount(prefixes).max()} items share their first '
                f"{self.levels - 1} codes, more than codebook_size = {self.codebook_size}"
            )
        _, residuals = self._net.quantize(self._net.latent(x))
        distance = torch.cdist(residuals[-1], self._net.codebooks[-1]).cpu().numpy()
        out = sids.copy()
        shared = np.flatnonzero(np.bincount(prefixes) > 1)
        for prefix in shared:
            items = np.flatnonzero(prefixes == prefix)
            taken = np.zeros(self.codebook_size, dtype=bool)
            for item in items[np.argsort(distance[items, sids[items, -1]], kind="stable")]:
                code = int(np.where(taken, np.inf, distance[item]).argmin())
                taken[code] = True
                out[item, -1] = code
        return out

    def encode(self, X: ArrayLike | Tensor) -> NDArray[np.int32]:
        """Nearest codes of new items, level by level.

        Args:
            X: [n, d], taken as float32.

        Returns:
            int32 [n, L]; with distinct="rank" [n, L + 1], the last column 0.

        Raises:
            RuntimeError: It is not fitted.
            ValueError: X has another number of columns, or values that are not finite.
        """
        net = self._fitted("encode")
        x = as_rows(X)
        if x.shape[1] != len(net.mean):
            raise ValueError(f"X: wanted {len(net.mean)} columns, got {x.shape[1]}")
        sids = self._codes(_tensor(x).to(net.mean.device))
        return np.pad(sids, ((0, 0), (0, int(self.distinct == "rank"))))

    @torch.no_grad()
    def decode(self, sids: ArrayLike) -> NDArray[np.float32]:
        """What the decoder makes of ids.

        Args:
            sids: [n, 1 to L] integers in 0..K-1 (fewer columns: the first levels alone); a rank
                column says nothing of the vector.

        Returns:
            float32 [n, d].

        Raises:
            RuntimeError: It is not fitted.
            TypeError: `sids` are not integers.
            ValueError: The shape is wrong or a code is out of range.
        """
        net = self._fitted("decode")
        codes = np.asarray(sids)
        most = self.levels + (self.distinct == "rank")
        if codes.ndim != 2 or not 1 <= codes.shape[1] <= most:
            raise ValueError(f"sids: wanted shape [n, 1..{most}], got {list(codes.shape)}")
        if codes.dtype.kind not in "iu":
            raise TypeError(f"sids: wanted integers, got dtype {codes.dtype}")
        codes = codes[:, : self.levels].astype(np.int64)
        if codes.size and not 0 <= codes.min() <= codes.max() < self.codebook_size:
            raise ValueError(f"sids: wanted codes in 0..{self.codebook_size - 1}")
        rows = torch.from_numpy(codes).to(net.mean.device)
        out: NDArray[np.float32] = net.decode(net.quantized(rows)).cpu().numpy()
        return out

    def _fitted(self, verb: str) -> _Autoencoder:
        if not hasattr(self, "_net"):
            raise RuntimeError(f"{verb}: call fit or from_pretrained first")
        return self._net

    def _settings(self) -> dict[str, Any]:
        names = (
            *("levels", "codebook_size", "dim", "epochs", "batch_size", "lr", "weight_decay"),
            *("commitment", "estimator", "sinkhorn", "distinct"),
        )
        return {"hidden": list(self.hidden), **{name: getattr(self, name) for name in names}}

    @property
    def fingerprint(self) -> str:
        """Of the network, 32 hexadecimal digits: `Catalog.build(quantizer=...)`."""
        state = self._fitted("fingerprint").state_dict()
        return fingerprint(*(state[name].cpu().numpy() for name in sorted(state)))

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes config.json and model.safetensors to `directory`."""
        from safetensors.torch import save_file

        net = self._fitted("save_pretrained")
        directory = Path(directory)
        with atomic_write(directory / "model.safetensors") as path:
            save_file({k: v.contiguous().cpu() for k, v in net.state_dict().items()}, path)
        config = {
            "format": _FORMAT,
            "tokenizer": "rqvae",
            "width": len(net.mean),
            **self._settings(),
            "report": self.report_,
        }
        with atomic_write(directory / "config.json") as path:
            path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> RQVAE:
        """Reads what `save_pretrained` wrote; `encode` and `decode` work, `sids_` is not kept.

        Raises:
            DataError: A file is missing, broken or of something else.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        directory = Path(directory)
        path = directory / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            if (config.pop("format"), config.pop("tokenizer")) != (_FORMAT, "rqvae"):
                raise ValueError(f"wanted an RQ-VAE's config of format {_FORMAT}")
            width, report = config.pop("width"), config.pop("report")
            rqvae = cls(**config)
            net = _Autoencoder(width, rqvae.hidden, rqvae.dim, rqvae.levels, rqvae.codebook_size)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: {error}") from error
        path = directory / "model.safetensors"
        try:
            net.load_state_dict(load_file(path))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise DataError(f"{path}: {' '.join(str(error).split())}") from error
        rqvae._net, rqvae.report_ = net.eval(), report
        return rqvae
