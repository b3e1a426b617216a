"""Models to try the backend with, and data that they have not seen.

`simple` adds and subtracts two vectors (numpy). `digits` recognizes handwritten digits of 8 x 8 pixels (ONNX): a
network of 64-64-10 trained on the "Optical Recognition of Handwritten Digits" data set that scikit-learn ships (UCI
Machine Learning Repository, E. Alpaydin and C. Kaynak, CC BY 4.0); `python -m tests.tools.train_digits` makes it again.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_HERE = Path(__file__).resolve().parent


def repository_path() -> Path:
    """The model repository with the samples."""
    return _HERE / "repository"


def heldout() -> tuple[npt.NDArray[np.float32], npt.NDArray[Any]]:
    """Images that `digits` was not trained on: pixels [n, 64] (0 to 16, FP32), and the digits [n] they show (INT64)."""
    with np.load(_HERE / "digits_heldout.npz") as data:
        return data["X"].astype(np.float32), data["y"].astype(np.int64)
