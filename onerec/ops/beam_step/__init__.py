"""One exact beam step over the trie of semantic ids."""

from onerec.ops.beam_step.step import SCORINGS, BeamStep, allow_masks, beam_step, check_scoring

__all__ = ["SCORINGS", "BeamStep", "allow_masks", "beam_step", "check_scoring"]
