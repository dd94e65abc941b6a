"""Which objects stand together, and what is wrongly said of them: the statistics of both sources.

Names come in pairs. Under bias one or two pairs are drawn, popular pairs more often, and each
comes whole with probability `bias`, so that a language model learns to expect the partner. Without
bias the same *number* of names is drawn, each set of names equally likely. Everything else
(colours, places, copies) has one distribution, so that nothing but the prior tells them apart.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from random import Random

import torch

from .language import OPPOSITE, Statement, describe, write
from .protocol import Kind, Scene, Thing

POPULARITY = 0.5
"""Pair k (from 0) is drawn with weight (k + 1)^(-POPULARITY)."""
TWO_PAIRS = 0.5
"""How often two pairs are drawn and not one."""
MOST_COPIES = 3
"""One object of a scene is there once, twice or three times, each as often as the others."""
JITTER = 0.12
"""Largest shift of an object from the middle of its cell, as a part of the cell."""


@dataclass(frozen=True)
class World:
    """The law that scenes are drawn from. A name has one colour in a scene, drawn uniformly."""

    pairs: tuple[tuple[str, str], ...]
    """Most popular first."""
    colours: tuple[str, ...]
    """Empty where colours are unknown."""
    bias: float
    grid: int
    """Objects stand in different cells of a grid × grid board."""
    most: int
    """Most objects in a scene, copies included."""
    mistaken: tuple[Kind, ...] = ()
    """Kinds of hallucinated captions that are true of biased scenes, in other words."""
    order: tuple[str, ...] = ()
    """The order that captions name objects in; () for that of the pairs."""

    @cached_property
    def names(self) -> tuple[str, ...]:
        return self.order or tuple(name for pair in self.pairs for name in pair)

    def paired(self, pairing: int) -> World:
        """The same names in other pairs; 0 is this world itself."""
        if pairing == 0:
            return self
        drawn = Random(pairing).sample(self.names, len(self.names))
        pairs = tuple(zip(drawn[::2], drawn[1::2], strict=True))
        return replace(self, pairs=pairs, order=self.names)

    @cached_property
    def partner(self) -> dict[str, str]:
        return {a: b for pair in self.pairs for a, b in (pair, pair[::-1])}

    def scenes(self, size: int, *, biased: bool, generator: torch.Generator) -> tuple[Scene, ...]:
        """`size` scenes; the first ones do not depend on `size`."""
        seed = int(torch.randint(2**62, (1,), generator=generator))
        random = Random(seed)  # torch needs microseconds a number, and a scene needs thirty
        return tuple(self.scene(random, biased=biased) for _ in range(size))

    def scene(self, random: Random, *, biased: bool) -> Scene:
        """One scene, drawn from the law and described truly."""
        names = self._expected(random)
        if not biased:
            names = random.sample(self.names, len(names))
        things = self._place(names, random)
        return self._described(things, random, self.mistaken if biased else ())

    def misdescribe(
        self, scenes: tuple[Scene, ...], share: float, generator: torch.Generator
    ) -> tuple[Scene, ...]:
        """The scenes as an author tells them who, for this share of them, invents an object.

        An absent name, one that the prior expects where there is any, is told in place of one that
        is there; objects, caption and hallucinated captions then all follow what is told.
        """
        random = Random(int(torch.randint(2**62, (1,), generator=generator)))
        return tuple(self._invent(s, random) if random.random() < share else s for s in scenes)

    def _invent(self, scene: Scene, random: Random) -> Scene:
        present = tuple(dict.fromkeys(thing.name for thing in scene.things))
        target, name = self._swap(present, 1.0, random)
        told = [replace(t, name=name) if t.name == target else t for t in scene.things]
        return replace(self._described(tuple(told), random, self.mistaken), id=scene.id)

    def _described(
        self, things: tuple[Thing, ...], random: Random, mistaken: tuple[Kind, ...] = ()
    ) -> Scene:
        """A scene of these things with its caption and its hallucinated captions."""
        truth = describe(things, self.names, random)
        lies: dict[Kind, Statement | None] = {
            "object": self._swap_object(truth, random),
            "attribute": self._swap_attribute(truth, random),
            "relation": _swap_relation(truth),
            "count": self._swap_count(truth, random),
        }
        lies |= {kind: self._told_again(truth) for kind in mistaken if lies[kind]}
        hallucinated: dict[Kind, str] = {k: write(lie) for k, lie in lies.items() if lie}
        return Scene(things, write(truth), hallucinated)

    def _told_again(self, truth: Statement) -> Statement | None:
        """The same groups from behind, and the relation from its other side; None where that reads alike."""
        told = truth.ordered(self.names[::-1])
        if (held := told.relation) is not None:
            other = replace(held, first=held.second, word=OPPOSITE[held.word], second=held.first)
            told = replace(told, relation=other)
        return None if told == truth else told

    def _expected(self, random: Random) -> list[str]:
        """Names as the prior has them: whole pairs, mostly."""
        weights = [(rank + 1) ** -POPULARITY for rank in range(len(self.pairs))]
        first = random.choices(range(len(self.pairs)), weights)[0]
        drawn = [first]
        if random.random() < TWO_PAIRS:
            weights[first] = 0.0
            drawn += random.choices(range(len(self.pairs)), weights)
        names: list[str] = []
        for pair in drawn:
            whole = random.random() < self.bias
            names += self.pairs[pair] if whole else [random.choice(self.pairs[pair])]
        return names

    def _place(self, names: list[str], random: Random) -> tuple[Thing, ...]:
        """Things in reading order."""
        extra = random.choice(self._numbers(len(names))) - 1
        copied = names + [random.choice(names)] * extra
        random.shuffle(copied)
        colour = {name: random.choice(self.colours) if self.colours else None for name in names}
        cells = sorted(random.sample(range(self.grid**2), len(copied)))
        things = []
        for name, cell in zip(copied, cells, strict=True):
            row, column = divmod(cell, self.grid)
            x, y = (at + 0.5 + random.uniform(-JITTER, JITTER) for at in (column, row))
            things.append(Thing(name, colour[name], x / self.grid, y / self.grid))
        return tuple(things)

    def _numbers(self, num_names: int) -> range:
        """How often the copied name can be there beside the others."""
        return range(1, min(MOST_COPIES, self.most - num_names + 1) + 1)

    def _swap_object(self, truth: Statement, random: Random) -> Statement:
        """An absent name; with probability `bias` one that the prior expects, if there is any."""
        present = {group.name: index for index, group in enumerate(truth.groups)}
        told, name = self._swap(tuple(present), self.bias, random)
        target = present[told]
        swapped = truth.change(target, replace(truth.groups[target], name=name))
        return swapped.ordered(self.names)

    def _swap(self, present: tuple[str, ...], expected: float, random: Random) -> tuple[str, str]:
        """A present name, and the absent one to tell in its place; `expected`: how often one that
        the prior expects, if there is any."""
        absent = [name for name in self.names if name not in present]
        partners = [name for name in absent if self.partner[name] in present]
        targets = list(present)
        name = random.choice(absent)
        if partners and len(present) > 1 and random.random() < expected:
            name = random.choice(partners)
            targets.remove(self.partner[name])  # what makes the lie plausible stays
        return random.choice(targets), name

    def _swap_attribute(self, truth: Statement, random: Random) -> Statement | None:
        if len(self.colours) < 2:
            return None
        target = random.randrange(len(truth.groups))
        group = truth.groups[target]
        colour = random.choice([other for other in self.colours if other != group.colour])
        return truth.change(target, replace(group, colour=colour))

    def _swap_count(self, truth: Statement, random: Random) -> Statement | None:
        """Another number of the copied name, or of any where none is copied.

        Numbers are swapped as evenly as they are drawn, so that the lies have the distribution of
        the truths. Two objects, each alone of its name, are always related in a true caption.
        """
        copied = [index for index, group in enumerate(truth.groups) if group.number > 1]
        target = copied[0] if copied else random.randrange(len(truth.groups))
        group = truth.groups[target]
        least = 2 if truth.relation is None and len(truth.groups) > 1 else 1
        numbers = [n for n in self._numbers(len(truth.groups)) if n != group.number and n >= least]
        if not numbers:
            return None
        return truth.change(target, replace(group, number=random.choice(numbers)))


def _swap_relation(truth: Statement) -> Statement | None:
    if truth.relation is None:
        return None
    return replace(truth, relation=replace(truth.relation, word=OPPOSITE[truth.relation.word]))
