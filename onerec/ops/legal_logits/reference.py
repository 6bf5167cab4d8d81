"""The logits of legal codes, by way of all of them."""

from __future__ import annotations

import torch

from onerec.ops.session_beam.beam import LegalCodes


def legal_logits_reference(
    hidden: torch.Tensor, head: torch.Tensor, legal: LegalCodes
) -> torch.Tensor:
    """float32 [n]: hidden [B, R, d] times head [K, d], at the legal codes."""
    beams = legal.counts.shape[1]
    logits = hidden @ head.T
    return logits[legal.rows // beams, legal.rows % beams, legal.codes.long()]
