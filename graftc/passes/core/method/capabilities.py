"""Optional capabilities of methods besides adapting and folding: classes that a `Method` may also derive from.

Code that needs a capability checks for it with ``isinstance``. A method without the capability need not define
anything.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Literal, TypeVar

from torch import Tensor

from graftc.passes.core.method.principal import PrincipalComponents
from graftc.passes.core.method.scoring import Scoring
from graftc.passes.core.method.steering import AdaptedSite
from graftc.specs.base import MethodSpec
from graftc.specs.errors.diagnostics import GraftError

S = TypeVar("S", bound=MethodSpec)


@dataclass(frozen=True)
class Transition(Generic[S]):
    """The state from which an adaptation's next training run starts.

    Attributes:
        spec: the adaptation in that run.
        values: its tensors by Store name; missing tensors start from their initial values.
        rewind: whether all other trained tensors are reset to the values they had when the previous run started.
    """

    spec: S
    values: Mapping[str, Tensor] = field(default_factory=dict)
    rewind: bool = False


class Scored(ABC, Generic[S]):
    """A method that uses examples to choose what to train, before its first training run."""

    @abstractmethod
    def scoring(self, spec: S) -> Scoring | None:
        """Return how to score entries from examples; None if the spec makes the choice without examples."""

    @abstractmethod
    def scored(self, places: Sequence[AdaptedSite[S]]) -> Sequence[str]:
        """Return the Store names of the base tensors whose scores `selected` needs."""

    @abstractmethod
    def selected(self, spec: S, places: Sequence[AdaptedSite[S]], scores: Mapping[str, Tensor]) -> Transition[S]:
        """Return the starting point of training after the scores have determined what to train.

        Args:
            spec: the adaptation without its overrides applied.
            places: every adapted place.
            scores: a score for every entry of the tensors that `scored` names, as tensors of the same shapes by Store
                name.
        """


class Initialised(ABC, Generic[S]):
    """A method that can compute its initial values from examples, before its first training run."""

    input_part: ClassVar[str]
    """The part that multiplies a site's input, by which the input is recognised in a forward pass."""

    @abstractmethod
    def starts_from(self, spec: S, places: Sequence[AdaptedSite[S]]) -> Literal["inputs", "gradients"] | None:
        """Return which values of the examples its initial values depend on; None if they depend on none any more.

        Args:
            spec: the adaptation without its overrides applied.
            places: every adapted place; none to ask about the spec alone.
        """

    @abstractmethod
    def components(self, place: AdaptedSite[S]) -> int:
        """Return the number of principal components of a site's inputs that `initialised` needs."""

    @abstractmethod
    def initialised(
        self, spec: S, places: Sequence[AdaptedSite[S]], statistics: Sequence[PrincipalComponents | Tensor]
    ) -> Transition[S]:
        """Return the starting point of training.

        Args:
            spec: the adaptation without its overrides applied.
            places: every adapted place.
            statistics: for each place, the principal components of its inputs, or the sum of its weight's gradients,
                ``[..., out, in]``.
        """


class Staged(ABC, Generic[S]):
    """A method with several training runs. Its specs have a field ``stage``: the 1-based number of the run."""

    @abstractmethod
    def stages(self, spec: S) -> int:
        """Return the number of training runs."""

    @abstractmethod
    def advance(self, spec: S, places: Sequence[AdaptedSite[S]], shared: Mapping[str, Tensor]) -> Transition[S]:
        """Return the starting point of the training run after that of ``spec``; the returned spec has the next stage.

        Args:
            spec: the adaptation without its overrides applied.
            places: every adapted place with its live tensors.
            shared: the tensors that all sites share, by part.
        """


class Collapsing(ABC, Generic[S]):
    """A method whose adaptation, if it does not fold, is deployed as a simpler one with the same name."""

    @abstractmethod
    def collapse(self, spec: S) -> MethodSpec | None:
        """Return the simpler adaptation; None if the adaptation is deployed as it was trained.

        Args:
            spec: the adaptation without its overrides applied.
        """

    def collapsed(self, spec: S, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the simpler adaptation's tensors at one site, by part; by default, the tensors unchanged.

        Args:
            spec: the adaptation with the site's overrides applied.
            tensors: the site's own tensors and those that all sites share, by part, in float64; on the meta device if
                only sizes are requested.
        """
        return tensors


class Figured(ABC, Generic[S]):
    """A method that reports figures on the effect of training at a site.

    Examples are a site's rank and the share of its weight that remains. `Controller.figures` returns the figures that
    only a controller knows.
    """

    @abstractmethod
    def figures(self, spec: S, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return one site's figures as scalars by name, on the tensors' device; an empty mapping if there are none.

        Args:
            spec: the adaptation with the site's overrides applied.
            tensors: the site's own tensors and those that all sites share, by part.
        """


@dataclass(frozen=True)
class Reading:
    """A figure that exists only during a forward pass: a value that an operator computes from a parameter.

    Attributes:
        figure: the name of the figure.
        part: the part name of the parameter.
        operators: the operators to look for among the parameter's readers; the first match is used.
        number: a function that computes the figure, a scalar, from the operator's positional arguments and its result.
    """

    figure: str
    part: str
    operators: tuple[Any, ...]
    number: Callable[[Sequence[Any], Tensor], Tensor]


class Observed(ABC, Generic[S]):
    """A method whose forward pass computes values worth observing, such as gate values or sampled routes."""

    @abstractmethod
    def readings(self, spec: S) -> Sequence[Reading]:
        """Return the readings for one site's parameters; readings of parts that the site lacks are ignored.

        Args:
            spec: the adaptation with the site's overrides applied.
        """


class Ranked(Figured[S]):
    """A method with ranks, some of which may have no effect."""

    def figures(self, spec: S, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return ``rank``, the number of ranks that have an effect; for a mixture of experts, the mean over experts."""
        return {"rank": self.live_ranks(spec, tensors).sum(-1).float().mean()}

    @abstractmethod
    def live_ranks(self, spec: S, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return a mask of the ranks that have an effect at one site, ``bool[..., rank]``.

        Args:
            spec: the adaptation with the site's overrides applied.
            tensors: the site's own tensors and those that all sites share, by part.
        """

    def deploy_rank(self, spec: S, shared: Mapping[str, Tensor], rank: int) -> None:
        """Set the rank that the adaptation uses in eval mode and when it folds, if the method allows it.

        Args:
            spec: the adaptation without its overrides applied.
            shared: the tensors that all sites share, by part; they store the rank.
            rank: the new rank.

        Raises:
            GraftError: GC055 if the method does not allow it, or not at this rank.
        """
        raise one_rank(spec)


class Resized(ABC, Generic[S]):
    """A method whose final size, after all of its training runs, differs from the current size of its parameters."""

    @abstractmethod
    def deployed(self, spec: S, places: Sequence[AdaptedSite[S]]) -> int | None:
        """Return the number of elements to ship with the base; None if it equals the number of parameter elements.

        Args:
            spec: the adaptation without its overrides applied.
            places: every adapted place with its tensors, which may be on the meta device.
        """


class RowWise(ABC, Generic[S]):
    """A method that folds each row of a weight independently, so that the whole weight need not be in memory.

    A block of rows folds like a separate weight, using the corresponding rows of some of the adaptation's tensors and
    all of the others.
    """

    @abstractmethod
    def row_axes(self, spec: S) -> Mapping[str, int]:
        """Return, by part, the axis of each tensor that corresponds to the site's rows.

        Parts that are not listed are needed in full; names of parts that do not exist are ignored.

        Args:
            spec: the adaptation with the site's overrides applied.
        """

    def fewest_rows(self, spec: S) -> int:
        """Return the minimum number of rows in a block."""
        return 1

    def from_weight(self, spec: S, weight: Tensor) -> Mapping[str, Tensor]:
        """Return the graph's constants for a weight ``[..., rows, in]``, by part; see `Builder.constant`."""
        return {}

    def standing_alone(self, spec: S, roles: Sequence[str]) -> S:
        """Return the same adaptation for a map without a role, with the choices that ``roles`` imply made explicit."""
        return spec


class Exchangeable(ABC, Generic[S]):
    """A method for which one exported graph takes adaptations of any size as its inputs.

    The graph is built for `exchangeable` at two sizes, and whatever differs between the two is dynamic in the file. If
    a call passes no tensors, those whose shape depends on the size are zeros of size `least`, and the others have their
    initial values. Together these must not change the base.
    """

    least: ClassVar[int] = 1
    """The size of the defaults."""

    @abstractmethod
    def exchangeable(self, spec: S, size: int) -> MethodSpec | None:
        """Return the adaptation for which the graph is built.

        It has this size at every site and, apart from shapes, nothing else that depends on the size. Two adaptations
        fit into the same graph if this function returns the same for both, apart from name, target and dtype.

        Args:
            spec: the adaptation without its overrides applied.
            size: the size: a rank, a width or a length. A method without sizes ignores it.

        Returns:
            The adaptation, at the same target; None if the tensors of this one must keep their shapes.
        """

    def exchanged(self, spec: S, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return one site's tensors for that adaptation, by part; by default, the tensors unchanged.

        Args:
            spec: the adaptation with the site's overrides applied.
            tensors: the site's own tensors and those that all sites share, by part, in float64.
        """
        return tensors


class Reselecting:
    """A method that replaces its trained entries during training, so that its indices are in no particular order."""


def one_rank(spec: MethodSpec) -> GraftError:
    """Return the error for a method whose rank cannot be chosen."""
    return GraftError("GC055", f"{spec.method} has only one rank, which its spec sets")
