"""The guide's code runs page by page, every recipe runs, and the documentation builds with one command."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from handloom import Engine

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = sorted(DOCS.glob("*.md"))
RECIPES = sorted((DOCS / "recipes").glob("*.py"))
SAYS = {  # what a recipe or a page must print
    "branch_where_torn": r"('.*'\n){2,}",
    "own_rule": r"WithinOneNat.*",
    "paired_comparison": r"min-p gains \d",
    "rank_continuations": r"^ +-\d+\.\d+ Paris\n",
    "token_healing": r"as it is: (.|\n)*healed: '://",
    "two_prompts_vote": r"product: '.*\n(.|\n)*mixture: '",
    "value_head": r"weight 0.0: (.|\n)*weight 40.0: ",
    "rewind_where_it_matches": r"as it is: .*(town|city)(.|\n)*rewound: (?!.*(town|city))",
    "refine": r"( +-\d+\.\d+ .*\n){3}",
    "7_experiments": r"min-p against top-p, 3 samples in pairs(.|\n)*removed by each member",
    "8_server": r"Paris(.|\n)*1 '.*\n(.|\n)*0 '",
    "1_first_run": r"Paris(.|\n)*did you mean 'temperature'",
    "6_your_strategy": r"a = 1.0:.*Lyon(.|\n)*the law holds: p = 0\.\d(.|\n)*FSD ",
    "2_parameters": r"llamacpp (.|\n)*top_p(.|\n)*temperature(.|\n)*min_p",
}


@pytest.fixture
def one_engine(smollm2, smollm2_engine, monkeypatch):
    """Pages and recipes load the demo model, each for itself; here they share it."""
    monkeypatch.setenv("HANDLOOM_MODEL", str(smollm2))

    def engine(name, **options):
        assert str(name) == str(smollm2)
        return (
            Engine(smollm2_engine.model, smollm2_engine.tokenizer, **options) if options else smollm2_engine
        )

    monkeypatch.setattr(Engine, "from_pretrained", engine)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page, one_engine, capsys):
    text, namespace = page.read_text(encoding="utf-8"), {}
    for found in re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S):
        line = text[: found.start()].count("\n") + 1  # tracebacks tell the page's own lines
        exec(compile("\n" * line + found.group(1), str(page), "exec"), namespace)
    assert "engine" in namespace
    assert re.search(SAYS.get(page.stem, ""), capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_runs_and_says_what_it_promises(recipe, one_engine, capsys):
    runpy.run_path(str(recipe))
    assert re.search(SAYS[recipe.stem], capsys.readouterr().out, re.M)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_is_at_most_thirty_lines(recipe):
    assert recipe.read_text(encoding="utf-8").count("\n") <= 30


def test_every_page_of_the_guide_is_in_the_book():
    included = re.findall(r"^\.\. include:: (.*)$", (DOCS / "__init__.py").read_text(encoding="utf-8"), re.M)
    assert included == [page.name for page in PAGES]
    assert [page.name[0] for page in PAGES] == list("12345678")


@pytest.mark.slow
def test_one_command_builds_guide_and_reference(tmp_path, monkeypatch):
    pytest.importorskip("pdoc")
    monkeypatch.syspath_prepend(DOCS.parent)
    monkeypatch.setattr(sys, "argv", ["docs", str(tmp_path)])
    runpy.run_module("docs", run_name="__main__")
    pages = {
        path.relative_to(tmp_path).as_posix(): path.read_text("utf-8") for path in tmp_path.rglob("*.html")
    }
    assert "One seed is one noise" in pages["docs.html"]
    assert "best_of_two" in pages["docs.html"]
    assert 'id="Engine.generate"' in pages["handloom.html"]
    assert 'id="beam_search"' in pages["handloom/strategies.html"]
    assert 'id="Keep"' in pages["handloom/processors.html"]
