"""The network: configuration, attention, mixture of experts, OneRec."""

from onerec.model.config import OneRecConfig
from onerec.model.onerec import DecoderCache, Memory, OneRec, OneRecOutput, RouterStats

__all__ = ["DecoderCache", "Memory", "OneRec", "OneRecConfig", "OneRecOutput", "RouterStats"]
