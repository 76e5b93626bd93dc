r"""Shows the mistakes of a fine-tuned model: which classes it confuses, and its most confident errors.

    python -m vit_jax.mistakes WORKDIR [--split=test] [--images=24]

Evaluates a run on a split of its data and writes into its workdir. Classes and loss are those of the training; data
that have changed since are refused.

confusion.png    the confusion matrix: rows are true classes, columns predicted ones
mistakes.png     the wrong predictions with the highest probabilities
predictions.csv  for each image its path, true class, predicted class, and the probability of both
"""

import argparse
import csv
import io
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from vit_jax.console import num_cpus, print_any_text, run_command, show_name
from vit_jax.data.sources import NO_LABEL, Example, MissingDataError, Source, open_source
from vit_jax.data.transforms import ImageError
from vit_jax.errors import UserError
from vit_jax.files import AnyPath, parse_path, write_atomically, write_figure
from vit_jax.json_files import read_object
from vit_jax.predict import PROBABILITIES, Predictor
from vit_jax.run.compilation_cache import use_compilation_cache
from vit_jax.run.facts import open_as_trained, read_facts
from vit_jax.weights import Weights, load

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_CLASSES = 60  # of a confusion matrix with names


def predict_source(predictor: Predictor, source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Predicts all examples: probabilities, float32 `[examples, classes]`, and labels, int64 `[examples]`.

    Raises `UserError` if images may have several labels.
    """
    if source.max_labels > 1:
        raise UserError(f"images of {source.name} may have several labels, which a confusion matrix cannot show.")
    probabilities, labels = [], np.full(len(source), NO_LABEL)

    def read(index: int) -> np.ndarray:
        example = source[index]
        label = example["label"]
        labels[index] = label if isinstance(label, int | np.integer) else next(iter(label), NO_LABEL)
        return _as_seen(predictor, source, index, example)

    with ThreadPoolExecutor(num_cpus()) as pool:
        for start in range(0, len(source), predictor.batch_size):
            indices = range(start, min(start + predictor.batch_size, len(source)))
            probabilities.append(predictor(np.stack(list(pool.map(read, indices)))))
    return np.concatenate(probabilities), labels


def _as_seen(predictor: Predictor, source: Source, index: int, example: Example) -> np.ndarray:
    """Preprocesses the image of an example for the model."""
    image, preprocessing = example["image"], predictor.preprocessing
    try:
        if isinstance(image, bytes):
            image = preprocessing.decode(image, exif_orientation=example.get("exif_orientation", False))
        return preprocessing(image)
    except ImageError as error:
        raise UserError(f"cannot read {source.where(index)}: {error}. Replace or remove the file.") from error


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts images by true class (row) and predicted class (column), int64 `[num_classes, num_classes]`.

    Both arguments are int `[examples]`; examples with `NO_LABEL` do not count.
    """
    counted = labels != NO_LABEL
    matrix = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(matrix, (labels[counted], predicted[counted]), 1)
    return matrix


def worst_mistakes(probabilities: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """Returns at most `count` wrong examples, by falling probability of the predicted class."""
    predicted = probabilities.argmax(axis=1)
    wrong = np.flatnonzero((predicted != labels) & (labels != NO_LABEL))
    return wrong[np.argsort(-probabilities[wrong, predicted[wrong]], kind="stable")][:count]


def draw_confusion(matrix: np.ndarray, names: Sequence[str]) -> "Figure":
    """Draws the matrix, shaded by share of the row."""
    from matplotlib.figure import Figure

    with_names = len(names) <= _MOST_CLASSES
    side = max(4.0, 0.33 * len(names)) if with_names else 10.0
    figure = Figure(figsize=(side + 2, side + 1), layout="constrained")
    axis = figure.subplots()
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if with_names:
        # A name such as "$5 or $10" is not a formula.
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=8, parse_math=False)
        axis.set_yticks(range(len(names)), names, fontsize=8, parse_math=False)
        for row, column in np.argwhere(matrix):
            color = "white" if shares[row, column] > 0.5 else "black"
            axis.text(column, row, matrix[row, column], ha="center", va="center", fontsize=7, color=color)
    right = np.trace(matrix) / max(1, matrix.sum())
    axis.set(xlabel="predicted", ylabel="true", title=f"{100 * right:.1f} % of {matrix.sum():,} images are right")
    figure.colorbar(image, label="share of the true class", shrink=0.7)
    return figure


def draw_mistakes(images: Sequence[np.ndarray], titles: Sequence[str]) -> "Figure":
    """Draws images with titles."""
    from matplotlib.figure import Figure

    columns = min(6, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(2.1 * columns, 2.5 * rows), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axis in axes:
        axis.axis("off")
    for axis, image, title in zip(axes, images, titles, strict=False):
        axis.imshow(image)
        axis.set_title(title, fontsize=8, parse_math=False)
    return figure


def write_mistakes(
    path: AnyPath | str,
    weights: Weights,
    source: Source,
    *,
    class_names: Sequence[str] | None = None,
    num_images: int = 24,
    probabilities: str | None = None,
) -> dict[str, float]:
    """Writes the three files into a folder; returns accuracy and number of examples.

    Args:
      path: folder to write to.
      weights: the model's weights.
      source: images labelled with its classes.
      class_names: names of the logits, or the first of them; None: those of the weights, or else of the source.
      num_images: number of images in mistakes.png.
      probabilities: "softmax" or "sigmoid"; None: as the weights say, or else softmax.
    """
    path = parse_path(path)
    predictor = Predictor(weights, batch_size=min(64, len(source)), probabilities=probabilities)
    chances, labels = predict_source(predictor, source)
    num_classes = chances.shape[1]
    names = [show_name(name) for name in class_names or weights.class_names or source.class_names or ()]
    names += [str(number) for number in range(len(names), num_classes)]
    predicted = chances.argmax(axis=1)
    matrix = confusion_matrix(labels, predicted, num_classes)
    write_figure(path / "confusion.png", draw_confusion(matrix, names))

    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["image", "true", "predicted", "probability of true", "probability of predicted"])
    for index, (label, said) in enumerate(zip(labels, predicted, strict=True)):
        if label != NO_LABEL:
            of_both = [f"{chances[index, each]:.4f}" for each in (label, said)]
            writer.writerow([show_name(source.where(index)), names[label], names[said], *of_both])
    write_atomically(path / "predictions.csv", table.getvalue())

    pictures, titles = [], []
    for index in map(int, worst_mistakes(chances, labels, num_images)):
        said = predicted[index]
        pictures.append(_as_seen(predictor, source, index, source[index]))
        titles.append(f"{names[labels[index]]}\nsaid {names[said]}, {100 * chances[index, said]:.0f} %")
    if pictures:
        write_figure(path / "mistakes.png", draw_mistakes(pictures, titles))
    else:
        (path / "mistakes.png").unlink(missing_ok=True)  # from an earlier call
    return {"accuracy": float(np.trace(matrix) / max(1, matrix.sum())), "examples": int(matrix.sum())}


def open_split(
    path: AnyPath, weights: Weights, split: str | None = None, dataset: str | None = None, *, allow_change: bool = False
) -> tuple[Source, Sequence[str] | None]:
    """Opens a split of a run's data, with the run's labels; also returns the names of the run's classes.

    The defaults are the run's evaluation split, and its data set as it was named then. Data that have changed are
    refused unless `allow_change`.

    Raises:
      UserError: the split does not exist, or the data are missing or have changed.
    """
    data = read_object(path / "config.json")["data"]
    split = split or data["eval_split"]
    if split is None:
        raise UserError("the run has no evaluation split. Set one, such as --split=test.")
    facts = read_facts(path)
    of_run = [each for each in (facts.eval, facts.train) if each] if facts else []
    kept = next((each for each in of_run if each.split == split), None)
    found = dataset or ((kept or of_run[0]).find() if of_run else data["dataset"])
    if kept and kept.labels:
        kept = None  # it describes several labels per image, which this command does not use
    names = facts.class_names if facts else weights.class_names

    def open_with(known: Sequence[str] | None) -> Source:
        options = {name: data.get(name) for name in ("image_key", "label_key", "max_labels")}
        return open_source(found, split, class_names=known, **options)

    try:
        source = open_as_trained(open_with, names, kept, what=str(path), allow_change=allow_change)
    except MissingDataError as error:
        raise MissingDataError(f"{error}\nIf the data have moved, set --dataset=<path>.") from error
    if facts is None and names is None and source.class_names and not allow_change:
        raise UserError(
            "\n".join(weights.notes)
            + "\nPass --allow_data_change to use the class names of the current data, in order."
        )
    return source, names


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m vit_jax.mistakes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdir", help="of the run")
    parser.add_argument("--split", help="of the run's data set (default: its evaluation split)")
    parser.add_argument("--dataset", help="current path or name of the run's data set (default: unchanged)")
    parser.add_argument("--probabilities", choices=tuple(PROBABILITIES), help="default: by the loss of the run")
    parser.add_argument(
        "--allow_data_change",
        action="store_true",
        help="accept data that have changed; class names match the labels",
    )
    parser.add_argument("--images", type=int, default=24, help="in mistakes.png (default: 24)")
    args = parser.parse_args(arguments)
    print_any_text()
    try:
        if args.images < 1:
            raise UserError(f"--images must be at least 1, got {args.images}.")
        path = parse_path(args.workdir)
        if not (path / "config.json").exists():
            raise UserError(f"{path} is not the workdir of a run: it has no config.json.")
        use_compilation_cache()
        weights = load(path)
        for note in weights.notes:
            print(f"note: {note}", file=sys.stderr)
        source, names = open_split(path, weights, args.split, args.dataset, allow_change=args.allow_data_change)
        found = write_mistakes(
            path, weights, source, class_names=names, num_images=args.images, probabilities=args.probabilities
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{100 * found['accuracy']:.2f} % of {found['examples']:,} images of {source.split} are right")
    print(f"In {path}: confusion.png, predictions.csv{', mistakes.png' if found['accuracy'] < 1 else ''}")
    return 0


if __name__ == "__main__":
    run_command(main)
