"""Settings made in Python are those that the command line makes."""

from __future__ import annotations

from pathlib import Path

import pytest

from onerec.cli.command import parse_command
from onerec.pipeline import Settings
from onerec.pipeline.settings import PRESETS, SECTIONS, RecommendConfig


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_that_of_the_command(preset: str, tmp_path: Path) -> None:
    argv = ["--out", str(tmp_path), "--preset", preset]
    command = parse_command("run", "", argv, list(SECTIONS), data=True)
    assert Settings.of_preset(preset) == command.settings


def test_attributes_can_be_chosen() -> None:
    chosen = RecommendConfig(users=7)
    settings = Settings.of_preset(data="log", recommend=chosen)
    assert (settings.data, settings.recommend) == ("log", chosen)
    assert settings.evaluate == Settings.of_preset().evaluate
    with pytest.raises(TypeError, match="recomend"):
        Settings.of_preset(recomend=chosen)
