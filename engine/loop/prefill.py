"""Prompts into rows: admitted requests wait here while their prompts are computed, many in one pass."""

from __future__ import annotations

from collections import deque

import torch

from ..errors import HandloomError
from ..forward.filling import Filling, advance
from .request import Prefilled, Request

# Steps for which a free slot waits, while others decode, for prompts that share its pass: reading the weights once more
# costs about as much as a step of all slots. On a CPU a step costs what its rows cost, so none is idle.
PATIENCE = {"cuda": 8}
LOGITS = 512  # tokens of a pass that keeps all their logits


class Prompts:
    """Admitted requests without a slot, first come first; their prompts are computed between two decode steps.

    Args:
        model: the adapter. One that `packs` takes pieces of several prompts in one pass, others take one prompt.
        budget: prompt tokens of one round, after which decoding goes on; a prompt that is longer takes several.
    """

    def __init__(self, model, budget: int):
        self.model, self.budget = model, budget
        self.queue: deque[Request] = deque()
        self._known: dict[tuple, Prefilled] = {}  # prompts in the queue, by their tokens
        self._waited, self._patience = 0, PATIENCE.get(model.device.type, 0)

    def __len__(self) -> int:
        return len(self.queue)

    def add(self, request: Request) -> None:
        """Take one more; a prompt that is here already is computed once for both."""
        ready, prompt = request.prefilled, request.prompt
        every = request.params.prompt_logprobs is not None
        if not every and prompt.embeddings is None and self.model.packs:
            ready = request.prefilled = self._shared(tuple(prompt.ids), ready)
        if ready.row is None and ready.filling is None:
            room = request.blocks(self.model.pool.block_size) if self.model.paged else 0
            ready.filling = Filling(prompt.ids, prompt.embeddings, room, every=every)
            ready.alternatives = request.params.prompt_logprobs or 0
        self.queue.append(request)

    def _shared(self, ids: tuple, ready: Prefilled) -> Prefilled:
        """What stands for a prompt: that of an equal one in the queue, or its own."""
        same = self._known.get(ids)
        if same is None or same.waiting == 0:
            same = self._known[ids] = ready
        elif same is not ready:
            same.waiting += 1
        return same

    def blocks(self, size: int) -> int:
        """Blocks of `size` cells that the requests are still promised, beyond those that hold their prompts."""
        promised = sum(request.blocks(size) for request in self.queue)
        return promised - sum(len(ready.filling.table or ()) for ready in self._ahead())

    def worth_a_pass(self, decoding: bool, more: bool) -> bool:
        """Whether to compute now, or after some more steps in which others may join.

        Args:
            decoding: whether any row decodes meanwhile.
            more: whether requests wait that have no slot yet.
        """
        ahead = self._ahead()
        if not (ahead and decoding and more) or self._waited >= self._patience:
            return bool(ahead)
        if any(ready.filling.table is not None for ready in ahead):
            return True  # begun
        self._waited += 1
        return sum(ready.filling.left for ready in ahead) >= self.budget // 2

    def compute(self) -> list[tuple[Request, str]]:
        """One round of passes; the requests whose prompts cannot be computed leave, with the reason."""
        spent, self._waited, failed = 0, 0, []
        while spent < self.budget and (ahead := self._ahead()):
            try:
                spent += self._pass(ahead, self.budget - spent)
            except (HandloomError, torch.OutOfMemoryError) as error:
                lost = [request for request in self.queue if request.prefilled is ahead[0]]
                self.queue = deque(request for request in self.queue if request.prefilled is not ahead[0])
                self._let_go(ahead[0])
                failed += [(request, str(error)) for request in lost]  # an error would hold on to blocks
        return failed

    def _pass(self, ahead: list[Prefilled], left: int) -> int:
        """One pass over the next pieces; how many tokens it computed."""
        first = ahead[0].filling
        if not self.model.packs:
            with torch.no_grad():
                ahead[0].row, out = self.model.prefill(
                    first.ids, first.embeddings, every=first.every, room=first.room
                )
            return self._computed(ahead[0], out) or len(first.ids)
        budget = self.budget if first.lone or self.model.alone else left
        budget = min(budget, LOGITS) if first.every else budget
        fillings = [ready.filling for ready in ahead]
        try:
            count = advance(self.model, fillings, budget)
        except (HandloomError, torch.OutOfMemoryError):
            if len(fillings) == 1:
                raise
            count = advance(self.model, fillings[:1], budget)  # alone each of them can fail alone
        for ready in ahead:
            if ready.filling.left == 0:
                ready.row = ready.filling.row()
                self._computed(ready, ready.filling.output())
        return count

    def _computed(self, ready: Prefilled, out) -> None:
        ready.logits, ready.states, ready.claim = out.logits[0, -1], out.states, ready.filling.claim
        if ready.filling.every:
            found = prompt_logprobs(ready.filling.ids, out.logits[0], ready.alternatives)
            ready.prompt_logprobs, ready.prompt_top_logprobs = found
        ready.filling = None

    def done(self, most: int) -> list[Request]:
        """Take out those at the front whose prompts are computed."""
        found: list[Request] = []
        while len(found) < most and self.queue and self.queue[0].prefilled.row is not None:
            found.append(self.queue.popleft())
            found[-1].prefill_done()
        if not self.queue:
            self._known.clear()
        return found

    def drop(self, request: Request) -> None:
        """One request less waits for its prompt, which goes when it was the last."""
        if request in self.queue:
            self.queue.remove(request)
        request.prefilled.taken()
        if request.prefilled.waiting == 0:
            self._let_go(request.prefilled)

    def close(self) -> None:
        """Let go of everything that was computed for requests that will not run."""
        for request in self.queue:
            self._let_go(request.prefilled)
        self.queue.clear()

    def _let_go(self, ready: Prefilled) -> None:
        if ready.filling is not None:
            ready.filling.dropped(self.model.pool)
        elif ready.claim:
            self.model.pool.unclaim(ready.claim)
        ready.row = ready.claim = ready.filling = None

    def _ahead(self) -> list[Prefilled]:
        """Prompts that are still to be computed, in order."""
        return [*{id(ready): ready for r in self.queue if (ready := r.prefilled).row is None}.values()]


def prompt_logprobs(ids: list[int], logits: torch.Tensor, alternatives: int = 0) -> tuple[list, list]:
    """Log-probability of each prompt token after those before it, from `logits [T, V]`, and of the likeliest there."""
    if len(ids) < 2 or min(ids) < 0:
        return [None] * len(ids), [None] * len(ids)
    targets, logp = torch.tensor(ids[1:], device=logits.device)[:, None], logits[:-1].log_softmax(-1)
    best = logp.topk(min(alternatives, logp.shape[1]))
    top = [
        dict(zip(*row, strict=True)) for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
    return [None, *logp.gather(-1, targets)[:, 0].tolist()], [None, *top]
