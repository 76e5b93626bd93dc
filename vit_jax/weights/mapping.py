"""From the names and layouts of other libraries' arrays to ours and back, by tables.

A format is a table of rules. A rule pairs one of their names with one or several of ours, and says how arrays are
turned over. The names are templates: `{l}` stands for a layer (from 0), `{s}` for a stage and `{u}` for a unit of a
ResNet (from 1), `{s0}` and `{u0}` for the same counted from 0.

Ours are flat here: `{"Transformer/encoderblock_0/LayerNorm_0/scale": array, ...}`, layers unrolled.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from vit_jax.errors import UserError

Arrays = dict[str, np.ndarray]
MAX_LAYERS = 256  # the deepest ViT has 48, R200 has 66; what a model of so many takes to trace is seconds
_SHOWN = 8  # names in an error


@dataclasses.dataclass(frozen=True)
class Transform:
    """How arrays are turned over.

    Attributes:
      to_ours: maps their array and the number of attention heads to ours, one for each of the rule's names.
      to_theirs: maps our arrays, one for each of the rule's names, to theirs.
    """

    to_ours: Callable[[np.ndarray, int | None], tuple[np.ndarray, ...]]
    to_theirs: Callable[..., np.ndarray]


def _heads(num_heads: int | None) -> int:
    if num_heads is None:
        raise UserError(
            "the number of attention heads cannot be told from this file. Name the model, such as --model=ViT-B/16, or "
            "the folder with its config.json."
        )
    return num_heads


def _split_qkv_kernel(array: np.ndarray, num_heads: int | None) -> tuple[np.ndarray, ...]:
    heads, width = _heads(num_heads), array.shape[1]
    return tuple(part.T.reshape(width, heads, -1) for part in np.split(array, 3))


SAME = Transform(lambda array, _: (array,), lambda array: array)
# [out, in] <-> [in, out]
DENSE = Transform(lambda array, _: (array.T,), lambda array: array.T)
# [out, in, height, width] <-> [height, width, in, out]
CONV = Transform(lambda array, _: (array.transpose(2, 3, 1, 0),), lambda array: array.transpose(3, 2, 0, 1))
# [classes, width, 1, 1] <-> [width, classes]
HEAD_AS_CONV = Transform(lambda array, _: (array.squeeze((2, 3)).T,), lambda array: array.T[:, :, None, None])
# [1, 1, width, classes] <-> [width, classes]
HEAD_AS_TF_CONV = Transform(lambda array, _: (array.squeeze((0, 1)),), lambda array: array[None, None])
# [1, 1, 1, channels] <-> [channels]
CHANNELS_OF_4D = Transform(lambda array, _: (array.reshape(-1),), lambda array: array[None, None, None])
# Older files have [1, 1, 1, channels], newer ones [channels].
CHANNELS = Transform(lambda array, _: (array.reshape(-1),), lambda array: array)
# [heads * head_dim, width] <-> [width, heads, head_dim]
INTO_HEADS = Transform(
    lambda array, heads: (array.T.reshape(array.shape[1], _heads(heads), -1),),
    lambda array: array.reshape(array.shape[0], -1).T,
)
# [heads * head_dim] <-> [heads, head_dim]
INTO_HEADS_BIAS = Transform(lambda array, heads: (array.reshape(_heads(heads), -1),), lambda array: array.reshape(-1))
# [width, heads * head_dim] <-> [heads, head_dim, width]
OUT_OF_HEADS = Transform(
    lambda array, heads: (array.T.reshape(_heads(heads), -1, array.shape[0]),),
    lambda array: array.reshape(-1, array.shape[-1]).T,
)
# Several of the above, one below the other.
QKV = Transform(
    _split_qkv_kernel,
    lambda *arrays: np.concatenate([array.reshape(array.shape[0], -1).T for array in arrays]),
)
QKV_BIAS = Transform(
    lambda array, heads: tuple(part.reshape(_heads(heads), -1) for part in np.split(array, 3)),
    lambda *arrays: np.concatenate([array.reshape(-1) for array in arrays]),
)
KV = Transform(
    lambda array, heads: tuple(part.T.reshape(array.shape[1], _heads(heads), -1) for part in np.split(array, 2)),
    QKV.to_theirs,
)
KV_BIAS = Transform(
    lambda array, heads: tuple(part.reshape(_heads(heads), -1) for part in np.split(array, 2)),
    QKV_BIAS.to_theirs,
)


@dataclasses.dataclass(frozen=True)
class Rule:
    """One of their names, ours, and how the arrays are turned over.

    Attributes:
      theirs: template of their name.
      ours: template of our name, or of several.
      transform: of the arrays.
    """

    theirs: str
    ours: str | tuple[str, ...]
    transform: Transform = SAME

    @property
    def all_ours(self) -> tuple[str, ...]:
        """Our names, also where there is one."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours


@dataclasses.dataclass(frozen=True)
class Format:
    """How a library names and lays out a model's arrays.

    Attributes:
      name: what the command line calls it.
      description: in a few words.
      rules: the table.
      is_recognised: whether a file with these names, prefix taken off, is of this format.
      prefixes: that all names may bear, such as "params/"; the first that any has is taken off.
      anchor: regular expression of the name of one array that each model has; what its group "prefix" matches is taken
        off all names, instead of `prefixes`.
      others: names beside the parameters that carry nothing, as regular expressions.
      renames: (regular expression, replacement) of names that some files spell otherwise.
      attributes: of the model, which the library fixes and no array shows.
      to_ours: what remains to be done to our arrays after reading.
      from_ours: what remains to be done to our arrays before writing.
      finish: what remains to be done to their arrays after writing.
    """

    name: str
    description: str
    rules: tuple[Rule, ...]
    is_recognised: Callable[[Iterable[str]], bool]
    prefixes: tuple[str, ...] = ()
    anchor: str = ""
    others: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    attributes: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    to_ours: Callable[[Arrays], Arrays] = lambda arrays: arrays
    from_ours: Callable[[Arrays], Arrays] = lambda arrays: arrays
    finish: Callable[[Arrays], Arrays] = lambda arrays: arrays

    def normalize(self, arrays: Arrays) -> Arrays:
        """Their arrays without prefix, odd spellings and what carries nothing."""
        arrays = unstack_arrays(self._strip(arrays))
        normalized: Arrays = {}
        for name, array in arrays.items():
            for pattern, replacement in self.renames:
                name = re.sub(pattern, replacement, name)  # noqa: PLW2901
            if name in normalized:
                raise UserError(f"two arrays of the file are called {name!r}, spelt differently.")
            if not any(re.fullmatch(pattern, name) for pattern in self.others):
                normalized[name] = array
        return normalized

    def parameters(self, names: Iterable[str]) -> list[str]:
        """The names of a file that are those of parameters: with the prefix, if any has it, and not of `others`."""
        names = list(names)
        prefix = self.prefix(names)
        return [
            name
            for name in names
            if name.startswith(prefix) and not any(re.fullmatch(other, name[len(prefix) :]) for other in self.others)
        ]

    def prefix(self, names: Iterable[str]) -> str:
        """What stands before the names of all parameters, such as "params/"; may be empty.

        Raises:
          UserError: the file has several models.
        """
        names = list(names)
        if not self.anchor:
            return next((prefix for prefix in self.prefixes if any(name.startswith(prefix) for name in names)), "")
        found = sorted({match["prefix"] for name in names if (match := re.fullmatch(self.anchor, name))})
        if len(found) > 1:
            raise UserError(
                f"the file has {len(found)} models, whose names begin with {', '.join(map(repr, found[:4]))}. Keep the "
                "arrays of one."
            )
        return found[0] if found else ""

    def _strip(self, arrays: Arrays) -> Arrays:
        """Takes the prefix off; names without it are dropped as not parameters."""
        prefix = self.prefix(arrays)
        return {name[len(prefix) :]: array for name, array in arrays.items() if name.startswith(prefix)}

    def read(self, arrays: Arrays, *, num_heads: int | None = None) -> Arrays:
        """Maps their arrays to ours.

        Args:
          arrays: as in the file.
          num_heads: attention heads, which only some formats need to be told.

        Raises:
          UserError: a name that no rule knows.
        """
        ours: Arrays = {}
        unknown = []
        for name, array in self.normalize(arrays).items():
            match = _find(self.rules, name)
            if match is None:
                unknown.append(name)
                continue
            rule, indices = match
            try:
                parts = rule.transform.to_ours(array, num_heads)
            except (ValueError, IndexError) as error:
                if isinstance(error, UserError):
                    raise
                raise UserError(f"{name} has an unexpected shape, {array.shape}.") from error
            for our_name, part in zip(rule.all_ours, parts, strict=True):
                filled = _fill(our_name, indices)
                if filled in ours:
                    raise UserError(f"two arrays of the file are {self.their_name(filled)}, spelt differently.")
                ours[filled] = part
        if unknown:
            raise UserError(
                f"{len(unknown)} of the file's {len(arrays)} names are not those of a {self.description}, first "
                f"{list_names(unknown)}. A different architecture, or a format that vit_jax does not know."
            )
        return self.to_ours(ours)

    def write(self, params: Arrays) -> Arrays:
        """Maps our arrays to theirs.

        Raises:
          UserError: an array that the format has no name for.
        """
        params = self.from_ours(dict(params))
        theirs: Arrays = {}
        left = dict(params)
        for name in params:
            if name not in left:
                continue
            found = self._rule_of(name)
            names = found and [_fill(template, found[1]) for template in found[0].all_ours]
            if not found or not names or any(other not in left for other in names):
                continue
            theirs[_fill(found[0].theirs, found[1])] = found[0].transform.to_theirs(*(left.pop(n) for n in names))
        if left:
            raise UserError(
                f"a {self.description} has no name for {len(left)} of the model's {len(params)} arrays, first "
                f"{list_names(left)}. Use --to=vit, which has one for all."
            )
        return self.finish(theirs)

    def their_name(self, our_name: str) -> str:
        """What the format calls one of our arrays; our name if it has none."""
        found = self._rule_of(our_name)
        return _fill(found[0].theirs, found[1]) if found else our_name

    def _rule_of(self, our_name: str) -> tuple[Rule, dict[str, int]] | None:
        for rule in self.rules:
            for template in rule.all_ours:
                if (indices := _match(template, our_name)) is not None:
                    return rule, indices
        return None


def unstack_arrays(arrays: Arrays) -> Arrays:
    """Splits the arrays of scanned layers, `.../encoderblock/...`, into those of single ones."""
    unstacked: Arrays = {}
    for name, array in arrays.items():
        if re.search(r"(^|/)encoderblock/", name):
            if not array.ndim or len(array) > MAX_LAYERS:
                raise UserError(f"{name} has an unexpected shape, {array.shape}: layers should be first.")
            for layer in range(len(array)):
                unstacked[name.replace("encoderblock/", f"encoderblock_{layer}/", 1)] = array[layer]
        else:
            unstacked[name] = array
    return unstacked


def list_names(names: Iterable[str]) -> str:
    """The first names, comma-separated."""
    names = sorted(names)
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


_FIELD = re.compile(r"\{(\w+)(?::\w+)?\}")


def _pattern(template: str) -> str:
    pieces = _FIELD.split(template)
    # Every other piece is the name of a field.
    return "".join(
        f"(?P<{piece}>[0-9]{{1,6}})" if index % 2 else re.escape(piece) for index, piece in enumerate(pieces)
    )


_PATTERNS: dict[str, re.Pattern[str]] = {}


def _match(template: str, name: str) -> dict[str, int] | None:
    """The numbers that a template's fields have in a name, counted as ours; None if it is not of this form."""
    if template not in _PATTERNS:
        _PATTERNS[template] = re.compile(_pattern(template))
    match = _PATTERNS[template].fullmatch(name)
    if match is None:
        return None
    return {field.removesuffix("0"): int(number) + field.endswith("0") for field, number in match.groupdict().items()}


def _find(rules: Iterable[Rule], name: str) -> tuple[Rule, dict[str, int]] | None:
    for rule in rules:
        if (indices := _match(rule.theirs, name)) is not None:
            return rule, indices
    return None


def _fill(template: str, indices: dict[str, int]) -> str:
    fields: dict[str, Any] = {**indices, **{f"{name}0": index - 1 for name, index in indices.items()}}
    return template.format(**fields)
