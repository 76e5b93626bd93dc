"""Writes the runs of the paper's studies, without training: on JFT-300M, and small ones on CIFAR-10 as a zip file."""

from tests.report.workdirs import write_run, write_starts

JFT = 303_000_000
JFT_FIELDS = {"data__dataset": "tfds:jft", "data__image_size": 224, "batch_size": 4096}
FEW_SHOT = {
    "evals__fewshot__datasets": ("tfds:imagenet2012",),
    "evals__fewshot__test_split": "validation",
    "evals__fewshot__train_split": "train[:65000]",
    "evals__fewshot__image_size": 224,
}
FIVE_SHOT = "fewshot/imagenet2012/pre_logits/5shot"
SMALL = {"num_layers": 4, "hidden_dim": 128, "mlp_dim": 384, "num_heads": 2}
SMALL_FIELDS = {
    "data__dataset": "cifar10.zip",
    "data__eval_split": "test",
    "data__image_size": 32,
    "batch_size": 128,
    "optimizer__learning_rate": 1e-3,
}


def write_on_jft(path, model, five_shot, *, images=JFT, epochs=7, **fields):
    """A pre-training on JFT-300M or a part of it, with its linear 5-shot accuracy on ImageNet, a share."""
    steps = round(epochs * images / 4096)
    metrics = {FIVE_SHOT: five_shot, f"{FIVE_SHOT}_std": 0.001}
    return write_run(path, model, metrics, steps=steps, images=images, **JFT_FIELDS | FEW_SHOT | fields)


def write_small(path, accuracy, model="ViT-Ti/4", *, images=50_000, seed=0, steps=500, model_fields=None, **fields):
    """A small run from scratch on CIFAR-10, with its test accuracy, a share."""
    split = "train" if images == 50_000 else f"train[:{images}]"
    metrics = {"test/accuracy": accuracy, "test/examples": 10_000}
    fields = {**SMALL_FIELDS, "data__train_split": split, "seed": seed, **fields}
    own = {} if model.startswith(("R", "Axial")) else SMALL
    write_run(path, model, metrics, steps=steps, images=images, model_fields={**own, **(model_fields or {})}, **fields)
    write_starts(path, [(0, {})])
    return path


def write_all_studies(folder):
    """Runs of every study, at the paper's scale and small, each small one with two seeds."""
    subsets = {9_000_000: (0.30, 0.42), 30_000_000: (0.45, 0.50), 90_000_000: (0.55, 0.53), JFT: (0.60, 0.55)}
    for images, (of_vit, of_bit) in subsets.items():
        part = {"images": images, "data__train_split": "train" if images == JFT else f"train[:{images}]"}
        write_on_jft(folder / f"subsets/vit_{images}", "ViT-B/32", of_vit, **part)
        write_on_jft(folder / f"subsets/bit_{images}", "R50x1", of_bit, **part)
    base = {"num_layers": 8, "hidden_dim": 1024, "mlp_dim": 2048, "num_heads": 16, "patch_size": 32}
    shapes = {"depth_16": {"num_layers": 16}, "width_512": {"hidden_dim": 512}, "mlp_4096": {"mlp_dim": 4096}}
    shapes |= {"patch_16": {"patch_size": 16}, "all": {"num_layers": 16, "hidden_dim": 2048, "mlp_dim": 4096}}
    for number, (name, changed) in enumerate({"base": {}, **shapes}.items()):
        fields = base | changed
        model = f"ViT-L/{fields.pop('patch_size')}"
        write_on_jft(folder / "shape" / name, model, 0.5 + 0.02 * number, model_fields=fields, epochs=3)
    for pool, rate, value in (("cls", 8e-4, 0.60), ("gap", 8e-4, 0.55), ("gap", 3e-4, 0.601)):
        path, pooled = folder / f"pool/{pool}_{rate}", {"pool": pool}
        write_on_jft(path, "ViT-B/16", value, model_fields=pooled, optimizer__learning_rate=rate)
    for model, value in (("Axial-ViT-B/32", 0.61), ("ViT-B/32", 0.6)):
        write_on_jft(folder / f"axial/{model.replace('/', '_')}", model, value, epochs=2)
    for seed in (0, 1):
        _write_small_studies(folder / "small", seed)


def _write_small_studies(folder, seed):
    more = 0.004 * seed
    for number, images in enumerate((1_000, 5_000, 50_000)):
        vit, bit = 0.25 + 0.2 * number + more, 0.35 + 0.14 * number - more
        write_small(folder / f"images/vit_{images}_{seed}", vit, images=images, seed=seed)
        fields = {"images": images, "seed": seed, "model_fields": {"stages": (2, 2, 2)}}
        write_small(folder / f"images/bit_{images}_{seed}", bit, "R26x1", **fields)
    shapes = {"depth": {"num_layers": 8}, "width": {"hidden_dim": 256}, "patch": {"patch_size": 8}}
    for number, (name, changed) in enumerate({"base": {}, **shapes}.items()):
        model = f"ViT-Ti/{changed.get('patch_size', 4)}"
        fields = {key: value for key, value in changed.items() if key != "patch_size"}
        value = 0.5 + 0.03 * number + more
        write_small(folder / f"shape/{name}_{seed}", value, model, steps=300, seed=seed, model_fields=fields)
    for pool, rate, value in (("cls", 1e-3, 0.52), ("gap", 1e-3, 0.5), ("gap", 3e-4, 0.53)):
        fields = {"optimizer__learning_rate": rate, "model_fields": {"pool": pool}, "steps": 200}
        write_small(folder / f"pool/{pool}_{rate}_{seed}", value + more, seed=seed, **fields)
    for kind, place, value in (("none", "stem", 0.4), ("learned_1d", "stem", 0.5), ("learned_2d", "shared", 0.51)):
        positions = {"position_embedding": kind, "position_embedding_at": place}
        path = folder / f"positions/{kind}_{place}_{seed}"
        write_small(path, value + more, seed=seed, steps=250, model_fields=positions)
    for name, rate, value in (("adamw", 1e-3, 0.6), ("sgd", 0.1, 0.58)):
        fields = {"optimizer__name": name, "optimizer__learning_rate": rate, "steps": 350}
        path = folder / f"optimizers/{name}_{seed}"
        write_small(path, value + more, "R26x1", seed=seed, model_fields={"stages": (2, 2, 2)}, **fields)
