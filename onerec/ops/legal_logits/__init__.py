"""The output layer for legal codes only."""

from onerec.ops.legal_logits.logits import legal_logits

__all__ = ["legal_logits"]
