"""``graftc import-peft``: read checkpoints of PEFT and write an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graftc.cli.options import Certify, DryRun, Force, Json, ModelOption, Out, destination

__all__ = ["import_peft"]


def import_peft(
    directories: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR...",
            help="Folders that PEFT's save_pretrained wrote; of several, each adaptation is called as its folder is.",
            show_default=False,
        ),
    ],
    model: ModelOption,
    out: Out = None,
    name: Annotated[
        str | None,
        typer.Option(
            "--name",
            metavar="NAME",
            help="An adapter in a sub-folder, as PEFT writes all but the one called default.",
            show_default=False,
        ),
    ] = None,
    certify: Certify = True,
    dry_run: DryRun = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Read PEFT checkpoints and write an artifact; every tensor must have a place in the model."""
    from graftc.cli.output import print_json, steps, working

    to = destination(out, dry_run=dry_run)
    with working(json) as warnings, steps(json) as step:
        from graftc.files.writing import check_apart, check_destination
        from graftc.runtime.artifact.places import is_artifact
        from graftc.runtime.interop.peft.folder import read_peft

        if to is not None:
            for directory in directories:
                check_apart(to, directory, model)
            check_destination(to, force=force, replaceable=is_artifact)
        single = len(directories) == 1
        adapters = [read_peft(directory, name if single else None) for directory in directories]
        step("loading the model")
        from graftc.runtime.api import import_peft as import_from
        from graftc.runtime.artifact.write import ArtifactEvidence, save
        from graftc.runtime.deploy.merged import certificate_of
        from graftc.runtime.interop.peft.expert_layouts import pairs_in
        from graftc.runtime.interop.peft.pairs import as_data
        from graftc.runtime.interop.peft.several import names_of
        from graftc.runtime.model.runner import runner_of
        from graftc.runtime.offered.adapters import Adapters
        from graftc.runtime.sources.models import load_model_and_inputs

        loaded, inputs = load_model_and_inputs(model)
        step("compiling")
        compiled = import_from(directories[0] if single else directories, loaded, inputs, name=name)
        step("certifying")
        certificate, kept = certificate_of(compiled) if certify else (None, {})
        if to is not None:
            step("writing")
            save(compiled, to, ArtifactEvidence(certificate, kept, model), force=force)
        alone = [compiled] if single else Adapters(runner_of(compiled)).each_alone(names_of(directories))
        pairs = (pairs_in(given, part.compilation) for given, part in zip(adapters, alone, strict=True))
        tensors = as_data(list(dict.fromkeys(pair for group in pairs for pair in group)))

    from graftc.cli.deployed import files_in, print_certificate, print_files, print_tensors

    files = files_in(to)
    methods = [str(given.config.format[0].tag()) for given in adapters]
    types = [given.config.peft_type for given in adapters]
    if json:
        from graftc.cli.results import ImportPeftResult

        result = {
            **{"adapters": [str(directory) for directory in directories], "peft_types": types, "methods": methods},
            "model": model,
            **{"out": None if to is None else str(to), "dry_run": dry_run, "tensors": tensors, "files": files},
            **{"certificate": certificate.to_json() if certificate else None, "warnings": warnings},
        }
        print_json(ImportPeftResult.model_validate(result))
        return
    print_tensors(", ".join(f"{kind} as {method}" for kind, method in zip(types, methods, strict=True)), tensors)
    print_certificate(certificate, kept)
    print_files(to, files)
