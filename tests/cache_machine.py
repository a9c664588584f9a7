"""A machine that does with a cache whatever people do, at random, and recomputes every step from the whole text.

Its state is a text, the cache of the first of its tokens, and hooks on layers. Each step changes one of them, and holds
what the model gives against the same model without a cache, and, where the adaptations fold, against a plain model of
transformers that has them in its weights.
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
from graftc.testing.perturb import perturb
from tests.language_models import VOCABULARY, language_model

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
    """A compiled model, and plain ones with its adaptations: one for each slot of its bank, one where all folds, none
    otherwise."""
    family, spec = SETUPS[setup]
    compiled = graftc.compile(spec, language_model(family)).eval()
    perturb(compiled, 0.3)
    if "compose" in spec:
        return compiled, [compiled.fix(name).merge().to_transformers() for name in "ab"]
    return compiled, [compiled.merge().to_transformers()] if setup in ("lora", "windows") else []


@dataclass
class CacheMachine:
    """One run.

    Attributes:
        setup: which model.
        seed: of what it does.
        done: steps by their name.
        worst: the largest difference of logits, over the largest of them.
        log: what it has done, for whoever looks for a failure.
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

    # What the text and its cache are.

    def begin(self) -> None:
        """A new text, with padding on one side or none."""
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
    def held(self) -> int:
        """Tokens in the cache."""
        return 0 if self.cache is None else int(self.cache.get_seq_length())

    def grown(self, ids: Tensor) -> None:
        more = ids.shape[1] - self.mask.shape[1]
        self.ids, self.mask = ids, torch.cat([self.mask, self.mask.new_ones(len(self.mask), more)], 1)

    def rows(self, indices: list[int]) -> None:
        index = torch.tensor(indices)
        self.ids, self.mask, self.chosen = self.ids[index], self.mask[index], self.chosen[index]

    # What models compute for it.

    def given(self, start: int) -> dict[str, Any]:
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        found = {"input_ids": self.ids[:, start:], "attention_mask": self.mask, "position_ids": positions[:, start:]}
        return {**found, **self.choice()}

    def choice(self) -> dict[str, Any]:
        return {"adapter_ids": self.chosen} if self.bank else {}

    @torch.no_grad()
    def expected(self) -> Tensor:
        """The logits of the whole text, without a cache."""
        found: Tensor = self.model(**self.given(0), use_cache=False).logits
        given = {name: value for name, value in self.given(0).items() if name != "adapter_ids"}
        if self.plain:
            each = torch.stack([plain(**given, use_cache=False).logits for plain in self.plain])
            slots = self.chosen if self.bank else torch.zeros_like(self.chosen)
            self.close(found, each[slots, torch.arange(len(slots))], 0)
        return found

    def close(self, found: Tensor, expected: Tensor, start: int) -> None:
        real = self.mask[:, start:].bool()
        difference = float((found - expected)[real].abs().max() / expected[real].abs().max()) if real.any() else 0.0
        self.worst = max(self.worst, difference)
        assert difference <= TOLERANCE, f"{difference:.1e} in {self.setup}, seed {self.seed}: {self.log[-12:]}"

    # Steps.

    def step(self) -> None:
        """One of them."""
        if self.ids.shape[1] > LONGEST:
            self.begin()
        names = [name for name in dir(self) if name.startswith("do_")]
        name = self.random.choice(names)
        self.log.append(f"{name}[{tuple(self.ids.shape)}, {self.held} held]")
        self.done[name.removeprefix("do_")] += bool(getattr(self, name)() is not False)

    def do_call(self) -> Any:
        """Some tokens more, by hand."""
        start = self.held
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
        assert self.cache is None or outputs.cache is self.cache
        self.cache = outputs.cache
        assert self.held == self.ids.shape[1]
        self.close(outputs.logits, self.expected()[:, start:], start)
        return None

    def do_default_call(self) -> Any:
        """The whole text anew, with nothing said of a cache."""
        with torch.no_grad():
            outputs = self.model(**self.given(0))
        self.close(outputs.logits, self.expected(), 0)
        if not self.virtual:
            self.cache = outputs.cache
        return None

    def generated(self, **options: Any) -> Any:
        if not bool(self.mask[:, -1].all()) or self.held >= self.ids.shape[1]:
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
        found = self.model.generate(self.ids, **given, **own, cache=self.cache)
        assert torch.equal(found.sequences, expected.sequences), f"{self.setup}, seed {self.seed}: {self.log[-12:]}"
        assert self.cache is None or found.cache is self.cache
        self.cache = found.cache
        if beams > 1:
            self.rows([row for row in range(len(self.ids)) for _ in range(beams)])
        self.grown(found.sequences)
        assert self.held == self.ids.shape[1] - 1
        if beams > 1:  # the loop chooses once more after its last step, and leaves the cache's rows as they were
            self.cache = None
        if beams == 1:
            logits, other = torch.stack(found.logits, 1), torch.stack(expected.logits, 1)
            start = self.ids.shape[1] - count
            self.close(logits, other, start)

    def do_greedy(self) -> Any:
        """Generated tokens."""
        self.generated()

    def do_penalised(self) -> Any:
        """The same with what looks at the text."""
        options = [{"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}, {"bad_words_ids": [[7], [9, 11]]}]
        self.generated(**self.random.choice(options))

    def do_sampled(self) -> Any:
        """Tokens that are drawn."""
        self.generated(do_sample=True, top_k=20, temperature=1.2)

    def do_beams(self) -> Any:
        """Two beams, each of which becomes a row."""
        if len(self.ids) * 2 > MOST_ROWS:
            return False
        self.generated(num_beams=2, num_return_sequences=2)
        return None

    def do_crop(self) -> Any:
        """Tokens are taken back, from the cache or from both."""
        if self.held < 2:
            return False
        count = self.random.randint(1, min(4, self.held - 1))
        self.cache.crop(-count)
        if self.random.random() < 0.7:
            self.ids, self.mask = self.ids[:, : self.held + 1], self.mask[:, : self.held + 1]
        return None

    def do_reorder(self) -> Any:
        """Rows change places, and some come twice."""
        indices = [self.random.randrange(len(self.ids)) for _ in range(len(self.ids))]
        if self.held:
            self.cache.reorder_cache(torch.tensor(indices))
        self.rows(indices)

    def do_select(self) -> Any:
        """Some rows stay."""
        indices = sorted(self.random.sample(range(len(self.ids)), self.random.randint(1, len(self.ids))))
        if self.held:
            self.cache.batch_select_indices(torch.tensor(indices))
        self.rows(indices)

    def do_repeat(self) -> Any:
        """Each row twice."""
        if len(self.ids) * 2 > MOST_ROWS:
            return False
        if self.held:
            self.cache.batch_repeat_interleave(2)
        self.rows([row for row in range(len(self.ids)) for _ in range(2)])
        return None

    def do_copy(self) -> Any:
        """The cache is copied, or goes through a file."""
        if self.cache is None:
            return False
        self.cache = copy.deepcopy(self.cache) if self.random.random() < 0.5 else pickle.loads(pickle.dumps(self.cache))
        return None

    def do_drop(self) -> Any:
        """The text goes on without its cache."""
        self.cache = None

    def do_hook(self) -> Any:
        """A layer is scaled from now on, or no more; what was computed before is worth nothing then."""
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
        """Nothing is scaled."""
        while _handles:
            _handles.pop().remove()


_handles: list[Any] = []


def run(setup: str, seed: int, steps: int) -> CacheMachine:
    """A machine after some steps."""
    machine = CacheMachine(setup, seed)
    try:
        for _ in range(steps):
            machine.step()
    finally:
        machine.unhook()
    return machine
