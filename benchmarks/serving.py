"""The cost of serving sixteen adapters in one batch of sixteen rows: in slots of graftc's, and in peft.

    python -m benchmarks.serving [--rounds 12] [--case smollm2] [--layers N] [--context 32] [--steps 4] [--quick]
        [--threads N] [--out benchmarks/results]

Writes serving.json and serving.md. Every row is a text with an adapter of its own, a LoRA of rank 8 on all projections;
peft is given ``adapter_names``. A turn is a prompt of ``--context`` tokens in each row, and then ``--steps`` tokens in
each. Beside it stand the same rows with one adapter, and what changing an adapter in its slot takes.
"""

from __future__ import annotations

import atexit
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import command_line, machine_line, parse, parser, write
from benchmarks.generate import PARTS, cases, measure, status
from benchmarks.generation import FLOOR, Case, Entry, Live, called, floor
from benchmarks.hardware import device
from benchmarks.train.contestants import UnavailableError
from benchmarks.train.models import shared_copy
from benchmarks.train.report import machine

ROWS = 16
NAMES = [f"user_{number}" for number in range(ROWS)]
PEFT_ONE, PEFT_ALL = "peft, 1 adapter", "peft, 16 adapters"
ONE, ALL, SLOTS_ONE, BANK = "graftc, 1 adapter", "slots, 16 adapters", "slots, 1 adapter", "bank, 16 adapters"
OVER_ONE = "slots, 16 adapters over 1"
AIM = {"prefill": 0.84, "decode": 0.53}
"""The time of a bank without slots as a share of peft's, measured before there were slots."""


def folders(case: Case) -> dict[str, Path]:
    """Return the folders of the adapters, which are written when they are first requested."""
    if "folders" not in case.compiled:
        model = _peft(case)
        top = Path(tempfile.mkdtemp())
        atexit.register(shutil.rmtree, top, ignore_errors=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save_pretrained(top, selected_adapters=NAMES)
        case.compiled["folders"] = {name: top / name for name in NAMES}
    found: dict[str, Path] = case.compiled["folders"]
    return found


def _peft(case: Case) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UnavailableError("peft is not installed") from error
    if "peft" not in case.compiled:
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        config = LoraConfig(r=8, lora_alpha=16, target_modules=names, init_lora_weights=False, task_type="CAUSAL_LM")
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(shared_copy(case.model), config, adapter_name=NAMES[0])
            for name in NAMES[1:]:
                model.add_adapter(name, config)
        case.compiled["peft"] = model.eval()
    return case.compiled["peft"]


def _graftc(case: Case, kind: str) -> Any:
    """Return the model with one adapter, with all of them in slots, or with all of them in a bank without slots."""
    import graftc

    if kind not in case.compiled:
        model, paths = shared_copy(case.model), folders(case)
        if kind == ONE:
            made: Any = graftc.import_peft(paths[NAMES[0]], model)
        else:
            made = graftc.import_peft(paths, model, bank=True)
        if kind == BANK:
            adapt = [entry.model_dump(mode="json", exclude_unset=True) for entry in made.spec.adapt]
            plain = graftc.compile({"adapt": adapt, "compose": {"bank": NAMES}}, model).eval()
            stored = {name: made.bank().tensors(name) for name in NAMES}
            own = {
                fqn.replace(".graftc.bank.", f".graftc.{name}."): tensor
                for name, tensors in stored.items()
                for fqn, tensor in tensors.items()
            }
            plain.load_adapter_state_dict({**plain.adapter_state_dict(), **own})
            made = plain
        case.compiled[kind] = made
    return case.compiled[kind]


def _rows(case: Case, model: Any, **chosen: Any) -> Live:
    """Return a contestant that chooses adapters in every call."""
    return called(
        case, lambda **given: model(**{**given, "position_ids": given["position_ids"].expand(ROWS, -1)}, **chosen)
    )


def entries() -> list[Entry]:
    """Return all entries, in the order of their turns."""
    first, every = torch.tensor([0], device=device()), torch.arange(ROWS, device=device())

    def peft(case: Case, **chosen: Any) -> Live:
        model = _peft(case)
        model.set_adapter(NAMES[0])
        return _rows(case, model, **chosen)

    aims = {"smollm2": AIM, "llama": AIM}
    return [
        Entry(FLOOR, floor),
        Entry(PEFT_ONE, peft),
        Entry(ONE, lambda case: _rows(case, _graftc(case, ONE)), PEFT_ONE, equals=PEFT_ONE),
        Entry(SLOTS_ONE, lambda case: _rows(case, _graftc(case, ALL), adapter_ids=first), ONE, equals=ONE),
        Entry(PEFT_ALL, lambda case: peft(case, adapter_names=NAMES), PEFT_ONE),
        Entry(ALL, lambda case: _rows(case, _graftc(case, ALL), adapter_ids=every), PEFT_ALL, aims, PEFT_ALL),
        Entry(OVER_ONE, lambda case: _rows(case, _graftc(case, ALL), adapter_ids=every), ONE),
        Entry(BANK, lambda case: _rows(case, _graftc(case, BANK), adapter_ids=every), PEFT_ALL, equals=PEFT_ALL),
    ]


def changes(case: Case, rounds: int) -> dict[str, float]:
    """Return the median seconds of reading an adapter's folder, and of writing it to a slot."""
    bank = _graftc(case, ALL).bank()
    load = bank.loader(lambda name: folders(case)[name])
    seconds: dict[str, list[float]] = {"read": [], "write": []}
    for number in range(rounds):
        begun = time.perf_counter()
        values = load(NAMES[number % ROWS])
        seconds["read"].append(time.perf_counter() - begun)
        begun = time.perf_counter()
        bank.slots.write(number % ROWS, values)
        seconds["write"].append(time.perf_counter() - begun)
    return {name: statistics.median(found) for name, found in seconds.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 if an entry does not compute what its peer does."""
    prog = "python -m benchmarks.serving"
    options_of = parser(prog, "Adapters in slots, beside peft.", 12)
    options_of.add_argument("--case", action="append", choices=("llama", "smollm2"), help="one model (default: both)")
    options_of.add_argument("--layers", type=int, help="the first layers of SmolLM2 only (default: all)")
    options_of.add_argument("--context", type=int, default=32, help="tokens of each row's prompt (default: 32)")
    options_of.add_argument("--steps", type=int, default=4, help="tokens behind it in each round (default: 4)")
    options = parse(options_of, arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    rounds = min(options.rounds, 2) if options.quick else options.rounds
    date, before = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), machine()

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    found: dict[str, Any] = {}
    for one in cases(options):
        ids = torch.randint(3, one.model.config.vocab_size, (ROWS, one.ids.shape[1])).to(one.ids.device)
        case = replace(one, ids=ids)
        found[case.name] = {**measure(case, entries(), rounds, tell), "changes": changes(case, max(rounds, 4))}
    host = {**before, "load_after": machine()["load"]}
    data = {"command": command_line(prog, arguments), "date": date, "rounds": rounds, "machine": host, "cases": found}
    write(options.out, "serving", data, "\n".join(_lines(data)) + "\n")
    return status(found, tell)


def _lines(data: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of the report in Markdown."""
    yield "# Serving adapters from slots\n"
    yield f"`{data['command']}`, {data['date']}.\n"
    yield machine_line(data)
    for name, case in data["cases"].items():
        yield f"\n## {name}\n"
        yield (
            f"{case['layers']} layers, {ROWS} rows of {case['context']} tokens, then {case['steps']} steps a round. "
            f"Reading and checking an adapter's folder takes {1e3 * case['changes']['read']:.0f} ms, writing it to a "
            f"slot {1e3 * case['changes']['write']:.1f} ms.\n"
        )
        yield "| entry | compared with | prefill ms | ratio | decode ms | ratio |"
        yield "| --- | --- | ---: | ---: | ---: | ---: |"
        for entry, one in case["entries"].items():
            cells = [entry, one["peer"] or ""]
            for part in PARTS:
                over, aim = one[part]["over_peer"], one["aim"].get(part)
                ratio = "" if over is None else f"{over:.2f}"
                if aim is not None and over is not None:
                    ratio = f"{f'**{ratio}**' if over > aim else ratio} ({aim})"
                cells += [f"{1e3 * one[part]['median']:.1f}", ratio]
            yield f"| {' | '.join(cells)} |"
        for entry, reason in case["skipped"].items():
            yield f"\n{entry}: skipped: {reason}"


if __name__ == "__main__":
    sys.exit(main())
