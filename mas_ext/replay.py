"""Replay: a memory of a few old samples that a loop mixes into its batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from mas_ext._arguments import check_count
from mas_ext.importance import batches as batch_of


class Replay:
    """A memory of so many samples out of all that came, each of which is as likely to be in it as any other.

        replay = mas_ext.Replay(500)
        for x, y in stream:
            old_x, old_y = replay.draw(len(x)) if len(replay) else (x, y)
            loss = F.cross_entropy(model(x), y) + F.cross_entropy(model(old_x), old_y)
            ...  # backward and optimizer step, as ever
            replay.add((x, y))

    Reservoir sampling (Vitter 1985): the memory is a uniform sample of all that was added, whatever its length
    and without boundaries of tasks. With `labels`, class-balanced (Chrysakis and Moens, ICML 2020): every class
    gets the same share as far as it had samples, and within a class the sample is uniform.

    Args:
        samples: how many are kept.
        labels: of a batch as it is added, the class of each sample, integers (N,).
        seed: of the choice; the caller's random state is neither used nor changed.

    Raises:
        ValueError: fewer samples than one.
    """

    def __init__(
        self, samples: int, labels: Callable[[Any], Tensor] | None = None, seed: int = 0
    ) -> None:
        check_count(samples, "samples")
        check_count(seed, "seed", least=0)
        self.samples, self.labels = samples, labels
        self._memory = _Memory(torch.Generator().manual_seed(seed).get_state())

    def __len__(self) -> int:
        """How many samples are in the memory."""
        return len(self._memory.kept)

    def add(self, batch: Any) -> None:
        """Offer the samples of a batch to the memory; what is kept is copied, on the device where it is.

        Args:
            batch: a tensor, or a tuple, list or mapping that begins with one, samples in dimension 0; all
                samples of one shape.

        Raises:
            TypeError, ValueError: a batch that is none of these; labels that are not one integer per sample.
        """
        batch_of.told(batch)  # refuses what is no batch
        memory = _Memory(**self.state_dict())
        for i, label in enumerate(self._labels(batch, batch_of.size(batch))):
            place = memory.place(label, self.samples)
            if place is not None:
                memory.put(place, label, batch_of.at(batch, [i]))
        self._memory = memory

    def draw(self, count: int) -> Any:
        """A batch of random samples of the memory, each at most once, in the structure in which they came.

        Of fewer samples than `count` all are drawn.

        Raises:
            ValueError: a count below 1; an empty memory; samples of different shapes.
        """
        check_count(count, "count")
        memory = _Memory(**self.state_dict())
        if not memory.kept:
            raise ValueError("draw: got an empty memory, expected one that samples were added to")
        chosen = torch.randperm(len(memory.kept), generator=memory.generator)[:count].tolist()
        drawn = batch_of.copied(batch_of.concatenated([memory.kept[i] for i in chosen]))
        self._memory = memory
        return drawn

    def state_dict(self) -> dict[str, Any]:
        """The memory and all that further choices depend on."""
        return self._memory.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state_dict(), from where all goes on to the same bits; nothing changes on an error.

        Raises:
            ValueError: no such state, or one of more samples; one of a smaller memory that was full, in which
                later samples would be likelier than those that it let go.
        """
        expected = {"kept", "classes", "seen", "full", "random"}
        if state.keys() != expected:
            raise ValueError(f"state: got {sorted(state)}, expected {sorted(expected)}")
        if len(state["kept"]) > self.samples:
            raise ValueError(
                f"state: got {len(state['kept'])} samples, expected at most {self.samples}"
            )
        kept, seen = len(state["kept"]), sum(state["seen"].values())
        least = min(seen, self.samples)
        if kept < least:
            raise ValueError(
                f"state: got {kept} of {seen} samples, a full memory, expected {least} of them"
            )
        self._memory = _Memory(**state)

    def _labels(self, batch: Any, count: int) -> list[int]:
        if self.labels is None:
            return [0] * count
        found = self.labels(batch)
        if found.shape != (count,) or found.is_floating_point() or found.is_complex():
            raise ValueError(
                f"labels: got {found.dtype} of shape {tuple(found.shape)}, expected integers of shape "
                f"({count},)"
            )
        labels: list[int] = found.tolist()
        return labels


class _Memory:
    """A reservoir of samples, copied before it changes, so that an error leaves the old one whole.

    random: the state of its generator. kept, classes: the samples, each a batch of one, and their classes.
    seen: how many of each class came. full: classes that were the largest of a full memory once: their samples
    replace one another from then on.
    """

    def __init__(
        self,
        random: Tensor,
        kept: Iterable[Any] = (),
        classes: Iterable[int] = (),
        seen: Mapping[int, int] | None = None,
        full: Iterable[int] = (),
    ) -> None:
        self.generator = torch.Generator()
        self.generator.set_state(random)
        self.kept, self.classes, self.full = [*kept], [*classes], {*full}
        self.seen, self.held = Counter(seen), Counter(self.classes)

    def state_dict(self) -> dict[str, Any]:
        """What it is made of again."""
        return {
            "kept": [*self.kept],
            "classes": [*self.classes],
            "seen": dict(self.seen),
            "full": sorted(self.full),
            "random": self.generator.get_state(),
        }

    def place(self, label: int, samples: int) -> int | None:
        """Where a sample of this class goes: at the end, in the place of another one, or nowhere."""
        self.seen[label] += 1
        if len(self.kept) < samples:
            return len(self.kept)
        most = max(self.held.values())
        largest = {each for each, held in self.held.items() if held == most}
        self.full |= largest
        if label in self.full:
            if self._below(self.seen[label]) >= self.held[label]:
                return None
            largest = {label}
        places = [i for i, each in enumerate(self.classes) if each in largest]
        return places[self._below(len(places))]

    def put(self, place: int, label: int, sample: Any) -> None:
        """Keep a sample there, instead of what was there."""
        self.held.subtract(self.classes[place : place + 1])
        self.held[label] += 1
        self.classes[place : place + 1] = [label]
        self.kept[place : place + 1] = [sample]

    def _below(self, bound: int) -> int:
        return int(torch.randint(bound, (), generator=self.generator))
