"""Handwritten digits (Alpaydin and Kaynak, UCI Machine Learning Repository, 1998, CC BY 4.0): real data without a download."""

from pathlib import Path

import numpy as np

from vix.data.dataset import ImageData, LabeledImages

# The test part of the original set, as scikit-learn's load_digits() has it, in the order of its stratified train_test_split.
FILE = Path(__file__).with_suffix(".npz")
MAX_PIXEL = 16
TEST_SIZE = 360


class Digits(ImageData):
    """1,437 training and 360 test images of 8×8 gray pixels, 10 classes; the split is fixed and stratified."""

    image_size, channels, sizes = 8, 1, (1797 - TEST_SIZE, TEST_SIZE)
    class_names = tuple("0123456789")

    def read(self) -> tuple[LabeledImages, LabeledImages]:
        with np.load(FILE) as arrays:
            images = np.round(arrays["pixels"] * (255 / MAX_PIXEL)).astype(np.uint8)[..., None]
            labels = arrays["labels"].astype(np.int64)
        return (images[:-TEST_SIZE], labels[:-TEST_SIZE]), (images[-TEST_SIZE:], labels[-TEST_SIZE:])
