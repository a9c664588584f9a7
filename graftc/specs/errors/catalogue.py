"""The catalogue of errors and warnings, with one entry per stable code. Uses only the standard library.

``docs/errors.md`` is generated from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Code:
    """One stable code.

    Attributes:
        code: ``GC`` and three digits; never assigned to another error.
        title: a few words, lower case.
        explanation: the meaning.
        remedy: what to do, in one or two sentences.
        exit_code: exit status of the command line: 1 for a negative answer, 2 for usage or spec, 3 for files or model;
            0 for a warning.
    """

    code: str
    title: str
    explanation: str
    remedy: str
    exit_code: int

    @property
    def severity(self) -> Literal["error", "warning"]:
        """The severity: an error ends the operation; a warning does not."""
        return "error" if self.exit_code else "warning"


_WARNING, _NO, _SPEC, _FAILED = 0, 1, 2, 3

# One entry: code and exit status, title, explanation, remedy.
# fmt: off
_TABLE: tuple[tuple[str, int, str, str, str], ...] = (
    # The text of a spec.
    ("GC001", _SPEC, "the spec cannot be read",
     "The text is not valid YAML, JSON or TOML, it is not UTF-8, or it does not contain a mapping.",
     "Correct the line that the message shows. Quote patterns that start with `*`, indent with spaces, and use each "
     "key only once."),
    ("GC002", _SPEC, "a value is not allowed",
     "A value is missing, has the wrong type, or is out of bounds.",
     'Use a value of the type and within the bounds given in the spec reference. Types are strict: `8` is a number, '
     '`"8"` is not.'),
    ("GC003", _SPEC, "a field is unknown",
     "There is no field with this name here. Unknown fields are never ignored.",
     "Correct the spelling as the hint says, or remove the field. `graftc methods NAME` lists the fields of a method."),
    ("GC004", _SPEC, "a method is unknown",
     "No built-in method and no installed plugin has this tag.",
     "Use a tag listed by `graftc methods`. If the method comes from a plugin, install its package in this "
     "environment."),
    ("GC005", _SPEC, "two adaptations have the same name",
     "An adaptation's tensors are named after it, so its name must be unique.",
     "Rename one of the adaptations, or omit the names: each adaptation then gets a unique one."),
    ("GC006", _SPEC, "the spec file cannot be opened",
     "The path does not exist, is a folder, or is not readable.",
     "Check the path against the folder in which the command runs. In Python, pass text through "
     "`graftc.specs.parse_spec`."),
    ("GC007", _SPEC, "the spec version is not supported",
     "This release reads version 1 of the format.",
     "Write `version: 1`, or install a release that supports the other version."),
    ("GC008", _SPEC, "a regular expression takes too long",
     "Matching it against the module paths tries too many alternatives, for example because of nested repetitions.",
     "Avoid nested repetitions, or use globs in `modules`, which match in time linear in the length of the path."),
    ("GC009", _SPEC, "the spec exceeds a limit",
     "Its size, its nesting depth, its number of values, or the length of a string exceeds the limit for specs.",
     "Stay within the limits given in the spec reference. Write adaptations that differ only in where they apply as "
     "one, with a list of targets or `overrides`."),
    ("GC010", _SPEC, "a string contains half a character",
     "A lone surrogate, such as `\\ud800`, is not a character and cannot be stored in a file.",
     "Write the character itself, or both halves of its escape together."),

    # References of a spec to a model.
    ("GC011", _SPEC, "a pattern matches nothing",
     "Every list item, brace branch, layer entry, exclusion and override must match a site, but one of them does not.",
     "Correct the pattern or remove it. `graftc roles MODEL` lists the sites of a model."),
    ("GC012", _SPEC, "a role is unknown",
     "There is no role with this name.",
     "Use a role listed in the spec reference. Roles have no wildcards; braces are allowed: `attn.{q,v}`."),
    ("GC013", _SPEC, "a different number of sites was expected",
     "`expect` gives the number of sites that must remain after all narrowing, but the actual number differs.",
     "Compare the counts in the message with what you intended, then correct the target or `expect`."),
    ("GC014", _SPEC, "the target selects no site",
     "Every pattern matches something, but nothing is left after applying `layers` and `exclude`.",
     "Widen `layers` or narrow `exclude`; the message shows how many sites each of them leaves."),
    ("GC015", _SPEC, "a role is absent",
     "The model, or some of its layers, has no site with this role.",
     "`graftc roles MODEL` shows which roles were found, and why the others were not. Name the site with `modules`, "
     "or limit the target with `layers` or `expect`."),
    ("GC016", _SPEC, "the method does not support such sites",
     "Each method adapts only certain kinds of site, but these sites are of a different kind.",
     "Choose a role of a kind that the method supports (`graftc methods NAME`), or another method."),
    ("GC017", _SPEC, "the site cannot be adapted",
     "Its weight does not belong to a linear map, or the model reads it as more than some rows of one stored tensor. "
     "Or a method needs the site's effective weight, but an earlier adaptation of the site cannot be expressed as a "
     "change of the weight.",
     "Leave it out with `exclude`, or adapt a neighbouring site. Put the method that needs the weight first."),
    ("GC018", _SPEC, "tokens cannot be added",
     "The model does not declare which table holds its token embeddings, or reads it in a way that does not allow new "
     "rows.",
     "Use a model that has `get_input_embeddings` and `resize_token_embeddings`, as transformers models do. If "
     "`first` leaves a gap, lower it."),
    ("GC019", _SPEC, "virtual tokens do not fit the model",
     "Virtual tokens are inserted among the token embeddings, so the model must accept these instead of token ids "
     "(`inputs_embeds`), and no computation after its layers may need anything else about the tokens.",
     "Use a method that adds no virtual tokens, for example `prefix`; or leave out the input that the message names."),

    # A spec that does not fit the model.
    ("GC020", _SPEC, "a size does not fit the layer",
     "A rank above the smaller dimension of a weight adds parameters but no expressive power. Blocks have to divide "
     "the inputs evenly.",
     "Lower `rank`, or lower it for these sites only with `overrides`. Choose a size of blocks that divides the inputs "
     "of every site."),
    ("GC021", _SPEC, "two owners of the same rows",
     "Two adaptations change partially overlapping rows of one tensor, both train the tensor itself, or one would "
     "train a value that the other treats as a constant.",
     "Leave the site out of one of them, or name exactly the same rows in both, which stacks them. The adaptation "
     "that trains the tensor itself must come first."),
    ("GC022", _SPEC, "a tied weight cannot be folded",
     "The tensor has another reader, so folding it, or training it in full, would change that reader as well.",
     "List the module in `untie:`, which gives it a tensor of its own, or leave the site out; `train:` accepts a tied "
     "tensor if it names all modules that share it. The unfolded model still runs and can be exported."),
    ("GC023", _SPEC, "no gradient path",
     "No output of the model depends on a trainable tensor, so the tensor would never be trained.",
     "Leave the site out of the target or of `train`, or use a model class whose outputs depend on it."),
    ("GC024", _WARNING, "a weight has readers that are not adapted",
     "The site is trained, but folding it would change the other readers, so merging will be refused (GC022).",
     "No action is needed if the adapted model is never merged. Otherwise list the module in `untie:`, or leave the "
     "site out."),

    # Capturing and running a model.
    ("GC025", _WARNING, "training hooks were never called",
     "The adaptation's method adds an objective to the loss, or does work between optimiser steps, but neither was "
     "called.",
     "Add `compiled.extra_loss()` to the loss and call `compiled.after_step()` after each optimiser step, or pass "
     "`compiled.callback()` to the Trainer."),
    ("GC026", _SPEC, "a schedule does not fit the training run",
     "The adaptation changes over the whole training run, but either the total number of steps is unknown, or its "
     "phases leave no step between them.",
     "Call `compiled.begin(total_steps)` before training, or pass `compiled.callback()` to the Trainer. If the "
     "message names phases of the spec, shorten them."),
    ("GC027", _SPEC, "there is nothing to untie",
     "The modules named in `untie` share no parameter with another module.",
     "Leave the pattern out. `graftc check` warns about tied weights that are adapted (GC024)."),
    ("GC028", _SPEC, "untying changes the model",
     "The model class scales or omits a value if its config declares tied embeddings.",
     "Leave out `untie` for this class. The adaptation still trains; it stays in the graph when deployed."),
    ("GC029", _SPEC, "adaptations cannot be combined",
     "They adapt different rows of fused weights, or this kind of combination needs factors or ranks that they do not "
     "have.",
     "Combine adaptations that have the same target, or that adapt whole modules. `svd`, `ties` and `dare` accept "
     "every method that folds into weights."),
    ("GC030", _FAILED, "the model cannot be captured",
     "`torch.export` could not turn the model into a graph, or its inputs cannot be inferred from its interface.",
     "Pass `example_inputs` if the message asks for them. Remove from the model any Python control flow that depends "
     "on tensor values."),
    ("GC031", _FAILED, "the inputs cannot be captured",
     "No graph can be built for this combination of inputs, flags and sizes, or the graph does not read an adapted "
     "site.",
     "Omit the input or flag that the message names, or compile with `example_inputs` that match the call."),
    ("GC032", _FAILED, "the model cannot be loaded",
     "The folder, hub id or callable did not yield a model, or the model has no config from which it can be rebuilt.",
     "Pass a transformers folder with config and weights, a hub id, or `package.module:callable`. `--meta` needs no "
     "weights."),
    ("GC033", _FAILED, "the graphs are for a different dtype",
     "A capture is valid only for the dtype in which the model was loaded.",
     "Load the base model in the other dtype and compile that; the adapter tensors can be copied over."),
    ("GC034", _SPEC, "the model has no layers",
     "Checkpointing works on repeated layers, but the model has none.",
     "Leave out `checkpoint: layers`."),
    ("GC035", _SPEC, "gradients are missing",
     "The adaptation needs the gradients of the step just taken, but there are none.",
     "Call `compiled.after_step()` after `optimizer.step()` and before `optimizer.zero_grad()`."),
    ("GC036", _SPEC, "adaptations do not fit together",
     "A composition names adaptations that are at different sites, are built differently, or cannot be composed in "
     "this way.",
     "Compose adaptations of the same sites; those of a bank may differ only in their names. The message says which "
     "one differs, and where."),
    ("GC037", _SPEC, "the rows of the batch cannot be separated",
     "Each row of a batch must be treated separately, but at this point of the graph there is no batch axis.",
     "Leave the site out of the target, or make the choice for the whole call instead of for each row."),
    ("GC038", _SPEC, "the choice does not fit the bank",
     "The selection in a call is not a slot of the bank, or it does not have exactly one entry for each row.",
     "Pass one slot index (from 0) or adaptation name for each row; weights need one column for each slot."),
    ("GC039", _SPEC, "a token is not in the vocabulary",
     "The spec names a token by its id, but the model's embedding table has no such row.",
     "Use ids from the model's own tokenizer, for example `tokenizer.sep_token_id`."),
    ("GC040", _FAILED, "a pass broke an invariant",
     "The verifier found an error in the graph after a pass. This is a bug in graftc or in a method, not in the spec.",
     "Report it with the message, which names the pass and the node. Base weights are untouched."),
    ("GC041", _FAILED, "a graph does not match the model",
     "The captured graph and the model itself give different outputs on the same inputs, so nothing built from the "
     "graph would be an adaptation of the model.",
     "If forward branches on tensor values, on attributes that it changes, or on state outside the module, express "
     "that with tensors and buffers. If this should work, report the model's class and its inputs."),
    ("GC042", _WARNING, "forward assigns to its module",
     "A forward pass assigns attributes of a module: counters, caches, tensors that are read later. A graph has no "
     "attributes: running it assigns nothing, and any attribute that forward reads is a constant.",
     "Keep state that changes between calls in buffers, and return values that are read later."),
    ("GC043", _SPEC, "a module of the tree cannot be used on its own",
     "The modules of a compiled model only hold tensors; the computation is in the graphs of the whole model. Such a "
     "module cannot be called, a backward hook on it is never called, and a forward hook sees and changes only values "
     "that the graph has in the same form as the source model.",
     "Hook, call or change the source model and compile that, or use the compiled model as a whole."),
    ("GC044", _SPEC, "a base tensor has been unfrozen",
     "Base tensors belong to the source model and are never trained in place: no artifact would include them.",
     "Name the module in `train:` of the spec, which trains a copy, or freeze it again."),
    ("GC045", _SPEC, "the method needs a different optimiser",
     "The adaptation uses the gradient statistics of an optimiser from `graftc.optim`, but is not trained with one.",
     "Train with the optimiser that the message names, created from the compiled model."),
    ("GC046", _WARNING, "optimiser moments belong to replaced entries",
     "Entries have been replaced without the optimiser's knowledge: its moments at their positions belong to the "
     "previous entries.",
     "Train with an optimiser from `graftc.optim`, created from the compiled model."),
    ("GC047", _WARNING, "random choices in training are captured as off",
     "In training, the model's Python code randomly chooses which layers run (layerdrop) or which inputs are masked "
     "(SpecAugment). A graph cannot do this and was captured without it.",
     "If that is acceptable, set `layerdrop` to 0 and `apply_spec_augment` to False before compiling; inputs can be "
     "masked before they are passed to the model."),
    ("GC048", _WARNING, "a constant of the graphs was set",
     "The graphs contain the attributes of the source model as constants, with their values at capture. Setting an "
     "attribute on the compiled model does not change any result.",
     "Set it on the source model, and compile that."),
    ("GC049", _WARNING, "a graph omits part of forward",
     "A graph contains the operators of a forward pass, with torch's gradients for them. It does not contain custom "
     "backward passes, gradient hooks, or checks of whether gradients, autocast or inference mode are enabled.",
     "No action is needed if the model is not trained through that module, or if the omitted part makes no "
     "difference. Otherwise express it with tensor operations: `x + (f(x) - x).detach()` has the value of `f(x)` and "
     "the gradient of `x`."),

    # Folding and adapter tensors.
    ("GC050", _NO, "an adaptation cannot be folded",
     "No change of the base weights is equivalent to it, at least not at the site that the message names.",
     "`compiled.merge_partially()` (`graftc merge --partial`) folds the others and leaves this one in the graph, "
     "`compiled.fix(name)` keeps one member of a bank that rows choose from, and `--no-merge` exports the model "
     "unfolded."),
    ("GC051", _NO, "the certificate is over budget",
     "The folded and unfolded computations differ by more than the budget allows. Nothing was written.",
     "Check the sites that the message names. If it names only an output, each site is exact, but rounding errors "
     "have added up over the layers: raise the limit with `fold.budget.logits` or `--budget`, or, if the base is in "
     "16 bits, merge in float32 (`--dtype float32`) to reduce them."),
    ("GC052", _NO, "the model does not fit its class",
     "Folding had to add a tensor, such as a bias, that the original class does not have; or the model was changed "
     "after it was loaded (modules, numbers, hooks, ties, buffers that are not stored), and the class would build "
     "another from the config: run on sample inputs, it does not compute what the merged model does.",
     "Export to ONNX or `.pt2`, which contain the graph of the model as it is, or leave the adaptation unfolded."),
    ("GC053", _FAILED, "adapter tensors do not fit",
     "Names and shapes must match those of `adapter_state_dict()`. Nothing was copied.",
     "Compile the spec with which the tensors were trained, against the same model."),
    ("GC054", _SPEC, "a merged model cannot train",
     "A merged model is for deployment and has no train mode.",
     "Train the compiled model from which it was merged; merging has not changed that model."),
    ("GC055", _SPEC, "a rank cannot be deployed",
     "The method of the adaptation has only one rank, or the rank is out of bounds.",
     "Name an adaptation whose method is trained for many ranks, such as `dylora`, and a rank from 1 to the "
     "adaptation's."),
    ("GC056", _SPEC, "nothing can be determined by examples",
     "No adaptation has a selection or initial values that use examples, or there are no examples, or they yield no "
     "loss.",
     "Name a selection in the spec, for example `fish`, and call `compiled.select(examples)` before training, or an "
     "initialiser such as `eva`, and call `compiled.initialise(examples)`; pass batches that have labels."),
    ("GC057", _SPEC, "there is no further training run",
     "No adaptation has a training run left after the current one.",
     "Merge, save or export the model. `compiled.stages_left` is the number of training runs that remain."),
    ("GC058", _FAILED, "the folder contains a different recipe",
     "The recipe that was started there has a different spec, seed or model; or the folder contains other files.",
     "Use a separate folder for each recipe, or remove the old one."),
    ("GC059", _WARNING, "tensors do not train",
     "In the first optimiser steps, tensors that should train had no gradient or did not change: they are not in the "
     "optimiser, the loss does not depend on them, their learning rate is 0, or the step was lost in rounding.",
     "The message names the tensors with the likely cause for each. `graftc.optim.param_groups(compiled, lr)` returns "
     "parameter groups with everything that trains."),

    # Writing, packages and plugins.
    ("GC060", _FAILED, "the export failed",
     "The exporter failed, or the file it wrote does not compute the same function as the model. Nothing was left "
     "behind.",
     "The message gives the exporter's reason. Try the other format, or newer versions of torch and onnxruntime."),
    ("GC061", _FAILED, "an optional package is missing",
     "The command needs a package that is installed only as an extra.",
     "Install the extra that the message names, for example `pip install 'graftc[export]'`."),
    ("GC062", _FAILED, "the demo's model or data is missing",
     "A pretrained model or the news texts are not installed.",
     "Run the commands that the message names; `make setup` does the same."),
    ("GC063", _FAILED, "the destination exists",
     "Existing files are not overwritten unless you ask for it.",
     "Choose another path, remove the existing file or folder, or replace it with `--force` if the command has that "
     "option."),
    ("GC064", _FAILED, "the destination cannot be written",
     "Its parent folder is missing or read-only, or the disk is full. No partially written files are left.",
     "Create the folder, free some space, or choose another path."),
    ("GC065", _SPEC, "an adaptation cannot be an input",
     "It has been folded into the weights, or the exported graph reads none of its tensors.",
     "Export the unfolded model (`--no-merge`), or leave the adaptation out of the inputs."),
    ("GC066", _NO, "an adaptation cannot be a LoRA",
     "It changes something other than the weights of linear maps (biases, norms, keys and values), or it is part of a "
     "composition that is not a sum.",
     "Leave it out of the conversion, fold it into a base that is saved with the adapter (`--into-base NAME`), or "
     "merge the whole model."),
    ("GC067", _NO, "a conversion is not accurate",
     "The converted adapter's update differs from the original one by more than was allowed, or by more than its "
     "rounding. Nothing was written.",
     "Raise the rank or the allowed error. If a probe of the written files failed, the source does not have the "
     "layout that was assumed; the message names the site."),
    ("GC068", _NO, "the server does not support the adapter",
     "The server for which the adapter is meant would reject it, or would compute a different result with it. Nothing "
     "was written.",
     "The message names each field and the solution: convert the adapter to a plain LoRA of one rank (`graftc "
     "convert`), or merge the model."),
    ("GC069", _SPEC, "the adapter does not fit the layout",
     "The layout cannot represent a part of the adapter, the folder does not have the assumed layout, or the "
     "conversion needs sizes of the base that are unknown.",
     "Choose another layout, specify the folder's layout with `--from`, or specify the base with `--model`."),
    ("GC070", _FAILED, "a method is registered twice",
     "Two modules claim the same tag; the message names both.",
     "Rename one of the methods, or uninstall one of the packages."),
    ("GC071", _FAILED, "a plugin is not a method",
     "An entry point of `graftc.methods` cannot be imported; its modules lack a spec class, claims or a method; the "
     "method claims sites that it does not accept; it fails when it is inserted; or its fold requests a tensor that "
     "it does not have, changes one that the site does not have, or returns a different shape.",
     "Repair or uninstall the package that the message names."),
    ("GC072", _SPEC, "a compiled model does not support this",
     "Models of other libraries have such a method or option; a model of captured graphs does not.",
     "Use the alternative that the message names."),
    ("GC073", _SPEC, "the argument is of the wrong kind",
     "The function does not accept this argument: for example the name of a model instead of the model, a compiled "
     "model instead of its base, a peft config instead of a spec, or names where all adaptations are meant.",
     "Pass the argument that the message describes."),
    ("GC074", _SPEC, "a model cannot be pickled",
     "Its graphs are code, which would run when the file is loaded.",
     "Use `model.save(path)` for the whole model, `torch.save(compiled.state_dict(), path)` for the trained tensors, "
     "and `copy.deepcopy(model)` for a copy."),

    ("GC075", _WARNING, "a GGUF file has no tokenizer",
     "The base has no tokenizer with it, or one of a kind that cannot be written.",
     "No action is needed if only the weights are read. llama.cpp needs a tokenizer: save it into the base's folder "
     "as `tokenizer.json` and export again."),
    ("GC076", _WARNING, "a counter in a module is not updated",
     "A buffer was registered on a module of a compiled model, as by tools that count operations module by module "
     "(thop). The modules only hold tensors, and the computation is in the graphs of the whole model, so such a count "
     "is zero or too small.",
     "Count operators with `torch.utils.flop_counter.FlopCounterMode`, or count on the source model."),
    ("GC077", _FAILED, "a plugin's pass cannot run",
     "An entry point of `graftc.passes` cannot be imported or is not an `AddedPass`; the pass cannot be placed where "
     "it requests; it does not do what it declares; it fails; or it leaves an invalid graph. An artifact whose graphs "
     "were rewritten by a pass needs the same pass when it is loaded; any other artifact must be loaded without such "
     "a pass.",
     "Repair, install or uninstall the package that the message names."),
    ("GC078", _FAILED, "a plugin's exporter cannot run",
     "An entry point of `graftc.exporters` cannot be imported, is not an `Exporter` of the same name, or has the name "
     "of another format; or the exporter failed. Nothing was left behind.",
     "Repair or uninstall the package that the message names."),
    ("GC079", _FAILED, "a serving engine cannot run the model",
     "The engine refused the model or an adapter, crashed, did not end in time, or did not answer with the tokens that "
     "were requested. It ran in a process of its own, so nothing else was affected.",
     "The message has the engine's reason and what it printed last. Convert the adapter (`graftc convert`), or serve "
     "the merged model (`graftc merge`)."),

    # Artifacts.
    ("GC080", _FAILED, "there is no artifact",
     "The path does not exist, or it is a folder without a graftc `manifest.json`.",
     "Pass the folder that `graftc compile` or `compiled.save` wrote."),
    ("GC081", _FAILED, "the artifact has a newer format",
     "A newer release wrote it, and this one cannot read it.",
     "Update graftc."),
    ("GC082", _FAILED, "the artifact is damaged",
     "The content of a file does not match the manifest: it was truncated or changed after writing.",
     "Copy the artifact again from its origin. `graftc verify DIR` checks every file."),
    ("GC083", _FAILED, "a file of the artifact is missing",
     "The manifest names a file that is not in the folder.",
     "Copy the whole folder rather than single files."),
    ("GC084", _FAILED, "the artifact's tensors do not match its manifest",
     "The names, dtypes, shapes or values of the stored tensors differ from those that the manifest lists.",
     "Restore `adapters.safetensors` from the copy that belongs to this artifact; another artifact's tensors do not "
     "fit."),
    ("GC085", _FAILED, "the artifact is not safe to read",
     "It contains links, names that lead out of its folder, or files that the manifest does not list.",
     "Do not use an artifact of unknown origin. In your own artifact, remove the files that the message names."),
    ("GC086", _FAILED, "the base cannot be found",
     "An artifact contains only adapters. The model that it adapts was moved, was created in Python, or would have to "
     "be loaded by code that the artifact names, which is never run.",
     "Specify the base with `--model MODEL`, or in Python with `graftc.load(path, model)`."),
    ("GC087", _FAILED, "the base is a different model",
     "The config or the weights of the model are not those that were adapted; or its modules, numbers or hooks were "
     "changed, so that it does not compute what the artifact's graph of it does.",
     "Use the model, in the revision, against which the spec was compiled."),
    ("GC088", _FAILED, "the spec resolves to different sites",
     "With the installed library versions, the spec adapts different sites, or yields different graphs, than when the "
     "artifact was saved.",
     "Install the versions of torch and transformers with which it was saved, or compile and train again."),
    ("GC089", _FAILED, "weights are missing",
     "The checkpoint lacks tensors of the model, or has them with different sizes. Loading initialises them at "
     "random, which is useful only if the whole tensor is trained, as for a new head.",
     "Use a complete checkpoint, or train the new tensors in full: `train: [classifier]`."),

    # The command line, and views of graphs.
    ("GC090", _SPEC, "the command line is misused",
     "A command, argument or option is missing, is unknown, or contradicts another.",
     "`graftc COMMAND --help` shows how the command is used."),
    ("GC091", _SPEC, "nothing has that name",
     "The graph has no node, site or tensor with this name, or has several; or the artifact contains no graphs.",
     "Use one of the names that the message suggests, or look at the whole graph with `graftc inspect DIR --graph`."),
    ("GC092", _WARNING, "a graph cannot be written",
     "It contains an operator or an output class that is not from torch, transformers or graftc, to which files "
     "cannot refer.",
     "No action is needed if the artifact is only loaded, because loading captures the model again. Inspecting it "
     "requires its base."),
    ("GC093", _SPEC, "a selection is not one target",
     "A target consists of roles, modules, expressions and layers, each for all of its sites, and no combination of "
     "these selects exactly the places in the selection.",
     "Split the selection by role or by module, and write an adaptation for each part."),
    ("GC094", _SPEC, "a key cannot be used",
     "The file does not contain a key of the required kind (private to sign, public to verify), contains a key for an "
     "algorithm other than Ed25519 or ECDSA, or is encrypted and the passphrase is missing or wrong.",
     "`ssh-keygen -t ed25519` makes a pair of keys: sign with the file itself, verify with FILE.pub."),
    ("GC095", _WARNING, "the base computes something else",
     "Run on sample inputs, the base differs from the graph that the artifact contains of it, by more than rounding. "
     "Its config and weights are the same, but other versions of the libraries are installed.",
     "Evaluate the adapted model again, or install the versions with which the artifact was written."),
    ("GC096", _WARNING, "the folder's config is not the one that was adapted",
     "A streamed merge copies the config of the base's folder. The model that was adapted had other settings: they "
     "were changed after loading, or in the folder since.",
     "Merge in memory, which writes the settings that were adapted, or repair the folder's `config.json`."),
    ("GC099", _FAILED, "an unexpected failure",
     "This is a bug in graftc, or a library failed in a way that graftc does not recognise.",
     "Run the command again with `GRAFTC_DEBUG=1` in the environment, which shows the traceback, and report it."),

    # Checkpoints as files, and merging.
    ("GC100", _FAILED, "a checkpoint cannot be read",
     "The folder has no safetensors files, or some are missing, truncated, or inconsistent with their headers or the "
     "index.",
     "Download the checkpoint again. A model that is stored as pickles (`.bin`) has to be saved again as safetensors."),
    ("GC101", _FAILED, "a checkpoint is not safe to read",
     "Its index names files outside its folder, or a file is a link that leads out of it.",
     "Do not use a checkpoint of unknown origin. In your own checkpoint, replace links with the files themselves."),
    ("GC102", _FAILED, "an adapter does not fit the checkpoint",
     "Tensors that the adapter changes are missing from the checkpoint's files or have different sizes, or values are "
     "not finite. Nothing was written.",
     "Use the base on which the adapter was trained. The message lists every tensor that does not fit."),
    ("GC103", _NO, "the merge cannot be streamed",
     "A streaming merge changes stored weights one by one, without the model. Adaptations that need the model, and "
     "bases that are not stored in floating point, cannot be merged in this way.",
     "Merge in memory: `graftc merge DIR --out DIR2` without `--stream`. For a quantised base, use the folder of the "
     "model from which it was quantised."),
    ("GC104", _NO, "the merge changes nothing",
     "No folded tensor differs from the base's after rounding: the adapter is untrained or belongs to another model, "
     "its scale is zero, or its whole update is no larger than rounding to the base's dtype.",
     "Check that it is the right adapter. `--dtype float32` (`dtype=torch.float32`) keeps small updates; "
     "`--allow-unchanged` (`allow_unchanged=True`) merges anyway."),
    ("GC105", _WARNING, "the merge loses most of the update",
     "Most of the update is smaller than the spacing of the dtype in which the merged weights are stored, so rounding "
     "restores the base's values.",
     "`--dtype float32` (`dtype=torch.float32`) keeps small updates, as does serving the adapter unmerged."),

    # Checkpoints of peft.
    ("GC110", _FAILED, "there is no PEFT adapter",
     "The path does not exist, or the folder lacks `adapter_config.json` or `adapter_model.safetensors`. Pickled "
     "weights (`adapter_model.bin`) are never read, because reading them runs code.",
     "Pass the folder that PEFT's `save_pretrained` wrote. Pickled weights of your own can be loaded in PEFT and "
     "saved again, which writes safetensors."),
    ("GC111", _FAILED, "the PEFT config cannot be read",
     "`adapter_config.json` is not valid JSON, or has a field that is unknown or of the wrong type.",
     "Restore the file from its origin. A config is data: nothing that it names is imported or run."),
    ("GC112", _SPEC, "the PEFT adapter is not supported",
     "Its type, or an option that it uses, has no equivalent in graftc.",
     "The page on PEFT checkpoints lists the supported types and options."),
    ("GC113", _FAILED, "the tensors do not fit the PEFT config",
     "The file has tensors that the config does not account for, lacks some that it requires, or has values that are "
     "not finite.",
     "Restore `adapter_model.safetensors` and `adapter_config.json` from the same checkpoint."),
    ("GC114", _FAILED, "the PEFT adapter does not fit the model",
     "The checkpoint adapts modules that the model does not have, or its tensors do not match the sizes of the "
     "model's layers: it was trained on a different base.",
     "Use the base model on which the adapter was trained; `base_model_name_or_path` in its config names it."),
    ("GC115", _SPEC, "the model cannot be written for PEFT",
     "PEFT has no equivalent of an adaptation, of one of its options, or of how adaptations are composed. Nothing was "
     "written.",
     "Merge the adaptation into the base instead, save it as an artifact, or leave out the part that the message "
     "names."),
    ("GC116", _WARNING, "adapter tensors were rounded",
     "The checkpoint's tensors have a wider dtype than those of the compiled model.",
     "Leave out `dtype: base`, which keeps tensors in 16 bits; load the base in float64 if the file is in float64."),
    ("GC117", _WARNING, "the task of a PEFT config trains a head",
     "A config with `task_type: SEQ_CLS` or another task with a head trains that head in full along with the "
     "adaptation, as PEFT does. The message names the modules; the equivalent in a spec is `train`.",
     "Leave `task_type` out of the config if the head should not be trained."),

    # Training loops.
    ("GC120", _WARNING, "packed texts attend to one another",
     "Positions restart within a row, as in packed texts, but an attention mask is passed as well. transformers "
     "models separate packed texts by their positions only if there is no mask; with a mask, tokens also attend to "
     "earlier texts. The source model does the same.",
     "Leave `attention_mask` out of packed batches. Collators for padding-free batches do so."),
    ("GC121", _WARNING, "packed texts lack virtual tokens",
     "Virtual tokens are placed at the beginning of a row. If several texts are packed into it, only the first one "
     "has them, so the others are computed without the adaptation.",
     "Do not pack the texts, or use `prefix`: every text of a row attends to its keys and values."),
    ("GC122", _WARNING, "packed texts share a gate",
     "Gates (of UniPELT, and of `compose: gate`) are means over the tokens of a row. If several texts are packed into "
     "it, each text affects the results of the others.",
     "Do not pack the texts."),
    ("GC123", _FAILED, "there is no training log",
     "The file does not exist, cannot be read, or contains no JSON line with a `step`.",
     "Pass a file written by `graftc.TrainingLog`, or the `trainer_state.json` of a Trainer's checkpoint."),
    ("GC124", _WARNING, "lines of a training log are skipped",
     "A line is not JSON, has no `step`, is longer than 16 MiB, or returns to an earlier step for the thousandth "
     "time. A process that was killed may have left half a line.",
     "No action is needed for single lines. Otherwise, check which processes write to the file."),
    ("GC125", _WARNING, "an invocation is missing or ambiguous",
     "An aLoRA acts from the last occurrence of its invocation on. No row of the call has the invocation, so nothing "
     "is adapted and nothing trains; or the invocation is a single token that also occurs elsewhere in the rows.",
     "Use the ids that the model's own tokenizer gives for the invocation within a prompt, where they may differ from "
     "those of the invocation alone; begin it with a special token."),

    # Several processes.
    ("GC130", _SPEC, "not supported with several processes",
     "A model was sharded before it was compiled, or an operation needs the whole weights, or the gradients of the "
     "whole batch, but each process has only a part of them.",
     "Compile the whole model in each process first, and shard or wrap the compiled one. Otherwise follow the "
     "instructions in the message."),
    ("GC131", _FAILED, "a process did not take part",
     "All processes gather the tensors of a sharded model together. One of them called something else, or nothing, "
     "until the process group timed out; or the process that writes has failed.",
     "Make the call in every process, not under `if rank == 0`; only one of them writes."),

    # Generating.
    ("GC140", _SPEC, "the cache does not fit",
     "A call passes a cache, but the model does not cache keys and values; or the cache belongs to another model or "
     "batch, is of a type that graphs do not take, has dropped tokens outside a sliding window, or has a fixed length "
     "and no room for the call.",
     "Pass the cache that this model returned for the same batch, an empty `DynamicCache()`, or only `use_cache=True` "
     "for a new one. Models whose state is not keys and values run without a cache: `use_cache=False`."),
    ("GC141", _SPEC, "an adaptation does not work with a cache",
     "With a cache, a call computes only the new tokens. The adaptation's effect on a token depends on tokens that "
     "are not in that call, as for a gate over a whole row.",
     "Generate with `use_cache=False`, which computes the whole text at every step, or leave the adaptation out with "
     "`disabled(name)`."),
    ("GC142", _SPEC, "the model cannot generate",
     "The source model's class has no head that predicts the next token, or does not support a cache.",
     "Compile a model with a language model head."),
    ("GC143", _SPEC, "a position is beyond the table",
     "The model has a learned vector for each position, but a row has more tokens than there are positions.",
     "Shorten the prompt, or generate fewer tokens (`max_new_tokens`)."),
    ("GC144", _FAILED, "the graphs cannot generate",
     "A folder for generation must contain ONNX files with a cache (keys and values of earlier tokens as inputs, "
     "those of all tokens as outputs) and the model's `config.json`. A file is missing or cannot be read, or a graph "
     "has no cache.",
     "Export the model for generation into a new folder. Encoders and graphs without a cache cannot generate."),
    ("GC145", _SPEC, "the call does not fit the graph",
     "The graph has no input or output for an argument, an input is missing or has a different shape, a token is not "
     "in the vocabulary, or inputs fail a check that the model itself makes, such as a text with fewer image tokens "
     "than its images have features.",
     "Leave out the argument that the message names, or pass the input in the shape that it gives."),
    ("GC146", _FAILED, "there is no tokenizer",
     "Neither the folder nor the base has a tokenizer, or the tokenizer cannot be read or belongs to another model.",
     "Specify a folder or hub id that has the model's tokenizer: `--tokenizer NAME`."),
    ("GC147", _SPEC, "there is no chat template",
     "The model's tokenizer has no template for conversations, or the template does not accept such messages.",
     "Use a model that is tuned for chat, or `graftc generate` without `--chat`. Leave out `--system` if the template "
     "has no such role."),
    ("GC148", _FAILED, "the generation settings are not valid",
     "A setting in the model's `generation_config.json` cannot be used: its value has the wrong type, exceeds a "
     "limit, or is rejected by transformers, such as a temperature of 0.",
     "Correct the file, or remove the setting that the message names."),
    ("GC149", _SPEC, "the model is not one graph",
     "The model's own Python code runs between graphs of its layers, because the whole model cannot be captured, but "
     "the feature that the message names needs one graph: virtual tokens, banks, clozes, graphs in a file.",
     "Adapt layers and linear maps with LoRA, (IA)3 or bottlenecks, or train tensors in full; deploy the merged model "
     "as a transformers folder. `capture: graph` reports why the whole model cannot be captured."),

    # Memory of a training step.
    ("GC150", _SPEC, "an output is not available in train mode",
     "With `memory: {loss: chunked}`, and with `auto` where it applies, the head and the loss of a language model are "
     "computed a few rows at a time in train mode, so the logits never exist as a whole.",
     "Set `memory: {loss: whole}` in the spec, or call the model in eval mode, where all outputs are available."),
    ("GC151", _WARNING, "the loss is not computed in chunks",
     "The spec has `memory: {loss: chunked}`, but the graph has no head over a vocabulary followed by a "
     "cross-entropy, something else reads the logits, or the adapted head is not a sum of linear maps.",
     "Training is correct, but stores the logits. Leave the head out of the adaptation that the message names, or use "
     "`memory: {loss: auto}`, which does not warn."),
    ("GC152", _SPEC, "a chunked loss has no second derivative",
     "With `memory: {loss: chunked}` the gradient of the loss is computed in the forward pass, a few rows at a time, "
     "and cannot itself be differentiated.",
     "Set `memory: {loss: whole}` in the spec if you need gradients of gradients."),
    ("GC153", _WARNING, "the activation budget is not met",
     "The spec has `memory: {budget: ...}`, but the values that cannot be recomputed exceed it: layer inputs, random "
     "draws such as those of the base's own dropouts, and values that operators save internally.",
     "Training is correct, and uses as much memory as the message says. `checkpoint: layers` repeats random draws as "
     "well; a base without dropouts stores less."),
    ("GC154", _SPEC, "a number of bytes cannot be read",
     "A memory budget is a positive number of bytes, optionally with a unit: kB, MB, GB and TB are powers of 1000; "
     "KiB, MiB, GiB and TiB are powers of 1024.",
     "Write it as `24GB` or `22.5GiB`."),
    ("GC155", _NO, "no step fits into the memory",
     "Not even one row of the shortest sequences can be trained within the memory budget: the memory that stays in "
     "use between steps, together with the least that a step needs, exceeds the budget.",
     "The message says how much memory the smallest step needs. Checkpointing and a chunked loss reduce the memory of "
     "a step; a base in bfloat16, fewer trained entries, another optimiser or more devices reduce the memory that "
     "stays in use."),

    # Quantised bases.
    ("GC160", _SPEC, "nothing to quantise",
     "The spec has `base: {quantize: ...}`, which applies to the linear maps and experts in the repeated layers of a "
     "model, but there are none, or `skip` covers all of them.",
     "Leave `quantize` out, or skip fewer modules."),
    ("GC161", _FAILED, "the quantisation format is not supported",
     "According to the folder's config, its weights are quantised with a method or options that graftc does not read.",
     "Use the checkpoint that is not quantised, and quantise it in the spec (`base: {quantize: nf4}`), or use one in "
     "a format from the page on quantised checkpoints."),
    ("GC162", _SPEC, "a quantised module cannot be used",
     "The model contains a module or tensor of a quantisation library whose encoding graftc does not know, or whose "
     "layout has been changed for a kernel.",
     "Load the folder with `graftc.load_base(folder)`, which reads the quantised weights itself, or load the model "
     "that is not quantised. Compile a bitsandbytes model on a CPU before calling it in eval mode."),
    ("GC163", _FAILED, "a quantised checkpoint is inconsistent",
     "Codes, scales or zero points of a weight are missing, or their sizes or dtypes do not match the weight.",
     "Download the checkpoint again; its config must be the one with which it was written."),
    ("GC164", _WARNING, "activations are not quantised here",
     "The checkpoint's own library also rounds the inputs of quantised linear maps, to 8 or 4 bits. graftc uses the "
     "quantised weights, but does not round inputs.",
     "No action is needed. Outputs are closer to those of the original model, and differ from the library's by its "
     "rounding."),
    ("GC165", _NO, "a merge into packed weights needs a decision",
     "The base's weights are quantised, and an update is mostly smaller than the steps between their values: a merge "
     "either creates a model in full precision, which is exact but takes as much space as one, or packs the changed "
     "weights again, which loses some of the update and disturbs the rest.",
     'Use `merge(base="full")` (`--base full`) or `merge(base="requantized")`, whose certificate reports what was '
     'lost; or deploy the adapters next to the packed base with `save`, or with `export` of the compiled model '
     '(`--no-merge`).'),
    ("GC166", _NO, "packed weights are not supported there",
     "A merged model whose weights were packed again is not a plain transformers model, so it has no folder and no "
     "`to_transformers`; some packings can be read but not written; and a base in full precision has nothing to pack "
     "again.",
     'Use `merge(base="full")`, or export the packed model to ONNX or `.pt2`.'),
    ("GC167", _SPEC, "the weights before quantisation are not available",
     "`init: loftq` starts from the quantisation error of the weights. It is known if the spec quantises them, but "
     "not for a model that was loaded quantised, nor for sites that are not quantised.",
     "Load the model in full precision and set `base: {quantize: ...}` in the spec, or choose another `init`."),
    ("GC168", _NO, "the base's codes belong to an adaptation",
     "With `init: loftq` and several iterations, an adaptation chooses the codes of the quantised base. They follow "
     "from its tensors and the original weights, so a base with these codes cannot be saved without the adaptation, "
     "and its updates do not fit a base that was quantised in the usual way.",
     'Keep the adaptation, and disable it if it is not needed, or use `merge(base="full")`, which writes a plain '
     "model."),
    ("GC169", _WARNING, "rounding hides what outputs show",
     "Rounding inside the model moves its outputs so far that comparing them says little. Either the adapted model's "
     "own outputs are inexact, because large values in it nearly cancel, and the folded model does not repeat the "
     "error; or rounding the folded weights differently moves outputs by a large part of their size. Each weight "
     "was still compared on its own.",
     "Evaluate the folded model before serving it: what was measured unfolded was measured with the rounding."),

    # Classifying by filling blanks.
    ("GC170", _SPEC, "the model cannot fill the cloze",
     "`cloze` makes a transformers language model classify by the tokens that it predicts for blanks. The model is "
     "not such a model, or lacks the tokens that the spec names.",
     "Use a masked, causal or sequence-to-sequence language model with its head, and ids from its own tokenizer."),

    # Patterns and verbalizers.
    ("GC175", _SPEC, "a pattern cannot be used",
     "A pattern is a text with a slot for a field of a row, such as `{text}`, and a `{blank}` that the model fills. "
     "It must have both, must not show a label, and must differ from the other patterns.",
     'Write it as `"{text} This text is about {blank}."`. Write a literal brace twice.'),
    ("GC176", _SPEC, "a verbalizer cannot be used",
     "A verbalizer gives each label one or more words. It must have at least two labels, and no two labels with the "
     "same words; all verbalizers of a document must have the same labels.",
     "Give each label in the data its own words."),
    ("GC177", _SPEC, "members cannot share a base",
     "With `members: bank`, the members of an ensemble are slots of one bank: everything that trains in them must be "
     "an adaptation that banks support, and the document must not compose these itself.",
     "Use such a method in `spec`, for example `lora`, or write `members: separate`."),
    ("GC178", _SPEC, "a word does not fill the blanks",
     "A model fills each blank with one token of its vocabulary, so a word must have as many tokens as the pattern "
     "has blanks, when written as in the pattern, with the space before it.",
     "Use a word that is one token, or give the pattern as many blanks as the word has tokens."),
    ("GC179", _SPEC, "a pattern does not fit the model",
     "The pattern itself uses all the tokens that a text may have, or the tokenizer has no token for a blank of this "
     "kind.",
     "Shorten the pattern or raise `max_length`. For a model that writes text from left to right, the pattern must "
     "end in its only blank."),

    # Data and members of PET.
    ("GC180", _FAILED, "rows of data cannot be used",
     "A file of rows is missing, too large or malformed; or a row lacks a field that a pattern shows, or has a label "
     "that the verbalizer does not have.",
     "Use JSON Lines, or CSV or TSV with a header, in UTF-8, with the label in the field `label`. The message names "
     "the line."),

    # Pattern-exploiting training.
    ("GC181", _FAILED, "training has diverged",
     "The loss of a training run that graftc performs itself is not finite.",
     "Lower the learning rate, warm it up over more steps, or load the base in float32."),
    ("GC182", _SPEC, "there is nothing to train from",
     "A stage of a recipe has no rows to learn from, or no model to start with.",
     "The message says which rows or which model is missing."),

    # Example calls.
    ("GC183", _WARNING, "a processor creates no example",
     "For a model that reads text with images or sound, the processor in its folder creates an example call. This "
     "processor failed or exceeded the limits on time, memory or size, so the example contains only text.",
     "Pass a batch as `example_inputs={name: tensor}`; on the command line, use a callable that returns `(model, "
     "example_inputs)`."),

    # Slots of banks.
    ("GC190", _FAILED, "no slot is available",
     "Every slot of the bank contains an adapter that a call uses or that is active, or the bank has fewer slots than "
     "a call chooses adapters. Nothing has changed.",
     "Evict an adapter, wait until calls have ended, or compile the bank with more `slots`."),
    ("GC191", _FAILED, "the adapter does not fit the bank",
     "A slot accepts a LoRA of another rank or scaling, if it adapts only modules that the bank adapts and has at most "
     "the bank's rank. Nothing has been written.",
     "Compile a bank whose adaptations have the modules and the rank that the message names."),

    # Adapters as inputs of graphs.
    ("GC192", _FAILED, "an adapter does not fit a graph",
     "The graph is of another base, its inputs are for another method or have other sizes, or it does not adapt the "
     "places that the adapter adapts. Or a file of an adapter lacks tensors or has values that are not finite, or a "
     "file is not a graph with adaptations as inputs.",
     "The message names what differs. Export a graph of this base with such an adaptation as an input, or choose the "
     "graph that the adapter is for."),

    # TRL's command line.
    ("GC200", _SPEC, "settings of TRL cannot be used",
     "The YAML file or an option of `graftc trl` is not one that TRL reads, two of them contradict each other, or no "
     "adapter is asked for.",
     "Correct the key that the message names. `trl TRAINER --help` lists the keys and their values."),
    ("GC201", _FAILED, "a run of TRL cannot start",
     "TRL, or a library that it uses, could not load the data, the model, its tokenizer or a checkpoint, or refused "
     "the settings before the first step.",
     "The message is the library's own. `GRAFTC_DEBUG=1` in the environment shows where it comes from."),
)
# fmt: on

CATALOGUE: dict[str, Code] = {
    code: Code(code, title, explanation, remedy, exit_code) for code, exit_code, title, explanation, remedy in _TABLE
}
"""Every code, in order."""
