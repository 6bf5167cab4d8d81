"""What a recommender was made from, as fingerprints."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Lineage:
    """Fingerprints in hexadecimal digits; empty where there is none.

    Attributes:
        export: Of the folder of `export` that the network came from.
        quantizer: Of the quantizer that gave the catalogue its semantic ids.
        catalog: Of item ids and semantic ids.
    """

    export: str = ""
    quantizer: str = ""
    catalog: str = ""
