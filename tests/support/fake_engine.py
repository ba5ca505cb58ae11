"""A stand-in for Engine without a model: it answers a prompt with its characters in reverse order."""

import time

import handloom
from handloom.errors import PromptError
from handloom.loop.generation import Event, Generation, Timings

PAUSE = 0.01  # seconds a token for prompts with "slow" in them


class FakeTokenizer:
    """One token a character."""

    chat_template = None

    def decode(self, ids):
        return "".join(map(chr, ids))


class TemplateTokenizer(FakeTokenizer):
    """One that has a chat template, so that text becomes a conversation."""

    chat_template = "yes"


class FakeEngine:
    """What the command line uses of Engine; rows advance in turn, as they do in the real loop."""

    loaded = None
    tokenizer = FakeTokenizer()
    dtype, device = "torch.float32", "cpu"

    @classmethod
    def from_pretrained(cls, name, **arguments):
        cls.loaded = (name, arguments)
        return cls()

    def encode(self, text):
        return [ord(character) for character in text]

    def chat_prompt(self, messages):
        text = "".join(f"<{message['role'][0]}>{message['content']}" for message in messages)
        if len(text) > 100:
            raise PromptError(f"the conversation has {len(text)} tokens, the model takes 100")
        return self.encode(text + "<a>")

    def stream(self, prompts, params):
        wanted = params if isinstance(params, list) else [params] * len(prompts)
        rows = [self.row(i, s, prompts[i], own) for i, own in enumerate(wanted) for s in range(own.n)]
        while rows:
            for row in list(rows):
                event = next(row)
                yield event
                if event.finish:
                    rows.remove(row)

    def row(self, request, sample, ids, params):
        text = "".join(map(chr, ids))
        answer = text[::-1]
        reason = "eos" if len(answer) <= params.max_new_tokens else "length"
        answer = answer[: params.max_new_tokens]
        error = "the logits are NaN" if "boom" in text else None
        for count, character in enumerate(answer, start=1):
            if "slow" in text:
                time.sleep(PAUSE)
            last = count == len(answer)
            finish = ("error" if error else reason) if last else None
            generation = None
            if last:
                generation = Generation(
                    request=request,
                    sample=sample,
                    prompt_token_ids=ids,
                    token_ids=[ord(c) for c in answer],
                    text=answer,
                    finish_reason=finish,
                    stop_reason="max_new_tokens" if finish == "length" else None,
                    logprobs=[-0.5] * count,
                    raw_logprobs=[-1.0] * count,
                    top_logprobs=[{ord(c): -0.5} for c in answer] if params.logprobs else None,
                    error=error,
                    timings=Timings(first_token=0.25, tokens_per_second=40.0),
                    params=params,
                )
            yield Event(
                request=request,
                sample=sample,
                token_id=ord(character),
                text=character,
                generation=generation,
                finish=finish,
            )


if __name__ == "__main__":
    import signal

    from handloom.cli.command import main

    # As in a terminal: a process that was started in the background inherits that Ctrl-C is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    handloom.Engine = FakeEngine
    main()
