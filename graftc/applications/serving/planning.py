"""Plan how an engine can serve an artifact: try every route on it, and put the cheapest exact one first."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from graftc.applications.serving.attempts import Made, adapter_files, command, exported, path_word, planned, tried
from graftc.applications.serving.checking import serve_check
from graftc.compiler.folding.fold_plan import fold_plan
from graftc.compiler.resolve.tokens import TOKENS
from graftc.compiler.resolve.train import TRAIN
from graftc.records.serving.plans import RouteKind, ServingPlan, ServingRoute
from graftc.runtime.api import import_peft, load, load_base
from graftc.runtime.artifact.places import is_peft
from graftc.runtime.deploy.convert import Converted
from graftc.runtime.deploy.merged import Merged
from graftc.runtime.export.exporting import Exporting
from graftc.runtime.model.adapted import AdaptedRunner
from graftc.runtime.model.runner import runner_of
from graftc.runtime.serving.engines import ENGINES, Engine, engine_of
from graftc.runtime.sources.models import local_folder
from graftc.specs.errors.arguments import as_path
from graftc.specs.errors.calls import public
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.foreign.config import CONFIG, MOST, config_bytes, parsed_config
from graftc.specs.methods.lora import LoRA
from graftc.specs.strict_json import read_json

_LOADING = ("peft", "gguf-adapter")
_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_NO_ADAPTERS = "it loads no adapters"


@public("graftc.serve_plan")
def serve_plan(
    artifact: str | Path,
    engine: str,
    *,
    base: str | Path | None = None,
    error: float = 0.05,
    merged: bool = True,
    step: Callable[[str], None] = lambda _: None,
) -> ServingPlan:
    """State by which routes an engine can serve an artifact, what each costs, and which other engines serve it.

    The files of every route are made in a temporary folder and checked as `serve_check` does; errors are measured on
    them. Nothing is left behind: the commands of a route make the files again.

    Args:
        artifact: an artifact, or a PEFT folder.
        engine: the engine's name.
        base: the base's folder; by default the one that the artifact names.
        error: the bound for a LoRA that is not exact: the relative error of each site's update.
        merged: whether to try the routes that write a whole model.
        step: a function to call with the name of each step.

    Raises:
        GraftError: GC068 for an unknown engine, GC002 for an error that is not in (0, 1); as in `graftc.load` and
            `graftc.import_peft`.
    """
    row, path = engine_of(engine), as_path(artifact)
    if not 0 < error < 1:
        raise GraftError("GC002", f"the error must be in (0, 1), not {error}")
    step("loading")
    model = None if base is None else str(base)
    compiled = _imported(path, model) if is_peft(path) else load(path, model)
    with _base_of(runner_of(compiled), model) as folder:
        planner = _Planner(path, compiled, row, folder, error, merged, step)
        return ServingPlan(str(path), row.name, row.read, tuple(planner.routes()))


def _imported(path: Path, base: str | None) -> Any:
    named = base if base is not None else _config_of(path).get("base_model_name_or_path")
    if not isinstance(named, str):
        raise GraftError("GC069", f"{path} names no base", hint="name its folder: --base DIR")
    return import_peft(path, load_base(named))


def _config_of(path: Path) -> dict[str, Any]:
    raw = config_bytes(path / CONFIG)
    parsed_config(raw, str(path / CONFIG))
    return dict(read_json(raw, MOST))


@contextmanager
def _base_of(runner: AdaptedRunner, given: str | None) -> Iterator[Path]:
    """Yield the folder of the base, or one with only its config if it was made in memory."""
    source = runner.compilation.source
    folder = Path(given) if given is not None else local_folder(source)
    if folder is not None and (folder / "config.json").is_file():
        yield folder
        return
    config: Any = getattr(source, "config", None)
    if not hasattr(config, "save_pretrained"):
        raise GraftError(
            "GC069", "the base has no config that engines read", hint="engines load models of transformers"
        )
    with tempfile.TemporaryDirectory() as place:
        config = copy.deepcopy(config)
        config.architectures = [type(source).__name__]
        config.save_pretrained(place)
        yield Path(place)


@dataclass
class _Planner:
    path: Path
    compiled: Any
    engine: Engine
    base: Path
    error: float
    whole: bool
    step: Callable[[str], None]

    def routes(self) -> Iterator[ServingRoute]:
        """Yield the routes: this engine's, exact ones first, and those of others that serve the artifact unmerged."""
        own = [*self._adapters(self.engine), self._over_base()]
        whole = [self._graph(self.engine), self._merged()] if self.whole else []
        approximate = [self._within_error()]
        found = [route for route in (*own, *whole, *approximate) if route is not None]
        yield from (route for route in found if route.exact)
        yield from (route for route in found if not route.exact)
        stuck = self.whole and not any(route.available and route.exact for route in found)
        for other in (row for row in ENGINES.values() if row.name != self.engine.name):
            self.step(f"trying {other.title}")
            tries = [*self._adapters(other), self._graph(other) if stuck else None]
            yield from [route for route in tries if route is not None and route.available][:1]

    @cached_property
    def runner(self) -> AdaptedRunner:
        """The Runner of the model."""
        return runner_of(self.compiled)  # type: ignore[no-any-return]

    @cached_property
    def kept(self) -> dict[str, str]:
        """The adaptations that do not fold, with the reasons."""
        return fold_plan(self.runner.compilation).reasons()

    @cached_property
    def beyond(self) -> list[str]:
        """The adaptations that fold but do not update linear maps: ``trained``, ``tokens``, biases and norms."""
        spec = self.runner.compilation.spec
        names = [*([TRAIN] if spec.train else []), *([TOKENS] if spec.tokens else [])]
        for own in spec.adapt:
            if isinstance(own, LoRA) and own.bias == "none":
                continue
            try:
                self.compiled.convert([str(own.name)], rank=1)
            except GraftError as error:
                if error.code == "GC066":
                    names.append(str(own.name))
        return names

    @cached_property
    def converted(self) -> Converted | GraftError:
        """The model with a LoRA in place of every adaptation, which loses nothing."""
        return self._converted()

    def _converted(self, **options: Any) -> Converted | GraftError:
        self.step("converting")
        try:
            return self.compiled.convert(**options)  # type: ignore[no-any-return]
        except GraftError as error:
            return error

    def _adapters(self, engine: Engine) -> Iterator[ServingRoute]:
        """Yield the routes that leave the base alone and lose nothing."""
        if not set(_LOADING) & set(engine.forms):
            yield planned("as-is", engine, reason=_NO_ADAPTERS)
            return
        self.step("trying the adapter as it is")
        first = planned("as-is", engine)
        if is_peft(self.path):
            certificate = serve_check(self.path, engine.name, base=self.base)
            if certificate.passed:
                yield replace(first, available=True, needs=certificate.needs, served=path_word(self.path))
                return
        first = tried(first, engine, self.base, adapter_files(self.runner, self._source, engine))
        yield self._imported_first(first)
        if not first.available:
            yield self._lora("lora", engine, self.converted)

    def _lora(
        self, kind: RouteKind, engine: Engine, made: Converted | GraftError, *options: str, exact: bool = True
    ) -> ServingRoute:
        route = planned(kind, engine, exact=exact)
        if isinstance(made, GraftError):
            return replace(route, reason=made.message)
        out = f"{self._source}-{kind}"
        route = tried(route, engine, self.base, adapter_files(runner_of(made.compiled), out, engine))
        route = replace(
            route,
            rank=max((site.rank or 1 for site in made.sites), default=route.rank),
            site_error=made.largest_error,
            output_error=made.largest_difference,
            largest_output=made.largest_output,
        )
        if not route.available:
            return route
        convert = command("convert", self._source, *options, "--out", out)
        base = f"{out}/base" if kind == "lora-over-base" else None
        return self._imported_first(replace(route, commands=(convert, *route.commands), base=base))

    def _over_base(self) -> ServingRoute | None:
        """Return the route that folds what no LoRA can be into a base; None if there is nothing to fold, or no LoRA."""
        spec = self.runner.compilation.spec
        left = [own for own in spec.adapt if str(own.name) not in (*self.beyond, *self.kept)]
        if not self.beyond or not left:
            return None
        route = planned("lora-over-base", self.engine)
        if "peft" not in self.engine.forms:
            return replace(route, reason="the new base is a folder of transformers, which it does not load")
        options = [word for name in self.beyond for word in ("--into-base", name)]
        return self._lora("lora-over-base", self.engine, self._converted(into_base=self.beyond), *options)

    def _within_error(self) -> ServingRoute | None:
        """Return the route with a smaller rank; None if a LoRA that loses nothing has as small a rank."""
        if not set(_LOADING) & set(self.engine.forms) or isinstance(self.converted, GraftError):
            return None
        made = self._converted(error=self.error)
        option = ("--error", f"{self.error:g}")
        if isinstance(made, GraftError):
            return replace(planned("lora-within-error", self.engine, exact=False), reason=made.message)
        largest, rank = max(self.engine.ranks, default=None), max(site.rank or 1 for site in made.sites)
        if largest is not None and rank > largest:
            made, option = self._converted(rank=largest), ("--rank", str(largest))
        elif rank >= max(site.rank or 1 for site in self.converted.sites):
            return None
        return self._lora("lora-within-error", self.engine, made, *option, exact=False)

    def _graph(self, engine: Engine) -> ServingRoute | None:
        """Return the route that leaves the adaptations in the graph; None for engines that load no graphs."""
        if "onnx-generate" not in engine.forms:
            return None
        self.step("exporting graphs")

        def make(place: Path) -> Made:
            exported(Exporting(self.runner), "onnx-generate", place / "graphs")
            return self._graphs(place, "graph", "--no-merge")

        return self._imported_first(replace(tried(planned("graph", engine), engine, self.base, make), unmerged=True))

    def _merged(self) -> ServingRoute:
        self.step("merging")
        route = planned("merged", self.engine)
        try:
            merged: Merged[Any] = self.compiled.merge()
        except GraftError as error:
            return replace(route, reason=error.message)
        form = next(form for form in self.engine.forms if form not in _LOADING)

        def make(place: Path) -> Made:
            source = self._source
            if form == "model":
                out = f"{source}-merged"
                return Made(merged.save(place / "model"), out, (command("merge", source, "--out", out),))
            if form == "gguf-model":
                exported(runner_of(merged).exporting, "gguf", place / "model.gguf", server=self.engine.name)
                options, out = ("--format", "gguf", "--for", self.engine.name), f"{source}-merged.gguf"
                return Made(place / "model.gguf", out, (command("export", source, *options, "--out", out),))
            exported(runner_of(merged).exporting, "onnx-generate", place / "graphs")
            return self._graphs(place, "merged")

        route = tried(route, self.engine, self.base, make)
        narrow = set(self.engine.file_types) - {_TYPES.get(next(self.compiled.parameters()).dtype, "")}
        if route.available and form == "gguf-model" and narrow:
            reason = f"all weights are rounded to {min(narrow)}"
            return self._imported_first(replace(route, exact=False, reason=reason))
        outputs = merged.certificate.outputs
        return self._imported_first(replace(route, output_error=max(outputs.values(), default=None)))

    def _graphs(self, place: Path, kind: str, *options: str) -> Made:
        """Return graphs for generation, which were exported to a folder, and the command that does the same."""
        out = f"{self._source}-{kind}"
        line = command("export", self._source, *options, "--format", "onnx-generate", "--out", out)
        return Made(place / "graphs", out, (line,))

    @property
    def _source(self) -> str:
        """The artifact in commands."""
        return f"{path_word(self.path)}-artifact" if is_peft(self.path) else path_word(self.path)

    def _imported_first(self, route: ServingRoute) -> ServingRoute:
        """Return a route whose commands begin with the import of a PEFT folder, if that is what is served."""
        if not route.commands or not is_peft(self.path):
            return route
        first = command("import-peft", path_word(self.path), "--model", path_word(self.base), "--out", self._source)
        return replace(route, commands=(first, *route.commands))
