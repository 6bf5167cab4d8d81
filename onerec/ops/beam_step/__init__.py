"""One exact beam step over the trie of semantic ids."""

from onerec.ops.beam_step.step import BeamStep, beam_step

__all__ = ["BeamStep", "beam_step"]
