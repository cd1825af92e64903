"""A run's images for TensorBoard: the confusion matrix, the worst-classified images, and attention maps of the class token.

Each function draws without a display and returns an array (Y, X, 3) of uint8. Input images are arrays (count, Y, X, C) of
uint8. matplotlib is slow to import, so only :mod:`vix.reporting.logger` imports this module.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from vix.reporting.console import encodable

Array = np.ndarray[Any, np.dtype[Any]]
DPI = 100
MOST_NUMBERS, MOST_NAMES = 25, 100  # number of classes up to which cell values, and class names, are legible
CELL, GAP, LINE = 96, 14, 13  # pixels: side of an image, gap between images, height of a line of text
COLUMNS = 8  # of the worst images


@rc_context({"text.parse_math": False})  # dollar signs in names are text
def confusion_matrix(true: Array, predicted: Array, class_names: Sequence[str]) -> Array:
    """The confusion matrix, in percent of each true class (rows).

    true, predicted: class index of every image, (count,).
    """
    classes = len(class_names)
    counts = np.bincount(true * classes + predicted, minlength=classes**2).reshape(classes, classes)
    percent = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = np.clip(0.5 * classes, 4.5, 9) if classes <= MOST_NUMBERS else np.clip(0.12 * classes, 6, 12)
    figure = Figure((side + 2, side + 1), DPI, layout="constrained")
    axes = figure.subplots()
    # Square-root color scale: an error rate of 5 % must be visible.
    picture = axes.imshow(percent, cmap="Blues", norm=PowerNorm(0.5, 0, 100))
    axes.set_title(f"Images by class, top-1 {100 * np.mean(true == predicted):.2f} %")
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    figure.colorbar(picture, ax=axes, label="% of the true class", shrink=0.6, ticks=[0, 1, 5, 10, 25, 50, 100])
    if classes <= MOST_NAMES:
        names, size = [short(name) for name in class_names], 9 if classes <= MOST_NUMBERS else 5
        axes.set_xticks(range(classes), names, fontsize=size)
        axes.set_yticks(range(classes), names, fontsize=size)
        if max(map(len, names)) > 3:
            axes.tick_params(axis="x", labelrotation=90)
    if classes <= MOST_NUMBERS:
        for row, column in np.argwhere(counts):
            share = percent[row, column]
            color = "white" if share > 35 else "black"
            text = f"{share:.0f}" if share >= 0.5 else "<1"
            axes.text(column, row, text, ha="center", va="center", fontsize=8, color=color)
    return render(figure)


@rc_context({"text.parse_math": False})  # dollar signs in names are text
def worst_images(images: Array, true: Array, predicted: Array, losses: Array, class_names: Sequence[str]) -> Array:
    """A grid of images with their true and predicted classes, red where these differ, and their losses.

    true, predicted: class index of every image, (count,).   losses: cross-entropy in nats, (count,).
    """
    names = [short(name) for name in class_names]
    captions = [f"{names[t]} → {names[p]}\nloss {x:.2f}" for t, p, x in zip(true, predicted, losses, strict=True)]
    colors = ["tab:red" if wrong else "black" for wrong in true != predicted]
    rows = [slice(i, i + COLUMNS) for i in range(0, len(images), COLUMNS)]
    cells = [[square(image) for image in images[row]] for row in rows]
    title = "Images with the highest loss: true class → predicted class"
    return grid(title, cells, [captions[row] for row in rows], [colors[row] for row in rows])


@rc_context({"text.parse_math": False})  # dollar signs in names are text
def attention_maps(images: Array, true: Array, predicted: Array, maps: Sequence[Array], class_names: Sequence[str]) -> Array:
    """One row per image: the image with its true and predicted classes, then the class token's attention in each layer.

    true, predicted: class index of every image, (count,).
    maps: for each layer, the attention weights averaged over the heads, (count, Y, X).

    Each map has its own color scale, from 0 (black) to its largest weight, which the caption gives as a multiple of the weight
    of uniform attention to all tokens, the class token included. Negative weights, which approximate mixers can produce, are
    blue.
    """
    cells, texts = [], []
    for i, image in enumerate(images):
        layers = [layer[i] * (layer[i].size + 1) for layer in maps]
        cells.append([square(image), *(square(heat(layer)) for layer in layers)])
        caption = f"{short(class_names[true[i]])}\n→ {short(class_names[predicted[i]])}"
        texts.append([caption, *(f"layer {k}\nmax. {layer.max():.1f} ×" for k, layer in enumerate(layers))])
    blue = "; blue: negative" if any(layer.min() < 0 for layer in maps) else ""
    title = f"Attention of the class token, mean over the heads\n(× the weight of uniform attention{blue})"
    return grid(title, cells, texts, [["black"] * len(row) for row in cells])


def heat(map_YX: Array) -> Array:
    """A map in color, (Y, X, 3): black, red, yellow from 0 to its largest magnitude, and blue below 0."""
    shade_YX1 = (map_YX / max(np.abs(map_YX).max(), 1e-30))[..., None]
    colors = np.where(shade_YX1 >= 0, colormaps["inferno"](shade_YX1[..., 0])[..., :3], -shade_YX1 * [0.2, 0.65, 1.0])
    return np.round(255 * colors).astype(np.uint8)


def square(image_YXC: Array) -> Array:
    """An image resized to (CELL, CELL, 3) by nearest-neighbor interpolation."""
    rows, columns = (np.arange(CELL) * size // CELL for size in image_YXC.shape[:2])
    return np.broadcast_to(image_YXC[rows][:, columns], (CELL, CELL, 3))


def grid(
    title: str, cells: Sequence[Sequence[Array]], texts: Sequence[Sequence[str]], colors: Sequence[Sequence[str]]
) -> Array:
    """Rows of images (CELL, CELL, 3), each with two lines of colored text below it."""
    head = LINE * (title.count("\n") + 2)
    step = CELL + GAP
    height, width = head + len(cells) * (step + 2 * LINE), GAP + max(map(len, cells)) * step
    # One image with text on it: separate axes per image would be a hundred times slower.
    canvas = np.full((height, width, 3), 255, np.uint8)
    figure = Figure((width / DPI, height / DPI), DPI)
    figure.text(0.5, 1 - LINE / 2 / height, title, ha="center", va="top", fontsize=10)
    for i, row in enumerate(cells):
        top = head + i * (step + 2 * LINE)
        for j, image in enumerate(row):
            left = GAP + j * step
            canvas[top : top + CELL, left : left + CELL] = image
            place = ((left + CELL / 2) / width, 1 - (top + CELL + 2) / height)
            figure.text(*place, texts[i][j], ha="center", va="top", fontsize=7, color=colors[i][j])
    figure.figimage(canvas)
    return render(figure)


def short(name: str) -> str:
    """A class name, truncated to 12 characters."""
    name = encodable(name)
    return name if len(name) <= 12 else f"{name[:11]}…"


def render(figure: Figure) -> Array:
    """The pixels of a figure, (Y, X, 3) of uint8."""
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings(action="ignore"):  # a character missing from the font is drawn as a box
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
