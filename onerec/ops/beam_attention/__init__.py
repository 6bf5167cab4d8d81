"""The two attentions of a decoder whose beams share a history: to that, and to their own tokens."""

from onerec.ops.beam_attention.attention import ancestry_attention, cross_attention

__all__ = ["ancestry_attention", "cross_attention"]
