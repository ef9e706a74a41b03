"""Few-shot episodes from examples by class: a task batch is one gather."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastmeta import values
from fastmeta.batch import TaskBatch
from fastmeta.tasks._arguments import exact_device
from fastmeta.tasks.drawing import NATURAL_QUERIES, natural_sizes, subsets, subsets_by_weight, with_replacement
from fastmeta.tasks.examples import Examples
from fastmeta.tasks.padding import Part, others, padded
from fastmeta.tasks.rows import as_inputs, examples_of, turned
from fastmeta.tasks.source import part_of

CLASSES = ("even", "size")


class EpisodeSampler:
    """N-way episodes: classes without replacement, and of each class disjoint support and query rows.

    Args:
        images: where the rows are from: `[classes, instances, ...]`; or a list of `[instances, ...]`, one for each
            class, which may differ in length; or `~fastmeta.tasks.Examples`. uint8 are images, of which 255 is 1.0;
            floating rows stay as they are; other integers are token ids.
        ways: N, classes per task; or `(lo, hi)`: as many as a uniform draw says, for each task.
        shots: support rows per class; or `(lo, hi)`: a uniform draw for each task; or "natural", below.
        query_shots: query rows per class; or "all" that the support leaves over.
        most_queries: with "all", at most so many of a class, at random.
        replace: every row is drawn by itself. A class may then have fewer rows than a task takes, a row may come twice,
            and stand in support and query.
        classes: "even": all classes are as likely; "size": drawn one after the other, in proportion to their rows.
        rotations: every rotation by 90 degrees of a class is a class of its own, as usual with Omniglot. Takes 4 times
            the memory of the images, and holds it where they lie.
        augment: `(images [B, C, H, W], generator) -> [B, C, H, W]`, an `~fastmeta.tasks.Augmentation`: of support and
            query.
        device: where tasks are drawn and batches lie, by default where the rows lie. Rows that lie elsewhere are
            gathered there, into pinned memory if they go to a GPU, and moved.
        name: for messages.

    `sample` gives inputs `[T, S, ...]` and `[T, Q, ...]`, float32 in [0, 1] of uint8, floating ones in their own dtype,
    token ids int64; and labels int64 in [0, N), in order. Where tasks differ in size they are padded to the largest of
    their batch, with rows and labels of 0, and `support_mask` and `query_mask` say what is their own.

    "natural" are the sizes of Meta-Dataset (Triantafillou et al. 2020, section 3.2). Of a task with classes C, of which
    class c has n_c rows, every class has the same number of queries

        q = min(query_shots, min over c of floor(n_c / 2)), with their query_shots of 10,

    and the support set, with beta from U(0, 1], and alpha_c from U[log 0.5, log 2) for each class,

        |S| = min(500, sum over c of ceil(beta min(100, n_c - q)))
        R_c = exp(alpha_c) n_c / sum over c' of exp(alpha_c') n_c'
        k_c = min(floor(R_c (|S| - |C|)) + 1, n_c - q)

    rows of class c. With query_shots "all" the support is that of 10. Their ways are `(5, 50)`.

    Raises:
        ValueError: rows of another shape, a size below 1, more ways than classes, more rows than a class has; options
            that do not go together.
        TypeError: rows of a dtype that is none of these, a size that is no int.
    """

    kind = "classification"

    def __init__(
        self,
        images: Tensor | Sequence[Tensor] | Examples,
        *,
        ways: int | tuple[int, int],
        shots: int | tuple[int, int] | str,
        query_shots: int | str,
        most_queries: int | None = None,
        replace: bool = False,
        classes: str = "even",
        rotations: bool = False,
        augment: Callable[[Tensor, torch.Generator | None], Tensor] | None = None,
        device: torch.device | str | None = None,
        name: str | None = None,
    ):
        examples = examples_of(images, name)
        self._ways, self._shots = _range("ways", ways), _range("shots", shots, "natural")
        if not isinstance(query_shots, str):
            values.count("query_shots", query_shots)
        elif query_shots != "all":
            raise ValueError(f"query_shots must be an int or 'all', got {query_shots!r}")
        if most_queries is not None:
            values.count("most_queries", most_queries)
            if query_shots != "all":
                raise ValueError(f"most_queries goes with query_shots 'all', and query_shots is {query_shots}")
        self.replace = values.flag("replace", replace)
        if replace and (shots == "natural" or query_shots == "all"):
            raise ValueError("replace goes with numbers of rows, not with shots 'natural' or query_shots 'all'")
        values.choice("classes", classes, CLASSES)
        if values.flag("rotations", rotations):
            examples = turned(examples)
        if values.function("augment", augment, or_none=True) and len(examples.input_shape) != 3:
            raise ValueError(f"augment needs images [C, H, W], and rows are {list(examples.input_shape)}")
        self.examples, self.name, self.augment = examples, examples.name, augment
        self.ways, self.shots, self.query_shots, self.most_queries = ways, shots, query_shots, most_queries
        self.classes = classes
        self.device = examples.rows.device if device is None else exact_device("device", device)
        self._check_sizes()
        self._order, self._starts = examples.order.to(self.device), examples.offsets[:-1].to(self.device)
        self._counts = examples.counts.to(self.device)
        # classes of one size are drawn from with whole random numbers, whatever the rows came as
        same = bool((examples.counts == examples.counts[0]).all())
        self._same_count = int(examples.counts[0]) if same else None

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.examples.input_shape

    @property
    def output_size(self) -> int:
        return self._ways[1]

    @property
    def fewest_rows(self) -> int:
        """Of a task."""
        queries = 1 if self.query_shots == "all" or self.shots == "natural" else self.query_shots
        return self._ways[0] * (self._shots[0] + queries)

    def over(self, rows: Tensor, name: str) -> EpisodeSampler:
        """The same episodes from the same generator with other rows, such as embeddings, in the order of classes."""
        found = copy.copy(self)
        found.examples, found.name, found.augment = self.examples.over(rows, name=name), name, None
        found.device = rows.device
        found._order, found._starts = found.examples.order.to(rows.device), self._starts.to(rows.device)
        found._counts = self._counts.to(rows.device)
        return found

    def sample(self, num_tasks: int, *, generator: torch.Generator | None = None) -> TaskBatch:
        """`num_tasks` episodes, drawn with `generator` (of the sampler's device) or the global one."""
        return self.sample_part(num_tasks, slice(None), generator=generator)

    def sample_part(self, num_tasks: int, part: slice, *, generator: torch.Generator | None = None) -> TaskBatch:
        """The episodes `part` of the `num_tasks` that `sample` would give: all are drawn, and the rows of these
        gathered."""
        values.count("num_tasks", num_tasks, 0)
        values.generator("generator", generator, self.device)
        fixed = all(isinstance(size, int) for size in (self.ways, self.shots, self.query_shots))
        support, query = (self._of_one_size if fixed else self._of_many_sizes)(num_tasks, generator)
        if self.augment is None:
            support, query, part = support.only(part), query.only(part), slice(None)
        places = torch.cat([support.places.flatten(), query.places.flatten()])
        x = as_inputs(self._gather(self._order[places]))
        if self.augment is not None:  # of all: what is drawn for an image depends on those before it
            x = self.augment(x, generator)
        middle = support.places.numel()
        batch = TaskBatch(*support.filled(x[:middle]), *query.filled(x[middle:]), *support.mask, *query.mask)
        return batch if part == slice(None) else part_of(batch, part)

    def _of_one_size(self, num_tasks: int, generator: torch.Generator | None) -> tuple[Part, Part]:
        cls = self._draw_classes(num_tasks, None, generator)
        each = self.shots + self.query_shots
        count = self._same_count or self._counts[cls].flatten()
        member = self._draw_rows(cls.numel(), count, each, generator).view(*cls.shape, each)
        places = self._starts[cls].unsqueeze(2) + member
        labels = torch.arange(self.ways, device=self.device)

        def part(places: Tensor) -> Part:
            return Part(places.flatten(1), labels.repeat_interleave(places.shape[2]).repeat(num_tasks, 1), ())

        return part(places[:, :, : self.shots]), part(places[:, :, self.shots :])

    def _of_many_sizes(self, num_tasks: int, generator: torch.Generator | None) -> tuple[Part, Part]:
        drawn = {"device": self.device, "generator": generator}
        low, most = self._ways
        ways = torch.randint(low, most + 1, (num_tasks, 1), **drawn)
        cls = self._draw_classes(num_tasks, ways, generator)
        there = torch.arange(most, device=self.device) < ways
        counts, starts = self._counts[cls], self._starts[cls]
        if self.shots == "natural":
            queries = NATURAL_QUERIES if self.query_shots == "all" else self.query_shots
            shots, queries = natural_sizes(counts, there, queries, generator)
        else:
            low, high = self._shots
            shots = torch.randint(low, high + 1, (num_tasks, 1), **drawn) * there
            queries = there * self.query_shots if self.query_shots != "all" else None
        if self.query_shots == "all":
            queries = (counts - shots) * there
            queries = queries if self.most_queries is None else queries.clamp(max=self.most_queries)
        rest = self.query_shots == "all" and self.most_queries is None  # then only the support is drawn
        size = (shots if rest else shots + queries).flatten()
        member = self._draw_rows(cls.numel(), counts.flatten(), size, generator)
        places = starts.unsqueeze(2) + member.unflatten(0, cls.shape)
        number = torch.arange(places.shape[2], device=self.device)
        in_support = number < shots.unsqueeze(2)
        if rest:
            asked = others(starts, counts * there, places, in_support)
        else:
            asked = places[~in_support & (number < (shots + queries).unsqueeze(2))]
        return padded(places[in_support], shots), padded(asked, queries)

    def _draw_classes(self, num_tasks: int, ways: Tensor | None, generator: torch.Generator | None) -> Tensor:
        """int64 `[T, most ways]`, of which the first `ways[t]` count (None: all), in random order."""
        drawn = {"device": self.device, "generator": generator}
        if self.classes == "even":
            return subsets(num_tasks, len(self._counts), self._ways[1], **drawn)
        cls = subsets_by_weight(num_tasks, self._counts, self._ways[1], **drawn)
        # the largest would come first, and a label tell of the size
        order = torch.rand(cls.shape, **drawn)
        if ways is not None:
            order.masked_fill_(torch.arange(cls.shape[1], device=self.device) >= ways, 2)
        return cls.gather(1, order.argsort(1))

    def _draw_rows(self, number: int, count: int | Tensor, size: int | Tensor, generator) -> Tensor:
        draw = with_replacement if self.replace else subsets
        return draw(number, count, size, device=self.device, generator=generator)

    def _gather(self, row: Tensor) -> Tensor:
        rows = self.examples.rows
        if rows.device == self.device:
            return rows[row]
        row = row.to(rows.device)
        if rows.device.type == "cpu" and self.device.type == "cuda":
            pinned = torch.empty(len(row), *rows.shape[1:], dtype=rows.dtype, pin_memory=True)
            return torch.index_select(rows, 0, row, out=pinned).to(self.device, non_blocking=True)
        return rows[row].to(self.device)

    def _check_sizes(self) -> None:
        counts, most = self.examples.counts, self._shots[1]
        if self._ways[1] > len(counts):
            raise ValueError(f"ways must be at most {len(counts)}, the classes of {self.name}, got {self.ways}")
        natural, rest = self.shots == "natural", self.query_shots == "all"
        needed = 1 if self.replace else 2 if natural else most + (1 if rest else self.query_shots)
        least, few = int(counts.min()), int((counts < needed).sum())
        if not few:
            return
        which = "a class" if len(counts.unique()) == 1 else f"class {self.examples.names[int(counts.argmin())]!r}"
        which = f"the examples of {which} of {self.name}"
        more = f"; {few - 1} more of its classes have too few" if 1 < few < len(counts) else ""
        if natural:
            raise ValueError(f"shots 'natural' takes 2 of {which}, and there is {least}{more}")
        if rest:
            raise ValueError(f"shots must be below {least}, {which}, so that queries are left; got {self.shots}{more}")
        raise ValueError(
            f"shots + query_shots must be at most {least}, {which}, got {self.shots} + {self.query_shots}{more}"
        )


def _range(name: str, value: int | tuple[int, int] | str, word: str | None = None) -> tuple[int, int]:
    """The least and the most of a size that is an int, two of them, or `word`, which says nothing but 1."""
    if word is not None and isinstance(value, str) and value == word:
        return 1, 1
    if isinstance(value, int):
        return values.count(name, value), value
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(
            f"{name} must be an int, (lo, hi){f' or {word!r}' if word else ''}, got {values.shown(value)}"
        )
    low, high = values.counts(name, value)
    if low > high:
        raise ValueError(f"{name} must be (lo, hi) with lo at most hi, got {value}")
    return low, high
