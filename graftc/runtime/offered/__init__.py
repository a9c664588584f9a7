"""The features that a compiled model offers besides calls, with the class that implements each of them.

Modules that are slow to import and not needed for compiling and training are imported on first use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pkgutil import resolve_name
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from graftc.runtime.export.exporting import Exporting
from graftc.runtime.model.adapted import AdaptedRunner
from graftc.runtime.model.generation import GENERATING

if TYPE_CHECKING:  # the classes that the table names
    from graftc.runtime.deploy.combine import Combining as Combining
    from graftc.runtime.deploy.convert import Converting as Converting
    from graftc.runtime.deploy.merging import Merging as Merging
    from graftc.runtime.export.exporting import Exporting as Exporting
    from graftc.runtime.offered.adapters import Adapters as Adapters
    from graftc.runtime.offered.banks import Choosing as Choosing
    from graftc.runtime.offered.checkpointing import Checkpointing as Checkpointing
    from graftc.runtime.offered.ecosystem import Ecosystem as Ecosystem
    from graftc.runtime.offered.inspecting import Inspecting as Inspecting
    from graftc.runtime.offered.pages_and_cards import Presenting as Presenting
    from graftc.runtime.offered.reference_model import Referring as Referring
    from graftc.runtime.offered.reusing import Reusing as Reusing
    from graftc.runtime.offered.saving import Saving as Saving
    from graftc.runtime.offered.scoring import TokenScoring as TokenScoring
    from graftc.runtime.offered.state_dicts import StateDicts as StateDicts
    from graftc.runtime.offered.warming import Warming as Warming
    from graftc.runtime.training.initialising import Initialising as Initialising
    from graftc.runtime.training.selecting import Selecting as Selecting
    from graftc.runtime.training.steering import TrainingSteering as TrainingSteering

PARTS: Mapping[str, str] = MappingProxyType(
    {
        "offered.adapters:Adapters": "add disable disabled enable load_adapter remove rename",
        "offered.banks:Choosing": "activate active bank fix train_only",
        "training.steering:TrainingSteering": "after_step begin callback deploy_rank extra_loss rank_pattern "
        "site_figures skip_step steps_left uninitialised unselected warn_of_unsteered",
        "training.selecting:Selecting": "advance joined select stages_left",
        "training.initialising:Initialising": "initialise",
        "offered.scoring:TokenScoring": "token_log_probs",
        "offered.checkpointing:Checkpointing": "activation_checkpointing_disable activation_checkpointing_enable "
        "gradient_checkpointing_disable gradient_checkpointing_enable is_activation_checkpointing "
        "is_gradient_checkpointing",
        "model.generation:Generating": " ".join(GENERATING),
        "offered.inspecting:Inspecting": "activations diff explain lowering model_explorer print_graph report tree",
        "offered.pages_and_cards:Presenting": "card view",
        "offered.reference_model:Referring": "reference trainer",
        "deploy.merging:Merging": "merge merge_partially merged_state_dict",
        "deploy.combine:Combining": "combine",
        "deploy.convert:Converting": "convert",
        "export.exporting:Exporting": "export",
        "offered.saving:Saving": "save",
        "offered.reusing:Reusing": "certify_reuse",
        "offered.warming:Warming": "warm_up",
        "offered.state_dicts:StateDicts": "adapter_state_dict full_state_dict load_adapter_state_dict record",
        "offered.ecosystem:Ecosystem": "add_model_tags disable_input_require_grads enable_input_require_grads "
        "floating_point_ops get_decoder get_input_embeddings get_memory_footprint get_nb_trainable_parameters "
        "get_output_embeddings num_parameters print_trainable_parameters save_pretrained tie_weights",
    }
)
"""The classes that implement features, in modules of `graftc.runtime`, each with the names that it offers."""


def _part(kind: str, runner: AdaptedRunner) -> Any:
    return resolve_name(f"graftc.runtime.{kind}")(runner)


OFFERED: Mapping[str, Callable[[AdaptedRunner], Any]] = MappingProxyType(
    {name: partial(_part, kind) for kind, names in PARTS.items() for name in names.split()}
)
"""The names that a compiled model offers besides its Runner's own, each with a function that creates its object."""
