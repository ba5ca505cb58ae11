"""`python -m handloom.experiments.lm_eval run --model handloom ...`: the harness's own command with our model in it."""

from lm_eval.__main__ import cli_evaluate

from . import model  # noqa: F401 - registers it; versions that look for plugins find it without

if __name__ == "__main__":
    cli_evaluate()
