"""The inspector page in a real browser: what a person does with it, and that nothing it shows left the machine."""

import re
import shutil

import pytest

from handloom import SamplingParams
from handloom.experiments.analysis.trace import trace

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium"
)
SETTINGS = {"temperature": 1.5, "top_p": 0.8, "repetition_penalty": 1.4}


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield running
        running.close()


@pytest.fixture
def page(browser):
    """A page on which nothing may go wrong, and from which no request may leave this machine."""
    context = browser.new_context(viewport={"width": 1600, "height": 1000})
    opened, wrong = context.new_page(), []
    opened.set_default_timeout(20_000)
    opened.on(
        "console",
        lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None,
    )
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("request", lambda asked: None if re.match(r"(http://127\.0\.0\.1:|file:|data:)", asked.url)
              else wrong.append(asked.url))  # fmt: skip
    yield opened
    assert wrong == []
    context.close()


def generated(page, server, count=12, **settings):
    """Type a prompt and parameters, and generate."""
    page.goto(server.url + "/")
    page.fill("#prompt", "the quick")
    for name, value in settings.items():
        page.fill(f"#field-{name}", str(value))
    page.fill("#count", str(count))
    page.dispatch_event("#count", "change")
    page.press("#prompt", "Control+Enter")
    page.wait_for_selector("#text b")


def ids(page):
    """Token ids of the branch that is shown."""
    return page.evaluate("import('/page/model.js').then(m => m.branch().ids)")


def settled(page, condition):
    """Wait for a condition, and until nothing is under way; the page's policy lets no text be evaluated in it."""
    for each in (condition, "document.getElementById('status').textContent === ''"):
        for _ in range(1000):
            if page.evaluate(f"Boolean({each})"):
                break
            page.wait_for_timeout(20)
        else:
            pytest.fail(f"it never came to {each}: {page.inner_text('#status')}")


def test_what_is_generated_hovered_reordered_branched_compared_and_linked(page, server):
    engine = server.engine
    generated(page, server, **SETTINGS)
    params = SamplingParams(**SETTINGS, seed=0, max_new_tokens=12)
    found = trace(engine, "the quick", params)
    assert ids(page) == found.generation.token_ids
    assert page.locator("#text b").count() == 12

    page.hover('#text b[data-at="3"]')
    assert "candidate" in page.inner_text("#tip")
    assert "top_p removed" in page.inner_text("#tip")
    page.click('#text b[data-at="3"]')
    table = page.locator("#here table")
    assert table.locator("thead th").all_inner_texts() == [
        *("candidate", "model", "repetition_penalty", "temperature", "top_p", "removed by")
    ]
    kept = table.locator("tfoot tr").nth(0).locator("td").all_inner_texts()[:4]
    assert [int(n) for n in kept] == [stage.kept for stage in found.steps[3].stages]
    page.keyboard.press("ArrowRight")
    assert "Token 4" in page.inner_text("#here h2")
    page.keyboard.press("ArrowLeft")

    page.drag_and_drop("#order li:nth-child(3)", "#order li:nth-child(2)")  # top_p before temperature
    settled(page, "document.querySelector('#apply')")
    other = trace(
        engine, [*found.generation.prompt_token_ids, *ids(page)[:3]],
        params.replace(order=["repetition_penalty", "top_p", "temperature"], max_new_tokens=1),
    ).steps[0]  # fmt: skip
    kept = page.locator("#here tfoot tr").nth(0).locator("td").all_inner_texts()[:4]
    assert [int(n) for n in kept] == [stage.kept for stage in other.stages]
    assert "temperature runs after top_p" in page.inner_text("#warnings")
    assert "the same noise draws" in page.inner_text("#here .changed")
    page.click("#reset")
    settled(page, "!document.querySelector('#apply')")

    before = ids(page)
    button = page.locator("#here tbody tr:not(.drawn) button").last
    chosen = int(button.get_attribute("data-pick"))
    button.click()
    settled(page, "document.querySelectorAll('#branch option').length === 2")
    after = ids(page)
    assert after[:4] == [*before[:3], chosen]
    assert len(after) == 4 + 12
    assert page.locator("#beside").is_visible()
    differs = next(i for i, (a, b) in enumerate(zip(after, before, strict=False)) if a != b)
    assert page.inner_text("#apart") == f"the two are one text up to token {differs}"
    assert page.locator("#text b.apart").first.get_attribute("data-at") == str(differs)

    shown, link = page.inner_text("#text"), page.url
    page.goto("about:blank")
    page.goto(link)
    settled(page, "document.querySelectorAll('#branch option').length === 2")
    assert page.inner_text("#text") == shown
    assert ids(page) == after
    assert page.input_value("#field-top_p") == "0.8"
    page.wait_for_selector("#here h2")


def test_a_step_at_a_time_and_errors_in_words(page, server):
    generated(page, server, count=1, temperature=1)
    for length in (2, 3):
        page.click("#step")
        settled(page, f"document.querySelectorAll('#text b').length === {length}")
    assert ids(page) == server.engine.generate("the quick", temperature=1, seed=0, max_new_tokens=3).token_ids
    copied = (
        "import('/page/controls.js').then(m => ['python', 'shell', 'plan'].map(kind => m.COPIES[kind]()))"
    )
    code = page.evaluate(copied)
    names = {"engine": server.engine, "SamplingParams": SamplingParams}
    assert eval(code[0], names).token_ids == ids(page)[:1]
    assert code[1].startswith("handloom 'the quick' --raw --temperature 1 --seed 0")
    assert 'prompts: ["the quick"]' in code[2]


def test_strategies_are_drawn_as_they_go_and_stand_side_by_side(page, server):
    """Prompt tokens are coloured, too; beams and drafts form a tree, pass by pass, and leave two branches."""
    generated(page, server, count=3, temperature=0, repetition_penalty=0.5)  # what was said is said again
    judged = page.evaluate("import('/page/model.js').then(m => m.view.judged)")
    given = server.engine.encode("the quick")
    assert judged[0] is None
    assert judged[1:] == pytest.approx(
        server.engine.score(server.engine.prefill([given[:1]]), [given[1:]])[0].tolist(), rel=1e-3
    )
    assert page.locator("#text i").count() == len(given)
    assert "rgba" in page.locator("#text i").nth(1).evaluate("mark => getComputedStyle(mark).backgroundColor")
    page.hover("#text i >> nth=1")
    assert "by the model" in page.inner_text("#tip")

    page.fill("#count", "30")
    page.dispatch_event("#count", "change")
    for number, strategy in enumerate(('{"name": "beam_search", "num_beams": 3}', "speculative"), 2):
        page.select_option("#branch", "0")
        page.click('#text b[data-at="0"]')
        page.fill("#strategy", strategy)
        page.click("#decode")
        settled(page, f"document.querySelectorAll('#branch option').length === {number}")
        last = page.evaluate(
            "import('/page/model.js').then(m => [m.view.growth.passes.length, m.branch().ids])"
        )
        texts = [server.engine.decode([i], skip_special_tokens=False) for i in last[1]]
        assert page.locator("#twigs .final").count() == len(texts)
        assert page.input_value("#pass") == str(last[0])
        page.focus("#pass")
        page.keyboard.press("Home")
        page.keyboard.press("ArrowRight")
        assert page.inner_text("#pass-number") == f"1 of {last[0]}"
        assert page.locator("#twigs .final").count() == 0
        assert page.locator("#twigs .kept").count() >= 1
        page.keyboard.press("End")
        if strategy == "speculative":
            accepted, proposed = re.match(r"(\d+) of (\d+) drafted", page.inner_text("#tree-note")).groups()
            assert page.locator("#twigs .accepted").count() == int(accepted) > 0
            assert page.locator("#twigs .rejected").count() == int(proposed) - int(accepted)
        else:
            assert page.locator("#twigs .dropped").count() > 0
    page.click("#tree-close")
    page.select_option("#other", "1")  # beams beside drafts, on one prefix
    one, two = page.evaluate("import('/page/model.js').then(m => m.view.branches.slice(1).map(b => b.ids))")
    differs = next(
        (i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two))
    )
    assert page.inner_text("#apart") == f"the two are one text up to token {differs}"
    assert page.locator("#twigs button.final").count() == len(two)
    page.locator("#twigs button.final").nth(1).click()
    assert "Token 1" in page.inner_text("#here h2")


@pytest.mark.parametrize(("width", "theme"), [(1600, "light"), (400, "dark")])
def test_it_fits_and_axe_finds_no_serious_violation(page, server, width, theme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=theme)
    generated(page, server, **SETTINGS)
    page.fill("#strategy", "beam_search")
    page.click("#decode")
    settled(page, "document.querySelector('#twigs .final')")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate("document.documentElement.dataset.theme") == theme
    found = axe.Axe().run(page, options={"runOnly": ["wcag2a", "wcag2aa"]}).response["violations"]
    serious = [each for each in found if each["impact"] in ("serious", "critical")]
    assert [(each["id"], [node["html"] for node in each["nodes"]]) for each in serious] == []


def test_the_offline_page_shows_a_trace_and_scrolls(page, server, tmp_path):
    found = trace(server.engine, "the quick", SamplingParams(**SETTINGS, seed=0, max_new_tokens=20))
    found.save(tmp_path / "trace.html")
    page.goto((tmp_path / "trace.html").as_uri())
    assert page.locator("#text b").count() == 20
    assert not page.locator("#ask").is_visible()
    page.keyboard.press("ArrowRight")
    assert "Token 1" in page.inner_text("#here h2")
    assert page.locator("#here thead th").count() == 6

    content = (tmp_path / "trace.html").read_text(encoding="utf-8")
    page.goto("about:blank")
    many = re.sub(r'"steps": ?\[(.*)\]\}', lambda m: '"steps":[' + ",".join([m[1]] * 100) + "]}", content)
    (tmp_path / "many.html").write_text(many, encoding="utf-8")
    page.goto((tmp_path / "many.html").as_uri())
    assert page.locator("#text b").count() == 2000
    page.set_viewport_size({"width": 400, "height": 900})
    tops = page.evaluate("""new Promise(done => {
        const text = document.getElementById('text'), tops = [];
        const next = () => {
            text.scrollTop += 20;
            tops.push(text.scrollTop);
            if (tops.length < 60) requestAnimationFrame(next); else done(tops);
        };
        requestAnimationFrame(next);
    })""")
    assert tops == [20 * (frame + 1) for frame in range(60)]  # every frame shows another place
