"""Semantic ids of a catalogue by the name of the tokenizer, those of other libraries included."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onerec.errors import OneRecError
from onerec.progress import Progress
from onerec.tokenizer import RQVAE, ResidualQuantizer
from onerec.tokenizer.residual_quantizer import describe_ids, number_collisions

RQVAE_EPOCHS = 100


@dataclass(frozen=True)
class Ids:
    """Ids that some other library's quantizer made.

    Attributes:
        sids_: int32 [N, L].
        report_: As that of `ResidualQuantizer`.
    """

    sids_: npt.NDArray[np.int32]
    report_: dict[str, Any]


def make_ids(
    name: str,
    vectors: npt.NDArray[np.float32],
    levels: int,
    codebook_size: int,
    seed: int,
    progress: Progress | None = None,
) -> Any:
    """A fitted tokenizer: what has `sids_` and `report_`.

    Args:
        name: "balanced" (unique ids of `ResidualQuantizer`), "sequential" (the same by the paper's
            Algorithm 1), "rqvae" (`RQVAE` with a collision digit, as TIGER has it), "rqvae-unique"
            (with its last codes moved apart), "faiss" (its residual quantizer, a collision digit).
        vectors: float32 [N, d].
        levels: L.
        codebook_size: K.
        seed: Of the tokenizer.
        progress: Told of an RQ-VAE's epochs.

    Raises:
        OneRecError: faiss is asked for and not installed, or K is no power of two for it.
    """
    if name.startswith("rqvae"):
        distinct: Any = "rank" if name == "rqvae" else "distinct"
        rqvae = RQVAE(
            levels, codebook_size, epochs=RQVAE_EPOCHS, distinct=distinct, random_state=seed
        )
        return rqvae.fit(vectors, progress)
    if name == "faiss":
        return _faiss_ids(vectors, levels, codebook_size, seed)
    method: Any = {"balanced": "priced", "sequential": "sequential"}[name]
    return ResidualQuantizer(
        levels, codebook_size, method=method, distinct="distinct", random_state=seed
    ).fit(vectors)


def _faiss_ids(vectors: npt.NDArray[np.float32], levels: int, codebook_size: int, seed: int) -> Ids:
    try:
        import faiss
    except ImportError as problem:
        raise OneRecError(
            f"the system onerec-faiss needs faiss ({problem}): pip install 'onerec[bench]', or "
            "leave it out with --systems"
        ) from problem
    bits = codebook_size.bit_length() - 1
    if 2**bits != codebook_size:
        raise OneRecError(f"faiss: --codebook_size must be a power of two, got {codebook_size}")
    quantizer = faiss.ResidualQuantizer(vectors.shape[1], levels, bits)
    quantizer.cp.seed = seed
    quantizer.train(vectors)
    packed = quantizer.compute_codes(vectors)
    codes = faiss.unpack_bitstrings(packed, levels, bits).astype(np.int32)
    error = np.square(vectors - quantizer.decode(packed), dtype=np.float64).sum(axis=1).mean()
    # In random order: the items' own order may tell what a model should not know.
    order = np.random.default_rng(seed).permutation(len(codes))
    sids = np.empty((len(codes), levels + 1), np.int32)
    sids[order] = number_collisions(codes[order], codebook_size)
    report = {"n_items": len(codes), "mse": float(error), **describe_ids(sids, codebook_size)}
    return Ids(sids, report)
