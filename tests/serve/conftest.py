"""One server and one client for the tests of this room that only ask."""

import openai
import pytest
from served import chat_engine, served


@pytest.fixture(scope="package")
def shared():
    """A server of four slots for a whole session's worker."""
    with served(chat_engine(slots=4)) as running:
        yield running


@pytest.fixture
def server(shared):
    """A server that answers; a test that changes it undoes that."""
    return shared


@pytest.fixture(scope="package")
def client(shared):
    """OpenAI's own client of it."""
    with openai.OpenAI(base_url=shared.url + "/v1", api_key="none", max_retries=0) as made:
        yield made
