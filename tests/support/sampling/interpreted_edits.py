"""Random programs of pipelines through the Triton kernels in the interpreter; run as a program of its own.

Prints one line a failure and exits with their number.
"""

import os
import random
import sys

os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import quick_interpreter
import torch
from device_edits import capped
from edit_programs import Cap, Program, compare

from handloom.kernels import dispatch


class DeviceCap(Cap):
    """The pointwise edit with its device function."""

    name = "Cap"
    device = capped


def failures(seeds):
    """What differs in the programs of some seeds."""
    for seed in seeds:
        program = Program(random.Random(seed), 70, rows=3, cap=DeviceCap)
        for step, (drawn, tokens, logprobs, names) in enumerate(program.run(4)):
            difference = compare(drawn, tokens, logprobs)
            if difference:
                yield f"seed {seed}, step {step}, {names}: {difference}"


def main():
    """Run as many seeds as the command line says; returns the number of failures."""
    torch.set_num_threads(1)
    np.seterr(all="ignore")
    quick_interpreter.install()
    count = 0
    with dispatch.use("triton"):
        for text in failures(range(int(sys.argv[1]))):
            count += 1
            sys.stdout.write(f"{text[:600]}\n")
    sys.stdout.write(f"{count} failures\n")
    return min(count, 100)


if __name__ == "__main__":
    sys.exit(main())
