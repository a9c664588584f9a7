"""Write the values of a compiled model's adaptations for a graph that takes such adaptations as inputs."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from graftc.files.destinations import overlap
from graftc.runtime.artifact.write import require_values
from graftc.runtime.export.job import ExportJob, require_one_graph
from graftc.runtime.export.onnx_check import require_close, run_session, session_of
from graftc.runtime.export.served_graph import ServedGraph
from graftc.runtime.model.adapted import AdaptedRunner
from graftc.runtime.onnx_generation import load
from graftc.runtime.onnx_generation.adapter_files import SUFFIX, read_adapter, write_adapter
from graftc.specs.errors.arguments import as_path
from graftc.specs.errors.diagnostics import GraftError

Values = tuple[ServedGraph, dict[str, Tensor]]


def prepare(job: ExportJob) -> Values:
    """Return the graph, and the tensors by the names of its inputs.

    Raises:
        GraftError: GC060 for a merged model, and for values that are not finite, GC063 if writing would replace a file
            of the graph, GC073 without a graph, GC192 if the model does not fit the graph.
    """
    if not isinstance(job.runner, AdaptedRunner):
        raise GraftError("GC060", "a merged model has no adapters", hint="export the compiled model")
    require_values(job.runner)
    require_one_graph(job.runner)
    if job.options["graph"] is None:
        hint = "graph='model.onnx', on the command line --for-graph model.onnx"
        raise GraftError("GC073", "the graph that the adapter is for is missing", hint=hint)
    graph = ServedGraph.read(as_path(job.options["graph"]))
    if job.path is not None and graph.contains(job.path):
        raise overlap(job.path, graph.path)
    tensors = graph.values(job.simplest.compilation, job.options["slot"])
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise GraftError("GC060", f"{name} has values that are not finite", hint="train again from earlier values")
    return graph, tensors


def write(job: ExportJob, path: Path) -> None:
    """Write the tensors in ONNX Runtime's format if the path ends with ``.onnx_adapter``, otherwise as safetensors."""
    graph, tensors = job.prepared
    write_adapter(tensors, path, graph.fingerprint)


def check(job: ExportJob, path: Path) -> None:
    """Read the file back, and run the graph with it. Where the graph has nothing else, compare it with the model.

    Raises:
        GraftError: GC060 if the file has other values, or if the graph does not compute what the model does.
    """
    graph, tensors = job.prepared
    found = read_adapter(path).tensors
    if found.keys() != tensors.keys() or not all(torch.equal(found[name], t.cpu()) for name, t in tensors.items()):
        raise GraftError("GC060", f"{path.name} does not have the values that were written")
    module = job.graph()
    inputs = module.flat(module.sample())
    with torch.no_grad():
        expected = module.module(**inputs)
    if graph.path.is_dir():
        model = load(graph.path).use(path)
        last = model.decoder_graph.last_logits
        outputs = {"logits": model(**inputs, logits_to_keep=int(last))["logits"]}
        mask = None if "decoder_input_ids" in inputs else inputs.get("attention_mask")
        logits = _of_last_tokens(expected["logits"], mask) if last else expected["logits"]
        if graph.alone:
            require_close(outputs, {"logits": logits}, module.counting(inputs))
        return
    session = session_of(graph.path)
    needed = {value.name for value in session.get_inputs()}
    feed = {name: value for name, value in inputs.items() if name in needed}
    if not needed <= feed.keys():
        return  # the graph is for another kind of call
    shared = [value.name for value in session.get_outputs() if value.name in expected]
    native = path.suffix == SUFFIX
    outputs = run_session(session, shared, feed if native else feed | tensors, [path] if native else ())
    if graph.alone:
        require_close(outputs, {name: expected[name] for name in shared}, module.counting(inputs))


def _of_last_tokens(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Return the logits of each row's last token, ``[batch, 1, vocabulary]``, given the mask of a decoder's text."""
    rows, count = logits.shape[:2]
    if mask is None or mask.shape != (rows, count):
        return logits[:, -1:]
    last = torch.where(mask != 0, torch.arange(count, device=mask.device), 0).amax(1)
    return logits[torch.arange(rows), last].unsqueeze(1)
