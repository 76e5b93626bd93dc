"""Maps the names and layouts of other libraries' arrays to ours and back, by tables of rules.

Names are flat and layers unrolled: `{"Transformer/encoderblock_0/LayerNorm_0/scale": array, ...}`.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from vit_jax.errors import UserError

Arrays = dict[str, np.ndarray]
MAX_LAYERS = 256  # bounds the time to trace a model; the deepest ViT has 48 layers, R200 has 66 units
_SHOWN = 8  # names in an error


@dataclasses.dataclass(frozen=True)
class Transform:
    """Conversion of an array's layout.

    Attributes:
      to_ours: maps their array and the number of attention heads (None: unknown) to ours.
      to_theirs: maps our array to theirs.
    """

    to_ours: Callable[[np.ndarray, int | None], np.ndarray]
    to_theirs: Callable[[np.ndarray], np.ndarray]


def _known(num_heads: int | None) -> int:
    if num_heads is None:
        raise UserError(
            "this file does not say how many attention heads the model has. Name the model, such as --model=ViT-B/16, "
            "or the folder with its config.json."
        )
    return num_heads


SAME = Transform(lambda array, _: array, lambda array: array)
# [out, in] <-> [in, out]
DENSE = Transform(lambda array, _: array.T, lambda array: array.T)
# [out, in, height, width] <-> [height, width, in, out]
CONV = Transform(lambda array, _: array.transpose(2, 3, 1, 0), lambda array: array.transpose(3, 2, 0, 1))
# [classes, width, 1, 1] <-> [width, classes]
HEAD_AS_CONV = Transform(lambda array, _: array.squeeze((2, 3)).T, lambda array: array.T[:, :, None, None])
# [1, 1, width, classes] <-> [width, classes]
HEAD_AS_TF_CONV = Transform(lambda array, _: array.squeeze((0, 1)), lambda array: array[None, None])
# [1, 1, 1, channels] <-> [channels]
CHANNELS_OF_4D = Transform(lambda array, _: array.reshape(-1), lambda array: array[None, None, None])
# Older files have [1, 1, 1, channels], newer ones [channels].
CHANNELS = Transform(lambda array, _: array.reshape(-1), lambda array: array)
# [heads * head_dim, width] <-> [width, heads, head_dim]
INTO_HEADS = Transform(
    lambda array, heads: array.T.reshape(array.shape[1], _known(heads), -1),
    lambda array: array.reshape(array.shape[0], -1).T,
)
# [heads * head_dim] <-> [heads, head_dim]
INTO_HEADS_BIAS = Transform(lambda array, heads: array.reshape(_known(heads), -1), lambda array: array.reshape(-1))
# [width, heads * head_dim] <-> [heads, head_dim, width]
OUT_OF_HEADS = Transform(
    lambda array, heads: array.T.reshape(_known(heads), -1, array.shape[0]),
    lambda array: array.reshape(-1, array.shape[-1]).T,
)


@dataclasses.dataclass(frozen=True)
class Rule:
    """One of their names, our name, and the conversion of the layout.

    Names are templates. `{l}` is the number of a layer, from 0; `{s}`, `{u}` and `{n}` are those of a ResNet's stage,
    unit and convolution, from 1; `{s0}` and `{u0}` are the same from 0. A template that ends in "/" stands for all
    arrays of a module, the empty one for all names.

    Attributes:
      theirs: template of their name.
      ours: template of our name, or several: their array then stacks ours, one below the other.
      transform: conversion of each of our arrays.
    """

    theirs: str
    ours: str | tuple[str, ...]
    transform: Transform = SAME

    @property
    def all_ours(self) -> tuple[str, ...]:
        """Templates of our names, also if there is one."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours


@dataclasses.dataclass(frozen=True)
class Format:
    """How a library names and lays out a model's arrays.

    Attributes:
      name: the value of `--to`.
      description: in a few words.
      rules: the table.
      marks: regular expressions; in a file of this format each matches a name, without prefix.
      prefix: regular expression of what may precede all names, such as "params/". The first mark locates it.
      ignored: regular expressions of names that are not parameters.
      renames: (regular expression, replacement) of names that some files spell differently.
      attributes: attributes of the model that the library fixes and no array shows.
      to_ours: a last step after reading.
      from_ours: a first step before writing.
      finish: a last step after writing.
    """

    name: str
    description: str
    rules: tuple[Rule, ...]
    marks: tuple[str, ...]
    prefix: str = ""
    ignored: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    attributes: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    to_ours: Callable[[Arrays], Arrays] = lambda arrays: arrays
    from_ours: Callable[[Arrays], Arrays] = lambda arrays: arrays
    finish: Callable[[Arrays], Arrays] = lambda arrays: arrays

    def parameters(self, names: Iterable[str]) -> dict[str, str]:
        """Names of a file's parameters, mapped to the same without prefix and odd spellings.

        Raises:
          UserError: the file has several models.
        """
        names = list(names)
        anchor = re.compile(f"(?P<prefix>{self.prefix}){self.marks[0]}")
        prefixes = sorted({match["prefix"] for name in names if (match := anchor.fullmatch(name))})
        if len(prefixes) > 1:
            raise UserError(
                f"the file has {len(prefixes)} models, whose names begin with {', '.join(map(repr, prefixes[:4]))}. "
                "Keep the arrays of one."
            )
        prefix = prefixes[0] if prefixes else ""
        found: dict[str, str] = {}
        for name in names:
            plain = name[len(prefix) :]
            for pattern, replacement in self.renames:
                plain = re.sub(pattern, replacement, plain)
            if name.startswith(prefix) and not any(re.fullmatch(pattern, plain) for pattern in self.ignored):
                found[name] = plain
        return found

    def is_format_of(self, names: Iterable[str]) -> bool:
        """Whether a file with these names is of this format."""
        plain = self.parameters(names).values()
        return all(any(re.fullmatch(mark, name) for name in plain) for mark in self.marks)

    def read(self, arrays: Arrays, *, num_heads: int | None = None) -> Arrays:
        """Converts their arrays to ours.

        Args:
          arrays: as in the file.
          num_heads: attention heads; only some formats need it.

        Raises:
          UserError: a name has no rule, or a shape does not fit its rule.
        """
        plain: Arrays = {}
        for name, plain_name in self.parameters(arrays).items():
            if plain_name in plain:
                raise UserError(f"two arrays of the file are called {plain_name!r}, spelt differently.")
            plain[plain_name] = arrays[name]
        ours: Arrays = {}
        unknown = []
        for name, array in unstack_arrays(plain).items():
            match = next(((rule, fields) for rule in self.rules if (fields := _match(rule.theirs, name))), None)
            if match is None:
                unknown.append(name)
                continue
            rule, fields = match
            names = [_fill(template, fields) for template in rule.all_ours]
            try:
                parts = np.split(array, len(names)) if len(names) > 1 else [array]
                parts = [rule.transform.to_ours(part, num_heads) for part in parts]
            except (ValueError, IndexError) as error:
                if isinstance(error, UserError):
                    raise
                raise UserError(f"{name} has an unexpected shape, {array.shape}.") from error
            for our_name, part in zip(names, parts, strict=True):
                if our_name in ours:
                    raise UserError(f"two arrays of the file are {self.their_name(our_name)}, spelt differently.")
                ours[our_name] = part
        if unknown:
            raise UserError(
                f"{len(unknown)} of the file's {len(arrays)} names do not belong to a {self.description}, first "
                f"{list_names(unknown)}. The architecture differs, or vit_jax does not know the format."
            )
        return self.to_ours(ours)

    def write(self, params: Arrays) -> Arrays:
        """Converts our arrays to theirs.

        Raises:
          UserError: the format has no name for an array.
        """
        left = self.from_ours(dict(params))
        theirs: Arrays = {}
        for name in list(left):
            if (match := self._rule_of(name)) is None:
                continue
            rule, fields = match
            names = [_fill(template, fields) for template in rule.all_ours]
            if left.keys() >= set(names):
                parts = [rule.transform.to_theirs(left.pop(each)) for each in names]
                theirs[_fill(rule.theirs, fields)] = np.concatenate(parts) if len(parts) > 1 else parts[0]
        if left:
            raise UserError(
                f"a {self.description} has no name for {len(left)} of the model's {len(params)} arrays, first "
                f"{list_names(left)}. Use --to=vit, which has one for all."
            )
        return self.finish(theirs)

    def their_name(self, our_name: str) -> str:
        """The format's name of one of our arrays; our name if it has none."""
        found = self._rule_of(our_name)
        return _fill(found[0].theirs, found[1]) if found else our_name

    def _rule_of(self, our_name: str) -> tuple[Rule, dict[str, Any]] | None:
        templates = ((rule, template) for rule in self.rules for template in rule.all_ours)
        return next(((rule, fields) for rule, template in templates if (fields := _match(template, our_name))), None)


def unstack_arrays(arrays: Arrays) -> Arrays:
    """Splits the arrays of scanned layers, `.../encoderblock/...`, into those of single layers."""
    unstacked: Arrays = {}
    for name, array in arrays.items():
        if not re.search(r"(^|/)encoderblock/", name):
            unstacked[name] = array
        elif not array.ndim or len(array) > MAX_LAYERS:
            raise UserError(f"{name} has an unexpected shape, {array.shape}: layers should be first.")
        else:
            for layer in range(len(array)):
                unstacked[name.replace("encoderblock/", f"encoderblock_{layer}/", 1)] = array[layer]
    return unstacked


def list_names(names: Iterable[str]) -> str:
    """The first names, comma-separated."""
    names = sorted(names)
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    pieces = re.split(r"\{(\w+)(?::\w+)?\}", template)  # every other piece is the name of a field
    pattern = "".join(f"(?P<{piece}>[0-9]{{1,6}})" if i % 2 else re.escape(piece) for i, piece in enumerate(pieces))
    return re.compile(pattern + ("(?P<rest>.+)" if template[-1:] in ("/", "") else "(?P<rest>)"))


def _match(template: str, name: str) -> dict[str, Any] | None:
    """The numbers of a template's fields in a name, counted as ours; None if the template does not match."""
    match = _pattern(template).fullmatch(name)
    if match is None:
        return None
    fields = match.groupdict()
    rest = fields.pop("rest")
    numbers = {field.removesuffix("0"): int(number) + field.endswith("0") for field, number in fields.items()}
    return {**numbers, **{f"{field}0": number - 1 for field, number in numbers.items()}, "rest": rest}


def _fill(template: str, fields: dict[str, Any]) -> str:
    return template.format(**fields) + fields["rest"]
