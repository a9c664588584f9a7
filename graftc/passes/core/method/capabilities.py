"""Capabilities of some methods besides adapting and folding: classes that a `Method` also derives from.

Code that needs a capability checks for it with ``isinstance``. A method without it has nothing to define.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import Tensor

from graftc.passes.core.method.scoring import Scoring
from graftc.passes.core.method.steering import AdaptedSite
from graftc.specs.base import MethodSpec
from graftc.specs.errors.diagnostics import GraftError

S = TypeVar("S", bound=MethodSpec)


@dataclass(frozen=True)
class Transition(Generic[S]):
    """The state that the next training of an adaptation starts from.

    Attributes:
        spec: the adaptation in that training.
        values: its tensors by their Store names; those that are missing start from their initial values.
        rewind: whether everything else that trains restarts from where the training that has ended started.
    """

    spec: S
    values: Mapping[str, Tensor] = field(default_factory=dict)
    rewind: bool = False


class Scored(ABC, Generic[S]):
    """A method that chooses by examples what trains, before its first training."""

    @abstractmethod
    def scoring(self, spec: S) -> Scoring | None:
        """Return how examples score entries; None if the spec chooses without examples."""

    @abstractmethod
    def scored(self, places: Sequence[AdaptedSite[S]]) -> Sequence[str]:
        """Return the Store names of the base's tensors whose scores `selected` needs."""

    @abstractmethod
    def selected(self, spec: S, places: Sequence[AdaptedSite[S]], scores: Mapping[str, Tensor]) -> Transition[S]:
        """Return the adaptation with what the scores choose.

        Args:
            spec: the adaptation without its overrides applied.
            places: every adapted place.
            scores: scores of every entry of the tensors of `scored`, by the tensors' Store names, in their shapes.
        """


class Staged(ABC, Generic[S]):
    """A method that takes several trainings. Its specs have a field ``stage``, the number of the training, from 1."""

    @abstractmethod
    def stages(self, spec: S) -> int:
        """Return the number of trainings that it takes."""

    @abstractmethod
    def advance(self, spec: S, places: Sequence[AdaptedSite[S]], shared: Mapping[str, Tensor]) -> Transition[S]:
        """Return what the training after the one of ``spec`` starts from; its spec has the next stage.

        Args:
            spec: the adaptation without its overrides applied.
            places: every adapted place with its live tensors.
            shared: tensors of the adaptation as a whole, by part.
        """


class Collapsing(ABC, Generic[S]):
    """A method that is deployed as a simpler adaptation of the same name if it does not fold."""

    @abstractmethod
    def collapse(self, spec: S) -> MethodSpec | None:
        """Return the simpler adaptation, or None if it is deployed as it was trained.

        Args:
            spec: the adaptation without its overrides applied.
        """

    def collapsed(self, spec: S, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the tensors of one site of the simpler adaptation, by part; by default, the tensors unchanged.

        Args:
            spec: the adaptation with the site's overrides applied.
            tensors: the site's own tensors by part, float64, and those that all sites share; on the meta device if only
                sizes are requested.
        """
        return tensors


class Figured(ABC, Generic[S]):
    """A method with numbers that describe what training has made of a site.

    Examples are its rank and the share of its weight that is left. `Controller.figures` gives the numbers that only a
    controller knows.
    """

    @abstractmethod
    def figures(self, spec: S, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the numbers of one site as scalars by name, on the tensors' device; none if it has none.

        Args:
            spec: the adaptation with the site's overrides applied.
            tensors: the site's own tensors by part, and those that all sites share.
        """


@dataclass(frozen=True)
class Reading:
    """A number that a forward pass has and no tensor keeps: what an operator computes from a parameter.

    Attributes:
        figure: the name of the number.
        part: the part of the parameter.
        operators: operators that read the parameter; the first one that does counts.
        number: a function that returns the number as a scalar, from the operator's positional arguments and its result.
    """

    figure: str
    part: str
    operators: tuple[Any, ...]
    number: Callable[[Sequence[Any], Tensor], Tensor]


class Observed(ABC, Generic[S]):
    """A method with numbers in a forward pass that are worth observing: values of gates, routes that were drawn."""

    @abstractmethod
    def readings(self, spec: S) -> Sequence[Reading]:
        """Return what is read of the parameters of one site; readings of parts that it does not have are ignored.

        Args:
            spec: the adaptation with the site's overrides applied.
        """


class Ranked(Figured[S]):
    """A method with ranks, some of which may have no effect."""

    def figures(self, spec: S, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return ``rank``, the number of ranks that have an effect; for a mixture of experts, the mean of theirs."""
        return {"rank": self.live_ranks(spec, tensors).sum(-1).float().mean()}

    @abstractmethod
    def live_ranks(self, spec: S, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return which ranks of one site have an effect, ``bool[..., rank]``.

        Args:
            spec: the adaptation with the site's overrides applied.
            tensors: the site's own tensors by part, and those that all sites share.
        """

    def deploy_rank(self, spec: S, shared: Mapping[str, Tensor], rank: int) -> None:
        """Choose the rank that the adaptation has in eval mode and folds at, if the method allows it.

        Args:
            spec: the adaptation without its overrides applied.
            shared: tensors of the adaptation as a whole, by part, which store the rank.
            rank: the new rank.

        Raises:
            GraftError: GC055 if it does not, or not at this rank.
        """
        raise one_rank(spec)


class Resized(ABC, Generic[S]):
    """A method that ships another number of elements after all of its trainings than its parameters have now."""

    @abstractmethod
    def deployed(self, spec: S, places: Sequence[AdaptedSite[S]]) -> int | None:
        """Return the number of elements that have to ship with the base; None if these are those of its parameters.

        Args:
            spec: the adaptation without its overrides applied.
            places: every adapted place with its tensors, which may be on the meta device.
        """


class RowWise(ABC, Generic[S]):
    """A method that folds every row of a weight by itself, so that the weight need not be in memory as a whole.

    A block of rows folds as a weight of its own, with the same rows of some of the adaptation's tensors and all of the
    others.
    """

    @abstractmethod
    def row_axes(self, spec: S) -> Mapping[str, int]:
        """Return the axis that counts the site's rows, by part.

        Parts that are not named are needed in full, and names of parts that do not exist are ignored.

        Args:
            spec: the adaptation with the site's overrides applied.
        """

    def fewest_rows(self, spec: S) -> int:
        """Return the least number of rows that a block may have."""
        return 1

    def from_weight(self, spec: S, weight: Tensor) -> Mapping[str, Tensor]:
        """Return the constants of its graph for a weight ``[..., rows, in]``, by part; see `Builder.constant`."""
        return {}

    def standing_alone(self, spec: S, roles: Sequence[str]) -> S:
        """Return the same adaptation for a map without a role, with what ``roles`` would decide set in the spec."""
        return spec


class Reselecting:
    """A method that trains entries whose places others take later, so that indices of entries are in no order."""


def one_rank(spec: MethodSpec) -> GraftError:
    """Return the error for a method whose rank cannot be chosen."""
    return GraftError("GC055", f"{spec.method} has one rank, which is that of its spec")
