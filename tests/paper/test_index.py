"""docs/paper.md: everything in the paper has an item; its commands, links and costs are those of the code."""

import argparse
import importlib
import json
import pathlib
import re
import sys

import pytest

from benchmarks import paper_costs
from tests.conftest import ROOT
from tests.paper.index import COMMANDS, DOCS, ITEMS, KEYS, OVERVIEW, TEXT, anchor_of, anchors
from vit_jax.costs.hardware import TPU_V3_CORE_BF16_FLOPS
from vit_jax.paper import tables
from vit_jax.plan import find_topology
from vit_jax.sweep.__main__ import make_parser
from vit_jax.sweep.trials import call, field_of, load_config, load_module

COSTS = paper_costs.read_costs(DOCS)
PAPER = [
    *(f"Section {number}" for number in range(1, 6)),
    *(f"Table {number}" for number in range(1, 10)),
    *(f"Figure {number}" for number in range(1, 15)),
    *(f"Appendix {letter}" for letter in "ABCD"),
    *(f"Appendix D.{number}" for number in range(1, 11)),
    "Appendix B.1.1",
    "Appendix B.1.2",
]


@pytest.mark.parametrize("part", PAPER)
def test_every_part_of_the_paper_is_in_the_overview(part):
    short = part.removeprefix("Appendix ")
    rows = [line for line in OVERVIEW.splitlines() if line.startswith("| [")]
    assert any(
        re.search(rf"\b{re.escape(part)}\b", row, re.I) or (part[0] == "A" and f"({short})" in row) for row in rows
    )


def test_overview_lists_the_items_in_their_order_and_each_answers_everything():
    rows = re.findall(r"(?m)^\| \[[^]]+\]\(#([^)]+)\) \|", OVERVIEW)
    assert sorted(rows) == sorted(map(anchor_of, ITEMS))
    for title, parts in ITEMS.items():
        assert list(parts) == KEYS, title
        assert all(parts.values()), title


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)]+)\)", TEXT))))
def test_link_resolves(link):
    path, _, anchor = link.partition("#")
    page = DOCS / path if path else DOCS / "paper.md"
    assert page.exists()
    assert not anchor or anchor in anchors(page)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:tests|vit_jax|benchmarks|configs)/[\w/.]+)`", TEXT))))
def test_file_that_is_named_exists(path):
    assert (ROOT / path).exists()


class _ParsedError(Exception):
    """Ends a command after its arguments are parsed."""


@pytest.fixture
def parse(monkeypatch):
    """Parses the arguments of a command as it does itself, and ends it there."""
    parse_args = argparse.ArgumentParser.parse_args

    def stop(self, *arguments):
        parse_args(self, *arguments)
        raise _ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.chdir(ROOT)

    def parse(module, arguments):
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        main = importlib.import_module(module).main
        takes_arguments = main.__code__.co_argcount
        with pytest.raises(_ParsedError):
            main(arguments) if takes_arguments else main()

    return parse


def known_flags(*files):
    """The absl flags that files define."""
    text = "".join((ROOT / "vit_jax" / file).read_text() for file in files)
    return {*re.findall(r'DEFINE_\w+\(\s*"(\w+)"', text), "dry_run"}


FLAGS = {
    "vit_jax.main": known_flags("main.py", "flags.py"),
    "vit_jax.plan": known_flags("plan/__main__.py", "flags.py"),
    "vit_jax.data.show": known_flags("data/show.py", "flags.py"),
}


def check_config(arguments):
    """Loads the config of `--config=...` with its fields; returns its place and the other arguments."""
    fields = [argument for argument in arguments if argument.startswith("--config.")]
    (place,) = [argument.removeprefix("--config=") for argument in arguments if argument.startswith("--config=")]
    load_config(place, fields)
    return place, [argument for argument in arguments if not argument.startswith("--config")]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command[1:])[:90])
def test_command_parses(command, parse):
    assert command[0] == "python"
    if command[1] != "-m":
        path = pathlib.Path(command[1])
        assert path.parent.name == "benchmarks" and (ROOT / path).exists()
        parse(f"benchmarks.{path.stem}", command[2:])
        return
    module, arguments = command[2], command[3:]
    if module == "vit_jax.sweep":
        flags, fields = make_parser().parse_known_args(arguments)
        assert all(map(field_of, fields))
        load_config(flags.config, fields)
        page = load_module(flags.config)
        assert flags.grid or call(page, "get_sweep", flags.config)
    elif module in FLAGS:
        _, others = check_config(arguments)
        for argument in others:
            flag, _, value = argument.removeprefix("--").partition("=")
            assert argument.startswith("--") and flag in FLAGS[module]
            assert flag != "topology" or all(map(find_topology, value.split(",")))
    elif importlib.util.find_spec(f"{module}.__main__") if "." in module and not module.endswith("flops") else None:
        parse(f"{module}.__main__", arguments)
    else:
        parse(module, arguments)


@pytest.mark.parametrize("name", [*paper_costs.RUNS, *paper_costs.SWEEPS])
def test_costs_are_those_that_are_stored(name):
    begin, end = f"<!-- costs of {name} -->\n\n", f"\n\n<!-- end of costs of {name} -->"
    assert f"{begin}{paper_costs.table(COSTS, name)}{end}" in re.sub(r"(?m)^  ", "", TEXT)


def test_stored_costs_are_those_of_the_index():
    assert list(COSTS) == paper_costs.all_places()


@pytest.mark.parametrize("place", paper_costs.all_places())
def test_stored_cost_is_of_the_config_as_it_is(place, monkeypatch):
    monkeypatch.chdir(ROOT)
    configs = paper_costs.configs_of(place)
    cost = COSTS[place]
    assert cost["runs"] == len(configs)
    assert cost["images"] == pytest.approx(sum(map(paper_costs.num_images, configs)), rel=1e-3)


def test_every_row_of_tables_2_5_and_6_has_a_cost(monkeypatch):
    monkeypatch.chdir(ROOT)

    def runs(name):
        return [load_config(place, []) for place in paper_costs.RUNS[name]]

    def data(config):
        return {18_291: "JFT-300M", 21_843: "ImageNet-21k", 1000: "ImageNet"}[config.model.num_classes]

    ours = [key for key in tables.TPUV3_CORE_DAYS if "Student" not in key[0]]
    assert [(config.model.name, data(config)) for config in runs("table 2")] == ours
    assert [(config.model.name, config.epochs) for config in runs("table 6")] == [
        (row.model, row.epochs) for row in tables.TABLE_6
    ]
    table_5 = {(config.model.name, data(config)) for config in runs("table 5")}
    for on in ("ImageNet", "ImageNet-21k"):
        for model, accuracy in zip(tables.TABLE_5_MODELS, tables.TABLE_5[on]["ImageNet"], strict=True):
            assert ((model, on) in table_5) == (accuracy is not None)


def test_cost_by_formula_is_the_flops_at_40_percent_and_the_sum_of_the_gradients():
    # ViT-B/32 on JFT, 7 epochs. On the 256 chips of v3-512 a ring moves 2 (n - 1) / n times the bfloat16 gradients.
    cost = COSTS["configs/vit_jft.py:model=ViT-B/32,epochs=7"]
    steps = cost["images"] / 4096
    tokens, width, mlp, patches = 50, 768, 3072, 49
    layer = tokens * (4 * width**2 + 2 * width * mlp) + 2 * tokens**2 * width
    products = 12 * layer + patches * 3072 * width + width * width + width * 18_291
    assert cost["flops"] == pytest.approx(3 * 2 * products * cost["images"], rel=1e-9)
    # The time leaves out the gradient of the pixels, which is never computed.
    compute = (3 * products - patches * 3072 * width) * 2 * 4096 / 512 / (0.4 * TPU_V3_CORE_BF16_FLOPS)
    parameters = 87_456_000 + width * width + 18_291 * width
    network = 2 * 255 / 256 * 2 * parameters / (4 * 656e9 / 8)
    (cores, _) = cost["plans"]
    assert cores["estimate"] == "formula"
    assert cores["core_days"] == pytest.approx(512 * steps * (compute + network) / 86_400, rel=2e-3)


def test_compiled_plans_replace_the_formula_or_stand_beside_it():
    plans = json.loads((DOCS / paper_costs.PLANS_JSON).read_text())
    by_run = {row["config"]: row for row in plans if row["topology"] == paper_costs.CORES}
    for place, run in (
        ("configs/vit_jft.py:model=ViT-L/16,epochs=14", "vit_jft:model=ViT-L/16"),
        ("configs/vit_l16_i21k.py", "vit_l16_i21k"),
        ("configs/bit_jft.py:model=R152x4", "bit_jft:model=R152x4"),
    ):
        plan, row = COSTS[place]["plans"][0], by_run[run]
        if row["estimate"] == "cycles":
            assert (plan["estimate"], plan["core_days"]) == ("cycles", row["core_days"])
        elif plan["estimate"] == "formula":
            assert plan["at_least"]["core_days"] == row["core_days"]


def test_text_of_a_cost_says_how_it_was_planned():
    plan = {"estimate": "formula", "core_days": 1234.5, "hours": 0.456}
    assert paper_costs.text_of(plan, "core_days") == "1,234\\*"
    assert paper_costs.text_of({**plan, "estimate": "cycles"}, "hours") == "0.46"
    bound = {**plan, "at_least": {"core_days": 45.0, "hours": 9.9}}
    assert paper_costs.text_of(bound, "core_days") == "1,234\\* (≥ 45)"


def test_numbers_in_claims_are_the_published_ones():
    best = tables.TABLE_2["ViT-H/14", "JFT-300M"]
    averages = [row[tables.TABLE_7_AVERAGE] for row in tables.TABLE_7.values()]
    core_days = [tables.TPUV3_CORE_DAYS[key, "JFT-300M"] for key in ("ViT-L/16", "R152x4", "ViT-H/14")]
    expected = {
        "Section 1": [best[task].mean for task in ("ImageNet", "ImageNet ReaL", "CIFAR-100", "VTAB")],
        "Table 1": [size.millions for size in tables.TABLE_1.values()],
        "Table 2": [f"{days / 1000:g}k" for days in core_days],
        "Section 4.6": tables.MASKED_PATCH_IMAGENET.values(),
        "Table 7": averages,
        "Appendix D.9": tables.OBJECTNET["ViT-H/14", "JFT-300M"].values(),
    }
    for title, numbers in expected.items():
        (claim,) = [parts["Claim"] for item, parts in ITEMS.items() if item.startswith(f"{title}:")]
        assert all(re.search(rf"\b{re.escape(str(number))}\b", claim) for number in numbers), title
