"""A thousand changed folders of models, tokenizers, generation settings and quantised checkpoints, opened and run.

What loads gives what transformers gives from the same folder, or what the quantised format means if its library is not
installed; everything else gives a code. Time and memory are bounded and nothing is written, as the interpreter's audit
hooks see it. ``make fuzz`` runs a twentieth of ``FUZZ``; the ordinary tests run a sample.
"""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from graftc.applications.chat.answering import answer, prompt_ids
from graftc.applications.chat.opening import TextModel, open_text_model, tokenizer_of
from graftc.records.applications.answers import Settings
from graftc.runtime.sources.models import quiet_transformers
from graftc.specs.errors.diagnostics import GraftError
from tests.cli.speakers import save_model, save_tokenizer
from tests.gates.counts import MODELS
from tests.gates.file_mutations import json_file, mutated_quantisation, tensor_file
from tests.gates.mutate import change, flip
from tests.gates.test_fuzz_artifacts import watched
from tests.kit.users import snapshot
from tests.runtime.sources.quantised.readers import require_values
from tests.runtime.sources.quantised.writers import FORMATS, llama, write

SAMPLE = 24
SECONDS, MEMORY = 2.0, 300 * 2**20
MESSAGES = [{"role": "user", "content": "w1 w2 é"}]
TEXTS = ("w1 w2", "w3 user: é", "")
KINDS = ("tokenizer", "settings", "config", "quantised")
QUANTISED = (
    *("fp8 blocks", "gptq 4 by activations", "hqq 4", "compressed 4 asymmetric", "awq", "fp8 one scale", "nf4"),
    *("gptq 8 symmetric", "mxfp8", "compressed int8", "hqq 4 across", "int8", "compressed fp8", "nf4 twice"),
)
"""Formats, in the order in which they are changed: a sample has the first of them."""
BITS_AND_BYTES: dict[str, dict[str, object]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4 twice": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
SETTINGS: dict[str, tuple[object, ...]] = {
    "do_sample": (True, False, 1, "yes"),
    "temperature": (0.0, -1.0, 0.5, 1e-30, 1e30, "hot", None),
    "top_k": (0, 1, -3, 10**9, 2.5, "x"),
    "top_p": (0.0, 0.5, 1.0, 7.0, -1, "x"),
    "num_beams": (1, 2, 0, -1, 10**6, 2.0, "x", [2]),
    "num_return_sequences": (1, 2, 10**6, 0, "x"),
    "repetition_penalty": (1.3, 0.0, -2.0, "x", 1e300),
    "no_repeat_ngram_size": (2, 10**9, -1, "x"),
    "bad_words_ids": ([[3]], [[]], [["a"]], "x", [[10**9]], [[-1]]),
    "eos_token_id": (0, [0, 5], 10**9, -1, "x", [], [[1]], 1.5),
    "pad_token_id": (2, -1, 10**9, "x", [1]),
    "forced_eos_token_id": (3, 10**9, "x"),
    "suppress_tokens": ([3, 4], [10**9], "x", [-1]),
    "sequence_bias": ({"[3]": 1.0}, [[[3], 1.0]], "x"),
    "stop_strings": (["w7"], "w7", [], [1], ["a"] * 500),
    "max_length": (1, 10**12, -1, "x"),
    "min_new_tokens": (2, 10**9, "x"),
    "cache_implementation": ("quick", "static", "dynamic", 5),
    "use_cache": (False, "x", True),
    "guidance_scale": (1.5, "x"),
    "penalty_alpha": (0.6, "x"),
    "prompt_lookup_num_tokens": (3, "x"),
    "length_penalty": (2.0, "x", -1e300),
    "early_stopping": (True, "never", "x"),
    "watermarking_config": ({"bias": 2.0}, {"greenlist_ratio": 9}, "x"),
    "typical_p": (0.5, "x"),
    "min_p": (0.1, 5.0, "x"),
    "transformers_version": (5, None),
    "return_dict_in_generate": (True, "x"),
    "output_attentions": (True, "x"),
}


@contextmanager
def bounded() -> Iterator[dict[str, float]]:
    """Limit the block to 20 s, and yield a mapping that receives its time and memory at the end."""

    def late(*_: object) -> None:
        raise AssertionError("it takes more than 20 s")

    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current value
    resident = _memory("VmRSS")
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    usage: dict[str, float] = {}
    began = time.process_time()
    try:
        yield usage
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        usage |= {"seconds": time.process_time() - began, "bytes": float(_memory("VmHWM") - resident)}


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


class Loaded:
    """A folder of a model with its tokenizer, and the checks of each changed copy of it."""

    def __init__(self, place: Path) -> None:
        self.place, self.intact, self.changed = place, save_model(place / "intact"), place / "changed"
        self.quantised: dict[str, Path] = {}
        save_tokenizer(self.intact)
        self.victim = place / "victim"
        self.victim.mkdir()
        (self.victim / "precious").write_text("precious")
        for kind in KINDS:  # runs lazy imports first
            assert self.run(kind, None) == "equal"

    def run(self, kind: str, number: int | None) -> str:
        intact = self.intact
        if kind == "quantised":
            intact = self._folder_of(QUANTISED[(number or 0) // len(KINDS) % len(QUANTISED)])
        self._copy(intact)
        what = "nothing" if number is None else self._change(kind, random.Random(number))
        before = snapshot_names(self.changed), snapshot(self.victim)
        try:
            return self._compared(kind, number is None)
        except BaseException as error:
            raise AssertionError(f"{kind} {number}: {what}: {type(error).__name__}: {error}") from error
        finally:
            assert (snapshot_names(self.changed), snapshot(self.victim)) == before

    def _copy(self, folder: Path) -> None:
        shutil.rmtree(self.changed, ignore_errors=True)
        shutil.copytree(folder, self.changed)

    def _folder_of(self, name: str) -> Path:
        """Return a quantised checkpoint, which loads unchanged."""
        if name not in self.quantised:
            folder = self.quantised[name] = self.place / name
            if name in BITS_AND_BYTES:
                quantised_by_transformers(folder, BITS_AND_BYTES[name])
            else:
                dtype, writer, options = FORMATS[name]
                write(folder, llama(dtype), writer, options)
            save_tokenizer(folder)
            self._copy(folder)
            assert self._compared("quantised", intact=True) == "equal", name
        return self.quantised[name]

    def _compared(self, kind: str, intact: bool) -> str:
        outputs: Any = None
        with bounded() as took, watched(self.place, sys.executable):
            try:
                outputs = self._tokenized() if kind == "tokenizer" else self._generated()
            except GraftError as error:
                assert not intact and error.code not in ("GC099",) and len(str(error)) < 20_000, str(error)
                code = error.code
        if not intact:
            assert took["seconds"] < SECONDS and took["bytes"] < MEMORY, took
        if outputs is None:
            return code
        with quiet_transformers():
            if kind == "quantised":
                self._require_quantised(*outputs)
            else:
                assert outputs == (self._tokens_there() if kind == "tokenizer" else self._generated_there())
        return "equal"

    def _require_quantised(self, said: list[int], logits: list[Any]) -> None:
        reference = require_values(self.changed, self.source)
        tokens, expected = self._said_there(reference)
        mine, theirs = torch.tensor(logits), torch.tensor(expected)
        scale = float(theirs.nan_to_num().abs().max())
        # Sums in 16 bits may be computed in another order; a wrong weight is detected above.
        torch.testing.assert_close(mine, theirs, atol=1e-2 * scale, rtol=1e-2, equal_nan=True)
        assert said == tokens

    def _tokenized(self) -> Any:
        tokenizer = tokenizer_of(str(self.changed), [])
        model = TextModel("model", None, None, tokenizer)
        ids = [prompt_ids_of(model, text) for text in (*TEXTS, MESSAGES)]
        return [each for each in ids if each is not None]

    def _tokens_there(self) -> Any:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.changed)
        ids = [list(tokenizer(text)["input_ids"]) for text in TEXTS]
        begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
        chat: Any = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=True)
        return [each or begin for each in [*ids, list(chat["input_ids"])] if each or begin]

    def _generated(self) -> Any:
        model = open_text_model(self.changed)
        ids = prompt_ids(model, "w1 w2 w3")
        said = answer(model, ids, Settings(max_new_tokens=4, seed=0))
        with torch.no_grad():
            logits = model.model(ids).logits
        self.source = model.source
        return list(said.ids), logits.tolist()

    def _generated_there(self) -> Any:
        import transformers

        config = transformers.AutoConfig.from_pretrained(self.changed)
        model = getattr(transformers, config.architectures[0]).from_pretrained(self.changed, config=config).eval()
        return self._said_there(model)

    def _said_there(self, model: Any) -> Any:
        from transformers import AutoTokenizer

        config, tokenizer = model.config, AutoTokenizer.from_pretrained(self.changed)
        ids = torch.tensor([tokenizer("w1 w2 w3")["input_ids"]])
        ends = model.generation_config.eos_token_id
        ends = list(dict.fromkeys([*(ends if isinstance(ends, list) else [] if ends is None else [ends]), 0]))
        pad = model.generation_config.pad_token_id
        places = config.get_text_config().max_position_embeddings  # answers end there
        room = places - ids.shape[1] if isinstance(places, int) and places > 0 else 4
        torch.manual_seed(0)
        with torch.no_grad():
            generated = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=min(4, room),
                eos_token_id=ends,
                pad_token_id=2 if pad is None else pad,
                tokenizer=tokenizer,
                use_cache=True,
            )
            generated = generated if isinstance(generated, torch.Tensor) else generated.sequences
            return generated[0, ids.shape[1] :].tolist(), model(ids).logits.tolist()

    def _change(self, kind: str, rng: random.Random) -> str:
        if kind == "settings":
            path = self.changed / "generation_config.json"
            data = json.loads(path.read_text()) if path.is_file() else {}
            for name in rng.sample(list(SETTINGS), rng.choice((1, 1, 1, 2))):
                data[name] = rng.choice(SETTINGS[name])
            if rng.random() < 0.1:
                data = change(data, rng)
            path.write_text(json.dumps(data))
            return json.dumps(data)[:300]
        if kind == "quantised":
            return self._change_quantised(rng)
        names = ("config.json",) if kind == "config" else TOKENIZER
        path = self.changed / rng.choice([name for name in names if (self.changed / name).is_file()])
        how = rng.choice(("value",) * 8 + ("bytes", "bytes", "pipe", "nothing", "deep", "sparse", "link"))
        if how == "value" and path.suffix == ".json":
            path.write_text(json.dumps(change(json.loads(path.read_text()), rng)))
        elif how in ("value", "bytes"):
            path.write_bytes(flip(path.read_bytes(), rng))
        elif how == "deep":
            path.write_text('{"a":' * 100_000)
        else:
            put(path, how)
        return f"{how} of {path.name}"

    def _change_quantised(self, rng: random.Random) -> str:
        how = rng.choice(("tensors",) * 8 + ("options",) * 8 + ("pipe", "nothing", "sparse", "link"))
        path = self.changed / rng.choice(("config.json", "model.safetensors"))
        if how == "tensors":
            tensor_file(self.changed / "model.safetensors", rng)
        elif how == "options":
            json_file(self.changed / "config.json", rng, mutated_quantisation)
        else:
            put(path, how)
        return f"{how} of {path.name}"


def put(path: Path, how: str) -> None:
    """Replace a file by something else."""
    path.unlink()
    if how == "pipe":
        os.mkfifo(path)
    elif how == "link":
        path.symlink_to("/dev/zero")
    elif how == "sparse":
        with path.open("wb") as file:
            file.truncate(2**36)


def quantised_by_transformers(folder: Path, options: dict[str, object]) -> None:
    """Save a tiny Llama that transformers has quantised with bitsandbytes."""
    import transformers

    dense = folder.with_name(f"{folder.name} dense")
    with quiet_transformers():
        llama(torch.float32, inner=128).save_pretrained(dense)
        config = transformers.BitsAndBytesConfig(**options)
        model: Any = transformers.LlamaForCausalLM.from_pretrained(
            dense, quantization_config=config, dtype=torch.float32, device_map="cpu"
        )
        model.save_pretrained(folder)
    shutil.rmtree(dense)


def snapshot_names(folder: Path) -> list[tuple[str, int, int]]:
    return sorted((str(path), path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*"))


def prompt_ids_of(model: Any, prompt: Any) -> list[int] | None:
    try:
        ids: list[int] = prompt_ids(_Somewhere(model.tokenizer), prompt)[0].tolist()  # type: ignore[arg-type]
    except GraftError as error:
        if error.code == "GC090":  # an empty text
            return None
        raise
    return ids


class _Somewhere:
    """A stand-in for a model that has only a tokenizer."""

    device = "cpu"
    model = None

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return Loaded(tmp_path_factory.mktemp("loaded"))


def _all(loaded: Loaded, numbers: range) -> None:
    failed = []
    for number in numbers:
        kind = KINDS[number % len(KINDS)]
        try:
            loaded.run(kind, number)
        except AssertionError as error:
            failed.append(str(error)[:400])
    assert not failed, "\n".join([f"{len(failed)} of {len(numbers)}", *failed[:40]])


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
def test_fuzz_loaders_sample(loaded: Loaded) -> None:
    _all(loaded, range(SAMPLE))


@pytest.mark.gate
@pytest.mark.filterwarnings("ignore")
def test_fuzz_loaders(loaded: Loaded) -> None:
    _all(loaded, range(SAMPLE, SAMPLE + MODELS))
