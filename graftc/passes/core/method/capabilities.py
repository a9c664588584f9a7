"""What some methods can beside adapting and folding: classes that a `Method` also derives from.

Whoever needs a capability asks ``isinstance`` for it. A method that does not have it has nothing to define.
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
    """What the next training of an adaptation starts from.

    Attributes:
        spec: the adaptation as it is there.
        values: its tensors by their Store names; those that are missing start from their initial values.
        rewind: whether everything else that trains starts again from where the training that has ended started.
    """

    spec: S
    values: Mapping[str, Tensor] = field(default_factory=dict)
    rewind: bool = False


class Scored(ABC, Generic[S]):
    """Chooses what trains by examples, before its first training."""

    @abstractmethod
    def scoring(self, spec: S) -> Scoring | None:
        """How examples score entries; None where the spec lets them have no say."""

    @abstractmethod
    def scored(self, places: Sequence[AdaptedSite[S]]) -> Sequence[str]:
        """Store names of the base's tensors that `selected` wants the scores of."""

    @abstractmethod
    def selected(self, spec: S, places: Sequence[AdaptedSite[S]], scores: Mapping[str, Tensor]) -> Transition[S]:
        """The adaptation with what scores choose.

        Args:
            spec: the adaptation without its overrides applied.
            places: every adapted place.
            scores: of every entry of `scored`, by the tensors' Store names, in their shapes.
        """


class Staged(ABC, Generic[S]):
    """Takes several trainings. Its specs have a field ``stage``, the number of the training, from 1."""

    @abstractmethod
    def stages(self, spec: S) -> int:
        """How many trainings it takes."""

    @abstractmethod
    def advance(self, spec: S, places: Sequence[AdaptedSite[S]], shared: Mapping[str, Tensor]) -> Transition[S]:
        """What the next training starts from, after the one that ``spec`` is for; its spec says that it is the next.

        Args:
            spec: the adaptation without its overrides applied.
            places: every adapted place with its live tensors.
            shared: tensors of the adaptation as a whole, by part.
        """


class Collapsing(ABC, Generic[S]):
    """Is deployed as a simpler adaptation of the same name, where it does not fold."""

    @abstractmethod
    def collapse(self, spec: S) -> MethodSpec | None:
        """The simpler adaptation, or None where it is deployed as it was trained.

        Args:
            spec: the adaptation without its overrides applied.
        """

    def collapsed(self, spec: S, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The tensors of one site of the simpler adaptation, by part; by default those that there are.

        Args:
            spec: the adaptation with the site's overrides applied.
            tensors: the site's own tensors by part, float64, and those that all sites share; on the meta device where
                only sizes are asked for.
        """
        return tensors


class Figured(ABC, Generic[S]):
    """Has numbers that say what training has made of a site: its rank, the share of its weight that is left. What only
    a controller knows, `Controller.figures` gives."""

    @abstractmethod
    def figures(self, spec: S, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The numbers of one site as scalars by name, on the tensors' device; none where it has none.

        Args:
            spec: the adaptation with the site's overrides applied.
            tensors: the site's own tensors by part, and those that all sites share.
        """


@dataclass(frozen=True)
class Reading:
    """A number that a forward pass has and no tensor keeps: what an operator makes of a parameter.

    Attributes:
        figure: its name.
        part: the parameter's.
        operators: those that read the parameter; the first one that does counts.
        number: the number as a scalar, from the operator's positional arguments and its result.
    """

    figure: str
    part: str
    operators: tuple[Any, ...]
    number: Callable[[Sequence[Any], Tensor], Tensor]


class Observed(ABC, Generic[S]):
    """Has numbers in a forward pass that are worth looking at: values of gates, routes that were drawn."""

    @abstractmethod
    def readings(self, spec: S) -> Sequence[Reading]:
        """What is read of the parameters of one site; those of parts that it does not have do no harm.

        Args:
            spec: the adaptation with the site's overrides applied.
        """


class Ranked(Figured[S]):
    """Has ranks some of which have no effect."""

    def figures(self, spec: S, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """See `Figured.figures`: ``rank``, how many have an effect; of a mixture of experts, their mean."""
        return {"rank": self.live_ranks(spec, tensors).sum(-1).float().mean()}

    @abstractmethod
    def live_ranks(self, spec: S, tensors: Mapping[str, Tensor]) -> Tensor:
        """Which ranks of one site have an effect, ``bool[..., rank]``.

        Args:
            spec: the adaptation with the site's overrides applied.
            tensors: the site's own tensors by part, and those that all sites share.
        """

    def deploy_rank(self, spec: S, shared: Mapping[str, Tensor], rank: int) -> None:
        """Choose the rank that the adaptation has in eval mode and folds at, where the method can.

        Args:
            spec: the adaptation without its overrides applied.
            shared: tensors of the adaptation as a whole, by part, which say the rank.
            rank: the new one.

        Raises:
            GraftError: GC055 where it cannot, or not at this rank.
        """
        raise one_rank(spec)


class Resized(ABC, Generic[S]):
    """Ships another number of elements after all of its trainings than its parameters have now."""

    @abstractmethod
    def deployed(self, spec: S, places: Sequence[AdaptedSite[S]]) -> int | None:
        """How many elements have to ship beside the base; None where these are those of its parameters.

        Args:
            spec: the adaptation without its overrides applied.
            places: every adapted place with its tensors, which may be on the meta device.
        """


class RowWise(ABC, Generic[S]):
    """Folds every row of a weight by itself: a block of rows folds as a weight of its own, with the same rows of some
    of the adaptation's tensors and all of the others. So it need not be in memory as a whole."""

    @abstractmethod
    def row_axes(self, spec: S) -> Mapping[str, int]:
        """Which axis counts the site's rows, by part. Parts that are not named are needed whole, and names of parts
        that there are not do no harm.

        Args:
            spec: the adaptation with the site's overrides applied.
        """

    def fewest_rows(self, spec: S) -> int:
        """The least number of rows that a block may have."""
        return 1

    def from_weight(self, spec: S, weight: Tensor) -> Mapping[str, Tensor]:
        """The constants, by part, that its graph has of a weight ``[..., rows, in]``: see `Builder.constant`."""
        return {}

    def standing_alone(self, spec: S, roles: Sequence[str]) -> S:
        """The same adaptation of a map that has no role, where a role decides what it does."""
        return spec


class Reselecting:
    """Trains entries that leave their places to others, so that indices of entries are in no order."""


def one_rank(spec: MethodSpec) -> GraftError:
    """The error where no rank can be chosen."""
    return GraftError("GC055", f"{spec.method} has one rank, which is that of its spec")
