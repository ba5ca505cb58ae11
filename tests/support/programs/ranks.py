"""Ranks of a split model; `ranks.py FOLDER PROMPTS` writes FOLDER/rank<i>.json.

Started by torchrun it is one of the ranks, under NCCL where there is a device for each; else two are forked behind the
imports, under gloo.
"""

import json
import os
import sys

import torch
from torch import distributed

from handloom import Engine

RANKS = 2
torch.set_num_threads(1)
folder, prompts = sys.argv[1], json.loads(sys.argv[2])


def rank(number: int, meeting: str) -> None:
    on_cuda, size = torch.cuda.is_available(), int(os.environ["WORLD_SIZE"])
    if on_cuda:
        torch.cuda.set_device(number)
    backend = "nccl" if on_cuda else "gloo"
    distributed.init_process_group(backend, init_method=meeting, rank=number, world_size=size)
    engine = Engine.from_pretrained(folder, tp_plan="auto", dtype="float32", slots=2, max_length=64)
    torch.manual_seed(100 + number)

    def ask(**params):
        return [g.token_ids for g in engine.generate(prompts, max_new_tokens=8, progress=False, **params)]

    found = {"greedy": ask(), "seeded": ask(temperature=1.0, seed=7), "unseeded": ask(temperature=1.0)}
    found["heads"] = engine.pool.stores[0].keys.shape[-2]
    with open(f"{folder}/rank{number}.json", "w") as file:
        json.dump(found, file)
    # A rank that is gone while another still listens to it would take that one with it.
    distributed.barrier()
    distributed.destroy_process_group()


if "LOCAL_RANK" in os.environ:  # torchrun's
    rank(int(os.environ["LOCAL_RANK"]), "env://")
    sys.exit()
children = []
for number in range(RANKS):
    if not (child := os.fork()):
        os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(RANKS))  # as torchrun does
        rank(number, f"file://{folder}/meeting")
        sys.exit()
    children.append(child)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
