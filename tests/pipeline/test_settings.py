"""What the presets and the catalogue decide."""

from __future__ import annotations

import pytest

from onerec.pipeline.settings import PRESETS, Settings, TokenizeConfig


@pytest.mark.parametrize(
    ("items", "levels", "size"),
    [
        (3, 2, 3),
        (20, 2, 8),
        (1_682, 2, 64),
        (12_101, 2, 512),
        (65_536, 2, 2_048),
        (65_537, 3, 128),
        (1_000_000, 3, 256),
    ],
)
def test_the_catalogue_decides_the_shape_of_the_ids(items: int, levels: int, size: int) -> None:
    assert TokenizeConfig().shape_for(items) == (levels, size)
    assert size**levels >= items


def test_what_is_asked_for_is_kept() -> None:
    assert TokenizeConfig(levels=4).shape_for(1_000) == (4, 16)
    assert TokenizeConfig(codebook_size=7).shape_for(1_000) == (2, 7)
    assert TokenizeConfig(levels=3, codebook_size=7).shape_for(1_000_000) == (3, 7)


@pytest.mark.parametrize("preset", PRESETS)
def test_only_the_paper_presets_have_three_levels_and_outputs_of_codes(preset: str) -> None:
    settings = Settings.of_preset(preset)
    paper = preset != "items"
    assert settings.tokenize.levels == (3 if paper else None)
    assert settings.model["node_outputs"] == (not paper)
    assert settings.train.batch_size == (128 if paper else None)
