"""A short-video world whose true expected watch time is known.

Users have interests, items have a topic, a creator, a quality and a length. An exposure is
skipped, watched in part, or watched to the end (and maybe again); each part's expectation has a
closed form, so the true value of any list of items is known. The three parts as functions of the
length were fitted so that the log of the default world has the marginals of KuaiRand-Pure's
single-column feed (70,003 exposures, 2022-04-25..30; Gao et al., CIKM 2022): mean watch time,
share watched to the end, under 3 s and under a tenth, in seven bands of length.
`World.marginals` gives ours beside theirs.

What a public log does not show, and so is an assumption here with a switch each: fatigue
(interest falls after similar items), repetition (a creator or an item again) and leaving.
"""

from onerec.data.simulator.population import simulate
from onerec.data.simulator.world import World

__all__ = ["World", "simulate"]
