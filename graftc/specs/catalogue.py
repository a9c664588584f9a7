"""The catalogue of errors and warnings: every stable code, once. The standard library only.

``docs/errors.md`` is made from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["CATALOGUE", "Code"]


@dataclass(frozen=True)
class Code:
    """One stable code.

    Attributes:
        code: ``GC`` and three digits; never given to something else.
        title: a few words, lower case.
        explanation: what it means.
        remedy: what to do, in one or two sentences.
        exit_code: exit status of the command line: 1 the answer is no, 2 usage or spec, 3 files or model; 0 for a
            warning.
    """

    code: str
    title: str
    explanation: str
    remedy: str
    exit_code: int

    @property
    def severity(self) -> Literal["error", "warning"]:
        """An error ends what was asked for; a warning does not."""
        return "error" if self.exit_code else "warning"


_WARNING, _NO, _SPEC, _FAILED = 0, 1, 2, 3

# One entry: code and exit status, title, explanation, remedy.
# fmt: off
_TABLE: tuple[tuple[str, int, str, str, str], ...] = (
    # What is written in a spec.
    ("GC001", _SPEC, "the spec cannot be read",
     "The text is not valid YAML, JSON or TOML, it is not UTF-8, or it holds no mapping.",
     "Correct the line that the message shows. Quote patterns that start with `*`, indent with blanks, and give each "
     "key once."),
    ("GC002", _SPEC, "a value is not allowed",
     "A value is missing, of the wrong type, or out of its bounds.",
     "Give a value of the type and within the bounds that the spec reference states. Types are strict: "
     '`8` is a number, `"8"` is not.'),
    ("GC003", _SPEC, "a field is unknown",
     "No field of this name exists at this place. Unknown fields are never ignored.",
     "Correct the spelling as the hint says, or remove the field. `graftc methods NAME` lists the fields of a method."),
    ("GC004", _SPEC, "a method is unknown",
     "No built-in method and no installed plugin has this tag.",
     "Take a tag that `graftc methods` lists. Where the method is a plugin's, install its package here."),
    ("GC005", _SPEC, "two adaptations have one name",
     "A name prefixes the tensors of its adaptation, so it is given once.",
     "Rename one of the adaptations, or leave out the names: each then gets one of its own."),
    ("GC006", _SPEC, "the spec file is not there",
     "The path does not exist, is a folder, or may not be read.",
     "Check the path against the folder in which the command runs. In Python, pass text through "
     "`graftc.specs.parse_spec`."),
    ("GC007", _SPEC, "the spec version is not supported",
     "This release reads version 1 of the format.",
     "Write `version: 1`, or install a release that reads the other version."),
    ("GC008", _SPEC, "a regular expression takes too long",
     "Matching it against the paths of modules tries too many ways: repetitions inside of repetitions do that.",
     "Write it without a repetition inside of a repetition, or as globs with `modules`, which take time linear in the "
     "path."),
    ("GC009", _SPEC, "the spec exceeds a limit",
     "Its size, its depth, the number of its values, or the length of a text is beyond what a spec may have.",
     "Keep to the limits that the spec reference lists. Adaptations that differ by place only are one, with a list of "
     "targets or `overrides`."),
    ("GC010", _SPEC, "a text holds half of a character",
     "A lone surrogate, such as `\\ud800`, is no character: no file can hold it.",
     "Write the character itself, or both halves of its escape together."),

    # What a spec says of a model.
    ("GC011", _SPEC, "a pattern matches nothing",
     "Every list item, brace branch, layer entry, exclusion and override has to match a site, and one does not.",
     "Correct the pattern as the hint says, or remove it. `graftc roles MODEL` lists the places of a model."),
    ("GC012", _SPEC, "a role is unknown",
     "The word is not in the vocabulary of roles.",
     "Take a role of the spec reference. Roles have no wildcards; braces are allowed: `attn.{q,v}`."),
    ("GC013", _SPEC, "another number of sites was expected",
     "`expect` counts the sites that are left after all narrowing, and the count differs.",
     "Compare the counts in the message with what was meant; then correct the target, or `expect`."),
    ("GC014", _SPEC, "the target selects no site",
     "Every pattern matches something, but `layers` and `exclude` together leave nothing.",
     "Widen `layers` or narrow `exclude`; the message counts what was left after each of them."),
    ("GC015", _SPEC, "a role is absent",
     "The model, or some of its layers, have no site of this role.",
     "`graftc roles MODEL` shows what was found, and why the rest was not. Name the place with `modules`, or limit the "
     "target with `layers` or `expect`."),
    ("GC016", _SPEC, "the method does not take such sites",
     "Each method adapts some kinds of site only; these are of another kind.",
     "Choose a role of a kind that the method takes (`graftc methods NAME`), or another method."),
    ("GC017", _SPEC, "the site cannot be adapted",
     "Its weight is not that of a linear map, or the model reads it as more than some rows of one stored tensor. Or a "
     "method needs the weight as adapted so far, and what stands there has none.",
     "Leave it out with `exclude`, or adapt a neighbouring place. Put the method that needs the weight first."),
    ("GC018", _SPEC, "tokens cannot be added",
     "The model does not say which table holds its tokens, or reads it in a way that new rows cannot be put into.",
     "Use a model with `get_input_embeddings` and `resize_token_embeddings`, as those of transformers. A `first` that "
     "leaves a gap has to be smaller."),
    ("GC019", _SPEC, "virtual tokens do not fit the model",
     "Virtual tokens stand among the word vectors, so the model has to take those in the place of token ids "
     "(`inputs_embeds`), and what comes behind its layers must need nothing else of them.",
     "Use a method that adds no virtual tokens, for example `prefix`; or leave out the input that the message names."),

    # Where a spec and a model do not go together.
    ("GC020", _SPEC, "the rank exceeds the layer",
     "A rank above the smaller side of a weight adds parameters, but no functions.",
     "Lower `rank`, or lower it for these sites only with `overrides`."),
    ("GC021", _SPEC, "two owners of the same rows",
     "Two adaptations change rows of one tensor that overlap in part, both train the tensor itself, or one would train "
     "what is constant to the other.",
     "Leave the place out of one of them, or name exactly the same rows in both, which stacks them. What trains the "
     "tensor itself goes first."),
    ("GC022", _SPEC, "a tied weight cannot be folded",
     "The tensor has another reader, which folding or training it in full would change as well.",
     "Leave the place out, or break the tie in the model before compiling. Unfolded, the model runs and exports."),
    ("GC023", _SPEC, "no gradient path",
     "A trainable tensor reaches no output of the model, so it would never learn.",
     "Leave the place out of the target or of `train`, or use a model class whose outputs depend on it."),
    ("GC024", _WARNING, "a weight has readers that are not adapted",
     "The place trains, but folding it would change the other readers, so that merging will be refused (GC022).",
     "Nothing, if the adapted model is never merged. Otherwise leave the place out, or break the tie in the model."),

    # Capturing and running a model.
    ("GC025", _WARNING, "an adaptation was trained without its steering",
     "Its method has an objective beside the loss, or does something between optimiser steps, and neither was called.",
     "Add `compiled.extra_loss()` to the loss and call `compiled.after_step()` after each optimiser step, or give the "
     "Trainer `compiled.callback()`."),
    ("GC026", _SPEC, "a schedule does not fit the training",
     "The adaptation changes over the whole training: nobody has said how many steps that is, or its phases leave no "
     "step between them.",
     "Call `compiled.begin(total_steps)` before training, or give the Trainer `compiled.callback()`. Shorten the "
     "phases of the spec where the message names them."),
    ("GC027", _SPEC, "there is nothing to untie",
     "No parameter of the modules that `untie` names is shared with another module.",
     "Leave the pattern out. `graftc check` warns of tied weights that are adapted (GC024)."),
    ("GC028", _SPEC, "untying changes the model",
     "The class scales or drops something where its config says that embeddings are tied.",
     "Leave `untie` out for this class. The adaptation trains all the same; it stays in the graph when deployed."),
    ("GC029", _SPEC, "adaptations cannot be combined",
     "They adapt other places, or the kind of combination needs factors or ranks that they do not have.",
     "Combine adaptations of the same target. `svd`, `ties` and `dare` take every method that folds into weights."),
    ("GC030", _FAILED, "the model cannot be captured",
     "`torch.export` could not turn the model into a graph, or its inputs cannot be told from its interface.",
     "Give `example_inputs` where the message asks for them. Python control flow that depends on values of tensors has "
     "to go from the model."),
    ("GC031", _FAILED, "the inputs cannot be captured",
     "No graph can be made for this combination of inputs, flags and sizes, or it does not read an adapted place.",
     "Leave out the input or flag that the message names, or compile with `example_inputs` like the call."),
    ("GC032", _FAILED, "the model cannot be loaded",
     "The folder, hub id or callable gave no model, or the model has no config to be rebuilt from.",
     "Give a transformers folder with config and weights, a hub id, or `package.module:callable`. `--meta` needs no "
     "weights."),
    ("GC033", _FAILED, "the graphs are for another dtype",
     "A capture holds for the element type in which the model was loaded.",
     "Load the base model in the other dtype and compile that; the adapter tensors can be copied over."),
    ("GC034", _SPEC, "there are no layers",
     "Checkpointing works on repeated layers, and the model has none.",
     "Leave out `checkpoint: layers`."),
    ("GC035", _SPEC, "gradients are missing",
     "The adaptation looks at the gradients of the step that was just taken, and there are none.",
     "Call `compiled.after_step()` after `optimizer.step()` and before `optimizer.zero_grad()`."),
    ("GC036", _SPEC, "adaptations do not fit together",
     "A composition names adaptations that are at other places, are made otherwise, or do what cannot be composed so.",
     "Compose adaptations of the same places; those of a bank are alike but for their names. The message says which "
     "one differs, and where."),
    ("GC037", _SPEC, "the rows of a batch cannot be told apart",
     "Each row of a batch is to be treated by itself, and at this place of the graph no axis counts the rows.",
     "Leave the place out of the target, or choose for the whole call instead of for each row."),
    ("GC038", _SPEC, "the choice does not fit the bank",
     "What a call chooses is no slot of the bank, or not one choice for each row.",
     "Give numbers from 0, or names of adaptations, one for each row; weights have a column for each slot."),
    ("GC039", _SPEC, "a token is not in the vocabulary",
     "The spec names a token by its id, and the model's table of embeddings has no such row.",
     "Take ids from the model's own tokenizer, for example `tokenizer.sep_token_id`."),
    ("GC040", _FAILED, "a pass broke an invariant",
     "The verifier found the graph wrong after a pass: a bug in graftc or in a method, not in the spec.",
     "Report it with the message, which names the pass and the node. Base weights are untouched."),
    ("GC041", _FAILED, "a graph is not the model",
     "Run on the same inputs, the captured graph and the model itself give different outputs, so nothing that is made "
     "of the graph would be an adaptation of the model.",
     "Where forward decides by values of tensors, by attributes that it changes, or by what lies outside of the "
     "module, write it in tensors and buffers. Where it should work, report the model's class and its inputs."),
    ("GC042", _WARNING, "forward assigns to its module",
     "A forward pass assigns attributes of a module: counters, caches, tensors that somebody reads later. A graph has "
     "no attributes: nothing is assigned when it runs, and what forward read of them is a constant.",
     "Keep what changes from call to call in buffers, and return what somebody reads later."),
    ("GC043", _SPEC, "a module of the tree has no life of its own",
     "The modules of a compiled model hold tensors; the graphs of the whole model compute what they do. A hook on one "
     "is never called, and a call has nothing to run.",
     "Hook, call or change the source model and compile that, or use the compiled model as a whole."),
    ("GC044", _SPEC, "a base tensor has been unfrozen",
     "Base tensors belong to the source model and are never trained in place: no artifact would have them.",
     "Name the module in `train:` of the spec, which trains a copy, or freeze it again."),
    ("GC045", _SPEC, "the method needs another optimiser",
     "The adaptation looks at what an optimiser of `graftc.optim` remembers of the gradients, and it trains with none.",
     "Train with the optimiser that the message names, and make it from the compiled model."),
    ("GC046", _WARNING, "moments are those of other entries",
     "Entries have been replaced, and the optimiser knows nothing of it: what it remembers at their places belongs to "
     "the entries that stood there.",
     "Train with an optimiser of `graftc.optim`, made from the compiled model."),
    ("GC047", _WARNING, "what is drawn while training is captured as off",
     "While it trains, the model draws outside of tensors which layers run (layerdrop) or which inputs are masked "
     "(SpecAugment). A graph cannot, and was captured without.",
     "Set `layerdrop` to 0 and `apply_spec_augment` to False before compiling if that is right; mask inputs before "
     "they go into the model."),
    ("GC048", _WARNING, "a constant of the graphs was set",
     "What an attribute of the source model was when it was captured is a constant of the graphs. Setting it on the "
     "compiled model changes no result.",
     "Set it on the source model, and compile that."),
    ("GC049", _WARNING, "a graph lacks something of forward",
     "A graph has the operators of a forward pass and torch's gradients of them. A backward pass of the model's own, "
     "hooks on gradients, and answers to whether gradients, autocast or inference mode are on are not in it.",
     "Nothing where the model is not trained through that place, or the answer makes no difference. Otherwise write it "
     "in tensors: `x + (f(x) - x).detach()` has another value than gradient."),

    # Folding and adapter tensors.
    ("GC050", _NO, "an adaptation cannot be folded",
     "It has no equivalent change of base weights, at least not at the place that the message names.",
     "Leave it out and fold the rest, or export the model unfolded."),
    ("GC051", _NO, "the certificate is over budget",
     "Folded and unfolded computations differ by more than allowed. Nothing was written.",
     "Look at the sites that the message names. A fold in 16 bits may need a larger `fold.budget.logits`, or the "
     "base in float32."),
    ("GC052", _NO, "the weights do not fit the class",
     "Folding had to add a tensor, such as a bias, for which the original class has no place.",
     "Export to ONNX or `.pt2`, which hold the added tensor, or leave the adaptation unfolded."),
    ("GC053", _FAILED, "adapter tensors do not fit",
     "Names and shapes must be those of `adapter_state_dict()`. Nothing was copied.",
     "Compile the spec that the tensors were trained with, against the same model."),
    ("GC054", _SPEC, "a merged model cannot train",
     "A merged model is for deployment and has no train mode.",
     "Train the compiled model that it came from; merging has left it as it was."),
    ("GC055", _SPEC, "a rank cannot be deployed",
     "The method of the adaptation has one rank only, or the rank is out of bounds.",
     "Name an adaptation whose method is trained for many ranks, such as `dylora`, and a rank from 1 to its own."),
    ("GC056", _SPEC, "examples cannot choose",
     "No adaptation has a selection that looks at examples, or there are no examples, or they give no loss.",
     "Name such a selection in the spec, as `fish`, and call `compiled.select(examples)` before training, with batches "
     "that have labels."),
    ("GC057", _SPEC, "there is no further training",
     "No adaptation takes another training after the one that the model is for.",
     "Merge, save or export the model. `compiled.stages_left` says how many trainings are to follow."),
    ("GC058", _FAILED, "the folder holds another recipe",
     "The recipe that was begun there has another spec, seed or model.",
     "Give every recipe a folder of its own, or remove the old one."),

    # Writing, packages and plugins.
    ("GC060", _FAILED, "the export failed",
     "The exporter failed, or what it wrote does not compute what the model computes. Nothing was left behind.",
     "The message has the exporter's reason. Try the other format, or newer versions of torch and onnxruntime."),
    ("GC061", _FAILED, "an optional package is missing",
     "The command needs a package that is installed as an extra only.",
     "Install the extra that the message names, for example `pip install 'graftc[export]'`."),
    ("GC062", _FAILED, "the demo's model or data is missing",
     "A pretrained model or the news texts are not installed.",
     "Run the commands that the message names; `make setup` does it too."),
    ("GC063", _FAILED, "the destination exists",
     "Nothing is overwritten unless that is asked for.",
     "Choose another path, remove what is there, or replace it with `--force` where the command has it."),
    ("GC064", _FAILED, "the destination cannot be written",
     "The folder above it is missing or read-only, or the disk is full. Nothing is left half-written.",
     "Make the folder, free some space, or choose another path."),
    ("GC065", _SPEC, "an adaptation cannot be an input",
     "It has folded into the weights, or the exported graph reads none of its tensors.",
     "Export the unfolded model (`--no-merge`), or leave the adaptation out of the inputs."),
    ("GC070", _FAILED, "a method is registered twice",
     "Two modules claim one tag; the message names both.",
     "Rename one of the methods, or uninstall one of the packages."),
    ("GC071", _FAILED, "a plugin is not a method",
     "An entry point of `graftc.methods` cannot be imported, or its modules lack a spec class, claims or method.",
     "Repair or uninstall the package that the message names."),
    ("GC072", _SPEC, "a compiled model does not do that",
     "Models of other libraries have such a method or option, and a model of captured graphs has not.",
     "Do it in the way that the message names."),
    ("GC073", _SPEC, "the argument is of another kind",
     "What was given is nothing that this function takes: the name of a model instead of the model, a compiled model "
     "instead of its base, a config of peft instead of a spec, names where all adaptations are meant.",
     "Give what the message names."),
    ("GC074", _SPEC, "a model cannot be pickled",
     "Its graphs are code, which would run wherever the file is read.",
     "Use `model.save(path)` for all of it, `torch.save(compiled.state_dict(), path)` for what trains, and "
     "`copy.deepcopy(model)` for a copy."),

    # Artifacts.
    ("GC080", _FAILED, "there is no artifact",
     "The path does not exist, or it is a folder without a `manifest.json` of graftc.",
     "Give the folder that `graftc compile` or `compiled.save` wrote."),
    ("GC081", _FAILED, "the artifact is of a newer format",
     "A newer release wrote it, and this one does not know how to read it.",
     "Update graftc."),
    ("GC082", _FAILED, "the artifact is damaged",
     "The content of a file is not what the manifest says: it was cut short or changed after writing.",
     "Copy the artifact again from where it came. `graftc verify DIR` checks every file."),
    ("GC083", _FAILED, "a file of the artifact is missing",
     "The manifest names a file that is not in the folder.",
     "Copy the whole folder, not single files of it."),
    ("GC084", _FAILED, "tensors of the artifact are not its own",
     "The names, types, shapes or values of the stored tensors are not those that the manifest lists.",
     "Restore `adapters.safetensors` from the copy that belongs to this artifact; tensors of another one do not fit."),
    ("GC085", _FAILED, "the artifact is not safe to read",
     "It holds links, names that lead out of its folder, or files that the manifest does not list.",
     "Do not use an artifact of unknown origin. In one of your own, remove the files that the message names."),
    ("GC086", _FAILED, "the base is not there",
     "An artifact holds adapters only. The model that it adapts was moved, was made in Python, or would be loaded by "
     "code that the artifact names, which is never run.",
     "Name the base with `--model MODEL`, or in Python with `graftc.load(path, model)`."),
    ("GC087", _FAILED, "the base is another model",
     "The config or the weights of the model are not those that were adapted.",
     "Give the model, in the revision, that the spec was compiled against."),
    ("GC088", _FAILED, "the base compiles to other places",
     "With the installed versions of the libraries the spec adapts other places, or gives other graphs, than when it "
     "was saved.",
     "Install the versions of torch and transformers with which it was saved, or compile and train anew."),
    ("GC089", _FAILED, "weights are missing",
     "The checkpoint lacks tensors of the model, or has them in other sizes. Loading draws those at random, which is "
     "of use only where all of such a tensor is trained, as a new head is.",
     "Give a complete checkpoint, or train the new tensors in full: `train: [classifier]`."),

    # The command line, and looking at graphs.
    ("GC090", _SPEC, "the command line is misused",
     "A command, argument or option is missing, unknown or contradicts another.",
     "`graftc COMMAND --help` shows how the command is used."),
    ("GC091", _SPEC, "there is nothing of that name",
     "The graph has no node, place or tensor of this name, or several; or the artifact holds no graphs.",
     "Take one of the names that the message suggests, or look at the whole graph with `graftc inspect DIR --graph`."),
    ("GC092", _WARNING, "a graph cannot be written",
     "It holds an operator or an output class that is not of torch, transformers or graftc, which no file can name.",
     "Nothing, if the artifact is to be loaded: that captures the model anew. Inspecting it needs its base."),
    ("GC099", _FAILED, "an unexpected failure",
     "A bug in graftc, or a library that failed in a way that graftc does not know.",
     "Run the command again with `GRAFTC_DEBUG=1` in the environment, which shows the traceback, and report it."),
)
# fmt: on

CATALOGUE: dict[str, Code] = {
    code: Code(code, title, explanation, remedy, exit_code) for code, exit_code, title, explanation, remedy in _TABLE
}
"""Every code, in order."""
