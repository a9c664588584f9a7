"""``graftc import-peft``: read a checkpoint of PEFT and write an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graftc.runtime.cli.options import Certify, DryRun, Force, Json, ModelOption, Out, destination

__all__ = ["import_peft"]


def import_peft(
    directory: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="A folder that PEFT's save_pretrained wrote.", show_default=False),
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
    """Read a PEFT checkpoint and write an artifact; every tensor must have a place in the model."""
    from graftc.runtime.cli.output import print_json, steps, working

    to = destination(out, dry_run=dry_run)
    with working(json) as warnings, steps(json) as step:
        from graftc.runtime.artifact.places import is_artifact
        from graftc.runtime.files import check_apart, check_destination
        from graftc.runtime.interop.peft.folder import read_peft

        if to is not None:
            check_apart(to, directory, model)
            check_destination(to, force=force, replaceable=is_artifact)
        config = read_peft(directory, name).config
        step("loading the model")
        from graftc.runtime.api import import_peft as import_from
        from graftc.runtime.artifact.write import save
        from graftc.runtime.deploy.merged import certificate_of
        from graftc.runtime.interop.peft.pairs import as_data, pairs_of
        from graftc.runtime.models import load_model_and_inputs

        loaded, inputs = load_model_and_inputs(model)
        step("compiling")
        compiled = import_from(directory, loaded, inputs, name=name)
        step("certifying")
        certificate, kept = certificate_of(compiled) if certify else (None, {})
        if to is not None:
            step("writing")
            save(compiled, to, force=force, base=model, certificate=certificate, kept=kept)
        tensors = as_data(pairs_of(compiled.compilation))

    from graftc.runtime.cli.deployed import files_in, print_certificate, print_files, print_tensors

    files = files_in(to)
    method = str(config.format[0].tag())
    if json:
        from graftc.runtime.cli.results import ImportPeftResult

        result = {
            **{"adapter": str(directory), "peft_type": config.peft_type, "method": method, "model": model},
            **{"out": None if to is None else str(to), "dry_run": dry_run, "tensors": tensors, "files": files},
            **{"certificate": certificate.to_json() if certificate else None, "warnings": warnings},
        }
        print_json(ImportPeftResult.model_validate(result))
        return
    print_tensors(f"{config.peft_type} as {method}", tensors)
    print_certificate(certificate, kept)
    print_files(to, files)
