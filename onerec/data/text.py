"""Item vectors from the items' texts, by a sentence-transformers model (extra `text`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from onerec.data.vectors import Floats, VectorFile, checked
from onerec.errors import DataError, OneRecError

NAME = "text"


@dataclass(frozen=True)
class TextVectors(VectorFile):
    """Vectors that are made when they are loaded.

    Args:
        texts: Of each item, text and tags; "" where it has neither.
        model: Name or folder of the model.
    """

    texts: tuple[str, ...] = ()
    model: str = ""

    def load(self) -> tuple[npt.NDArray[Any], Floats]:
        """Encodes the texts.

        Returns:
            Ids [n] of the items that have a text, and vectors float32 [n, d].

        Raises:
            DataError: No item has a text, or the model gives numbers that are not finite.
            OneRecError: The extra is not installed, or there is no such model.
        """
        assert self.item_ids is not None
        given = np.array([bool(text) for text in self.texts])
        if not given.any():
            raise DataError(f"{self.path}: no item has a text, so embeddings cannot be 'text'")
        model = _model(self.model)
        vectors = model.encode(
            [text for text in self.texts if text],
            convert_to_numpy=True,
            show_progress_bar=False,
        )
        return self.item_ids[given], checked(self.path, self.item_ids[given], vectors)


def text_vectors(path: Path, items: pa.Table, model: str) -> TextVectors:
    """The vectors of a log's items: an item's text, its tags behind it.

    Args:
        path: What messages call the log.
        items: item_id, text, tags.
        model: Name or folder of the model.
    """
    ids = items["item_id"].to_numpy(zero_copy_only=False)
    texts = []
    for item, text, tags in zip(
        ids.tolist(), items["text"].to_pylist(), items["tags"].to_pylist(), strict=True
    ):
        # An item without a text is called by its id.
        own = "" if text == f"item {item}" else text.strip()
        texts.append(". ".join(filter(None, [own, ", ".join(tags)])))
    return TextVectors(path, ids, f"{model} of text and tags", texts=tuple(texts), model=model)


def _model(name: str) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise OneRecError(
            f'embeddings: "text" needs the extra: pip install "onerec[text]" ({error})'
        ) from None
    try:
        return SentenceTransformer(name)
    except Exception as error:  # each kind of model and of network trouble has errors of its own
        reason = " ".join(str(error).split())[:300]
        raise OneRecError(
            f"text_model: wanted the folder of a sentence-transformers model or a name that can "
            f"be fetched, got {name!r} ({type(error).__name__}: {reason}). Without a network, run "
            f"`hf download NAME --local-dir FOLDER` where there is one, and take "
            "--sessions.text_model FOLDER"
        ) from None
