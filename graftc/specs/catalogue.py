"""The catalogue of errors and warnings: every stable code, once. The standard library only."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CATALOGUE", "Code"]


@dataclass(frozen=True)
class Code:
    """One stable code: a short title, what it means, and the exit status of the command line."""

    code: str
    title: str
    explanation: str
    exit_code: int


_SPEC, _NO, _FAILED = 2, 1, 3

_TABLE: tuple[tuple[str, int, str, str], ...] = (
    (
        "GC001",
        _SPEC,
        "the spec cannot be read",
        "The file is not valid YAML, JSON or TOML, or holds no mapping.",
    ),
    ("GC002", _SPEC, "a value is not allowed", "A value is missing, of the wrong type or out of its bounds."),
    ("GC003", _SPEC, "a field is unknown", "No field of this name exists here; nothing is ignored silently."),
    ("GC004", _SPEC, "a method is unknown", "No built-in method and no installed plugin has this tag."),
    (
        "GC005",
        _SPEC,
        "two adaptations have one name",
        "A name prefixes the tensors of its adaptation: it is unique.",
    ),
    (
        "GC006",
        _SPEC,
        "the spec file is not there",
        "The path does not exist, is a folder or may not be read.",
    ),
    ("GC007", _SPEC, "the spec version is not supported", "This release reads version 1."),
    (
        "GC011",
        _SPEC,
        "a pattern matches nothing",
        "Every list item, brace branch, layer entry and exclusion matches.",
    ),
    ("GC012", _SPEC, "a role is unknown", "`graftc roles MODEL` prints the roles that a model has."),
    (
        "GC013",
        _SPEC,
        "another number of sites was expected",
        "`expect` counts the sites left after all narrowing.",
    ),
    (
        "GC014",
        _SPEC,
        "the target selects no site",
        "Every pattern matches, but the narrowing leaves nothing.",
    ),
    ("GC015", _SPEC, "a role is absent", "The model, or some of its layers, has no site of this role."),
    (
        "GC016",
        _SPEC,
        "the method does not take such sites",
        "A method's claims list the kinds of site it can adapt.",
    ),
    (
        "GC017",
        _SPEC,
        "the site cannot be adapted",
        "Its weight is no linear map's, or the model reads it as more than some rows of one stored tensor.",
    ),
    (
        "GC018",
        _SPEC,
        "tokens cannot be added",
        "The model must say which table holds its tokens, and read it in ways that new rows can be put into.",
    ),
    (
        "GC020",
        _SPEC,
        "the rank exceeds the layer",
        "A rank above min(in, out) adds parameters, not functions.",
    ),
    (
        "GC021",
        _SPEC,
        "two owners of the same rows",
        "Rows of one tensor belong to one base-training adaptation.",
    ),
    (
        "GC022",
        _SPEC,
        "a tied weight cannot be folded",
        "Folding would change the other user of the tensor as well.",
    ),
    ("GC023", _SPEC, "no gradient path", "A trainable tensor reaches no output, so it would never learn."),
    (
        "GC024",
        0,
        "a weight is read outside its module",
        "It trains, but folding it would change other readers.",
    ),
    ("GC030", _FAILED, "the model cannot be captured", "torch.export could not turn the model into a graph."),
    (
        "GC031",
        _FAILED,
        "the inputs cannot be captured",
        "No graph can be made for this combination of inputs.",
    ),
    ("GC032", _FAILED, "the model cannot be loaded", "The folder, hub id or callable gave no model."),
    (
        "GC033",
        _FAILED,
        "the graphs are for another dtype",
        "A capture holds for one dtype; load the base in the other.",
    ),
    ("GC034", _SPEC, "there are no layers", "Checkpointing per layer needs a model with repeated layers."),
    ("GC040", _FAILED, "a pass broke an invariant", "The verifier found the graph wrong after a pass."),
    (
        "GC050",
        _NO,
        "an adaptation cannot be folded",
        "It has no equivalent change of base weights or constants.",
    ),
    (
        "GC051",
        _NO,
        "the certificate is over budget",
        "Folded and unfolded outputs differ by more than allowed.",
    ),
    (
        "GC052",
        _NO,
        "the weights do not fit the class",
        "The original class has no tensor for a folded weight.",
    ),
    ("GC053", _FAILED, "adapter tensors do not fit", "Names and shapes must be those of the compiled spec."),
    ("GC054", _SPEC, "a merged model cannot train", "Merging is for deployment; the compiled model trains."),
    ("GC060", _FAILED, "the export failed", "The exporter or the check of what it wrote failed."),
    ("GC061", _FAILED, "an optional package is missing", "The message names the extra that installs it."),
    ("GC062", _FAILED, "the demo's data is missing", "The message names the commands that fetch it."),
    ("GC063", _FAILED, "the destination exists", "Nothing is overwritten: choose another path or remove it."),
    (
        "GC064",
        _FAILED,
        "the destination cannot be written",
        "The folder above it is missing or read-only, or the disk is full. Nothing is left half-written.",
    ),
    ("GC070", _FAILED, "a method is registered twice", "Two modules claim one tag."),
    ("GC071", _FAILED, "a plugin is not a method", "An entry point of `graftc.methods` is broken."),
    ("GC080", _FAILED, "there is no artifact", "The path is missing, or holds no `manifest.json` of graftc."),
    ("GC081", _FAILED, "the artifact is of a newer format", "A newer release wrote it; this one cannot read it."),
    ("GC082", _FAILED, "the artifact is damaged", "A file's content is not what its manifest says."),
    ("GC083", _FAILED, "a file of the artifact is missing", "The manifest names a file that is not there."),
    ("GC084", _FAILED, "tensors of the artifact are not its own", "A tensor's name, type or values are another's."),
    (
        "GC085",
        _FAILED,
        "the artifact is not safe to read",
        "It holds links, names that lead out of its folder, or files that it does not list.",
    ),
    ("GC086", _FAILED, "the base is not there", "The model that the artifact adapts was moved, or has to be named."),
    ("GC087", _FAILED, "the base is another model", "Its config or its weights are not those that were adapted."),
    (
        "GC088",
        _FAILED,
        "the base compiles to other places",
        "With these versions of the libraries the spec adapts other places or other graphs than when saved.",
    ),
    ("GC090", _SPEC, "the command line is misused", "`graftc COMMAND --help` shows how a command is used."),
    ("GC091", _SPEC, "there is nothing of that name", "No node, place or tensor of the graph is called so."),
    ("GC099", _FAILED, "an unexpected failure", "A bug in graftc, or a library that failed in a way it does not know."),
)

CATALOGUE: dict[str, Code] = {code: Code(code, title, text, exit_code) for code, exit_code, title, text in _TABLE}
"""Every code, in order."""
