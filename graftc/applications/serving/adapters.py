"""Replay how an engine loads a PEFT folder: the module and scale of every tensor, beside those that PEFT defines."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from graftc.applications.serving.bases import BaseModule, ServedBase
from graftc.files.tensors.folder import TensorFolder
from graftc.passes.core.grouping import grouped_pairs
from graftc.records.serving.certificates import ServedSite, ServedTensor, ServingProblem
from graftc.runtime.interop.peft.folder import WEIGHTS, finite
from graftc.runtime.interop.peft.targets import meant
from graftc.runtime.serving.engines import Engine
from graftc.runtime.serving.limits import COPIES, KINDS, PREFIX, Kind, heads_served, limit_problems
from graftc.specs.errors.text import some
from graftc.specs.foreign.config import CONFIG, matching, parsed_config
from graftc.specs.regexes import RegexMatcher

_KEYS, _TABLE_KEYS = ("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")
_PART = re.compile(r"(?P<path>.+)\.lora_(?P<table>embedding_)?(?P<part>[AB])(?P<weight>\.weight)?")


@dataclass
class Replay:
    """The tensors that an engine has applied so far, and the problems found.

    Attributes:
        tensors, sites, problems: as in `graftc.records.serving.certificates.ServingCertificate`.
    """

    tensors: list[ServedTensor] = field(default_factory=list)
    sites: list[ServedSite] = field(default_factory=list)
    problems: list[ServingProblem] = field(default_factory=list)


@dataclass(frozen=True)
class _Pair:
    """The factors of one module: their keys and shapes by part."""

    keys: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    table: bool


def replayed(engine: Engine, config: Mapping[str, Any], file: TensorFolder, base: ServedBase) -> Replay:
    """Follow an engine through a PEFT folder.

    Args:
        engine: the engine.
        config: the contents of ``adapter_config.json``.
        file: the tensors of ``adapter_model.safetensors``.
        base: the base that the adapter is for.
    """
    replay = Replay(problems=list(limit_problems(engine, config, list(file))))
    if config.get("peft_type") != "LORA":
        replay.tensors = [ServedTensor(key, None, False, "it is not LoRA") for key in file]
        return replay
    pairs, others = _sorted(file)
    if not pairs:
        reason = "the file has no factors of a LoRA, so nothing would be applied"
        replay.problems.append(ServingProblem("ignored", WEIGHTS, reason, "export the adapter again"))
    selected = meant(parsed_config(config, CONFIG), [*base.modules, *pairs])
    scales, found = _Scales(engine, config), list[ServingProblem]()
    for path, pair in pairs.items():
        problems = list(_pair_problems(engine, path, pairs, base, scales, file))
        if selected is not None and path not in selected and (own := base.module(path)) and own.kind != "experts":
            problems.insert(0, _unselected(engine, config, path))
        module = base.module(path)
        if not problems and module is not None:
            replay.sites.append(ServedSite(path, *scales.served(path, pair), scales.defined(path)[1]))
        reason = problems[0].reason if problems else ""
        tensor = module.tensor if module is not None else None
        replay.tensors += [ServedTensor(key, tensor, not problems, reason) for key in pair.keys.values()]
        found += problems
    replay.problems += once(found)
    if selected is not None and pairs and all(base.module(path) is not None for path in pairs):
        _add_missing(replay, selected & base.modules.keys() - pairs.keys(), pairs, base)
    known = {problem.place for problem in replay.problems}
    strange = [key for key in others if not _is_read(engine, config, key, file, base)]
    replay.tensors += [
        ServedTensor(key, None, key not in strange, _STRANGE if key in strange else "") for key in others
    ]
    if strange and not known & set(strange):
        reason = f"{some(strange, 3)}: {_STRANGE}"
        replay.problems.append(ServingProblem(KINDS[engine.strays], strange[0], reason, "merge it: graftc merge"))
    return replay


def _add_missing(replay: Replay, missing: Collection[str], pairs: Mapping[str, _Pair], base: ServedBase) -> None:
    """Add the tensors of modules that the config selects and the file lacks, and the problem.

    Names for experts also match maps of the same name elsewhere, which are not meant by them.
    """
    fused = {path.rpartition(".")[2] for path in pairs if ".experts" in path}
    lost = [path for path in base.modules if path in missing and path.rpartition(".")[2] not in fused]
    if not lost:
        return
    replay.tensors += [
        ServedTensor(f"{PREFIX}{path}.{part}", base.modules[path].tensor, False, "the file does not have it")
        for path in lost
        for part in (_TABLE_KEYS if base.modules[path].kind == "embedding" else _KEYS)
    ]
    these = "a module" if len(lost) == 1 else f"{len(lost)} modules"
    reason = f"the config selects {these} whose factors are not in the file: {some(lost, 3)}"
    remedy = "restore the file, or name only modules with factors in target_modules"
    replay.problems.append(ServingProblem("wrong", lost[0], reason, remedy))


def once(problems: Iterable[ServingProblem]) -> list[ServingProblem]:
    """Return one problem of each sort, with the number of other places that have it."""
    sorts = grouped_pairs(((problem.kind, problem.remedy), problem) for problem in problems)
    return [
        first if not more else replace(first, reason=f"{first.reason} (and {len(more)} more like this)")
        for first, *more in sorts.values()
    ]


def _sorted(file: TensorFolder) -> tuple[dict[str, _Pair], list[str]]:
    """Return the pairs of factors by path, and the keys of all other tensors."""
    found: dict[str, dict[str, tuple[str, bool]]] = {}
    others = []
    for key in file:
        match = _PART.fullmatch(key.removeprefix(PREFIX))
        if match is None or bool(match["table"]) == bool(match["weight"]):
            others.append(key)
            continue
        found.setdefault(match["path"], {})[match["part"]] = key, bool(match["table"])
    shapes = {key: stored.shape for key, stored in file.entries.items()}
    return {
        path: _Pair(
            {part: key for part, (key, _) in parts.items()},
            {part: shapes[key] for part, (key, _) in parts.items()},
            any(table for _, table in parts.values()),
        )
        for path, parts in found.items()
    }, others


class _Scales:
    """The rank and the scale of a module, as PEFT defines them and as an engine works them out.

    An engine uses PEFT's formula with the fields that it reads.
    """

    def __init__(self, engine: Engine, config: Mapping[str, Any]) -> None:
        self._engine, self._config, self._matcher = engine, config, RegexMatcher()
        self._read = {name: value for name, value in config.items() if name not in engine.refused}

    def defined(self, path: str) -> tuple[int, float]:
        """Return what PEFT defines."""
        return self._scale(self._config, path)

    def served(self, path: str, pair: _Pair) -> tuple[int, float]:
        """Return what the engine uses."""
        rank = pair.shapes["A"][-2] if self._engine.rank_from == "tensor" else None
        return self._scale(self._read, path, rank)

    def _scale(self, config: Mapping[str, Any], path: str, rows: int | None = None) -> tuple[int, float]:
        rank = rows or int(self._of(config, "rank_pattern", path, "r"))
        alpha = float(self._of(config, "alpha_pattern", path, "lora_alpha"))
        return rank, alpha / (rank**0.5 if config.get("use_rslora") else rank)

    def _of(self, config: Mapping[str, Any], patterns: str, path: str, field: str) -> Any:
        pattern = config.get(patterns) or {}
        key = matching(list(pattern), path, self._matcher)
        value = config.get(field) if key is None else pattern[key]
        return 8 if value is None else value


def _pair_problems(
    engine: Engine,
    path: str,
    pairs: Mapping[str, _Pair],
    base: ServedBase,
    scales: _Scales,
    file: TensorFolder,
) -> Iterator[ServingProblem]:
    module, pair = base.module(path), pairs[path]
    if module is None:
        reason = f"{path} is not a module of the base"
        yield ServingProblem(KINDS[engine.strays], path, reason, "name the modules as the base does")
        return
    if pair.keys.keys() != {"A", "B"}:
        yield ServingProblem("refused", path, f"{path} has only one of A and B", "export the adapter again")
        return
    lacking = [name for name in engine.companions.get(path.rpartition(".")[2], ()) if beside(path, name) not in pairs]
    if lacking:
        reason = f"{path} is adapted without {' and '.join(lacking)}, with which {engine.title} fuses it"
        yield ServingProblem("refused", path, reason, "adapt them too: their B may be zeros")
    if problem := _factor_problem(path, pair, file):
        yield problem
        return
    yield from _shape_problems(path, pair, module, scales.defined(path)[0])
    fact = engine.places.get(module.kind) if module.kind != "linear" else None
    if fact is not None and (fact.treatment != "read" or (fact.only and base.architecture not in fact.only)):
        yield ServingProblem(
            KINDS.get(fact.treatment, "refused"), path, f"{engine.title} takes no LoRA on {path} here", fact.remedy
        )
    (rank, defined), (own, served) = scales.defined(path), scales.served(path, pair)
    if own != rank or abs(served - defined) > 1e-6 * abs(defined):
        reason = f"the scale of {path} is {defined:.6g}, but {engine.title} multiplies by {served:.6g}"
        yield ServingProblem("wrong", path, reason, f"graftc convert --to {engine.layout} folds the scale in")
    elif defined == 0:
        reason = f"lora_alpha or alpha_pattern makes the scale of {path} 0, so nothing would be added to it"
        yield ServingProblem("ignored", path, reason, "restore the alpha with which the adapter was trained")
    elif defined < 0:
        reason = f"the scale of {path} is {defined:.6g}, which subtracts the update"
        yield ServingProblem("unverified", path, reason, "make alpha positive; if the sign is meant, change that of B")


def _unselected(engine: Engine, config: Mapping[str, Any], path: str) -> ServingProblem:
    """Return the problem of factors that PEFT does not load; engines that look at the names in a config refuse them."""
    others = any(config.get(field) for field in ("layers_to_transform", "exclude_modules"))
    kind: Kind = "refused" if engine.by_target and not others else "wrong"
    reason = f"the config does not select {path}, which PEFT would leave as it is"
    return ServingProblem(kind, path, reason, "add it to target_modules, or remove its tensors")


def beside(path: str, name: str) -> str:
    """Return the path of another module of the same parent."""
    parent, dot, _ = path.rpartition(".")
    return f"{parent}{dot}{name}"


def _factor_problem(path: str, pair: _Pair, file: TensorFolder) -> ServingProblem | None:
    """Return why the factors of a module are not matrices of numbers that every engine reads."""
    remedy = "export the adapter again"
    if any(len(shape) != 2 for shape in pair.shapes.values()):
        reason = f"the factors of {path} have the shapes {' and '.join(str(list(s)) for s in pair.shapes.values())}"
        return ServingProblem("refused", path, f"{reason}, but have to be matrices", remedy)
    odd = sorted({file.entries[key].dtype for key in pair.keys.values()} - {"F32", "F16", "BF16"})
    if odd:
        reason = f"the factors of {path} are stored as {' and '.join(odd)}, which is not known to be read as meant"
        return ServingProblem("unverified", path, reason, "store them as F32, F16 or BF16")
    if not all(finite(file[key]) for key in pair.keys.values()):
        return ServingProblem("wrong", path, f"the factors of {path} contain NaN or infinity", remedy)
    return None


def _shape_problems(path: str, pair: _Pair, module: BaseModule, rank: int) -> Iterator[ServingProblem]:
    down, up = pair.shapes["A"], pair.shapes["B"]
    if down[-2] != rank or up[-1] != rank:
        reason = f"the rank of {path} is {rank} in the config, but its factors have {down[-2]} and {up[-1]}"
        yield ServingProblem("wrong", path, reason, "set r and rank_pattern to the ranks of the factors")
    elif (down[-1], up[-2]) != (module.inputs, module.outputs):
        reason = f"{path} maps {module.inputs} to {module.outputs}, but the factors map {down[-1]} to {up[-2]}"
        yield ServingProblem("refused", path, reason, "use the base that the adapter was trained on")
    elif pair.table != (module.kind == "embedding"):
        reason = f"{path} is stored as factors of {'an embedding' if pair.table else 'a linear map'}, which it is not"
        yield ServingProblem("refused", path, reason, "export the adapter again")


def _is_read(engine: Engine, config: Mapping[str, Any], key: str, file: TensorFolder, base: ServedBase) -> bool:
    """Return whether an engine reads a tensor that is not a factor, or may do without it as the base has the same."""
    if key.endswith(COPIES):
        own = base.stored.get(f"{key.removeprefix(PREFIX).removesuffix('.base_layer.weight')}.weight")
        return own is not None and file[key].shape == own.shape and bool(file[key].to(own.dtype).equal(own))
    return heads_served(engine, config) and key.split(".")[-2:][0] in engine.saved


_STRANGE = "neither a factor of a LoRA nor a tensor of the base"
