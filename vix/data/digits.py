"""Handwritten digits that are part of scikit-learn (Alpaydin and Kaynak, UCI, 1998): real data without a download."""

import numpy as np

from vix.data.dataset import ImageData, LabeledImages

TEST_SIZE = 360


class Digits(ImageData):
    """1,437 training and 360 test images of 8×8 gray pixels, 10 classes; the split is fixed and stratified."""

    image_size, channels, sizes = 8, 1, (1797 - TEST_SIZE, TEST_SIZE)
    class_names = tuple("0123456789")

    def read(self) -> tuple[LabeledImages, LabeledImages]:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
        train_x, test_x, train_y, test_y = train_test_split(
            images, digits.target, test_size=TEST_SIZE, stratify=digits.target, random_state=0
        )
        return (train_x, train_y), (test_x, test_y)
