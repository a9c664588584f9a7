"""Run a source model and its graph on the same inputs, for the anchor to compare."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, fx, nn

from graftc.compat import pytree
from graftc.compat.tensors import version_of
from graftc.compiler.capture.anchoring.differing import difference_of
from graftc.compiler.capture.anchoring.own_tensors import with_own_tensors
from graftc.compiler.capture.anchoring.products import Computing, Products, products_of
from graftc.compiler.capture.as_captured import as_captured, draws, same_draws
from graftc.compiler.capture.assignments import noticed
from graftc.compiler.capture.capture import output_spec
from graftc.compiler.capture.example_inputs import samples_on
from graftc.compiler.capture.identity.sources import home_of_module
from graftc.compiler.capture.past import CAPACITY, PAST, POSITIONS
from graftc.compiler.capture.request import CaptureRequest
from graftc.compiler.capture.signature import fits, is_sum
from graftc.passes.core.ir.cleaning import on_device
from graftc.passes.core.ir.functions import Bodies, FunctionCall, call, calls, renamed
from graftc.passes.core.ir.past_inputs import is_cross, is_past
from graftc.passes.core.ir.program import Program, map_nodes
from graftc.passes.core.packing.modules import packed_weights
from graftc.specs.errors.diagnostics import first_line

_SHORT = 5
"""Number of tokens in the shortest texts on which a model is tried."""
_STEPS = 2
_SMALL = 400_000_000
"""Upper limit on the number of parameters times the number of positions in a pass over the samples."""


RunInputs = Literal["samples", "ones", "shown"]
"""The inputs that a model ran on: random samples, all-ones tensors of the captured sizes, or the caller's examples."""


class NoRunError(Exception):
    """Raised if the model itself fails on the inputs of the comparison."""


@dataclass
class ModelRun:
    """One pass of the model: its inputs, its outputs, and the buffers that it updated."""

    inputs: Mapping[str, Tensor]
    spec: Any
    leaves: list[Any]
    buffers: Mapping[str, Tensor]


class Runs:
    """Runs of a model and of its graph on the same inputs."""

    def __init__(self, request: CaptureRequest, program: Program, constants: Mapping[str, Tensor]) -> None:
        self._request, self._program = request, program
        model, aliases = request.model, request.aliases
        self._model, self._device = model, request.device
        self._draws = any(draws(node) for node in program.graph.nodes)
        self.assigned: dict[str, None] = {}
        self._tensors = {aliases.get(name, name): tensor.detach() for name, tensor in _named_tensors(model)}
        self._tensors |= {name: tensor.detach() for name, tensor in constants.items()}
        self._tensors |= packed_weights(model)
        buffers = {aliases.get(n, n) for n, _ in model.named_buffers(remove_duplicate=False)}
        self._writable = buffers | constants.keys() | program.updates
        self._aliases = aliases
        self._products = products_of(model)
        self._ones_hold = False
        self._bodies = Bodies()
        size = sum(parameter.numel() for parameter in model.parameters())
        self._length = max(_SHORT, min(24, _SMALL // max(size, 1)))

    def first(self) -> tuple[ModelRun, RunInputs]:
        """Run the model on samples or, if it accepts none, on the captured inputs or the caller's examples.

        The kind of inputs is returned as well.
        """
        failure: NoRunError | None = None
        for kind, inputs in self._choices():
            try:
                return self.model(inputs), kind
            except NoRunError as error:
                failure = failure or error
        assert failure is not None
        raise failure

    def _choices(self) -> Iterator[tuple[RunInputs, Mapping[str, Tensor]]]:
        """Yield the inputs to try in turn, with their kinds."""
        while self._length >= _SHORT:
            yield "samples", self._text() if self._generates_alike else self.sample(0)
            self._length //= 2  # a position table may have fewer rows
        as_shown, shown = any(axis.as_shown for axis in self._request.axes), self._request.shown()
        yield "samples" if as_shown else "ones", self._request.examples()
        if shown and fits(self._program.inputs, shown):
            yield "shown", shown

    def special_ones(self, bound: float) -> tuple[str, ...]:
        """Return the named sizes for which the model, at size 1, computes something other than its graph.

        The tracer assumes that every size is greater than 1, and records nothing if a model checks for 1. Each size is
        set to 1 on its own, and all of them are set to 1 together. For a library's class, which checks at most for a
        single token, it is enough that all of them together show no difference in eval mode: a pass over one token
        takes as long as one over a text.
        """
        names, library = self._ones, self._is_of_a_library
        if self._ones_hold or not names or (library and self._program.mode == "train"):
            return ()
        if library and not self._differs_at(names, bound):
            return ()
        special: list[str] = []
        for together in self._independent(names) if len(names) > 1 else ():
            if len(together) == 1 or self._differs_at(together, bound):
                special += (name for name in together if self._differs_at([name], bound))
        return tuple(special) or (names if library or self._differs_at(names, bound) else ())

    def _independent(self, names: Sequence[str]) -> list[list[str]]:
        """Return the sizes in groups, such that testing a group together tests each of its sizes alone.

        Elements of a live model have their own sizes, and no element reads the results of another.
        """
        own = {f"{axis.name}__{at}" for axis in self._request.axes if axis.as_shown for at in range(len(axis.axes))}
        groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for name in names:
            groups[tuple(name.rsplit("__", 2)[1:]) if name in own else (name,)].append(name)
        return list(groups.values())

    @property
    def _is_of_a_library(self) -> bool:
        """Whether the model's class is a library's; such classes do not check both the mode and the token count."""
        own = next(cls for cls in type(self._model).__mro__ if not cls.__module__.startswith("graftc."))
        return home_of_module(own.__module__) == "library"

    @property
    def _ones(self) -> tuple[str, ...]:
        """The named sizes that may be 1."""
        named = (
            size
            for spec in self._program.inputs
            for size, (low, _) in zip(spec.shape, spec.ranges, strict=False)
            if isinstance(size, str) and low <= 1 and not is_sum(size) and size != CAPACITY
        )
        return tuple(dict.fromkeys(named))

    @property
    def _generates_alike(self) -> bool:
        """Whether text-generation calls are as informative as any others.

        This is the case in eval mode, for a library's class whose cache grows only with the text. Train mode is
        compared on calls with a past and several tokens.
        """
        signature, library = self._program.signature, self._is_of_a_library
        return library and self._program.mode == "eval" and self._grows and not any(map(is_cross, signature))

    @property
    def _grows(self) -> bool:
        return any(PAST in spec.shape for spec in self._program.inputs)

    def _differs_at(self, ones: Sequence[str], bound: float) -> bool:
        try:
            ours = self.model(self.sample(0, ones))
        except NoRunError:  # there is nothing to compare the graph with
            return False
        return bool(self.against(ours, bound)[1])

    def steps(self, before: ModelRun, bound: float) -> tuple[float, list[str]]:
        """Compare successive calls, as in text generation, and return the same data as `against`.

        The calls are a text without a past, if the graph accepts one, and a single token after it, with the cache that
        the model returned. For a graph whose past has a fixed length, only the first call is compared; for a library's
        class in train mode, none is.

        Args:
            before: the model's run on the first samples. For a library's class in eval mode, these are a text without a
                past, and the single token follows the first token of the text's first row, so that all sizes that may
                be 1 are 1.
            bound: as for `against`.
        """
        if self._is_of_a_library and self._program.mode == "train":
            return 0.0, []
        if self._generates_alike:
            try:
                worst, differing = self.against(self.model(self._token_behind(before)), bound)
            except NoRunError:
                worst, differing = 0.0, ["it does not run"]
            self._ones_hold = not differing
            if not differing:
                return worst, []
        tokens = next(spec.shape[1] for spec in self._program.inputs if spec.name.endswith(("input_ids", "embeds")))
        crosses = any(map(is_cross, self._program.signature))
        sizes = {} if crosses else {PAST: 0}
        worst, inputs = 0.0, self.sample(0, fixed_sizes=sizes)
        for _ in range(_STEPS if self._grows else 1):
            try:
                run = self.model(inputs)
            except NoRunError:  # there is nothing to compare the graph with
                break
            difference, differing = self.against(run, bound)
            worst = max(worst, difference)
            if differing:
                return worst, differing
            past = _returned_past(run)
            length = next(tensor.shape[2] for name, tensor in past.items() if not is_cross(name))
            inputs = {**self.sample(1, fixed_sizes={PAST: length, str(tokens): 1}), **past}
        return worst, []

    def _text(self) -> dict[str, Tensor]:
        """Return the inputs for a text without a past, at consecutive positions from 0.

        The matrix products for these inputs are known from signatures without a cache.
        """
        inputs = self.sample(0, fixed_sizes={PAST: 0})
        if POSITIONS in inputs:
            numbers = torch.arange(inputs[POSITIONS].shape[-1], device=self._device)
            inputs[POSITIONS] = numbers.to(inputs[POSITIONS].dtype).expand_as(inputs[POSITIONS]).contiguous()
        return inputs

    def _token_behind(self, before: ModelRun) -> dict[str, Tensor]:
        """Return inputs whose sizes are 1 wherever allowed, including the beginning of the returned cache."""
        past = {name: tensor[:1, :, :1].contiguous() for name, tensor in _returned_past(before).items()}
        return {**self.sample(1, self._ones), **past}

    def sample(
        self, seed: int, ones: Collection[str] = (), fixed_sizes: Mapping[str, int] | None = None
    ) -> dict[str, Tensor]:
        """Return random inputs, with fewer tokens for larger models; named sizes in ``ones`` are 1."""
        length = self._length
        sizes = (4 if length > 8 else 3, length, length - 2 if length > _SHORT else length - 1)  # no two are the same
        config = getattr(self._model, "config", None)
        fixed_sizes = {**dict.fromkeys(ones, 1), **(fixed_sizes or {})}
        return samples_on(self._device, self._program, seed, sizes, config, fixed_sizes=fixed_sizes)

    def model(self, inputs: Mapping[str, Tensor]) -> ModelRun:
        """Run the model, and return its outputs and the tensors that it updated.

        Raises:
            NoRunError: if the model raises, or if no output has a finite value.
        """
        model = self._model
        given = {name: tensor.clone() for name, tensor in inputs.items()}
        with same_draws(self._device, self._draws), as_captured(self._request):
            own = with_own_tensors(model, {self._aliases.get(n, n) for n in self._program.updates}, self._aliases)
            try:
                with noticed(model) as assigned, Computing(self._products):
                    outputs = model(**given)
            except Exception as error:
                raise NoRunError(first_line(error)) from error
            buffers = self._updated(own)
        self.assigned |= dict.fromkeys(assigned)
        leaves, spec = pytree.tree_flatten(outputs)
        run = ModelRun(inputs, output_spec(spec), leaves, buffers)
        if not _says_something(leaves):
            raise NoRunError("no output is a number")
        return run

    def _updated(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors that the model wrote to or replaced, by name."""
        updated: dict[str, Tensor] = {}
        for name, now in _named_tensors(self._model):
            before, declared = own.get(name), self._aliases.get(name, name) in self._program.updates
            if before is None or before.shape != now.shape:
                continue
            if now is not before or declared or version_of(before) > 0:
                updated[self._aliases.get(name, name)] = now
        return updated

    def against(self, run: ModelRun, bound: float) -> tuple[float, list[str]]:
        """Return the largest difference between the graph's results and a run's, and describe those above the bound."""
        program = self._program
        if run.spec != program.outputs:
            return float("inf"), [f"it returns {_shown(program.outputs)}, but the model returns {_shown(run.spec)}"]
        tensors = {n: t.clone() if n in self._writable else t for n, t in self._read().items()}
        given = {name: tensor.clone() for name, tensor in run.inputs.items()}
        try:
            with same_draws(self._device, self._draws), torch.no_grad():
                leaves = _interpret(program, given, tensors, self._device, self._products, self._bodies)
        except Exception as error:
            return float("inf"), [f"it fails where the model does not: {first_line(error)}"]
        declared = {self._aliases.get(name, name) for name in program.updates}
        written = {n: t for n, t in tensors.items() if n in declared or (n in self._writable and version_of(t) > 0)}
        updated = {name: written.get(name, self._tensors.get(name)) for name in [*run.buffers, *written]}
        names = [f"output {name}" for name in program.outputs.names] + [f"the update of {name}" for name in updated]
        ours = [*run.leaves, *(run.buffers.get(name, self._tensors.get(name)) for name in updated)]
        worst, exceeding = 0.0, []
        for name, a, b in zip(names, ours, [*leaves, *updated.values()], strict=True):
            difference, text = difference_of(a, b)
            worst = max(worst, difference)
            if difference > bound:
                exceeding.append(f"{name} {text}")
        return worst, exceeding

    def _read(self) -> dict[str, Tensor]:
        graph = self._program.graph
        targets = {str(node.target) for node in graph.find_nodes(op="get_attr")}
        for one in calls(graph):
            targets.update(self._bodies.tensors(one))
        return {name: tensor for name, tensor in self._tensors.items() if name in targets}


def _interpret(
    program: Program,
    inputs: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    device: torch.device,
    products: Products,
    bodies: Bodies,
) -> list[Any]:
    """Return the flat outputs of a graph; every node runs in order, and values are released after their last use."""
    values: dict[fx.Node, Any] = {}

    def sources(node: fx.Node) -> list[fx.Node]:
        """Return the nodes that a node reads; for a call, also those that its body reads from outside."""
        if node.target is not call:
            return node.all_input_nodes
        one = FunctionCall(node)
        inside = {*one.given, *bodies.region(one)}
        read = {source for each in bodies.region(one) for source in each.all_input_nodes if source.op != "get_attr"}
        return [*node.all_input_nodes, *(read - inside)]

    readers = Counter(source for node in program.graph.nodes for source in sources(node))

    def computed(node: fx.Node, value: Callable[[fx.Node], Any]) -> Any:
        args, kwargs = map_nodes((node.args, dict(node.kwargs)), value)
        if (known := None if kwargs else products.again(node.target, args)) is not None:
            return known
        operator = cast("Any", node.target)
        args, kwargs = on_device(operator, args, kwargs, device)
        return operator(*args, **kwargs)

    def called(one: FunctionCall) -> list[Any]:
        body, path, outputs = one.body, one.path, one.body_results
        own = dict(zip(one.given, (values[node] for node in one.inputs), strict=True))

        def value(node: fx.Node) -> Any:
            if node in own:
                return own[node]
            return tensors[renamed(str(node.target), body, path)] if node.op == "get_attr" else values[node]

        for node in bodies.region(one):
            own[node] = computed(node, value)
        return [value(node) for node in outputs]

    for node in program.graph.nodes:
        if node.op == "placeholder":
            values[node] = inputs[str(node.target)]
        elif node.op == "get_attr":
            values[node] = tensors[str(node.target)]
        elif node.target is call:
            values[node] = called(FunctionCall(node))
        elif node.op == "call_function":
            values[node] = computed(node, values.__getitem__)
        else:
            return list(map_nodes(node.args[0], values.__getitem__))
        for source in sources(node):
            readers[source] -= 1
            if not readers[source]:
                del values[source]
    raise ValueError("the graph has no outputs")


def _named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the parameters and buffers of a model, under all of their names."""
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def _returned_past(run: ModelRun) -> dict[str, Tensor]:
    """Return the cache after a call: the tensors that the model returned, and the given ones where it returned none."""
    returned = {n.rpartition(".")[2]: leaf for n, leaf in zip(run.spec.names, run.leaves, strict=True)}
    return {name: returned.get(name, given) for name, given in run.inputs.items() if is_past(name)}


def _says_something(leaves: Sequence[Any]) -> bool:
    """Return whether any output has a finite value."""
    return any(bool(leaf.isfinite().any()) if isinstance(leaf, Tensor) else leaf is not None for leaf in leaves)


def _shown(spec: Any) -> str:
    names = ", ".join(spec.names) or "nothing"
    return f"{names} ({spec.cls.__name__ if spec.cls is not None else spec.kind})"
