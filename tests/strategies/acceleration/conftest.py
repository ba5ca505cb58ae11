import pytest
from helpers import tiny_llama

from handloom import Engine


@pytest.fixture(scope="module")
def engine():
    return Engine(tiny_llama())


@pytest.fixture(scope="module")
def draft():
    """A smaller model that agrees now and then."""
    return Engine(tiny_llama(num_hidden_layers=1))
