"""What a team writes in an afternoon: FastAPI, PEFT's `set_adapter` under a lock, everything stock.

`python _plain_server.py PORT FOLDER...`: adapters of the same number of labels, named by their folders.
"""

import sys
import threading
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from _catalogue import MAX_LENGTH, stock_peft
from service.ml.base_models import EMBEDDED, find_base, locate
from service.ml.manifest import Manifest

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
app = FastAPI()
folders = [Path(name) for name in sys.argv[2:]]
labels = Manifest.read(folders[0]).labels
tokenizer = AutoTokenizer.from_pretrained(folders[0])
model = stock_peft(locate(find_base(EMBEDDED, None)), folders, len(labels))
lock = threading.Lock()


class Call(BaseModel):
    model: str
    texts: list[str]


@app.post("/predict")
def predict(call: Call) -> dict[str, list[dict[str, str | float]]]:
    # The tokenizer too is for one thread at a time: padding is a state of it.
    with lock, torch.inference_mode():
        batch = tokenizer(call.texts, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
        model.set_adapter(call.model)
        confidences, best = model(**batch).logits.softmax(-1).max(-1)
    answers = zip(best.tolist(), confidences.tolist(), strict=True)
    return {"predictions": [{"label": labels[i], "confidence": confidence} for i, confidence in answers]}


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
