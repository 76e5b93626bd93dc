r"""What a fine-tuned model gets wrong: which classes it takes for which, and the images it is most mistaken about.

    python -m vit_jax.mistakes WORKDIR [--split=test] [--images=24]

Evaluates the parameters of a run on a split of its data and writes into the workdir

confusion.png    the confusion matrix: rows are the true classes, columns what the model says
mistakes.png     the images it is most certain about and wrong
predictions.csv  for each image its place, true class, predicted class, and the probability of both
"""

import argparse
import csv
import io
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from vit_jax.compilation_cache import use_compilation_cache
from vit_jax.data.images import ImageError
from vit_jax.data.sources import NO_LABEL, Example, Source, open_source
from vit_jax.errors import UserError
from vit_jax.host import num_cpus
from vit_jax.json_files import read_object
from vit_jax.predict import Predictor
from vit_jax.weights import Weights, load
from vit_jax.workdir import AnyPath, parse, write_atomically

_MOST_CLASSES = 60  # of a matrix that has room for names


def predict_source(predictor: Predictor, source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Predicts all examples of a source.

    Returns:
      probabilities, float32 `[examples, classes]`, and labels, int64 `[examples]`.

    Raises:
      UserError: images may have several labels.
    """
    if source.max_labels > 1:
        raise UserError(f"images of {source.name} may have several labels; there is no confusion matrix of those.")
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
    """The image of an example as the model sees it."""
    image, preprocessing = example["image"], predictor.preprocessing
    try:
        if isinstance(image, bytes):
            image = preprocessing.decode(image, exif_orientation=example.get("exif_orientation", False))
        return preprocessing(image)
    except ImageError as error:
        raise UserError(f"cannot read {source.where(index)}: {error}. Replace or remove the file.") from error


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """int64 `[num_classes, num_classes]`: how many images of each class (row) were taken for each (column).

    Args:
      labels: `[examples]`; those without label, `NO_LABEL`, do not count.
      predicted: `[examples]`.
      num_classes: of both.
    """
    counted = labels != NO_LABEL
    matrix = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(matrix, (labels[counted], predicted[counted]), 1)
    return matrix


def worst_mistakes(probabilities: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """Examples that are wrong, the one whose wrong class has the highest probability first; at most `count`."""
    predicted = probabilities.argmax(axis=1)
    wrong = np.flatnonzero((predicted != labels) & (labels != NO_LABEL))
    return wrong[np.argsort(-probabilities[wrong, predicted[wrong]], kind="stable")][:count]


def draw_confusion(matrix: np.ndarray, names: Sequence[str]) -> bytes:
    """The matrix as a PNG; shades are shares of the row."""
    from matplotlib.figure import Figure

    with_names = len(names) <= _MOST_CLASSES
    side = max(4.0, 0.33 * len(names)) if with_names else 10.0
    figure = Figure(figsize=(side + 2, side + 1), layout="constrained")
    axis = figure.subplots()
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if with_names:
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        for row, column in np.argwhere(matrix):
            color = "white" if shares[row, column] > 0.5 else "black"
            axis.text(column, row, matrix[row, column], ha="center", va="center", fontsize=7, color=color)
    right = np.trace(matrix) / max(1, matrix.sum())
    axis.set(xlabel="predicted", ylabel="true", title=f"{100 * right:.1f} % of {matrix.sum():,} images are right")
    figure.colorbar(image, label="share of the true class", shrink=0.7)
    return _png(figure)


def draw_mistakes(images: Sequence[np.ndarray], titles: Sequence[str]) -> bytes:
    """Images with their titles as a PNG."""
    from matplotlib.figure import Figure

    columns = min(6, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(2.1 * columns, 2.5 * rows), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axis in axes:
        axis.axis("off")
    for axis, image, title in zip(axes, images, titles, strict=False):
        axis.imshow(image)
        axis.set_title(title, fontsize=8)
    return _png(figure)


def _png(figure: Any) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return content.getvalue()


def write_mistakes(path: AnyPath, weights: Weights, source: Source, *, num_images: int = 24) -> dict[str, float]:
    """Writes the three files; returns accuracy and number of examples.

    Args:
      path: folder for them.
      weights: of the model.
      source: labelled images of its classes.
      num_images: in the picture of mistakes.
    """
    predictor = Predictor(weights, batch_size=min(64, len(source)))
    probabilities, labels = predict_source(predictor, source)
    num_classes = probabilities.shape[1]
    names = list(source.class_names or weights.class_names or map(str, range(num_classes)))
    names += [str(number) for number in range(len(names), num_classes)]
    predicted = probabilities.argmax(axis=1)
    matrix = confusion_matrix(labels, predicted, num_classes)
    write_atomically(path / "confusion.png", draw_confusion(matrix, names))

    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["image", "true", "predicted", "probability of true", "probability of predicted"])
    for index, (label, said) in enumerate(zip(labels, predicted, strict=True)):
        if label != NO_LABEL:
            chances = [f"{probabilities[index, each]:.4f}" for each in (label, said)]
            writer.writerow([source.where(index), names[label], names[said], *chances])
    write_atomically(path / "predictions.csv", table.getvalue())

    worst = worst_mistakes(probabilities, labels, num_images)
    pictures = [_as_seen(predictor, source, index, source[index]) for index in map(int, worst)]
    titles = [
        f"{names[labels[index]]}\nsaid {names[predicted[index]]}, {100 * probabilities[index, predicted[index]]:.0f} %"
        for index in worst
    ]
    if pictures:
        write_atomically(path / "mistakes.png", draw_mistakes(pictures, titles))
    return {"accuracy": float(np.trace(matrix) / max(1, matrix.sum())), "examples": int(matrix.sum())}


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m vit_jax.mistakes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdir", help="of the run")
    parser.add_argument("--split", help="of the run's data set (default: what it was evaluated on)")
    parser.add_argument("--images", type=int, default=24, help="in mistakes.png (default: 24)")
    args = parser.parse_args(arguments)
    try:
        if args.images < 1:
            raise UserError(f"--images must be at least 1, got {args.images}.")
        path = parse(args.workdir)
        if not (path / "config.json").exists():
            raise UserError(f"{path} is not the workdir of a run: it has no config.json.")
        data = read_object(path / "config.json")["data"]
        split = args.split or data["eval_split"]
        if split is None:
            raise UserError("the run evaluated nothing; name a split, such as --split=test.")
        use_compilation_cache()
        source = open_source(data["dataset"], split, image_key=data["image_key"], label_key=data["label_key"])
        found = write_mistakes(path, load(path), source, num_images=args.images)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{100 * found['accuracy']:.2f} % of {found['examples']:,} images of {split} are right")
    print(f"In {path}: confusion.png, mistakes.png, predictions.csv")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
