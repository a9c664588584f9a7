"""Find residual branches, with the nodes that methods adapt: :func:`read_sublayers`."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace

from torch import Tensor, fx

from graftc.compiler.roles.assigned_roles import Labels
from graftc.compiler.roles.columns import Through
from graftc.compiler.roles.findings import place
from graftc.compiler.roles.flow import Residual, tensor_nodes
from graftc.compiler.roles.operators import NORMALISING, PADDING, PASSING, SHAPING, beneath
from graftc.passes.core.sites.calls import op_name
from graftc.passes.core.sites.moves import Move, names_of
from graftc.passes.core.worklist import Worklist
from graftc.records.roles import Sublayer

_ARRANGING = SHAPING | names_of(Move.COPY, Move.ITEM)
_ENDS = {"attn.o": "attn.sublayer", "ffn.down": "ffn.sublayer", "experts": "ffn.sublayer"}


@dataclass
class _Joint:
    """Branches that start from one value and end in one sum."""

    stream: fx.Node
    base: fx.Node
    sum: fx.Node
    branches: list[fx.Node] = field(default_factory=list)


def read_sublayers(labels: Labels) -> list[Sublayer]:
    """Return the branches of all residual adds, in graph order; parallel branches share their stream and sum."""
    normed = _Norms(labels)
    sublayers: list[Sublayer] = []
    uses: dict[tuple[str, tuple[str, ...]], int] = defaultdict(int)
    for joint in _joints(labels):
        post_norm = normed.after(joint)
        for branch in sorted(joint.branches, key=labels.flow.at.__getitem__):
            sublayer = _sublayer(labels, joint, branch, post_norm)
            key = sublayer.owner, sublayer.roles
            sublayers.append(replace(sublayer, use=uses[key]))
            uses[key] += 1
    return sublayers


def _joints(labels: Labels) -> list[_Joint]:
    """Return the residual adds; a chain of adds whose branches all start from its first operand counts as one."""
    joints: dict[fx.Node, _Joint] = {}
    for residual in labels.flow.residuals.values():
        before = joints.get(residual.stream)
        if before is not None and before.base is residual.base and set(residual.stream.users) == {residual.node}:
            del joints[residual.stream]
            joint = replace(before, sum=residual.node)
        else:
            joint = _Joint(residual.stream, residual.base, residual.node)
        joint.branches = [*joint.branches, *_terms(labels, residual, residual.branch)]
        joints[residual.node] = joint
    return list(joints.values())


def _terms(labels: Labels, residual: Residual, branch: fx.Node) -> list[fx.Node]:
    """Return the sublayers that add up to a branch, or the branch itself."""
    node = beneath(branch, PASSING)
    operands = tensor_nodes(node.args[:2]) if op_name(node) == "add" and node not in labels.flow.residuals else []
    if len(operands) == 2:
        first, second = (_kinds(labels, n) for n in operands)
        if first and second and not first & second:
            return [term for operand in operands for term in _terms(labels, residual, operand)]
    return [branch]


def _kinds(labels: Labels, branch: fx.Node) -> set[str]:
    kinds = {"attn.sublayer" for n in labels.nearest(branch) if n in labels.flow.attentions}
    for source in labels.nearest(branch):
        kinds |= {_ENDS[role] for role in labels.roles.get(source, ()) if role in _ENDS}
        if "attn.o" in labels.roles.get(source, ()) and _reads_inner(labels, source):
            kinds.add("ffn.sublayer")
    return kinds


def _reads_inner(labels: Labels, node: fx.Node) -> bool:
    """Return whether an output projection also reads the inner activation of a feed-forward."""
    inner = labels.nearest_linears(labels.flow.linears[node].input)
    return any(role in ("ffn.up", "ffn.gate") for n in inner for role in labels.roles.get(n, ()))


def _sublayer(labels: Labels, joint: _Joint, branch: fx.Node, post_norm: fx.Node | None) -> Sublayer:
    module = labels.module(joint.sum)
    layer, stack = place(module)
    crossing = next((n for n in labels.crosses if labels.between(joint.base, n, branch)), None)
    names = sorted(_kinds(labels, branch))
    roles = tuple(labels.prefix(joint.sum, crossing if name == "attn.sublayer" else None) + name for name in names)
    return Sublayer(
        roles=roles,
        stream=joint.stream,
        normed=_normed(labels, joint.base, branch),
        projection=_projection(labels, branch),
        branch=branch,
        sum=joint.sum,
        post_norm=post_norm,
        module=module,
        layer=layer,
        stack=stack,
    )


def _normed(labels: Labels, base: fx.Node, branch: fx.Node) -> fx.Node:
    """Return the last value from which the whole branch is computed, before heads, windows or rows are split off."""
    flow = labels.flow
    common = -1
    for entry in _entries(labels, base, branch):
        common &= flow.up_to(entry)
    after = tensor_nodes(flow.between(base, branch, common))
    node = after[-1] if after else base
    while node is not base and op_name(node) in _ARRANGING | PADDING and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _entries(labels: Labels, base: fx.Node, branch: fx.Node) -> list[fx.Node]:
    """Return the values that the first weights and attention calls after ``base`` read."""
    flow = labels.flow
    inside = labels.inside(base, branch)
    entries = []
    for node in inside:
        attention = flow.attentions.get(node)
        linear = flow.linears.get(node) or flow.depthwise.get(node)
        reads = [attention.query, attention.key, attention.value] if attention else node.all_input_nodes
        for operand in [linear.input] if linear else reads:
            starts = operand is base or flow.is_above(base, operand)
            if starts and not any(n is operand or flow.is_above(n, operand) for n in inside):
                entries.append(operand)
    return entries


def _projection(labels: Labels, branch: fx.Node) -> fx.Node:
    """Return the value to which the branch's dropout, norms, scales and shape operators are applied."""
    path = [branch]
    while path[-1] not in labels.columns.number:
        above = _carried(labels, path[-1])
        if above is None:
            break
        path.append(above)
    top = path[-1]
    shape = labels.flow.sizes.shape(branch.meta["val"])
    for node in reversed(path):
        if node is not top and op_name(node) not in _ARRANGING:
            return top
        value = node.meta["val"]  # a list if the node is a split
        if isinstance(value, Tensor) and labels.flow.sizes.shape(value) == shape:
            return node
    return top


def _carried(labels: Labels, node: fx.Node) -> fx.Node | None:
    """Return the operand that a node passes on, possibly scaled or normalised; None if there is none."""
    name = op_name(node)
    if name in PASSING or name in SHAPING or name in PADDING or name in NORMALISING or name == "getitem":
        return node.args[0] if isinstance(node.args[0], fx.Node) else None
    if name not in ("mul", "div", "add", "sub"):
        return None
    moving = [n for n in tensor_nodes(node.args[:2]) if labels.flow.is_data(n)]
    if len(moving) == 2 and name in ("mul", "div", "sub"):
        measures = Through.STATISTIC | Through.ROOT
        marks = [labels.columns.through.get(n, Through.NOTHING) & measures for n in moving]
        moving = [n for n, mark in zip(moving, marks, strict=True) if not mark] if any(marks) else moving
    return moving[0] if len(moving) == 1 else None


class _Norms:
    """The norms directly after residual adds."""

    def __init__(self, labels: Labels) -> None:
        self.labels = labels
        self._norm_of: dict[fx.Node, fx.Node] = {}
        self._behind: dict[int, list[fx.Node]] = defaultdict(list)
        scales = {f.node for f in labels.findings if f.role.endswith("norm")}
        for node in labels.flow.order:
            front = labels.columns.front.get(node, 0)
            is_norm = node in scales or op_name(node) in NORMALISING
            if is_norm and front and front & (front - 1) == 0:
                self._behind[front].append(node)

    def after(self, joint: _Joint) -> fx.Node | None:
        """Return the norm after a sum if the residual stream continues from it; None if it continues from the sum."""
        labels = self.labels
        number = 1 << labels.columns.number[joint.sum]
        norm = next((n for n in self._behind[number] if self._only_way(joint.sum, n)), None)
        if norm is None:
            return None
        later = [r for r in labels.flow.residuals.values() if labels.columns.front.get(r.stream, 0) == number]
        if later:
            continues = any(r.stream is norm or labels.flow.is_above(norm, r.stream) for r in later)
        else:
            own = labels.nearest(joint.stream)
            continues = len(own) == 1 and own[0] in self._norm_of
        if not continues:
            return None
        self._norm_of[joint.sum] = norm
        return norm

    def _only_way(self, start: fx.Node, norm: fx.Node) -> bool:
        nodes = Worklist([start])
        for node in nodes:
            readers = [user for user in node.users if user is not norm]
            if any(user.op == "output" or user in self.labels.columns.number for user in readers):
                return False
            nodes += (user for user in readers if isinstance(user.meta.get("val"), Tensor | tuple | list))
        return True
