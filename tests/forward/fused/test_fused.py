"""Fused decoder layers against the plain ones: what they compute, what they launch, and when they stand aside."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from architectures import ARCHITECTURES, prompts_of
from helpers import tiny_llama
from launches import Always, launches_of_a_step
from recorded_graph import install

from handloom import Engine, ModelError, SamplingParams
from handloom.forward import probe
from handloom.forward.fused.layers import SWAPPED, Fused
from handloom.forward.fused.products import Products
from handloom.forward.fused.recognise import fuse, unfuse
from handloom.kernels import dispatch

# Every decoder layer of these runs fused; of mixtures of experts its attention half.
FUSED = [
    "llama", "llama_yarn", "mistral_sw", "ministral", "qwen2", "qwen2_sw", "qwen3", "gemma", "gemma2", "gemma3_text",
    "phi3", "phi3_full", "olmo", "olmo2", "olmo3", "granite", "smollm3", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe",
    "granitemoe", "gpt_oss", "glm", "glm4", "exaone4", "ernie4_5", "seed_oss", "helium", "stablelm", "starcoder2",
    "nemotron",
]  # fmt: skip
# Dense ones, one of a kind, whose launches are counted: those of a step beside its decoder layers, which with the
# rotary embeddings' own modules are 6 more for each way that angles are made in (Gemma 3 has two).
COUNTED = {
    "mistral_sw": 4,
    "qwen2": 4,
    "qwen3": 4,
    "gemma2": 8,  # scaled embeddings, a soft cap on the logits
    "gemma3_text": 6,
    "phi3": 4,
    "olmo2": 4,
    "granite": 6,
    "smollm3": 4,
    "glm4": 4,
}
# What a step shows: rounding moves the logits by up to 1e-4; a wrong norm, angle or order by 0.05 at least.
TOLERANCE = 1e-3


def plain_and_fused(model, products=None, **options):
    """Two engines over one model each, the second one fused."""
    plain = Engine(model(), slots=3, **options)
    fused = Engine(model(), slots=3, fuse=True, **options)
    if products is not None:
        reasons = fuse(fused.runner, products)
        assert not any(reasons.values()), reasons
    return plain, fused


@torch.no_grad()
def everything(engine, prompts, drafts) -> list[torch.Tensor]:
    """Logits after ragged prompts, an extension, and two steps of rows that were chosen anew."""
    state = engine.prefill(prompts)
    longer = engine.extend(state, drafts)
    chosen = longer.select([1, 0, 0])
    after = engine.step(engine.step(chosen, torch.tensor([4, 5, 6])), torch.tensor([7, 8, 9]))
    return [state.logits, longer.logits, after.logits]


def same(have, want, tolerance=TOLERANCE):
    for mine, yours in zip(have, want, strict=True):
        torch.testing.assert_close(mine, yours, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("products", [None, Always()], ids=["products plain", "few rows"])
def test_every_layer_is_fused_and_computes_the_same(name, products):
    plain, fused = plain_and_fused(ARCHITECTURES[name], products)
    assert set(fused.runner.fused.values()) == {""}
    given = prompts_of([9, 4]), [[7, 8, 9], [11]]
    same(everything(fused, *given), everything(plain, *given))
    if products is not None:
        outliers(plain, fused)


def outliers(plain, fused):
    """Tokens whose embeddings are huge, zero, and NaN: large residuals, zero rows, and NaN that stays in its row."""
    for engine in (plain, fused):
        with torch.no_grad():
            words = engine.model.get_input_embeddings().weight
            words[50, ::3] *= 1000
            words[51] = 0
            words[52, 5] = torch.nan
    prompts, tokens, spoilt = [[3, 50, 7, 9], [51, 51], [6, 8, 10]], [50, 51, 3], [50, 52, 3]
    want, have = (engine.prefill(prompts) for engine in (plain, fused))
    found = []
    for step in (tokens, spoilt):
        one, other = plain.step(want, step).logits, fused.step(have, step).logits
        torch.testing.assert_close(other, one, atol=TOLERANCE, rtol=1e-3, equal_nan=True)
        found.append(other)
    assert found[1][1].isnan().all()
    # Experts, which are not ours, compute as many rows at once as chose them: there a neighbour may move the last bits.
    experts = {"num_experts", "num_local_experts"} & vars(plain.model.config).keys()
    same(found[1][[0, 2]], found[0][[0, 2]], TOLERANCE if experts else 0)


def with_outliers(dtype=torch.float32):
    """A Llama with tokens whose embeddings are huge, zero, and NaN."""
    model = tiny_llama(dtype)
    with torch.no_grad():
        words = model.get_input_embeddings().weight
        words[50] *= 3000
        words[51] = 0
        words[52] = float("nan")
        words[53, 3] = 2000
    return model


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_large_residuals_zero_rows_and_nan(kernels):
    """A row of NaN is NaN and changes no bit of its neighbours."""
    plain, fused = plain_and_fused(with_outliers, Always())
    outliers = [[3, 50, 7, 53, 4], [51, 51, 9], [6, 8, 10, 12]]
    nan = [[3, 50, 7, 53, 4], [51, 52, 9], [6, 8, 10, 12]]
    tokens = torch.tensor([50, 51, 3])
    found = []
    for prompts in (outliers, nan):
        want = [plain.step(state := plain.prefill(prompts), tokens).logits, state.logits]
        with dispatch.use(kernels):
            have = [fused.step(state := fused.prefill(prompts), tokens).logits, state.logits]
        for mine, yours in zip(have, want, strict=True):
            torch.testing.assert_close(mine, yours, atol=TOLERANCE, rtol=1e-4, equal_nan=True)
        found.append(have)
    for finite, spoilt in zip(*found, strict=True):
        assert spoilt[1].isnan().all()
        assert torch.equal(spoilt[[0, 2]], finite[[0, 2]])


@pytest.mark.parametrize("name", ["qwen3", "olmo2"])
def test_bfloat16_in_the_interpreter(name):
    """No further from float32 than twice the plain layers in bfloat16."""

    def low():
        return ARCHITECTURES[name]().to(torch.bfloat16)

    def exact():
        return low().float()

    def logits(engine):
        state = engine.prefill(prompts_of([4, 2]))
        return torch.cat([state.logits, engine.step(state, torch.tensor([7, 8])).logits])

    plain, fused = plain_and_fused(low, Always())
    want, theirs = logits(Engine(exact(), slots=3)), logits(plain)
    with dispatch.use("triton"):
        mine = logits(fused)
    assert (mine - want).abs().mean() <= 2 * (theirs - want).abs().mean()


# -- launches


def counts_of(name, fused):
    """Launches of one decoder layer, those of a model less those of the same one without its last; and of the rest."""
    counts = []
    for cut in (0, 1):
        model = ARCHITECTURES[name]()
        layers = model.model.layers
        model.config.num_hidden_layers = len(layers) - cut
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = model.config.layer_types[: len(layers) - cut]
        model.model.layers = layers[: len(layers) - cut]
        engine = Engine(model, self_check=False)
        if fused:
            fuse(engine.runner, Always())
        counts.append(len(launches_of_a_step(engine)))
    layer = counts[0] - counts[1]
    return layer, counts[0] - len(layers) * layer


@pytest.mark.parametrize("name", COUNTED)
def test_a_layer_takes_at_most_twelve_launches_and_the_rest_few(name):
    """Attention over one split and the cell writes included; a second launch merges the splits of long rows."""
    layer, rest = counts_of(name, fused=True)
    assert layer + 1 <= 12
    assert rest <= COUNTED[name]


def test_launches_of_a_llama():
    """Of a layer; and of the rest: embedding, angles, norm, output layer."""
    plain, fused = counts_of("llama", fused=False), counts_of("llama", fused=True)
    assert (plain, fused) == ((36, 15), (8, 4))


def test_ends_of_the_model_are_fused_too():
    """Final norm and output layer: one launch each."""
    engine = Engine(tiny_llama(), fuse=True)
    fuse(engine.runner, Always())
    names = launches_of_a_step(engine)
    assert names[-2:] == ["_add_norm_kernel", "_vector_kernel"]


# -- standing aside


def test_a_hook_on_an_inner_module_runs_its_layer_plain():
    model = tiny_llama()
    engine = Engine(model, fuse=True)
    want = engine.prefill([[3, 4, 5]]).logits
    seen = []
    hook = model.model.layers[1].mlp.act_fn.register_forward_hook(lambda *a: seen.append(1))
    have = engine.prefill([[3, 4, 5]]).logits
    hook.remove()
    assert seen == [1]
    torch.testing.assert_close(have, want, atol=TOLERANCE, rtol=0)
    engine.prefill([[3, 4, 5]])
    assert seen == [1]


def test_hidden_states_are_those_of_the_plain_layers():
    plain, fused = (Engine(tiny_llama(), fuse=f) for f in (None, True))
    for prompt in ([3, 4, 5], [6, 7]):
        want, have = (e.runner.prefill(prompt, hidden=True)[1].hidden for e in (plain, fused))
        same(have, want)
    # What transformers leaves on the parts to record outputs is nobody who listens.
    layer = next(part for part in fused.runner.module.modules() if isinstance(part, Fused))
    assert layer.structure.takes(fused.runner.cache)


def test_a_layer_that_computes_something_else_is_refused_by_name():
    model = tiny_llama()
    layer = model.model.layers[1]

    class Odd(type(layer)):
        def forward(self, hidden_states, **kwargs):
            return 1.01 * super().forward(hidden_states, **kwargs)

    layer.__class__ = Odd
    want = Engine(model, fuse=False).prefill([[3, 4, 5]]).logits
    engine = Engine(model, fuse=True)
    reasons = engine.runner.fused
    assert list(reasons) == ["model.layers.0", "model.layers.1"]
    assert reasons["model.layers.0"] == ""
    assert "differs by" in reasons["model.layers.1"]
    torch.testing.assert_close(engine.prefill([[3, 4, 5]]).logits, want, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("change", ["norm", "residual", "extra", "scale"])
def test_changes_that_names_do_not_tell_are_seen(change):
    """The same attributes, another computation: a norm that keeps the mean out, a residual that is added twice, ..."""
    model = tiny_llama()
    layer = model.model.layers[0]
    if change == "norm":
        layer.input_layernorm.forward = lambda x: torch.nn.functional.layer_norm(x, x.shape[-1:])
    elif change == "residual":
        plain = type(layer)
        layer.__class__ = type("Twice", (plain,), {"forward": lambda s, x, **k: plain.forward(s, x, **k) + x})
    elif change == "extra":
        layer.self_attn.gate = torch.nn.Linear(4, 4)
    else:
        layer.residual_multiplier = 0.5  # Llama's layer does not read it
    reasons = Engine(model, fuse=True).runner.fused
    assert reasons["model.layers.0"]
    assert reasons["model.layers.1"] == ""


def test_refusals_name_the_reason():
    with pytest.raises(ModelError, match=r"fuse=True: no decoder layer .* order that is not known"):
        Engine(ARCHITECTURES["gpt2"](), fuse=True)
    with pytest.raises(ModelError, match=r"fuse=True: .* mask path"):
        Engine(ARCHITECTURES["bloom"](), fuse=True)
    assert Engine(ARCHITECTURES["gpt2"]()).runner.fused == {}


def test_cuda_fuses_unless_told_otherwise(monkeypatch):
    asked = []
    monkeypatch.setattr(probe, "fuse_layers", lambda model: asked.append(model) or {"layers.0": ""})

    def fuses(device, wanted=None):
        asked.clear()
        model = SimpleNamespace(device=torch.device(device), path="attention", module=None)
        assert bool(probe._fused(model, wanted, None)) == bool(asked)
        return bool(asked)

    assert [fuses("cuda"), fuses("cuda", False), fuses("cpu"), fuses("cpu", True)] == [
        True,
        False,
        False,
        True,
    ]
    with dispatch.use("torch"):
        assert not fuses("cuda")


def test_the_users_model_is_never_touched():
    model = tiny_llama()
    before = [(part, type(part), dict(vars(part))) for part in model.modules()]
    ids = torch.tensor([[3, 4, 5]])
    want = model(ids).logits
    Engine(model, fuse=True).generate([[3, 4, 5]], max_new_tokens=3)
    assert all(type(part) is kind and vars(part) == held for part, kind, held in before)
    assert torch.equal(model(ids).logits, want)


def test_weights_and_attributes_that_change_are_followed():
    """Assigned weights act at once; what was read from a layer's attributes is read again."""
    model = tiny_llama()
    engine = Engine(model, fuse=True)

    def check():
        want = Engine(model, fuse=False).prefill([[3, 4, 5]]).logits
        torch.testing.assert_close(engine.prefill([[3, 4, 5]]).logits, want, atol=TOLERANCE, rtol=0)
        return want

    first = check()
    layer = model.model.layers[0]
    layer.input_layernorm.weight = torch.nn.Parameter(2 + layer.input_layernorm.weight.detach())
    second = check()
    layer.self_attn.scaling *= 0.01
    third = check()
    layer.post_attention_layernorm.variance_epsilon = 1e6
    fourth = check()
    for old, new in pairwise([first, second, third, fourth]):
        assert (old - new).abs().max() > 5 * TOLERANCE
    assert set(engine.runner.fused.values()) == {""}


def test_unfuse_puts_every_class_back():
    engine = Engine(tiny_llama(), fuse=True)
    kinds = [type(part) for part in Engine(tiny_llama()).runner.module.modules()]
    unfuse(engine.runner.module)
    assert not any(isinstance(part, SWAPPED) for part in engine.runner.module.modules())
    assert [type(part) for part in engine.runner.module.modules()] == kinds


# -- products


def test_products_are_chosen_by_the_clock():
    """The kernel of few rows is taken for those shapes alone that were faster in it."""
    engine = Engine(tiny_llama(), fuse=True)
    calls = []

    def timer(ours, plain):
        calls.append((len(ours), [call().shape for call in ours[:1]]))
        plain[0]()
        return (1.0, 2.0) if ours[0]().shape[0] in (1, 4) else (2.0, 1.0)

    products = Products(timer)
    fuse(engine.runner, products)
    layer = engine.runner.module.model.layers[0]
    heads = layer.structure.heads.projections
    assert [products.takes(rows, heads) for rows in (1, 2, 3, 4, 5, 8, 9)] == [
        True,
        False,
        True,
        True,
        False,
        False,
        False,
    ]
    assert products.takes(1, layer.structure.gate.projections, "silu")
    assert not products.takes(1, layer.structure.gate.projections)  # measured with its gate alone
    assert {count for count, _ in calls} == {1, 2}  # weights of both layers in turn; one output layer


def test_a_product_that_a_device_refuses_stays_plain(caplog):
    def timer(ours, plain):
        raise RuntimeError("out of resource: shared memory, Required: 139264, Hardware limit: 101376")

    products = Products(timer)
    engine = Engine(tiny_llama(), fuse=True)
    assert set(fuse(engine.runner, products).values()) == {""}
    assert products.chosen == {}
    assert "plain (RuntimeError: out of resource: shared memory" in caplog.text


def test_a_layer_norm_is_not_taken_for_one_that_keeps_the_mean():
    """In 16 bits and over many numbers the mean of normal numbers is less than rounding."""
    from handloom.forward.fused.parts import read_norm

    norm = torch.nn.LayerNorm(4096, eps=1e-5, bias=False).bfloat16()
    torch.nn.init.normal_(norm.weight, 1, 0.1)
    assert read_norm(norm, 4096).centered
    rms = torch.nn.RMSNorm(4096, eps=1e-5).bfloat16()
    assert not read_norm(rms, 4096).centered


def test_norms_that_compute_in_float32_are_not_ours_in_float64():
    with pytest.raises(ModelError, match="LlamaRMSNorm computes another norm"):
        Engine(tiny_llama(torch.float64), fuse=True)


# -- the loop


def test_recorded_steps_are_fused_and_right(monkeypatch):
    """A step recorded over fused layers gives, row by row, what plain layers give."""
    recorders = install(monkeypatch)
    model = tiny_llama()
    prompts, params = prompts_of([5, 9, 2, 7]), SamplingParams(max_new_tokens=12)
    want = [g.token_ids for g in Engine(model, slots=2, fuse=False).generate(prompts, params)]
    engine = Engine(model, slots=2, fuse=True, graph=True)
    fuse(engine.runner, Always())
    assert [g.token_ids for g in engine.generate(prompts, params)] == want
    assert sum(recorder.replays for recorder in recorders) > 10


def test_compiled_steps_run_the_plain_modules():
    """What is compiled is not fused by hand; passes that are not compiled are."""
    from handloom.forward.programs.compiling import CompiledStep

    engine = Engine(tiny_llama(), fuse=True)
    want = engine.generate([[3, 4, 5]], max_new_tokens=6)[0].token_ids
    engine.runner.compiled = CompiledStep(engine.runner, {1}, backend="eager")
    assert engine.generate([[3, 4, 5]], max_new_tokens=6)[0].token_ids == want
    assert not engine.runner.compiled.refused
