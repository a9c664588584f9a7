"""Run what export_onnx.py wrote. Deployment needs neither torch nor transformers nor graftc.

python examples/run_onnx.py [OUT]        needs pip install onnxruntime numpy
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime


def main(out: Path) -> None:
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    example = np.load(out / "example.npz")
    inputs = {value.name: example[value.name] for value in session.get_inputs()}
    (logits,) = session.run(["logits"], inputs)

    print("classes:", logits.argmax(-1).tolist())
    difference = float(np.abs(logits - example["logits"]).max())
    print(f"largest difference from torch: {difference:.1e}")
    if not difference <= 1e-4:
        sys.exit("ONNX Runtime computes something else than torch")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "onnx-out"))
