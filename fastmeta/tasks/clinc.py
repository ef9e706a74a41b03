"""CLINC150 (Larson et al. 2019): 150 intents of short English queries, as bags of words."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastmeta import values
from fastmeta.tasks._files import folder_of
from fastmeta.tasks.examples import Examples

FILE, SPLIT_FILE = "data_full.json", "intent_split_90_30_30.json"
SPLITS = ("train", "val", "test")  # of the intents; in the file also of every intent's queries, here all are examples
_WORD = re.compile(r"[a-z]+|\d")


def clinc(split: str = "train", data_root: str | os.PathLike | None = None, *, words: int = 2000) -> Examples:
    """The 150 queries of each intent of a split, float32 `[R, words]`: `tf_idf` with words and weights of the training
    intents, so that nothing of the others is known.

    Args:
        split: "train", "val" or "test": 90, 30 and 30 intents, as `intent_split_90_30_30.json` beside the data says.
        data_root: folder that holds `data_full.json`, itself or in `clinc150/`. Without it the folder that
            FASTMETA_DATA names.
        words: how many, the most frequent of the training intents; 2000 by default.

    Raises:
        ValueError: an unknown split; a file that is missing or damaged, by name.
    """
    values.choice("split", split, SPLITS)
    values.path("data_root", data_root, or_none=True)
    values.count("words", words)
    folder = folder_of(FILE, "CLINC150", "clinc150", data_root)
    queries, intents = _read(folder / FILE), _read(folder / SPLIT_FILE)
    try:
        pairs = [pair for part in SPLITS for pair in queries[part]]
        wanted = {one: set(intents[one]) for one in ("train", split)}
        of = {one: [(text, intent) for text, intent in pairs if intent in wanted[one]] for one in wanted}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / FILE} is not CLINC150: {type(error).__name__}: {error}") from error
    if not of[split]:
        raise ValueError(f"{folder / FILE} has no query of the intents that {SPLIT_FILE} names for {split}")
    texts, labels = zip(*of[split], strict=True)
    rows = tf_idf(texts, [text for text, _ in of["train"]], words=words)
    return Examples(rows, labels, name=f"clinc150/{split}")


def tf_idf(texts: Sequence[str], known: Sequence[str], *, words: int = 2000) -> Tensor:
    """Rows of unit length, float32 `[len(texts), words]`: how often each word stands in a text, times
    `log((1 + n) / (1 + d)) + 1` for a word in `d` of the `n` known texts (Salton and Buckley 1988, in the smoothed form
    that scikit-learn's `TfidfTransformer` documents). Columns are the most frequent words of the known texts, fewer if
    there are fewer; letters count as small ones, a digit is a word."""
    in_texts = Counter(word for text in known for word in set(_split(text)))
    frequent = sorted(in_texts, key=lambda word: (-in_texts[word], word))[:words]
    columns = {word: i for i, word in enumerate(frequent)}
    rows = torch.zeros(len(texts), len(columns))
    for i, text in enumerate(texts):
        for word, count in Counter(_split(text)).items():
            if word in columns:
                rows[i, columns[word]] = count
    number = torch.tensor([in_texts[word] for word in columns], dtype=torch.float64)
    rows *= (((1 + len(known)) / (1 + number)).log() + 1).float()
    return torch.nn.functional.normalize(rows, dim=1)


def _split(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
