"""One rank of a split model; `torchrun --nproc-per-node N ranks.py FOLDER PROMPTS` writes FOLDER/rank<i>.json."""

import json
import os
import sys

import torch

from handloom import Engine

torch.set_num_threads(1)
folder, prompts = sys.argv[1], json.loads(sys.argv[2])
engine = Engine.from_pretrained(folder, tp_plan="auto", dtype="float32", slots=2, max_length=64)
torch.manual_seed(100 + int(os.environ["RANK"]))


def ask(**params):
    return [g.token_ids for g in engine.generate(prompts, max_new_tokens=8, progress=False, **params)]


found = {"greedy": ask(), "seeded": ask(temperature=1.0, seed=7), "unseeded": ask(temperature=1.0)}
found["heads"] = engine.pool.stores[0].keys.shape[-2]
with open(f"{folder}/rank{os.environ['RANK']}.json", "w") as file:
    json.dump(found, file)
# A rank that is gone while another still listens to it would take that one with it.
torch.distributed.barrier()
torch.distributed.destroy_process_group()
