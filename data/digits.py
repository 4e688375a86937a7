"""The handwritten digits inside scikit-learn (Alpaydin and Kaynak 1998), as parquet shards."""

import hashlib
from pathlib import Path

from data.cache import cache_folder, write_shards

SHARDS = 16


def digits_shards() -> list[Path]:
    """The shards (columns `image`: 8 x 8 uint8, `label`: 0 to 9), written first if missing."""
    import numpy as np
    import pyarrow as pa
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # the pixels are counts from 0 to 16
    labels = digits.target.astype(np.int64)
    digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()[:16]
    folder = cache_folder() / f"sklearn_digits-{digest}"
    if not folder.is_dir():
        kind = pa.list_(pa.list_(pa.uint8()))
        rows = (slice(number, None, SHARDS) for number in range(SHARDS))
        tables = (pa.table({"image": pa.array(images[own].tolist(), kind), "label": labels[own]}) for own in rows)
        write_shards(folder, tables)
    return sorted(folder.glob("*.parquet"))
