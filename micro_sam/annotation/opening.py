"""Begin or go on with the annotation of an image: which journals belong to it, and sessions that write one."""

from pathlib import Path

import numpy as np
import xxhash

from .._version import __version__
from .geometry import AnnotationImage
from .journal import Journal, find_journals, is_finished, journal_path, tidy
from .session import AnnotationSession, Mode

_PROBED_PLANES = 3


def quick_signature(image: AnnotationImage) -> str:
    """Tell images apart by name, shape, type and a few planes; unlike a full signature it takes no time."""
    digest = xxhash.xxh3_128(repr((image.name, tuple(image.array.shape), str(image.array.dtype))).encode())
    n_planes = image.shape[0] if len(image.shape) == 3 else 1
    for plane in np.unique(np.linspace(0, n_planes - 1, _PROBED_PLANES).astype(int)).tolist():
        values = np.ascontiguousarray(image.plane(None if len(image.shape) == 2 else plane))
        digest.update(values.view(np.uint8).reshape(-1))
    return digest.hexdigest()


def unfinished(image: AnnotationImage, mode: Mode) -> list[Path]:
    """Journals of annotations of this image whose result was not saved, newest first."""
    return [path for path in find_journals(quick_signature(image), mode) if not is_finished(path)]


def start(image: AnnotationImage, mode: Mode) -> AnnotationSession:
    """Begin an annotation; every action goes to a new journal below the cache directory."""
    signature = quick_signature(image)
    header = {
        "mode": mode, "software": f"micro_sam {__version__}",
        "image": {
            "name": image.name, "shape": list(image.shape), "dtype": str(image.array.dtype), "signature": signature,
        },
    }
    tidy()
    journal = Journal.create(journal_path(signature, mode), header)
    return AnnotationSession(image, mode=mode, journal=journal)


def recover(image: AnnotationImage, mode: Mode, path: str | Path) -> AnnotationSession:
    """Go on with an annotation: everything is as after the last action in its journal, which can be undone as well."""
    journal, records = Journal.resume(path)
    session = AnnotationSession(image, mode=mode, journal=journal)
    session.restore(records)
    return session
