"""What a file of this folder says about its checkpoints, and how it reads sizes off shapes."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from flax import nnx

from esg_jax.interop.convert import empty_like, stream_from_ours
from esg_jax.interop.readers import CheckpointReader
from esg_jax.interop.rules import Table
from esg_jax.interop.verify import Difference
from esg_jax.interop.writers import write_sharded

Shapes = Mapping[str, tuple[int, ...]]
Json = Mapping[str, Any]
# (file or folder, our arrays by name, configuration, size of a shard in bytes) -> files written
Writer = Callable[[Path, Mapping[str, Any], Any, int], list[Path]]


@dataclasses.dataclass(frozen=True)
class Format:
    """Names that the tensors of a family may have.

    Attributes:
        name: for messages.
        marks: patterns; a checkpoint in which each is found somewhere has this format.
        table: from these names to ours.
        absent: pattern of our parameters that the format never holds.
    """

    name: str
    marks: tuple[str, ...]
    table: Table
    absent: str | None = None

    def fits(self, names: Iterable[str]) -> bool:
        """Whether a checkpoint with these names has this format."""
        names = list(names)
        return all(any(re.search(mark, name) for name in names) for mark in self.marks)


@dataclasses.dataclass(frozen=True)
class Family:
    """Checkpoints that one code base writes of one of our models.

    Attributes:
        model, config: class of the model and of its configuration.
        formats: gives the names to recognise it by, special ones first. A function, because those of a whole model
            follow the backbones.
        infer: configuration from the shapes of our parameters and the number of attention heads, where that is given.
            What it misses in the shapes is a KeyError.
        read_json: configuration from the content of a `config.json` and its path, which is for messages.
        written_as: name for `--format`; None: the family is only read. Of the families of one model the first is the
            default.
        write: writes a checkpoint of this family.
        verify: loads into PyTorch what `write` wrote, and compares outputs with our model's.
        parts: class of a part of the model -> prefix of the part's parameters, for `load_part`.
        open: the reader of a folder of several files that is of this family, None for any other folder.
        complete: adds to a checkpoint what the family leaves to another file (`--vision`): from the two readers and
            the other one's family.
        with_vocabulary: the configuration with fewer rows for tokens; None: the model has no vocabulary.
    """

    model: type[nnx.Module]
    config: type
    formats: Callable[[], Iterable[Format]]
    infer: Callable[[Shapes, int | None], Any]
    read_json: Callable[[Json, str], Any] | None = None
    written_as: str | None = None
    write: Writer | None = None
    verify: Callable[[Path, Any], list[Difference]] | None = None
    parts: Mapping[type, str] = dataclasses.field(default_factory=dict)
    open: Callable[[Path], CheckpointReader | None] | None = None
    complete: Callable[[CheckpointReader, CheckpointReader, "Family"], CheckpointReader] | None = None
    with_vocabulary: Callable[[Any, int], Any] | None = None


@dataclasses.dataclass(frozen=True)
class Inside:
    """A backbone's names within a whole model, below the model's prefix.

    Attributes:
        mark: pattern of a name by which the backbone is recognised there.
        table: from these names to ours.
    """

    mark: str
    table: Table


@dataclasses.dataclass(frozen=True)
class InTransformers(Inside):
    """The same for transformers' models, which describe their backbone in `config.json`.

    Attributes:
        model_type: the name that it has there.
        write_json, read_json: to and from our configuration; the latter also takes the path for messages.
    """

    model_type: str
    write_json: Callable[[Any], Json]
    read_json: Callable[[Json, str], Any]


@dataclasses.dataclass(frozen=True)
class BackboneFamily(Family):
    """Checkpoints of one of our backbones, alone and in whole models.

    Attributes:
        reference: its names in the reference code's models and in our own; None: such models are not converted.
        transformers: in transformers' models; None: transformers has none with this backbone.
    """

    reference: Inside | None = None
    transformers: InTransformers | None = None


def count(shapes: Shapes, pattern: str) -> int:
    """One more than the largest index that `pattern` captures; 0 when nothing fits."""
    found = (re.match(pattern, name) for name in shapes)
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def depths(shapes: Shapes) -> tuple[int, ...]:
    """Blocks of every stage, where they are called ``stages.STAGE.BLOCK``."""
    stages = range(count(shapes, r"stages\.(\d+)\.\d+\."))
    return tuple(count(shapes, rf"stages\.{stage}\.(\d+)\.") for stage in stages)


def part(shapes: Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    """The shapes below a prefix, without it."""
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def write_folder(
    folder: Path,
    arrays: Mapping[str, Any],
    table: Table,
    values: Json,
    max_shard_bytes: int,
    *,
    prefix: str = "",
    rows: int | None = None,
) -> list[Path]:
    """Writes safetensors, in shards when they are large, and `config.json`, as transformers keeps models.

    Args:
        folder: target, created when absent.
        arrays: our name -> array, or a `CheckpointReader`, which is read one tensor at a time.
        table: from the names in the files to ours.
        values: content of `config.json`, to which the type of the arrays is added.
        max_shard_bytes: size of a shard.
        prefix: of the names in `table`, left out of the files.
        rows: of the vocabulary that are written; by default all.

    Returns:
        The files written.

    Raises:
        ConversionError: an array that the table has no place for.
    """
    growing = {template for rule in table.rules if rule.growing is not None for template in rule.theirs}

    def tensors(arrays):
        for name, array in stream_from_ours(arrays, table):
            yield name.removeprefix(prefix), array[:rows] if name in growing else array

    layout = {name: (x.shape, x.dtype) for name, x in tensors(empty_like(arrays))}
    dtypes = {dtype.name for _, dtype in layout.values()}
    written = write_sharded(folder, layout, tensors(arrays), max_shard_bytes)
    values = {**values, "dtype": dtypes.pop()} if len(dtypes) == 1 else values
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    return [*written, folder / "config.json"]


def folder_writer(
    table: Callable[[Any], Table], values: Callable[[Any], Json], rows: Callable[[Any], int] | None = None
) -> Writer:
    """`write_folder` with everything that a configuration decides."""

    def write(folder, arrays, config, max_shard_bytes):
        cut = rows(config) if rows else None
        return write_folder(folder, arrays, table(config), values(config), max_shard_bytes, rows=cut)

    return write
