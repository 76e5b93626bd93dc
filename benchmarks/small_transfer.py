r"""A small transfer study for docs/results.md: pre-training, resolution, pooling and averaging, with three seeds.

    python benchmarks/small_transfer.py --data=cifar10.zip --out=runs/small_transfer
    python benchmarks/small_transfer.py --out=runs/small_transfer --report --docs=docs

Splits CIFAR-10 (images in {train,test}/<class>/*.jpg, in a zip file) into five classes to pre-train on and five to
transfer to, and then trains (configs/small_transfer.py):

1. a ViT with a class token, one with averaged tokens (GAP) and a BiT ResNet on the first five;
2. few-shot linear classifiers of the other five on each, and on networks that were never trained;
3. each fine-tuned on 2,000 images of the other five, at 32 pixels and at 48 with interpolated position embeddings, with
   and without Polyak averaging, and from scratch. The learning rate of each is chosen on 1,000 other images.

Runs `vit_jax.main` and `vit_jax.sweep` in folders below --out and prints each command. The same command resumes.
--only=<part of a name> restricts it.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence

from matplotlib.figure import Figure

# So that it runs from a clone that is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks.common import ROOT, insert_tables, progress
from vit_jax.console import format_table

SEEDS = (0, 1, 2)
SHOTS = (1, 5, 10, 25)
HALVES = {
    "upstream": ("airplane", "automobile", "bird", "cat", "deer"),
    "downstream": ("dog", "frog", "horse", "ship", "truck"),
}


@dataclasses.dataclass(frozen=True)
class Network:
    """A network to pre-train."""

    name: str
    arguments: str
    title: str


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way to make a classifier of the other five classes."""

    name: str
    network: str
    resolution: int
    pretrained: bool
    title: str
    polyak: float | None = None


NETWORKS = (
    Network("vit_cls", "model=vit,pool=cls", "ViT, class token"),
    Network("vit_gap", "model=vit,pool=gap", "ViT, GAP"),
    Network("bit", "model=bit", "BiT R20x1"),
)
ARMS = (
    Arm("vit_cls_48", "vit_cls", 48, True, "ViT, class token, 48 px"),
    Arm("vit_cls_32", "vit_cls", 32, True, "ViT, class token, 32 px"),
    Arm("vit_cls_48_polyak", "vit_cls", 48, True, "ViT, class token, 48 px, Polyak average", polyak=0.95),
    Arm("vit_gap_48", "vit_gap", 48, True, "ViT, GAP, 48 px"),
    Arm("bit_48", "bit", 48, True, "BiT R20x1, 48 px"),
    Arm("vit_cls_48_scratch", "vit_cls", 48, False, "ViT, class token, 48 px, from scratch"),
    Arm("bit_48_scratch", "bit", 48, False, "BiT R20x1, 48 px, from scratch"),
)


def split_classes(data: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes upstream.zip and downstream.zip, each with half of the classes of a zip file of images."""
    folder.mkdir(parents=True, exist_ok=True)
    for half, classes in HALVES.items():
        target = folder / f"{half}.zip"
        if target.exists():
            continue
        temporary = target.with_suffix(".tmp")
        with zipfile.ZipFile(data) as source, zipfile.ZipFile(temporary, "w") as copy:
            for name in sorted(source.namelist()):
                parts = name.split("/")
                if len(parts) == 3 and parts[1] in classes and parts[2]:
                    copy.writestr(name, source.read(name))
        temporary.replace(target)


class Study:
    """The runs, in folders below one."""

    def __init__(self, out: pathlib.Path, only: str):
        self._out, self._only = out, only

    def upstream(self, network: str, seed: int) -> pathlib.Path:
        """Workdir of a pre-training run."""
        return self._out / "upstream" / network / f"seed_{seed}"

    def untrained(self, network: str, seed: int) -> pathlib.Path:
        """Workdir of a network at its initialisation."""
        return self._out / "untrained" / network / f"seed_{seed}"

    def fewshot(self, network: str, seed: int, *, pretrained: bool) -> pathlib.Path:
        """Folder of a few-shot evaluation."""
        return self._out / "fewshot" / (network if pretrained else f"{network}_untrained") / f"seed_{seed}"

    def choice(self, arm: Arm) -> pathlib.Path:
        """Folder of the sweep that chooses an arm's learning rate; arms with Polyak averaging share that without."""
        return self._out / "choice" / arm.name.removesuffix("_polyak")

    def final(self, arm: Arm, seed: int) -> pathlib.Path:
        """Workdir of a fine-tuning run."""
        return self._out / "final" / arm.name / f"seed_{seed}"

    def run(self) -> None:
        """Runs everything that is missing."""
        for seed in SEEDS:
            for network in NETWORKS:
                self._pretrain(network, seed)
        for seed in SEEDS:
            for network in NETWORKS:
                for pretrained in (True, False):
                    self._evaluate_fewshot(network, seed, pretrained=pretrained)
        for arm in ARMS:
            self._choose(arm)
            for seed in SEEDS:
                self._finetune(arm, seed)

    def _call(self, module: str, folder: pathlib.Path, done: str, *arguments: str) -> None:
        if (folder / done).exists() or self._only not in str(folder):
            return
        command = [sys.executable, "-m", f"vit_jax.{module}", f"--workdir={folder}", *arguments]
        print("$", " ".join(command[1:]), flush=True)
        environment = os.environ | {"VIT_JAX_DATA": str(self._out / "data")}
        status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        if status:  # the command printed the reason; 143 and 130: ended by a signal, with its state saved
            progress(f"{folder} ended with status {status}; rerun the same command to resume.")
            sys.exit(status)

    def _pretrain(self, network: Network, seed: int) -> None:
        config = f"--config=configs/small_transfer.py:stage=pretrain,{network.arguments}"
        self._call("main", self.upstream(network.name, seed), "summary.json", config, f"--config.seed={seed}")
        self._call(
            *("main", self.untrained(network.name, seed), "summary.json", config, f"--config.seed={seed}"),
            *("--config.epochs=None", "--config.steps=1", "--config.optimizer.warmup_steps=0"),
            *("--config.optimizer.learning_rate=0.0", "--config.data.eval_split=None"),
        )

    def _evaluate_fewshot(self, network: Network, seed: int, *, pretrained: bool) -> None:
        weights = (self.upstream if pretrained else self.untrained)(network.name, seed)
        self._call(
            *("main", self.fewshot(network.name, seed, pretrained=pretrained), "evaluation.json", "--mode=eval"),
            f"--config=configs/small_transfer.py:stage=pretrain,{network.arguments}",
            *(f"--config.weights={weights}", "--config.data.eval_split=None"),
            *("--config.evals.fewshot.datasets=('downstream.zip',)", f"--config.evals.fewshot.shots={SHOTS}"),
            *("--config.evals.fewshot.image_size=32", "--config.evals.fewshot.crop_from=32"),
        )

    def _arguments(self, arm: Arm, seed: int) -> list[str]:
        network = next(each for each in NETWORKS if each.name == arm.network)
        weights = str(self.upstream(arm.network, seed)) if arm.pretrained else "none"
        config = f"configs/small_transfer.py:{network.arguments},resolution={arm.resolution},weights={weights}"
        return [f"--config={config}", f"--config.seed={seed}"]

    def _choose(self, arm: Arm) -> None:
        if arm.polyak is None:
            arguments = [*self._arguments(arm, SEEDS[0]), "--config.data.eval_split=train[2000:3000]"]
            self._call("sweep", self.choice(arm), "sweep.json", *arguments)

    def learning_rate(self, arm: Arm) -> float:
        """The chosen learning rate of an arm."""
        (task,) = json.loads((self.choice(arm) / "sweep.json").read_text())["tasks"].values()
        return task["chosen"]["optimizer.learning_rate"]

    def _finetune(self, arm: Arm, seed: int) -> None:
        if not (self.choice(arm) / "sweep.json").exists():
            return
        arguments = [
            *self._arguments(arm, seed),
            f"--config.optimizer.learning_rate={self.learning_rate(arm)}",
            *([f"--config.polyak_decay={arm.polyak}"] if arm.polyak is not None else []),
        ]
        self._call("main", self.final(arm, seed), "summary.json", *arguments)

    def accuracies(self, folders: Sequence[pathlib.Path], file: str, name: str) -> list[float]:
        """A metric of the finished runs."""
        found = []
        for folder in folders:
            if (folder / file).exists():
                content = json.loads((folder / file).read_text())
                found.append(content.get("metrics", content)[name])
        return found

    def upstream_accuracies(self, network: Network) -> list[float]:
        """Of the pre-trained networks, on the classes that they were trained on."""
        folders = [self.upstream(network.name, seed) for seed in SEEDS]
        return self.accuracies(folders, "summary.json", "test/accuracy")

    def fewshot_accuracies(self, network: Network, shots: int, *, pretrained: bool) -> list[float]:
        """Of linear classifiers on the other classes."""
        folders = [self.fewshot(network.name, seed, pretrained=pretrained) for seed in SEEDS]
        return self.accuracies(folders, "evaluation.json", f"fewshot/downstream.zip/pre_logits/{shots}shot")

    def final_accuracies(self, arm: Arm) -> list[float]:
        """Of the fine-tuned networks on the other classes."""
        folders = [self.final(arm, seed) for seed in SEEDS]
        return self.accuracies(folders, "summary.json", "test/accuracy")

    def tables(self) -> Iterator[tuple[str, str]]:
        """Names and contents of the tables of docs/results.md."""
        rows = [[network.title, _show(self.upstream_accuracies(network))] for network in NETWORKS]
        yield "upstream", format_table(["pre-trained on five classes", "accuracy on these"], rows)
        rows = []
        for network in NETWORKS:
            for pretrained in (True, False):
                title = network.title if pretrained else f"{network.title}, not trained"
                cells = [_show(self.fewshot_accuracies(network, shots, pretrained=pretrained)) for shots in SHOTS]
                rows.append([title, *cells])
        yield "fewshot", format_table(["representation", *(f"{shots}-shot" for shots in SHOTS)], rows)
        rows = []
        for arm in ARMS:
            rate = f"{self.learning_rate(arm):g}" if (self.choice(arm) / "sweep.json").exists() else ""
            rows.append([arm.title, rate, _show(self.final_accuracies(arm))])
        yield (
            "finetune",
            format_table(["fine-tuned on 2,000 images of the other five", "learning rate", "accuracy"], rows),
        )

    def picture(self) -> Figure:
        """Few-shot accuracy by shots, and the accuracy of each fine-tuned network."""
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        for index, network in enumerate(NETWORKS):
            for pretrained, line in ((True, "-o"), (False, "--o")):
                found = {shots: self.fewshot_accuracies(network, shots, pretrained=pretrained) for shots in SHOTS}
                found = {shots: values for shots, values in found.items() if values}
                means = [100 * statistics.fmean(values) for values in found.values()]
                title = network.title if pretrained else f"{network.title}, not trained"
                left.plot(list(found), means, line, color=f"C{index}", label=title, markersize=4)
        left.set(title="Linear classifiers in closed form", xlabel="images of a class", ylabel="accuracy, %")
        left.set_xscale("log")
        left.set_xticks(SHOTS, [str(shots) for shots in SHOTS])
        left.minorticks_off()
        left.grid(alpha=0.3)
        bottom, top = left.get_ylim()
        left.set_ylim(top=top + 0.25 * (top - bottom))  # room for the legend
        left.legend(fontsize=8, loc="upper left", ncols=2)
        for row, arm in enumerate(ARMS):
            values = [100 * value for value in self.final_accuracies(arm)]
            color = f"C{[network.name for network in NETWORKS].index(arm.network)}"
            right.plot(values, [row] * len(values), "o", color=color, markersize=5, alpha=0.7)
            if values:
                right.plot([statistics.fmean(values)] * 2, [row - 0.3, row + 0.3], color=color)
        right.set(title="Fine-tuned: three networks, and their mean", xlabel="accuracy, %")
        right.set_yticks(range(len(ARMS)), [arm.title for arm in ARMS])
        right.set_ylim(len(ARMS) - 0.5, -0.5)
        right.grid(alpha=0.3)
        return figure


def _show(values: Sequence[float]) -> str:
    """Mean and sample standard deviation in percent."""
    if len(values) < len(SEEDS):
        return f"not yet ({len(values)} of {len(SEEDS)} seeds)"
    return f"{100 * statistics.fmean(values):.1f} ± {100 * statistics.stdev(values):.1f} %"


def main() -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, help="zip file of CIFAR-10's images")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of all runs")
    parser.add_argument("--only", default="", help="only runs whose folder has this in its name")
    parser.add_argument("--report", action="store_true", help="run nothing, write tables and picture into --docs")
    parser.add_argument("--docs", type=pathlib.Path, default=pathlib.Path("docs"))
    arguments = parser.parse_args()
    study = Study(arguments.out.absolute(), arguments.only)
    if arguments.report:
        insert_tables(arguments.docs / "results.md", dict(study.tables()))
        study.picture().savefig(arguments.docs / "images" / "results.png", dpi=110)
        return 0
    if arguments.data is None:
        parser.error("--data is missing: the zip file of CIFAR-10's images.")
    split_classes(arguments.data, arguments.out.absolute() / "data")
    study.run()
    for name, table in study.tables():
        print(f"\n## {name}\n\n{table}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
