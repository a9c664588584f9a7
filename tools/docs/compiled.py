"""The reference page of compiled models: the class, and what else such a model offers, from the table of features."""

from __future__ import annotations

import graftc
from graftc.runtime.offered import PARTS
from tools.docs.markdown import header

__all__ = ["render_compiled"]

_TITLES = {
    "deploy.combine:Combining": "Combining adapters",
    "deploy.convert:Converting": "Converting",
    "model.generation:Generating": "Generation",
    "offered.adapters:Adapters": "Several adapters",
    "offered.banks:Choosing": "Banks",
    "offered.checkpointing:Checkpointing": "Recomputing",
    "offered.ecosystem:Ecosystem": "What other libraries expect",
    "offered.inspecting:Inspecting": "Inspecting",
    "offered.pages_and_cards:Presenting": "Pages and cards",
    "offered.reference_model:Referring": "Trainers with a reference model",
    "offered.reusing:Reusing": "Reuse of caches",
    "offered.scoring:TokenScoring": "Log-probabilities",
    "offered.state_dicts:StateDicts": "State",
    "offered.warming:Warming": "Warming up",
    "training.initialising:Initialising": "Initial values from examples",
    "training.selecting:Selecting": "Recipes in stages",
    "training.steering:TrainingSteering": "Steering of training",
}
_HEAD = """\
`graftc.compile`, `graftc.load`, `graftc.import_peft` and `graftc.tune` return a `Compiled`.

::: graftc.Compiled

## Offered attributes

A compiled model also has the following, unless the source model has a child of the same name. It passes on
everything else that transformers' generation reads, such as `config` and `generation_config`.
"""


def render_compiled() -> str:
    """Return the page; each attribute occurs once."""
    own = {name for kind in graftc.Compiled.__mro__ if kind.__module__.startswith("graftc.") for name in vars(kind)}
    sections = [f"{header('Compiled models')}\n{_HEAD}"]
    for part, offered in PARTS.items():
        names = [name for name in offered.split() if name not in own]
        if not names:
            continue
        sections.append(f"""\
### {_TITLES[part]}

::: graftc.runtime.{part.replace(":", ".")}
    options:
      heading_level: 4
      members: [{", ".join(names)}]
      show_docstring_description: false
      show_root_heading: false
      show_root_toc_entry: false
""")
    return "\n".join(sections)
