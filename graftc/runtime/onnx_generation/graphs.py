"""A graph in ONNX Runtime; inputs are bound in place, and outputs are torch tensors in ONNX Runtime's memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from graftc.passes.core.weights.names import owner_of
from graftc.runtime.onnx_generation.io_names import Slot, slots_of
from graftc.specs.errors.diagnostics import GraftError, first_line, nearest
from graftc.specs.errors.packages import optional_package

Provider = str | tuple[str, Mapping[str, Any]]
CPU = "CPUExecutionProvider"
BASE_OF_INPUTS = "graftc.inputs.base"
"""The entry of a file's metadata with the fingerprint of the base that the inputs adapt."""
_CUDA = ("CUDAExecutionProvider", "TensorrtExecutionProvider")

# By the name of a type in a session: torch's dtype, and the type's number in onnx.TensorProto.
_TYPES: dict[str, tuple[torch.dtype, int]] = {
    "tensor(float)": (torch.float32, 1),
    "tensor(int32)": (torch.int32, 6),
    "tensor(int64)": (torch.int64, 7),
    "tensor(bool)": (torch.bool, 9),
    "tensor(float16)": (torch.float16, 10),
    "tensor(double)": (torch.float64, 11),
    "tensor(bfloat16)": (torch.bfloat16, 16),
}

_OURS = frozenset(
    {
        "input_ids",
        "input_features",
        "attention_mask",
        "position_ids",
        "token_type_ids",
        "decoder_input_ids",
        "decoder_attention_mask",
        "encoder_attention_mask",
        "encoder_hidden_states",
    }
)
"""The inputs, apart from the cache, that a call can pass."""


class _Input(NamedTuple):
    """The dtype and the sizes of a graph's input; the sizes of dynamic axes are not integers."""

    dtype: torch.dtype
    number: int
    shape: tuple[int | str | None, ...]


def runtime() -> Any:
    """Return the module ``onnxruntime``.

    Raises:
        GraftError: GC061 if it is not installed.
    """
    return optional_package("onnxruntime", "generating from ONNX files", "onnx-runtime")


def providers_for(requested: Sequence[Provider] | None) -> list[Any]:
    """Return the requested execution providers, or by default CUDA (if this build and machine support it) and the CPU.

    Raises:
        GraftError: GC073 for a provider that this build of onnxruntime lacks.
    """
    available = runtime().get_available_providers()
    if requested is None:
        return [_CUDA[0], CPU] if _CUDA[0] in available and torch.cuda.is_available() else [CPU]
    if isinstance(requested, str):
        requested = [requested]
    for provider in requested:
        name = provider if isinstance(provider, str) else provider[0]
        if name not in available:
            close = nearest(str(name), available)
            hint = f"did you mean {close}?" if close else f"this build of onnxruntime has {', '.join(available)}"
            raise GraftError("GC073", f"there is no execution provider {name!r}", hint=hint)
    return list(requested)


class OnnxGraph:
    """An ONNX file loaded in a session.

    Args:
        path: the file; external data is read only from the same folder.
        providers: the execution providers, the first of which determines the device.
        options: ``onnxruntime.SessionOptions``.

    Attributes:
        inputs: the dtype and sizes of each input, by name.
        past: the names of the inputs that contain the cache, by slot.
        sizes: the number of heads and the head width of each cache tensor, by slot.
        present: the names of the outputs that contain the cache, by slot.
        adapted: the dtype and sizes of each input that is a tensor of an adaptation, by name.
        adapter: the tensors that these inputs have; those that are missing have the graph's defaults.
        base: the fingerprint of the base that adapters have to be for; None if the file does not say.
        last_logits: whether the graph computes the logits of each row's last token only.
        device: the device of floating-point tensors.

    Raises:
        GraftError: GC144 for a file that ONNX Runtime cannot load, or for inputs that calls cannot pass.
    """

    def __init__(self, path: Path, providers: Sequence[Any], options: Any) -> None:
        self.path = path
        if not path.is_file():
            raise GraftError("GC144", f"{path} is not a file")
        try:
            self.session = runtime().InferenceSession(str(path), options, providers=list(providers))
        except Exception as error:
            raise GraftError("GC144", f"ONNX Runtime could not load {path}: {first_line(error)}") from error
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        every = [*inputs, *(i for i in self.session.get_overridable_initializers() if owner_of(i.name))]
        unknown = [i.name for i in every if i.type not in _TYPES]
        if unknown:
            raise GraftError("GC144", f"{path.name} has inputs of unknown types: {', '.join(unknown)}")
        known = {i.name: _Input(*_TYPES[i.type], tuple(i.shape)) for i in every}
        calls = {i.name for i in inputs if not owner_of(i.name)}
        self.inputs = {name: own for name, own in known.items() if name in calls}
        self.adapted = {name: own for name, own in known.items() if name not in calls}
        self.adapter: Mapping[str, Tensor] = {}
        self.base: str | None = self.session.get_modelmeta().custom_metadata_map.get(BASE_OF_INPUTS)
        self.outputs = [o.name for o in outputs]
        self.last_logits = any(o.name == "logits" and len(o.shape) == 3 and o.shape[1] == 1 for o in outputs)
        self.past, self.present = slots_of(self.inputs), slots_of(self.outputs)
        strange = sorted(set(self.inputs) - _OURS - set(self.past.values()))
        if strange:
            hint = "graphs that use one file for both the first and later steps (use_cache_branch) are not supported"
            raise GraftError("GC144", f"{path.name} has inputs that no call provides: {', '.join(strange)}", hint=hint)
        self.sizes = {slot: self._fixed(slot) for slot in self.past}
        self.device = self._device()

    def _device(self) -> torch.device:
        provider = self.session.get_providers()[0]
        if provider not in _CUDA:
            return torch.device("cpu")
        return torch.device("cuda", int(self.session.get_provider_options()[provider].get("device_id", 0)))

    def _fixed(self, slot: Slot) -> tuple[int, int]:
        shape = self.inputs[self.past[slot]].shape
        # transformers' exporter writes fixed sizes as names.
        heads, width = (str(shape[i]) if len(shape) == 4 else "" for i in (1, 3))
        if not heads.isdecimal() or not width.isdecimal():
            shown = ", ".join(str(size) for size in shape)
            message = f"{self.path.name}: {self.past[slot]} is [{shown}], not [batch, heads, length, head_dim]"
            raise GraftError("GC144", message, hint="heads and head_dim must be fixed, batch and length dynamic")
        return int(heads), int(width)

    def dtype(self, slot: Slot) -> torch.dtype:
        """Return the dtype of a cache tensor."""
        return self.inputs[self.past[slot]].dtype

    def __call__(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the graph on the tensors that it takes; others are ignored.

        Returns:
            The outputs, by name, on the graph's device; they keep alive the memory that ONNX Runtime allocated.

        Raises:
            GraftError: GC145 if an input is missing or has the wrong rank, or if the graph fails.
        """
        binding = self.session.io_binding()
        alive = [self._bind(binding, name, own, given.get(name)) for name, own in self.inputs.items()]
        alive += [self._bind(binding, name, self.adapted[name], tensor) for name, tensor in self.adapter.items()]
        cuda = self.device.type == "cuda"
        for name in self.outputs:
            binding.bind_output(name, self.device.type, self.device.index or 0)
        if cuda:  # ONNX Runtime uses its own stream
            torch.cuda.current_stream(self.device).synchronize()
        try:
            self.session.run_with_iobinding(binding)
        except Exception as error:
            raise GraftError("GC145", f"ONNX Runtime failed in {self.path.name}: {first_line(error)}") from error
        if cuda:
            binding.synchronize_outputs()
        del alive
        return {name: _as_torch(value) for name, value in zip(self.outputs, binding.get_outputs(), strict=True)}

    def _bind(self, binding: Any, name: str, expected: _Input, tensor: Tensor | None) -> Tensor:
        """Bind an input, and return its buffer, which must stay alive until the graph has run."""
        if tensor is None:
            raise GraftError("GC145", f"{self.path.name} takes {name}, which the call does not pass")
        if tensor.dim() != len(expected.shape):
            message = f"{name} is {tuple(tensor.shape)}, but {self.path.name} takes {len(expected.shape)} axes"
            raise GraftError("GC145", message)
        # Integers are used in shapes, which are computed on the host.
        place = self.device if expected.dtype.is_floating_point else torch.device("cpu")
        tensor = tensor.to(place, expected.dtype).contiguous()
        # An empty tensor has no address, but ONNX Runtime requires one.
        buffer = tensor if tensor.numel() else tensor.new_empty(1)
        binding.bind_input(name, place.type, place.index or 0, expected.number, tuple(tensor.shape), buffer.data_ptr())
        return buffer


def _as_torch(value: Any) -> Tensor:
    """Return an output as a tensor, without a copy unless the build of onnxruntime lacks DLPack."""
    if hasattr(value, "__dlpack__"):
        return from_dlpack(value.__dlpack__())
    return torch.from_numpy(value.numpy())
