"""The features of a compiled model besides calls, and the plain object that implements each, built from its Runner.

Modules that take time to import and are not needed to compile and train are imported on first use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from graftc.runtime.model.adapted import AdaptedRunner
from graftc.runtime.model.generation import GENERATING, Generating
from graftc.runtime.offered.scoring import TokenScoring
from graftc.runtime.offered.state import StateDicts
from graftc.runtime.training.selecting import Selecting
from graftc.runtime.training.steering import TrainingSteering


def adapters_of(runner: AdaptedRunner) -> Any:
    from graftc.runtime.offered.adapters import Adapters

    return Adapters(runner)


def banks_of(runner: AdaptedRunner) -> Any:
    from graftc.runtime.offered.banks import Choosing

    return Choosing(runner)


def inspecting_of(runner: AdaptedRunner) -> Any:
    from graftc.runtime.offered.inspecting import Inspecting

    return Inspecting(runner)


def presenting_of(runner: AdaptedRunner) -> Any:
    from graftc.runtime.offered.pages_and_cards import Presenting

    return Presenting(runner)


def checkpointing_of(runner: AdaptedRunner) -> Any:
    from graftc.runtime.offered.checkpointing import Checkpointing

    return Checkpointing(runner)


def ecosystem_of(runner: AdaptedRunner) -> Any:
    from graftc.runtime.offered.ecosystem import Ecosystem

    return Ecosystem(runner)


def referring_of(runner: AdaptedRunner) -> Any:
    from graftc.runtime.offered.reference_model import Referring

    return Referring(runner)


def merging_of(runner: AdaptedRunner) -> Any:
    from graftc.runtime.deploy.merging import Merging

    return Merging(runner)


def combining_of(runner: AdaptedRunner) -> Any:
    from graftc.runtime.deploy.combine import Combining

    return Combining(runner)


def converting_of(runner: AdaptedRunner) -> Any:
    from graftc.runtime.deploy.convert import Converting

    return Converting(runner)


def exporting_of(runner: AdaptedRunner) -> Any:
    from graftc.runtime.export.exporting import Exporting

    return Exporting(runner)


def warming_of(runner: AdaptedRunner) -> Any:
    from graftc.runtime.offered.warming import Warming

    return Warming(runner)


def saving_of(runner: AdaptedRunner) -> Any:
    from graftc.runtime.offered.saving import Saving

    return Saving(runner)


_PARTS: Mapping[Callable[[AdaptedRunner], Any], str] = MappingProxyType(
    {
        adapters_of: "add disable disabled enable load_adapter remove rename",
        banks_of: "activate active fix train_only",
        TrainingSteering: "after_step begin callback deploy_rank extra_loss rank_pattern site_figures skip_step "
        "steps_left unselected warn_of_unsteered",
        Selecting: "advance joined select stages_left",
        TokenScoring: "token_log_probs",
        checkpointing_of: "activation_checkpointing_disable activation_checkpointing_enable "
        "gradient_checkpointing_disable gradient_checkpointing_enable is_activation_checkpointing "
        "is_gradient_checkpointing",
        Generating: " ".join(GENERATING),
        inspecting_of: "activations diff explain lowering model_explorer print_graph report tree",
        presenting_of: "card view",
        referring_of: "reference trainer",
        merging_of: "merge merge_partially merged_state_dict",
        combining_of: "combine",
        converting_of: "convert",
        exporting_of: "export",
        saving_of: "save",
        warming_of: "warm_up",
        StateDicts: "adapter_state_dict full_state_dict load_adapter_state_dict record",
        ecosystem_of: "add_model_tags disable_input_require_grads enable_input_require_grads floating_point_ops "
        "get_decoder get_input_embeddings get_memory_footprint get_nb_trainable_parameters get_output_embeddings "
        "num_parameters print_trainable_parameters save_pretrained tie_weights",
    }
)
"""The functions that create the parts, each with the names of what the part offers."""
OFFERED: Mapping[str, Callable[[AdaptedRunner], Any]] = MappingProxyType(
    {name: part for part, names in _PARTS.items() for name in names.split()}
)
"""The names that a compiled model offers besides its Runner's own, each with the function that creates its part."""
