"""What must hold of a processor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from ..kernels import dispatch
from ..kernels.sampling.draw import draw
from ..kernels.sampling.reference import apply_edits
from ..params.sampling_params import SamplingParams
from ..pipeline.pipeline import Context, Pipeline, Rows

# -- processors


def check_processor(
    rule,
    on: SamplingParams | None = None,
    *,
    vocab_size: int = 64,
    steps: int = 4,
    seed: int = 0,
    kernel: Callable[[Rows, Tensor, Context], Tensor] | None = None,
    atol: float = 0.0,
) -> None:
    """A processor keeps its promises, on random logits, some rows with excluded tokens and with ties.

    Off is identity, beside rows that are on; a row's result does not depend on the others; the same call
    gives the same bits; the input is untouched; exclusions make no NaN; `keeps_argmax` and
    `scale_free` are true where they are declared; forks and rewinds of its memory equal a replay. What the fused
    sampler makes of it is what its own `apply` gives: the edited logits to the last bit, and the token of the draw, in
    torch and, where Triton or its interpreter (TRITON_INTERPRET=1) can run, in the kernels.

    Args:
        rule: a Processor, a class of them, or a function (logits, context) -> logits.
        on: parameters that switch it on; None for a rule with parameters of its own.
        vocab_size: >= 8.
        steps: tokens that the rows are advanced by.
        seed: of logits and tokens.
        kernel: another implementation of `Rows.apply`, called as (rows, logits, context).
        atol: how far the kernel's finite logits may be from the reference; what is kept must be the same.
    """
    trial = Trial(rule, on or SamplingParams(temperature=1.0), vocab_size, steps, seed)
    off = SamplingParams(temperature=trial.on.temperature)
    together, rows = trial.play([trial.on] * 4)
    if not trial.processor.active(off):
        mixed, _ = trial.play([trial.on, off, trial.on, off])
        trial.equal("off is identity", [step[1::2] for step in mixed], [step[1::2] for step in trial.inputs])
        trial.equal("off beside on", [step[::2] for step in mixed], [step[::2] for step in together])
    for row in range(4):
        alone, _ = trial.play([trial.on], [row])
        trial.equal("batch equals solo", alone, [step[row : row + 1] for step in together], row)
    trial.equal("repeatable", trial.play([trial.on] * 4)[0], together)
    if trial.processor.keeps_argmax:
        for at, (before, after) in enumerate(zip(trial.inputs, together, strict=True)):
            best = after.gather(1, before.argmax(-1, keepdim=True))[:, 0]
            assert torch.equal(best, after.amax(-1)), (
                f"check_processor({trial.processor.name}), step {at}: keeps_argmax, yet the most likely token changed"
            )
    if getattr(trial.processor, "scale_free", False):
        for at, before in enumerate(rows):
            kept, halved = (
                (before.one_by_one(given, trial.context(range(4), at)) > -torch.inf).float()
                for given in (trial.inputs[at], trial.inputs[at] / 2)
            )
            trial.equal("scale_free", [halved], [kept], first_step=at)
    for at in range(steps):  # rewind to every step, and go on from there in two forks
        forks, _ = trial.play([trial.on] * 8, [0, 1, 2, 3] * 2, rows[at].select([0, 1, 2, 3] * 2), at)
        for half in (slice(0, 4), slice(4, 8)):
            trial.equal(f"rewind to step {at}", [step[half] for step in forks], together[at:])
    for at, before in enumerate(rows):
        _same_as_reference(trial, before, at, kernel, atol)


def _same_as_reference(trial: Trial, rows: Rows, at: int, kernel: Callable | None, atol: float) -> None:
    """At one step of a trial, the fused draw takes the reference's token, and a kernel gives its logits."""
    context, logits = trial.context(range(4), at), trial.inputs[at]
    reference = rows.one_by_one(logits, context)

    def same(law: str, got: Tensor, want: Tensor) -> None:
        trial.equal(law, [got], [want], first_step=at)

    same("rows.apply", rows.apply(logits, trial.context(range(4), at)), reference)
    edits = rows.edits(logits, trial.context(range(4), at))
    if edits is not None:
        same("the sampler's edits", apply_edits(logits, **edits.arguments()), reference)
        tokens = torch.tensor([row[at] for row in trial.tokens])
        same(
            "the sampler's edits at a token", edits.at(tokens)[:, None], reference.gather(1, tokens[:, None])
        )
    if not reference.isneginf().all(-1).any():
        tokens = draw(reference, context.seeds, context.positions, context.streams, rows.greedy_rows())
        for law, fused in _draws(trial, rows, logits, at):
            same(law, fused[:, None], tokens[:, None])
    if kernel is not None:
        other = kernel(rows, logits, trial.context(range(4), at))
        trial.equal("the kernel's kept tokens", [other.isneginf()], [reference.isneginf()])
        error = float((other - reference).nan_to_num(0.0).abs().max())
        assert error <= atol, f"check_processor({trial.processor.name}): kernel off by {error:.2e}"


def _draws(trial: Trial, rows: Rows, logits: Tensor, at: int) -> Iterator[tuple[str, Tensor]]:
    """Tokens of one step, by every implementation that can run here."""
    yield "the fused draw", rows.sample(logits, trial.context(range(4), at)).tokens
    if dispatch.interpreting() and at == len(trial.inputs) - 1:  # Triton's interpreter is slow: one step
        try:
            with dispatch.use("triton"):
                yield (
                    "the draw of the Triton kernels",
                    rows.sample(logits, trial.context(range(4), at)).tokens,
                )
        except dispatch.KernelUnavailable:  # no Triton, or no device function
            return


class Trial:
    """Four rows of made-up logits, prompts and tokens, on which a processor is played."""

    def __init__(self, rule, on: SamplingParams, vocab_size: int, steps: int, seed: int):
        self.pipeline = Pipeline([rule], name="check_processor")
        self.processor, self.on, self.vocab_size = self.pipeline[0], on, vocab_size
        source = torch.Generator().manual_seed(seed)
        self.inputs = [torch.randn(4, vocab_size, generator=source) * 3 for _ in range(steps)]
        for logits in self.inputs:
            logits[1, ::3] = -torch.inf
            logits[2] = logits[2].round()
            logits[3, 2:] = -torch.inf
        # Few different ids, so that penalties and repeats have something to find.
        small = min(8, vocab_size)
        ids = torch.randint(small, (4, 12 + steps), generator=source).tolist()
        self.prompts = [row[: 6 + 2 * i] for i, row in enumerate(ids)]
        self.tokens = [row[12:] for row in ids]

    def context(self, which: Iterable[int], at: int) -> Context:
        """The context of rows `which` after `at` steps."""
        which = list(which)
        ids = [self.prompts[i] + self.tokens[i][:at] for i in which]
        width = max(map(len, ids))
        return Context(
            tokens=torch.tensor([row + [-1] * (width - len(row)) for row in ids]),
            lengths=torch.tensor([len(row) for row in ids]),
            prompt_lengths=torch.tensor([len(self.prompts[i]) for i in which]),
            seeds=torch.tensor([100 + i for i in which]),
            streams=torch.zeros(len(which), dtype=torch.int64),
            params=[self.on] * len(which),
            vocab_size=self.vocab_size,
            device=self.inputs[0].device,
        )

    def play(self, params, which=range(4), rows: Rows | None = None, start: int = 0):
        """Every step's output for rows `which`, and the Rows before each step."""
        which, outputs, states = list(which), [], []
        if rows is None:
            rows = self.pipeline.bind(
                list(params),
                [self.prompts[i] for i in which],
                vocab_size=self.vocab_size,
                seeds=[100 + i for i in which],
            )
        for at in range(start, len(self.inputs)):
            logits = self.inputs[at][which]
            self.own(rows, logits, self.context(which, at), at)
            context, before = self.context(which, at), logits.clone()
            outputs.append(rows.apply(logits, context))
            states.append(rows)
            self.equal("the input is untouched", [logits], [before], first_step=at)
            rows = rows.accept(torch.tensor([self.tokens[i][at] for i in which]), context)
        return outputs, states

    def own(self, rows: Rows, logits: Tensor, context: Context, at: int) -> None:
        """What the processor itself makes of a step: `rows.apply` may stop or mend it before a law can be told."""
        for member in rows.active():
            given, values = logits.clone(), member.ready(rows.site)
            result = member.processor.apply(given, context.view(member.processor, values, member.memory))
            self.equal("the input is untouched", [given], [logits], first_step=at)
            if isinstance(result, Tensor) and result.shape == logits.shape:
                on = True if values.rows_on is None else values.rows_on
                where = f"check_processor({self.processor.name}), step {at}"
                assert not (result.isnan() & on).any(), f"{where}: NaN from logits without any"

    def equal(
        self, law: str, got: list[Tensor], want: list[Tensor], first_row: int = 0, first_step: int = 0
    ) -> None:
        """Raise AssertionError at the first value that is not the same."""
        for step, (a, b) in enumerate(zip(got, want, strict=True), first_step):
            differs = (a != b) & ~((a != a) & (b != b))
            if differs.any():
                row, token = differs.nonzero()[0].tolist()
                raise AssertionError(
                    f"check_processor({self.processor.name}), {law}: step {step}, row {first_row + row}, "
                    f"token {token}: {a[row, token].item():.9g} instead of {b[row, token].item():.9g}"
                )
