"""The compiled network gives the logits of the network."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from onerec import OneRec, OneRecConfig
from onerec.cli.main import main
from onerec.inference.aoti import PACKAGE, _AllExperts
from onerec.model.feed_forward import MoE

FIELDS: dict[str, Any] = {
    "codebook_size": 8,
    "levels": 2,
    "session_length": 2,
    "history_length": 3,
    "d_model": 8,
    "n_heads": 2,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "d_ff": 12,
    "n_experts": 3,
    "expert_d_ff": 8,
    "init_std": 0.4,
}


@pytest.mark.parametrize("normalize", [False, True])
def test_all_experts_are_the_mixture(normalize: bool) -> None:
    torch.manual_seed(0)
    mixture = MoE(OneRecConfig(**{**FIELDS, "normalize_gates": normalize})).eval()
    for parameter in mixture.parameters():
        torch.nn.init.normal_(parameter)
    mixture.selection_bias.uniform_(-0.2, 0.2)
    x = torch.randn(31, 8)
    with torch.no_grad():
        torch.testing.assert_close(_AllExperts(mixture)(x), mixture(x)[0])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_package_gives_the_logits_of_the_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = OneRec(OneRecConfig(**FIELDS)).eval()
    model.save_pretrained(tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model"), "--to", str(tmp_path), "--format", "aoti"]
    assert main(["export", str(tmp_path), *arguments]) == 0
    package = torch._inductor.aoti_load_package(str(tmp_path / PACKAGE))
    for items, beams in ((3, 2), (1, 7)):
        history = torch.full((1, 3, 2), -1)
        history[:, :items] = torch.randint(8, (1, items, 2))
        sessions = torch.randint(8, (beams, 2, 2))
        with torch.no_grad():
            wanted = model.session_logits(history, sessions, beams)
        torch.testing.assert_close(package(history, sessions), wanted)
