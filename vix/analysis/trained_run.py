"""Trained models of runs: their evaluation, and their predictions for image files."""

import copy
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from vix.build import construct, load_run, parse, parse_group
from vix.composition.command import Flags
from vix.composition.compose import compose
from vix.data.dataset import ImageData
from vix.data.image_folder import EvaluatedFolder, ImageFolder, Listing, read_image
from vix.data.loader import normalize
from vix.errors import ConfigError, DataError, UserError, nearest
from vix.overrides import override_key, parse_override
from vix.system.device import resolve_precision
from vix.system.files import expand_home
from vix.training.evaluate import TOP, evaluated_logits, predictions, scores

Weights = Literal["last", "best"]
# Of the trainer, what does not change the model.
TRAINER_KEYS = ("trainer.device", "trainer.precision", "trainer.eval_batch_size", "trainer.mirror_eval")
HELD_OUT = ("validation_size", "folds", "fold")  # of data: which training images are evaluated
IMAGE_FOLDER, EVALUATED_FOLDER = (f"{kind.__module__}.{kind.__name__}" for kind in (ImageFolder, EvaluatedFolder))


@dataclass(frozen=True)
class TrainedRun:
    """A run with its trained model.

    directory: of the run.
    weights: those of the last epoch, or of the epoch with the best accuracy.
    model: the model with these weights, in eval mode, on ``device``: (B, C, Y, X) images in [−1, 1] → (B, K) logits.
    shape: the run's image set, for the shape of its images. Its classes may lack their names.
    class_names: names of the classes; None where the run did not keep them.
    config: of the run, with the options that are overridden.
    overridden: keys of these options.
    checkpoint: of the run.
    device, autocast, batch_size: where, in which precision, and how many images at a time the model computes.
    mirror: whether the logits of each image and its mirror image are averaged.
    """

    directory: Path
    weights: Weights
    model: nn.Module
    shape: ImageData
    class_names: tuple[str, ...] | None
    config: DictConfig
    overridden: frozenset[str]
    checkpoint: Mapping[str, Any]
    device: torch.device
    autocast: torch.autocast
    batch_size: int
    mirror: bool


def separate(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate arguments into paths and overrides ``key=value``. The name of an existing file or directory is a path."""
    paths, overrides = list[str](), list[str]()
    for word in words:
        is_override = re.match(r"[\w.+~@]+=", word) and not os.path.lexists(expand_home(word))
        (overrides if is_override else paths).append(word if is_override else expand_home(word))
    return paths, overrides


def load_trained_run(
    directory: Path, weights: Weights, overrides: Sequence[str] = (), flags: Flags | None = None
) -> TrainedRun:
    """Load a run, to compute in the precision and with the batch size of its own evaluation, unless overridden.

    overrides: of ``TRAINER_KEYS`` and ``data``. Where they choose an image folder, its images are resized to those of the run.
    flags: where the file of an image set is looked for.

    Raises UserError where the directory holds no trained model, and for invalid overrides.
    """
    experiment, model, checkpoint = load_run(directory, weights)
    cfg = OmegaConf.create(checkpoint["config"])
    cfg.trainer.precision = checkpoint["results"].get("precision") or cfg.trainer.precision
    cfg.trainer.compile, cfg.trainer.memory_limit_gb = False, None
    overridden = override_config(cfg, overrides, experiment.data, flags)
    trainer = parse(cfg).trainer
    device, dtype = trainer.torch_device, resolve_precision(trainer.precision, trainer.torch_device)
    names = checkpoint["results"].get("class_names")
    return TrainedRun(
        directory,
        weights,
        model.to(device),
        experiment.data,
        tuple(names) if names else None,
        cfg,
        overridden,
        checkpoint,
        device,
        torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32),
        trainer.eval_batch_size,
        trainer.mirror_eval,
    )


def override_config(cfg: DictConfig, overrides: Sequence[str], shape: ImageData, flags: Flags | None) -> frozenset[str]:
    """Apply overrides to the config of a run, in place, and return their keys.

    shape: the run's image set.   flags: as for ``load_trained_run``.

    Raises UserError for an override with several values, and Hydra's exceptions for invalid ones.
    """
    values = {override_key(override): parse_override(override) for override in overrides}
    for override in values.values():
        if override.is_sweep_override():
            raise ConfigError(f"{override.input_line}: has several values; use one")
    if "data" in values:
        cfg.data = compose([str(values["data"].input_line)], flags).data
        for side in {"image_size", "channels"} & {*cfg.data}:
            cfg.data[side] = getattr(shape, side)
    for key, override in values.items():
        if key != "data":
            OmegaConf.update(cfg, key, override.value(), force_add=True)
    return frozenset(values)


def check_keys(overrides: Sequence[str], valid: Sequence[str]) -> None:
    """Raises ConfigError for the key of an override that is neither a valid one nor, where ``data`` is valid, below it."""
    for key in map(override_key, overrides):
        if key not in valid and not ("data" in valid and key.startswith("data.")):
            raise ConfigError(f"{key}: cannot be set for a trained model; {nearest(key, valid)}")


def evaluate(run: TrainedRun, split: Literal["test", "validation"] | None = None) -> dict[str, Any]:
    """Evaluate a model: :func:`vix.training.evaluate.scores`, the confusion matrix, and what was evaluated.

    split: the test images, or the training images that the run held out; None: those that the run itself evaluated.

    The confusion matrix has a row per true class and a column per predicted one, and contains numbers of images.

    Raises UserError where there is no such split, or the image set does not match the model.
    """
    data = evaluated_data(run, split)
    check_shape(run, data)
    images = data.load_evaluated(run.device)
    names = run.class_names or data.class_names
    images.labels = class_indices(run, data).to(run.device)[images.labels]
    predicted = predictions(run.model, images.eval_batches(run.batch_size), run.autocast, run.mirror)
    count = len(names)
    pairs = predicted.labels * count + predicted.top[:, 0]
    progress = run.checkpoint["progress"]
    return {
        "run": str(run.directory),
        "weights": run.weights,
        "epoch": progress["epoch"] if run.weights == "last" else progress["best"]["best_epoch"],
        "image_set": data.image_set,
        "tested_on": data.eval_split,
        "test_images": len(images),
        **scores(predicted, count),
        "class_names": list(names),
        "confusion_matrix": torch.bincount(pairs, minlength=count**2).view(count, count).tolist(),
    }


def evaluated_data(run: TrainedRun, split: Literal["test", "validation"] | None) -> ImageData:
    """The image set of the run's config, with the split.

    Raises UserError where it has no such split, or its images are not those of the run although no others are chosen.
    """
    options, recorded = run.config.data, run.checkpoint["results"].get("image_set")
    trained = run.checkpoint["config"]["data"]
    options.train_size = None
    others = bool(run.overridden & {"data", "data.root"})
    same = others and is_image_set(run, recorded)  # before the options of the held-out images are removed
    if split == "test":
        smaller = any(trained.get(option) for option in HELD_OUT) and "data.test_size" not in run.overridden
        options.update(dict.fromkeys((*HELD_OUT, "test_size") if smaller else HELD_OUT))  # it was that of the held-out images
    if others and not same:
        if options._target_ == IMAGE_FOLDER:
            options._target_ = EVALUATED_FOLDER
        for option in ("test_size", *HELD_OUT):
            if f"data.{option}" not in run.overridden:
                options[option] = None
    if split == "validation" and not (options.get("validation_size") or options.get("folds")):
        if others and any(trained.get(option) for option in HELD_OUT):
            raise UserError("--split validation: these are not the images of which the run held out some; use --split test")
        raise UserError(f"--split validation: {run.directory} held out no validation images; use --split test")
    data: ImageData = construct("data", parse_group(run.config, "data"))
    if not others and recorded and data.image_set != recorded:
        raise UserError(
            f"data.root={options.get('root')}: contains other images ({data.image_set}) than {run.directory} was evaluated on "
            f"({recorded}); pass data.root=DIR to evaluate on others"
        )
    held_out = {option: getattr(data, option) for option in HELD_OUT}
    if data.image_set == recorded and data.held_out_size and held_out != {option: trained.get(option) for option in HELD_OUT}:
        chosen, own = (
            ", ".join(f"data.{option}={of[option]}" for option in HELD_OUT if of.get(option) is not None)
            for of in (held_out, trained)
        )
        raise UserError(
            f"{chosen}: {run.directory} held out {own or 'no images'}, and was trained on all others; use --split test"
        )
    return data


def is_image_set(run: TrainedRun, recorded: str | None) -> bool:
    """Whether the chosen image set is the one that a run recorded; it may have no split but those that the run held out."""
    cfg, trained = copy.deepcopy(run.config), run.checkpoint["config"]["data"]
    for option in HELD_OUT:
        if trained.get(option) is not None and f"data.{option}" not in run.overridden:
            cfg.data[option] = trained[option]
    try:
        return bool(construct("data", parse_group(cfg, "data")).image_set == recorded)
    except UserError:  # another layout
        return False


def check_shape(run: TrainedRun, data: ImageData) -> None:
    """Raises UserError where the images or the number of classes are not those of the run's model."""
    for key, unit in (("image_size", "pixels a side"), ("channels", "channels"), ("classes", "classes")):
        here, there = getattr(data, key), getattr(run.shape, key)
        if here != there:
            raise UserError(f"data: {data.image_set} has {here} {unit}, but the model of {run.directory} has {there}")


def class_indices(run: TrainedRun, data: ImageData) -> Tensor:
    """For each class of an image set that has been read, the model's output (K,). Raises UserError where names differ."""
    names = run.class_names
    if names is None:  # a run of an earlier version
        return torch.arange(data.classes)
    for here, there, whose in ((names, data.class_names, "the run"), (data.class_names, names, data.image_set)):
        if only := [name for name in here if name not in there]:
            raise UserError(f"data: the classes are not those of {run.directory}: only {whose} has {', '.join(only[:5])}")
    return torch.tensor([names.index(name) for name in data.class_names])


@dataclass(frozen=True)
class FilePrediction:
    """The prediction for an image file.

    path: of the file.
    classes: the most probable classes and their probabilities, in descending order; at most five; empty after an error.
    error: why the file cannot be read; empty where it was.
    """

    path: str
    classes: tuple[tuple[str, float], ...] = ()
    error: str = ""


def image_files(paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """The files among the paths and the images below the folders among them; and an error message per unreadable folder."""
    files, errors = list[str](), list[str]()
    for path in paths:
        if not os.path.isdir(path):
            files.append(path)
            continue
        try:
            below = Listing().images_below(Path(path))
        except (OSError, DataError) as error:
            errors.append(f"{path}: cannot be read ({error})")
            continue
        files += below
        if not below:
            errors.append(f"{path}: contains no images")
    return files, errors


@torch.no_grad()
def predict(run: TrainedRun, files: Sequence[str]) -> Iterator[FilePrediction]:
    """Predict the classes of image files, which are cut and resized as those of an image folder, one batch at a time."""
    shape, names = run.shape, run.class_names or run.shape.class_names

    def read(path: str) -> np.ndarray | str:
        try:
            return read_image(path, shape.image_size, shape.channels)
        except DataError as error:
            return str(error)

    with ThreadPoolExecutor() as threads:
        for start in range(0, len(files), run.batch_size):
            paths = files[start : start + run.batch_size]
            contents = list(threads.map(read, paths))
            images = [image for image in contents if not isinstance(image, str)]
            top = iter(probabilities(run, np.stack(images), names) if images else ())
            for path, content in zip(paths, contents, strict=True):
                yield FilePrediction(path, error=content) if isinstance(content, str) else FilePrediction(path, next(top))


def probabilities(run: TrainedRun, images_BYXC: np.ndarray, names: Sequence[str]) -> list[tuple[tuple[str, float], ...]]:
    """For each image (uint8), the most probable classes with their probabilities."""
    images_BCYX = torch.from_numpy(images_BYXC).permute(0, 3, 1, 2).to(run.device)
    logits_BK = evaluated_logits(run.model, normalize(images_BCYX), run.autocast, run.mirror)
    values, classes = logits_BK.softmax(dim=1).topk(min(TOP, logits_BK.shape[1]))
    rows = zip(values.tolist(), classes.tolist(), strict=True)
    return [tuple((names[k], value) for value, k in zip(*row, strict=True)) for row in rows]
