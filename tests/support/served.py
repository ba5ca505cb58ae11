"""A server in this process: a tiny model behind it, a port of its own, and the check that nothing leaked."""

import copy
import threading
from contextlib import contextmanager

import uvicorn
from helpers import assert_nothing_leaked, tiny_llama, until
from tiny_tokenizers import CHAT, byte_level

from handloom import Engine
from handloom.serve.app import Server


def chat_engine(**options) -> Engine:
    """An engine with a byte-level tokenizer that has a chat template; `</s>` ends the text."""
    tokenizer = copy.deepcopy(byte_level())
    tokenizer.chat_template = CHAT
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=512)
    return Engine(model, tokenizer, eos_token_ids=[tokenizer.eos_token_id], **options)


@contextmanager
def served(engine: Engine, **options):
    """A running server and its address; it must have given every block back when it ends."""
    server = Server(engine, "tiny", **options)
    config = uvicorn.Config(
        server.app, port=0, log_level="warning", lifespan="on", timeout_graceful_shutdown=120
    )
    runner = uvicorn.Server(config)
    thread = threading.Thread(target=runner.run, daemon=True)
    thread.start()
    until(lambda: runner.started)
    server.url = f"http://127.0.0.1:{runner.servers[0].sockets[0].getsockname()[1]}"
    server.runner = runner
    try:
        yield server
    finally:
        runner.should_exit = True
        thread.join(120)
        assert not thread.is_alive()
        assert_nothing_leaked(engine)
