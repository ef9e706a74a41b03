"""Features of a data set, written once: what algorithms then train on in place of pictures."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import values
from ..tasks import NAMES, SPLITS, Examples, Inputs, load_images, open_data
from ..tasks.inputs import as_numbers
from ..tasks.read import Features, is_form, parse, with_options
from .checkpoint import write_whole
from .encoder import encoder_from, encoder_of
from .run import device_of, load

_AT_ONCE = 1024  # rows through the encoder


@torch.no_grad()
def features_of(encoder: nn.Module, examples: Examples) -> Tensor:
    """float32 `[R, D]` on the CPU for the rows of `examples` class by class, in eval mode.

    Raises:
        ValueError: an encoder whose batch norms have no running statistics: what it makes of a row depends on others.
    """
    if any(isinstance(m, nn.modules.batchnorm._NormBase) and m.running_mean is None for m in encoder.modules()):
        raise ValueError(
            "the encoder's batch norms have no running statistics, as in MAML's conv4, so that a row's features would "
            "depend on the rows beside it; encoders of protonet, ridge or contrastive have them"
        )
    encoder.eval()
    device = next((p.device for p in encoder.parameters()), torch.device("cpu"))
    order = examples.order.to(examples.rows.device)
    parts = [encoder(as_numbers(examples.rows[part].to(device))).float().cpu() for part in order.split(_AT_ONCE)]
    return torch.cat(parts).flatten(1)


def embed_data(
    source: str | Path,
    data: str,
    out: str | Path,
    splits: str | Path,
    *,
    device: str = "auto",
    data_root: str | Path | None = None,
) -> Examples:
    """Write the features of all splits of a data set, and which class is in which split.

    Args:
        source: a run's folder or checkpoint, of whose learner the encoder is taken, or a safetensors file with the
            weights of a `conv4` or an `mlp`.
        data: "glyphs", "omniglot" or own data as of `fastmeta.tasks.open_data`; pictures and tables are read as
            those of the run were, for a file's encoder as the form says.
        out: the file, as `Examples.save` writes it: rows float32 `[R, D]`.
        splits: a CSV file of the columns class and split, as `safetensors:out?splits=splits` reads it.
        device, data_root: as of `fastmeta train`.

    Returns:
        What was written.

    Raises:
        ValueError: a source without an encoder, data that it does not read, rows by task in place of classes.
    """
    encoder, inputs = _encoder(Path(values.path("source", source)), device)
    parts = _splits(data, inputs, data_root)
    names = [name for part in parts.values() for name in part.names]
    told = [split for split, part in parts.items() for _ in part.names]
    if len(set(names)) < len(names):  # a folder of the same name in two splits is two classes
        names = [f"{split}/{name}" for split, name in zip(told, names, strict=True)]
    found, labels, classes = [], [], 0
    for part in parts.values():
        found.append(_fitting(encoder, part, inputs))
        labels.append(torch.arange(classes, classes + len(part)).repeat_interleave(part.counts.cpu()))
        classes += len(part)
    written = Examples(torch.cat(found), torch.cat(labels), names=names, name=Path(out).stem)
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([("class", "split"), *zip(names, told, strict=True)])
    write_whole(Path(splits), text.getvalue().encode())
    written.save(out)
    return written


def _encoder(source: Path, device: str) -> tuple[nn.Module, Inputs | None]:
    """An encoder, and what it reads where that is known."""
    if source.is_file() and not source.with_suffix(".json").exists():
        return encoder_from(source)[0].to(device_of(device)), None
    learner = load(source, device=device)
    return encoder_of(learner), learner.inputs


def _splits(data: str, inputs: Inputs | None, data_root: str | Path | None) -> dict[str, Examples]:
    if not is_form(data):
        values.choice("data", data, (*NAMES[1:], "folder:PATH and other forms of own data"))
        found = {split: load_images(data, split, data_root=data_root) for split in SPLITS}
        return {
            split: Examples(
                images.flatten(0, 1),
                torch.arange(len(images)).repeat_interleave(images.shape[1]),
                names=[f"{split}/{i}" for i in range(len(images))],
            )
            for split, images in found.items()
        }
    if parse(data).pictures and inputs is not None and inputs.images:
        channels, side, _ = inputs.input_shape
        data = with_options(data, image_size=side, grey=channels == 1, background=inputs.background)
    columns = inputs.table if inputs is not None else None
    opened = open_data(data, fitted=None if columns is None else Features.from_json(columns["features"]))
    parts = {split: getattr(opened, split) for split in SPLITS if getattr(opened, split) is not None}
    if not all(isinstance(part, Examples) for part in parts.values()):
        raise ValueError(f"{data} has rows by task; features are of classes: a label without task or target")
    return parts


def _fitting(encoder: nn.Module, part: Examples, inputs: Inputs | None) -> Tensor:
    if inputs is not None and part.input_shape != inputs.input_shape:
        shapes = f"{list(part.input_shape)}, and the run reads {list(inputs.input_shape)}"
        raise ValueError(f"{part.name} has rows of shape {shapes}")
    try:
        return features_of(encoder, part)
    except RuntimeError as error:
        rows = f"{part.name}: rows of shape {list(part.input_shape)}"
        raise ValueError(f"{rows} do not fit the encoder: {error}") from error
