"""A machine that performs random operations on a cache, as users would, and recomputes each step from the whole text.

Its state is a text, the cache of its first tokens, and hooks on layers. Each step changes one of them and compares the
outputs of the model with those of the same model without a cache and, if the adaptations fold, with those of a plain
transformers model that has them in its weights.
"""

from __future__ import annotations

import copy
import pickle
import random
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

import graftc
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing.perturbing import perturb
from tests.kit.language_models import CACHE, VOCABULARY, language_model

TOLERANCE = 2e-4
"""Of logits, over the largest of them."""
LONGEST, MOST_ROWS = 40, 4
_LORA = {"method": "lora", "rank": 2, "target": {"role": ["attn.q", "attn.v", "ffn.up"]}}
_PREFIX = {"method": "prefix", "length": 4}
SETUPS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {"adapt": [_LORA]}),
    "bank": ("llama", {"adapt": [{**_LORA, "name": n} for n in "ab"], "compose": {"bank": ["a", "b"]}}),
    "shifted prefix": ("llama", {"adapt": [{**_PREFIX, "positions": "shifted"}]}),
    "prefix": ("gpt2", {"adapt": [_PREFIX]}),
    "prefix before a window": ("mistral", {"adapt": [{**_PREFIX, "positions": "shifted", "window": "masked"}]}),
    "prefix through a window": ("mistral", {"adapt": [{**_PREFIX, "window": "visible"}]}),
    "virtual tokens": ("gpt2", {"adapt": [{"method": "prompt", "length": 3}]}),
    "windows": ("gemma3", {"adapt": [_LORA]}),
    "bottleneck": ("gpt2", {"adapt": [{"method": "bottleneck"}]}),
}


@cache
def models(setup: str) -> tuple[Any, list[Any]]:
    """Return a compiled model and plain models with its adaptations folded in.

    There is one plain model for each slot of a bank, one if everything folds, and none otherwise.
    """
    family, spec = SETUPS[setup]
    compiled = graftc.compile(spec, language_model(family)).eval()
    perturb(compiled, 0.3)
    if "compose" in spec:
        return compiled, [compiled.fix(name).merge().to_transformers() for name in "ab"]
    return compiled, [compiled.merge().to_transformers()] if setup in ("lora", "windows") else []


@dataclass
class CacheMachine:
    """One run of random steps.

    Attributes:
        setup: the name of the setup in `SETUPS`.
        seed: the seed of the random steps.
        done: the number of steps taken, by name.
        worst: the largest difference of logits so far, relative to the largest of them.
        log: the steps in order, for debugging a failure.
    """

    setup: str
    seed: int
    done: Counter[str] = field(default_factory=Counter)
    worst: float = 0.0
    log: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model, self.plain = models(self.setup)
        self.random = random.Random(self.seed)
        self.virtual = bool(self.model.spec.adapt[0].virtual_tokens())
        self.bank = bool(self.model.spec.compose)
        path = "transformer.h" if hasattr(self.model, "transformer") else "model.layers"
        self.layers = [f"{path}.{number}" for number in range(2)]
        self.hooks: dict[str, float] = {}
        self.begin()

    # The text and its cache.

    def begin(self) -> None:
        """Start a new text, padded on one side or not at all."""
        rows, length = self.random.randint(1, 3), self.random.randint(4, 12)
        self.ids = self._tokens(rows, length)
        self.mask = torch.ones_like(self.ids)
        side = self.random.choice(["left", "right", "none"])
        for row in range(1, rows):
            count = self.random.randint(0, length - 2)
            if side != "none" and count:
                self.mask[row, slice(0, count) if side == "left" else slice(length - count, length)] = 0
        self.ids = self.ids * self.mask
        self.chosen = torch.tensor([self.random.randint(0, 1) for _ in range(rows)])
        self.cache: Any = None

    def _tokens(self, rows: int, count: int) -> Tensor:
        return torch.tensor([[self.random.randrange(3, VOCABULARY) for _ in range(count)] for _ in range(rows)])

    @property
    def cached(self) -> int:
        """The number of tokens in the cache."""
        return 0 if self.cache is None else int(self.cache.get_seq_length())

    def grown(self, ids: Tensor) -> None:
        more = ids.shape[1] - self.mask.shape[1]
        self.ids, self.mask = ids, torch.cat([self.mask, self.mask.new_ones(len(self.mask), more)], 1)

    def rows(self, indices: list[int]) -> None:
        index = torch.tensor(indices)
        self.ids, self.mask, self.chosen = self.ids[index], self.mask[index], self.chosen[index]

    # Outputs of the models.

    def given(self, start: int) -> dict[str, Any]:
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        inputs = {"input_ids": self.ids[:, start:], "attention_mask": self.mask, "position_ids": positions[:, start:]}
        return {**inputs, **self.choice()}

    def choice(self) -> dict[str, Any]:
        return {"adapter_ids": self.chosen} if self.bank else {}

    @torch.no_grad()
    def expected(self) -> Tensor:
        """Return the logits of the whole text, computed without a cache."""
        logits: Tensor = self.model(**self.given(0), use_cache=False).logits
        given = {name: value for name, value in self.given(0).items() if name != "adapter_ids"}
        if self.plain:
            each = torch.stack([plain(**given, use_cache=False).logits for plain in self.plain])
            slots = self.chosen if self.bank else torch.zeros_like(self.chosen)
            self.close(logits, each[slots, torch.arange(len(slots))], 0)
        return logits

    def close(self, actual: Tensor, expected: Tensor, start: int) -> None:
        real = self.mask[:, start:].bool()
        difference = float((actual - expected)[real].abs().max() / expected[real].abs().max()) if real.any() else 0.0
        self.worst = max(self.worst, difference)
        assert difference <= TOLERANCE, f"{difference:.1e} in {self.setup}, seed {self.seed}: {self.log[-12:]}"

    # Steps.

    def step(self) -> None:
        """Take one random step."""
        if self.ids.shape[1] > LONGEST:
            self.begin()
        names = [name for name in dir(self) if name.startswith("do_")]
        name = self.random.choice(names)
        self.log.append(f"{name}[{tuple(self.ids.shape)}, {self.cached} held]")
        self.done[name.removeprefix("do_")] += bool(getattr(self, name)() is not False)

    def do_call(self) -> Any:
        """Call the model on a few more tokens."""
        start = self.cached
        self.grown(torch.cat([self.ids, self._tokens(len(self.ids), self.random.randint(1, 3))], 1))
        if self.virtual:
            try:
                self.model(**self.given(start), cache=self.cache, use_cache=True)
            except GraftError as error:
                assert error.code == "GC141"
                return None
            raise AssertionError("virtual tokens are in front of the whole text")
        with torch.no_grad():
            outputs = self.model(**self.given(start), cache=self.cache, use_cache=True)
        assert self.cache is None or outputs[CACHE] is self.cache
        self.cache = outputs[CACHE]
        assert self.cached == self.ids.shape[1]
        self.close(outputs.logits, self.expected()[:, start:], start)
        return None

    def do_default_call(self) -> Any:
        """Call the model on the whole text again, without any argument about a cache."""
        with torch.no_grad():
            outputs = self.model(**self.given(0))
        self.close(outputs.logits, self.expected(), 0)
        if not self.virtual:
            self.cache = outputs[CACHE]
        return None

    def generated(self, **options: Any) -> Any:
        if not bool(self.mask[:, -1].all()) or self.cached >= self.ids.shape[1]:
            self.grown(torch.cat([self.ids, self._tokens(len(self.ids), 1)], 1))
        count = self.random.randint(1, 4)
        given = {"attention_mask": self.mask, "max_new_tokens": count, "min_new_tokens": count, **self.choice()}
        seed = self.random.randrange(10**6)
        own = {"return_dict_in_generate": True, "output_logits": True, "pad_token_id": 0, **options}
        torch.manual_seed(seed)
        expected = self.model.generate(self.ids, **given, **own, use_cache=False)
        torch.manual_seed(seed)
        beams = options.get("num_beams", 1)
        if self.cache is not None and beams > 1:
            self.cache.batch_repeat_interleave(beams)
        outputs = self.model.generate(self.ids, **given, **own, cache=self.cache)
        assert torch.equal(outputs.sequences, expected.sequences), f"{self.setup}, seed {self.seed}: {self.log[-12:]}"
        assert self.cache is None or outputs[CACHE] is self.cache
        self.cache = outputs[CACHE]
        if beams > 1:
            self.rows([row for row in range(len(self.ids)) for _ in range(beams)])
        self.grown(outputs.sequences)
        assert self.cached == self.ids.shape[1] - 1
        if beams > 1:  # after its last step the loop chooses beams once more without reordering the cache
            self.cache = None
        if beams == 1:
            logits, other = torch.stack(outputs.logits, 1), torch.stack(expected.logits, 1)
            start = self.ids.shape[1] - count
            self.close(logits, other, start)

    def do_greedy(self) -> Any:
        """Generate tokens greedily."""
        self.generated()

    def do_penalised(self) -> Any:
        """Generate tokens greedily with a logits processor that reads the text."""
        options = [{"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}, {"bad_words_ids": [[7], [9, 11]]}]
        self.generated(**self.random.choice(options))

    def do_sampled(self) -> Any:
        """Generate sampled tokens."""
        self.generated(do_sample=True, top_k=20, temperature=1.2)

    def do_beams(self) -> Any:
        """Generate with two beams, each of which becomes a row."""
        if len(self.ids) * 2 > MOST_ROWS:
            return False
        self.generated(num_beams=2, num_return_sequences=2)
        return None

    def do_crop(self) -> Any:
        """Remove tokens from the cache, or from both the cache and the text."""
        if self.cached < 2:
            return False
        count = self.random.randint(1, min(4, self.cached - 1))
        self.cache.crop(-count)
        if self.random.random() < 0.7:
            self.ids, self.mask = self.ids[:, : self.cached + 1], self.mask[:, : self.cached + 1]
        return None

    def do_reorder(self) -> Any:
        """Permute the rows, some of which may be repeated."""
        indices = [self.random.randrange(len(self.ids)) for _ in range(len(self.ids))]
        if self.cached:
            self.cache.reorder_cache(torch.tensor(indices))
        self.rows(indices)

    def do_select(self) -> Any:
        """Keep only some of the rows."""
        indices = sorted(self.random.sample(range(len(self.ids)), self.random.randint(1, len(self.ids))))
        if self.cached:
            self.cache.batch_select_indices(torch.tensor(indices))
        self.rows(indices)

    def do_repeat(self) -> Any:
        """Repeat each row twice."""
        if len(self.ids) * 2 > MOST_ROWS:
            return False
        if self.cached:
            self.cache.batch_repeat_interleave(2)
        self.rows([row for row in range(len(self.ids)) for _ in range(2)])
        return None

    def do_copy(self) -> Any:
        """Replace the cache by a deep copy or by one that has been pickled and unpickled."""
        if self.cache is None:
            return False
        self.cache = copy.deepcopy(self.cache) if self.random.random() < 0.5 else pickle.loads(pickle.dumps(self.cache))
        return None

    def do_drop(self) -> Any:
        """Drop the cache and keep the text."""
        self.cache = None

    def do_hook(self) -> Any:
        """Start or stop scaling a layer, and drop the cache, which the change makes invalid."""
        path = self.random.choice(self.layers)
        if path in self.hooks:
            del self.hooks[path]
        else:
            self.hooks[path] = self.random.choice([0.6, 0.8, 1.3])
        self.cache = None
        self.unhook()
        for model in (self.model, *self.plain):
            for where, factor in self.hooks.items():
                self._hook(model.get_submodule(where), factor)

    def _hook(self, layer: Any, factor: float) -> None:
        def scale(module: Any, args: Any, output: Any) -> Any:
            return (output[0] * factor, *output[1:]) if isinstance(output, tuple) else output * factor

        _handles.append(layer.register_forward_hook(scale))

    def unhook(self) -> None:
        """Remove all scaling hooks."""
        while _handles:
            _handles.pop().remove()


_handles: list[Any] = []


def run(setup: str, seed: int, steps: int) -> CacheMachine:
    """Return a machine that has taken some steps."""
    machine = CacheMachine(setup, seed)
    try:
        for _ in range(steps):
            machine.step()
    finally:
        machine.unhook()
    return machine
