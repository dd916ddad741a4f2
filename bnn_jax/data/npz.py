"""Files of NumPy: read with every byte checked, and kept as a cache of what was decoded."""

import logging
import zipfile
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np

from bnn_jax.errors import RunError
from bnn_jax.files import replacing

logger = logging.getLogger(__name__)


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz file, their CRCs checked; objects (pickles) are refused."""
    try:
        with path.open("rb") as stream:
            if not zipfile.is_zipfile(stream):
                raise RunError(f"{path} is not an .npz file or was cut short; write it again with numpy.savez")
            with np.load(stream, allow_pickle=False) as file:
                return {key: file[key] for key in file.files}
    except RunError:
        raise
    except Exception as error:  # Damage shows as a dozen types, from zipfile, zlib, struct, ast and NumPy.
        if "allow_pickle" in str(error):
            raise RunError(
                f"{path} holds Python objects, which are not loaded because they can run code; "
                "write it again with arrays of numbers"
            ) from error
        raise RunError(f"{path} cannot be read ({error}); write it again with numpy.savez") from error


def read_through_cache(
    folder: Path, source: str, cache: Path, decode: Callable[[], dict[str, np.ndarray]], splits: Collection[str]
) -> dict[str, np.ndarray]:
    """The arrays of a set of files: from `cache` if made from these very files, else decoded anew."""
    if cache.exists():
        try:
            arrays = read_npz(cache)
            needed = {f"{split}_{kind}" for split in splits for kind in ("images", "labels")}
            if str(arrays.get("source")) == source and arrays.keys() >= needed:
                return arrays
            logger.warning("%s was not made from the files in %s; making it anew", cache, folder)
        except RunError:
            logger.warning("%s is damaged; making it anew", cache)
    arrays = decode() | {"source": np.array(source)}
    try:
        with replacing(cache) as draft, draft.open("wb") as file:
            np.savez(file, **arrays)
    except OSError as error:
        logger.warning("%s cannot be written (%s); %s will be decoded anew each time", cache, error, folder)
    return arrays
