"""``graftc compile``: compile a spec against a model and write an artifact."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from graftc.cli.options import Certify, DryRun, Force, Json, ModelOption, Out, Seed, SpecArgument, destination

__all__ = ["compile"]


def compile(
    spec: SpecArgument,
    model: ModelOption,
    out: Out = None,
    seed: Seed = None,
    certify: Certify = True,
    full: Annotated[
        bool, typer.Option("--full", help="Identify the base by all its values instead of a sample of each tensor.")
    ] = False,
    dry_run: DryRun = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Compile a spec against a model and write an artifact: adapters, graphs, sites, and a reference to the base."""
    from graftc.cli.output import print_json, steps, working
    from graftc.specs.io import early_spec

    to = destination(out, dry_run=dry_run)
    with working(json) as warnings, steps(json) as step:
        # Before torch is imported: a misspelt field should be reported at once.
        loaded_spec = early_spec(spec)
        if to is not None:
            from graftc.files.writing import check_apart, check_destination
            from graftc.runtime.artifact.places import is_artifact

            check_apart(to, spec, model)
            check_destination(to, force=force, replaceable=is_artifact)
        step("loading the model")

        from graftc.runtime.api import compile as compile_spec
        from graftc.runtime.artifact.write import ArtifactEvidence, save
        from graftc.runtime.deploy.merged import certificate_of
        from graftc.runtime.sources.models import load_model_and_inputs

        started = time.perf_counter()
        loaded, inputs = load_model_and_inputs(model)
        seconds = time.perf_counter() - started
        step("compiling")
        compiled = compile_spec(loaded_spec, loaded, inputs, seed=seed)
        step("certifying")
        certificate, kept = certificate_of(compiled) if certify else (None, {})
        if to is None:
            fingerprint = compiled.compilation.identity(full=full).fingerprint
        else:
            step("writing")
            written = save(compiled, to, ArtifactEvidence(certificate, kept, model, full), force=force)
            fingerprint = written.base.fingerprint
        report = compiled.report

    from graftc.cli.commands.check import print_report, totals
    from graftc.cli.deployed import files_in, print_certificate, print_files

    files = files_in(to)
    if json:
        from graftc.cli.results import CompileResult

        result = {
            **{"spec": str(spec), "model": model, "class": type(loaded).__name__},
            **{"out": None if to is None else str(to), "dry_run": dry_run, "files": files},
            **{**report.to_json(), "totals": totals(report), "load_seconds": seconds},
            **{"fingerprint": fingerprint, "certificate": certificate.to_json() if certificate else None},
            "warnings": warnings,
        }
        print_json(CompileResult.model_validate(result))
        return
    print_report(str(spec), type(loaded).__name__, report, seconds)
    print_certificate(certificate, kept)
    print_files(to, files)
