"""Run tests as on other processors: ``python -m tools.processors [ARGUMENTS OF PYTEST]``.

PyTorch's kernels, oneDNN's and the number of threads determine how sums are grouped, and so the last bits of results. A
test that depends on one grouping passes on one machine and fails on another.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence

CAPABILITIES = ("DEFAULT", "AVX2", "AVX512")
"""PyTorch's names for the capabilities of processors, each including those before it."""

SETTINGS: tuple[Mapping[str, str], ...] = (
    {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "threads": "2"},
    {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "threads": "1"},
    {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "threads": "1"},
    {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "DEFAULT", "threads": "2"},
)
"""Every capability, with oneDNN limited to the same one or not at all, and with one or two threads."""


def environment(setting: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables of a setting."""
    threads = {name: setting["threads"] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    # Threads that spin while they wait for work would slow down the other tests.
    waiting = {"OMP_WAIT_POLICY": "PASSIVE"}
    return {**{name: value for name, value in setting.items() if name != "threads"}, **threads, **waiting}


def possible(capability: str) -> list[Mapping[str, str]]:
    """Return the settings that a machine of this capability can run; a higher one would fail at an unknown instruction.

    Args:
        capability: one of `CAPABILITIES`, as `torch.backends.cpu.get_cpu_capability` returns it. For any other, of
            another kind of processor, only the default is possible.
    """
    most = CAPABILITIES.index(capability) if capability in CAPABILITIES else 0
    return [setting for setting in SETTINGS if CAPABILITIES.index(setting["ATEN_CPU_CAPABILITY"].upper()) <= most]


def own_capability() -> str:
    """Return the capability of this machine, regardless of the environment."""
    code = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    plain = {name: value for name, value in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
    return subprocess.check_output([sys.executable, "-c", code], env=plain, text=True).strip()


def tested(setting: Mapping[str, str], arguments: Sequence[str]) -> int:
    """Run pytest under a setting, and return its exit status."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", *arguments], env={**os.environ, **environment(setting)}
    ).returncode


def main(arguments: Sequence[str]) -> int:
    """Run the tests under every setting that this machine can run; return 1 if a test failed under any of them."""
    can = own_capability()
    settings, failed = possible(can), []
    print(f"this processor can do {can}: {len(settings)} of {len(SETTINGS)} settings")
    with tempfile.TemporaryDirectory(prefix="graftc-captures-") as captures:
        os.environ.setdefault("GRAFTC_CACHE", captures)  # graphs are the same on every processor
        for setting in settings:
            said = " ".join(f"{name}={value}" for name, value in setting.items())
            print(f"\n== {said}", flush=True)
            start = time.monotonic()
            status = tested(setting, arguments)
            took = time.monotonic() - start
            print(f"== {said}: {'passed' if not status else f'failed ({status})'} in {took:.0f} s", flush=True)
            failed += [said] if status else []
    print("\n".join(["", *(f"failed: {said}" for said in failed)]) if failed else "\nall settings passed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
