"""``python -m vix predict RUN PATH … [key=value …]``: classes of image files, as CSV on standard output."""

import argparse
import csv
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from vix.analysis.trained_run import TRAINER_KEYS, check_keys, image_files, load_trained_run, predict, separate
from vix.cli.errors import one_line_errors, without_warnings
from vix.composition.command import expand_arguments
from vix.errors import UserError
from vix.reporting.console import protect_output
from vix.system.threads import use_given_cpus
from vix.training.evaluate import TOP


def main() -> None:
    """The command; exits with 1 where a file cannot be read, after the others."""
    protect_output()
    description = "Classes of image files, as CSV on standard output: file, class, probability, and the next four classes."
    parser = argparse.ArgumentParser(prog="python -m vix predict", description=description)
    parser.add_argument("run", metavar="RUN", help="a run's directory, such as outputs/vin/seed=0")
    parser.add_argument(
        "words",
        metavar="PATH",
        nargs="+",
        help="an image file, or a folder whose images are predicted; or key=value: trainer.device, trainer.precision, "
        "trainer.eval_batch_size, trainer.mirror_eval",
    )
    parser.add_argument("--weights", choices=("last", "best"), default="last", help="of which epoch (default: last)")
    options = parser.parse_intermixed_args(expand_arguments(sys.argv[1:]))
    words, overrides = separate([options.run, *options.words])
    use_given_cpus()
    errors = Console(stderr=True, markup=False, emoji=False, highlight=False, soft_wrap=True)
    progress = Progress(console=errors, transient=True, disable=not errors.is_terminal)
    with one_line_errors(overrides, batches="trainer.eval_batch_size"), without_warnings(), progress as bar:
        check_keys(overrides, TRAINER_KEYS)
        if len(words) < 2:
            raise UserError("PATH: pass the directory of a run, then image files or folders")
        run, *paths = words
        trained = load_trained_run(Path(run), options.weights, overrides)
        files, failures = image_files(paths)
        for failure in failures:
            bar.console.print(f"error: {failure}")
        writer = csv.writer(sys.stdout, lineterminator="\n")
        count = min(TOP, trained.shape.classes)
        writer.writerow(["file", *(f"{name}{f'_{i}' if i else ''}" for i in range(count) for name in ("class", "probability"))])
        for prediction in bar.track(predict(trained, files), total=len(files), description="images"):
            if prediction.error:
                failures.append(prediction.error)
                bar.console.print(f"error: {prediction.error}")
                continue
            writer.writerow([prediction.path, *(x for name, p in prediction.classes for x in (name, f"{p:.6f}"))])
    sys.exit(1 if failures else 0)
