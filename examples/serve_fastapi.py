"""Serve many adapters from a few slots: every row of every request names its own adapter.

python examples/serve_fastapi.py BASE ADAPTERS [SLOTS]        needs pip install fastapi uvicorn

BASE is a folder of transformers, ADAPTERS a folder whose subfolders are PEFT folders of LoRAs or graftc artifacts. The
first of them by name is the bank's own; all others are put in slots when a request names them.

curl localhost:8000/generate -H 'content-type: application/json' -d '{"tokens": [[5, 9, 2]], "adapters": ["alice"]}'
"""

import asyncio
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from fastapi import FastAPI, HTTPException

import graftc


def application(model: torch.nn.Module, adapters: Path, slots: int = 16, rank: int = 16) -> FastAPI:
    first = min(path.name for path in adapters.iterdir() if path.is_dir())
    compiled = graftc.import_peft({"first": adapters / first}, model, bank=True, slots=slots, rank=rank)
    pool = graftc.AdapterPool(compiled, adapters)
    app = FastAPI()

    @app.post("/generate")
    async def generate(request: dict) -> dict:
        ids = torch.tensor(request["tokens"])  # prompts of one length; a tokenizer and padding come before
        options = {"max_new_tokens": request.get("most", 20)}
        try:
            async with pool.use(*request["adapters"]) as rows:
                tokens = await asyncio.to_thread(compiled.generate, ids, adapter_ids=rows, **options)
        except graftc.GraftError as error:
            raise HTTPException(503 if error.code == "GC190" else 400, f"{error.code}: {error.message}") from error
        return {"tokens": tokens.tolist()}

    @app.get("/counters")
    def counters() -> dict:
        return {**asdict(pool.counters), "names": pool.bank.names}

    return app


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(application(graftc.load_base(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:4])))
