"""Operations with one signature on every device; a folder has the fast ways and a reference."""

from onerec.ops.beam_attention import ancestry_attention, cross_attention
from onerec.ops.beam_step import BeamStep, beam_step
from onerec.ops.legal_logits import legal_logits
from onerec.ops.moe import (
    MoEStats,
    PackedExperts,
    Routing,
    moe,
    moe_experts,
    moe_experts_sorted,
    moe_route,
)
from onerec.ops.session_beam import BeamResult, BeamSearch, BeamState, LegalCodes

__all__ = [
    "BeamResult",
    "BeamSearch",
    "BeamState",
    "BeamStep",
    "LegalCodes",
    "MoEStats",
    "PackedExperts",
    "Routing",
    "ancestry_attention",
    "beam_step",
    "cross_attention",
    "legal_logits",
    "moe",
    "moe_experts",
    "moe_experts_sorted",
    "moe_route",
]
