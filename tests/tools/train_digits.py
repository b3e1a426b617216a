"""Makes the sample model `digits` and its held-out data: `python -m tests.tools.train_digits`.

Seeds are fixed, so that the same versions of scikit-learn and skl2onnx make the same files. Needs the extra `dev`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from skl2onnx import convert_sklearn
from skl2onnx.common.data_types import FloatTensorType
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

SAMPLES = Path(__file__).resolve().parents[2] / "proxy/backend/samples"
SEED = 20


def main() -> None:
    """Train, write model.onnx and digits_heldout.npz, print the accuracy."""
    images, digits = load_digits(return_X_y=True)
    images = images.astype(np.float32)
    seen, heldout, seen_digits, heldout_digits = train_test_split(
        images, digits, test_size=0.2, random_state=SEED, stratify=digits
    )
    network = MLPClassifier((64,), alpha=0.01, max_iter=400, random_state=SEED)
    classifier = make_pipeline(StandardScaler(), network).fit(seen, seen_digits)
    model = convert_sklearn(
        classifier,
        name="digits",
        initial_types=[("pixels", FloatTensorType([None, 64]))],
        final_types=None,
        options={id(classifier): {"zipmap": False}},
        target_opset=17,
    )
    (SAMPLES / "repository/digits/1/model.onnx").write_bytes(model.SerializeToString())
    np.savez_compressed(SAMPLES / "digits_heldout.npz", X=heldout.astype(np.uint8), y=heldout_digits.astype(np.uint8))
    right = int((classifier.predict(heldout) == heldout_digits).sum())
    print(f"{right} of {len(heldout)} held-out images right: {right / len(heldout):.1%}")


if __name__ == "__main__":
    main()
