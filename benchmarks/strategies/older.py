"""One mode of the transformers that is on the path, timed: a task as JSON comes in, figures as JSON go out.

`benchmarks.strategies` runs it with version 4.49, the last that held contrastive search, DoLa, groups of beams and
constraints. It knows nothing of handloom, which needs a later version.
"""

import json
import sys
import time

import torch
import transformers


def main() -> None:
    """Two runs after one to warm up; the better counts."""
    task = json.load(sys.stdin)
    torch.set_num_threads(task["threads"])
    model = transformers.AutoModelForCausalLM.from_pretrained(task["model"], torch_dtype=torch.float32).eval()
    prompts, count = task["prompts"], task["count"]
    size = max(map(len, prompts))
    ids = torch.tensor([[0] * (size - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (size - len(p)) + [1] * len(p) for p in prompts])
    seconds = []
    for _ in range(3):
        start = time.process_time()
        found = model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=count, min_new_tokens=count, pad_token_id=0,
            **task["fields"],
        )  # fmt: skip
        seconds.append(time.process_time() - start)
    tokens = len(prompts) * (found.shape[1] - size)
    figures = {"tokens": tokens, "tokens_per_second": round(tokens / min(seconds[1:]), 2)}
    sys.stdout.write(json.dumps({"transformers": transformers.__version__, **figures}) + "\n")


if __name__ == "__main__":
    main()
