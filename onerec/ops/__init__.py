"""Operations with one signature on every device; each folder holds the fast ways and a reference."""

from onerec.ops.moe import MoEStats, Routing, moe, moe_experts, moe_route

__all__ = ["MoEStats", "Routing", "moe", "moe_experts", "moe_route"]
