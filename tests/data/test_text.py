"""Item vectors from texts, by a tiny model that the test makes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from onerec.data import SessionConfig, build_sessions, open_log
from onerec.data.text import text_vectors
from onerec.errors import DataError, OneRecError

WORDS = ["[UNK]", "red", "blue", "shoe", "hat", "wool"]
TABLE = np.random.default_rng(0).normal(size=(len(WORDS), 8)).astype(np.float32)
TEXTS = ["red shoe", "blue shoe", None, "red hat", "", "blue hat"] * 5
TAGS = [["wool"], None, None, ["wool"], ["shoe"], None] * 5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text's vector is the mean of its words'."""
    pytest.importorskip("sentence_transformers", reason='needs the extra "text"')
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import StaticEmbedding
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    folder: Path = tmp_path_factory.mktemp("model")
    made = SentenceTransformer(modules=[StaticEmbedding(tokenizer, TABLE)], device="cpu")
    made.save(str(folder))
    return folder


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Users who walk over 30 items, with texts and tags of some."""
    folder = tmp_path / "log"
    folder.mkdir()
    rows = [(f"u{u}", (u + n) % 30, 10**12 + 86_400_000 * n) for u in range(20) for n in range(8)]
    users, items, times = map(list, zip(*rows, strict=True))
    columns = {"user_id": users, "item_id": items, "timestamp": times}
    pq.write_table(pa.table(columns), folder / "interactions.parquet")
    pq.write_table(
        pa.table({"item_id": list(range(30)), "text": TEXTS, "tags": TAGS}),
        folder / "items.parquet",
    )
    return folder


def mean(*words: str) -> np.ndarray:
    """The mean of the words' vectors."""
    return TABLE[[WORDS.index(word) if word in WORDS else 0 for word in words]].mean(axis=0)


def test_vectors_are_the_models_of_text_and_tags(model: Path, log: Path, tmp_path: Path) -> None:
    config = SessionConfig(embeddings="text", text_model=str(model))
    with open_log(log) as source:
        found = build_sessions(source, config, tmp_path / "out")
    np.testing.assert_allclose(found.embeddings[0], mean("red", "shoe", ".", "wool"), rtol=1e-5)
    np.testing.assert_allclose(found.embeddings[1], mean("blue", "shoe"), rtol=1e-5)
    # Item 4 has tags only.
    np.testing.assert_allclose(found.embeddings[4], mean("shoe"), rtol=1e-5)
    told = found.funnel["embeddings"]
    assert (told["source"], told["dim"]) == ("text", 8)
    assert told["filled"] == 5, "items with neither text nor tags"
    assert str(model) in told["about"]
    config = SessionConfig(embeddings="text+cooccurrence", text_model=str(model), embedding_dim=4)
    with open_log(log) as source:
        both = build_sessions(source, config, tmp_path / "both")
    assert both.embeddings.shape == (30, 12)


def test_a_model_that_is_not_at_hand_is_told(
    model: Path, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_log(log) as source:
        vectors = text_vectors(source.path, source.items, str(tmp_path / "none"))
        with pytest.raises(OneRecError, match="text_model: wanted the folder of a sentence-tran"):
            vectors.load()
        monkeypatch.setitem(sys.modules, "sentence_transformers", None)
        with pytest.raises(OneRecError, match=r'needs the extra: pip install "onerec\[text\]"'):
            vectors.load()


def test_a_log_without_texts_is_told(model: Path, log: Path) -> None:
    (log / "items.parquet").unlink()
    with open_log(log) as source:
        vectors = text_vectors(source.path, source.items, str(model))
        with pytest.raises(DataError, match="no item has a text"):
            vectors.load()
        assert json.dumps(vectors.about)
