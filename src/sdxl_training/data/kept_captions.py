"""Which captions a run keeps the text states of, remembered once all are encoded, so that they need not be drawn again.

Shape legend: N keys; a key is two u64.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

from sdxl_training.data.atomic import write_atomically
from sdxl_training.data.store_format import Keys, as_keys
from sdxl_training.data.text_states import LOOKED_UP, TextCache

log = logging.getLogger(__name__)


class KeptCaptions:
    """The keys of a run's captions, in a file beside the text states: 16 bytes for a caption of each picture.

    made_from: names all that decides which captions a run keeps: pictures, captions, rules, seed.
    """

    def __init__(self, cache: TextCache, made_from: str) -> None:
        named = f"{made_from} {cache.variants}".encode()
        digest = hashlib.blake2b(named, digest_size=16, key=cache.key("")).hexdigest()
        self._cache = cache
        self._path = cache.store.folder / f"captions-{digest}.npy"
        self._keys = bytearray()

    def all_there(self, texts: Iterable[str]) -> bool:
        """Return whether the captions were remembered and the cache has all of them.

        texts: the captions; the first of them are drawn and looked for, should a new version draw others.
        """
        keys_N2 = self._read()
        if keys_N2 is None or not self._cache.there(keys_N2).all():
            return False
        first = as_keys(map(self._cache.key, islice(texts, LOOKED_UP)))
        return bool(self._cache.there(first).all())

    def noting(self, texts: Iterable[str]) -> Iterator[str]:
        """Yield the captions, noting which they are."""
        for text in texts:
            self._keys += self._cache.key(text)
            yield text

    def remember(self) -> None:
        """Write down what was noted. Raises UserError where that cannot be written."""
        sink = io.BytesIO()
        np.save(sink, np.frombuffer(self._keys, np.uint64).reshape(-1, 2))
        write_atomically(self._path, sink.getvalue())

    def _read(self) -> Keys | None:
        try:
            keys_N2 = np.load(self._path, allow_pickle=False)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, EOFError) as error:
            log.warning("%s is damaged (%s): the captions are drawn anew", self._path, error)
            return None
        return keys_N2 if keys_N2.dtype == np.uint64 and keys_N2.shape[1:] == (2,) else None
