"""Samples of the data that commands print, for commands that would take long to run."""

from __future__ import annotations

from typing import Any

RETENTION = {"norm": 0.9, "error": 0.1, "entries": 0.5}
EVIDENCE = {
    **{"site": "a", "adaptations": ["x"], "change": 0.5, "algebra": 0.0, "rounding": 0.5},
    "retention": RETENTION,
}
UNCHANGED = {**EVIDENCE, "site": "b", "retention": {"norm": 0.0, "error": 1.0, "entries": 0.0}}
ANCHOR = {"inputs": "input_ids", "mode": "eval", "difference": 0.0, "bound": 1e-5, "exact": True, "skipped": ""}
CERTIFICATE: dict[str, Any] = {
    **{"passed": True, "sites": [EVIDENCE, UNCHANGED], "outputs": {"logits": 1e-6}, "budget": 1e-4, "structure": "1"},
    **{"base_structure": "1", "additions": [], "fingerprint": "2", "dtype": "float32", "notes": []},
    "collapses": [{"adaptation": "x", "site": "a", "routings": 4, "error": 0.1}],
    "anchors": [ANCHOR],
    "requantised": [],
    "routes": [
        {
            "choice": "topk",
            "module": "layers.0.mlp.gate",
            "choices": 27,
            "flips": 1,
            "gap": 1e-3,
            "noise": 2e-3,
            "bound": 8e-3,
            "passed": True,
        }
    ],
    **{"retention": RETENTION, "unchanged": ["b"]},
    "largest_difference": 1e-6,
}
PASS = {"pipeline": "adapt", "name": "macs", "distribution": "graftc-macs", "version": "0.1", "rewrites": False}
FIGURE = {"name": "multiply_adds", "site": "a.weight", "layer": 0, "stack": "a", "value": 4.0}
REPORT: dict[str, Any] = {
    **{"adaptations": [], "base_parameters": 9, "trainable_parameters": 1, "trained_in_full": 0, "percent": 10.0},
    **{"deployed_parameters": 1, "flops_per_token": 2, "capture_seconds": 0.1, "rewrite_seconds": 0.1},
    **{
        "cached": False,
        "notes": [],
        "anchors": [{**ANCHOR, "seconds": 0.1}],
        "steps": [{"name": "capture", "seconds": 0.1}],
        "passes": [{**PASS, "figures": [FIGURE]}],
        "stacks": [{"stack": "encoder.layer", "layers": 2, "parameters": 96, "level": "layers", "reason": "a value"}],
    },
}
AGREEMENT = {"passed": True, "same_predictions": 1.0, "largest_difference": 1e-6, "tolerance": 1e-4}
SCORE, BETTER = {"accuracy": 0.5, "macro_f1": 0.5}, {"accuracy": 0.9, "macro_f1": 0.9}
DEMO: dict[str, Any] = {
    **{"passed": True, "failures": [], "quick": True, "examples": {"train": 9, "test": 3}},
    "scores": {"before": SCORE, "after": BETTER, "baseline": None},
    **{"report": REPORT, "certificate": CERTIFICATE, "transformers": AGREEMENT, "onnx": AGREEMENT},
    **{"seconds": {"training": 0.5}, "files": {"model": "folded"}},
}
LLM_DEMO: dict[str, Any] = {
    **{"passed": True, "failures": [], "quick": True, "examples": {"train": 9, "test": 3}},
    "training": {"steps": 3, "batch": 3, "losses_apart": None},
    "scores": {
        "untuned": {"likelihood": SCORE, "generation": 0.5},
        "graftc": {"likelihood": BETTER, "generation": 0.9},
        "peft": None,
    },
    "answers": [{"text": "a", "topic": "b", "before": "c", "after": "b"}],
    **{"report": REPORT, "certificate": CERTIFICATE},
    "same_tokens": {"merged": {"passed": True, "prompts": 2, "same": 2, "tokens": 8}},
    **{"seconds": {"training": 0.5}, "files": {"model": "folded"}, "bytes": {"model": 9}},
}
