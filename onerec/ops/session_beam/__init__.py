"""Session-wise beam search over the trie of semantic ids."""

from onerec.ops.session_beam.beam import BeamResult, BeamSearch, BeamState, LegalCodes
from onerec.ops.session_beam.search import constrained_beam_search

__all__ = ["BeamResult", "BeamSearch", "BeamState", "LegalCodes", "constrained_beam_search"]
