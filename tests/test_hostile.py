"""What strangers wrote (answers, names, templates, files, servers) is shown and kept, and does nothing."""

import copy
import io
import json
import re

import pytest
import yaml

from made_maps import make_map
from made_runs import _write, enhance_run, map_run, measures
from safelocus.cli import output
from safelocus.cli.evaluate import _disagreement
from safelocus.errors import ModelError
from safelocus.inert import code, inert, line, markdown, without_secrets
from safelocus.model.chat import bounds, chat_format
from safelocus.report.card import card
from safelocus.report.grid import Grid
from safelocus.report.page import write_page
from safelocus.report.runs import ReportRun
from test_endpoint import KEY, answer, error, judge_at, serve
from tiny_targets import byte_level

ESCAPES = "\x1b[2J\x1b]0;title\x07\x9b31m\r\b\0"
BIDI = "safe\u202egnp.exe\u2066\u200f\u061c"
MARKUP = "[bold red]x[/] [/nothing] [link=http://evil.example]y[/link]"
HTML = "<script>alert(1)</script><img src=http://evil.example onerror=alert(2)>"
TABLE = "a | b\nnew: line\n---\n`code` [text](javascript:x) ![](http://evil.example/x.png) \\|"
HOSTILE = [ESCAPES, BIDI, MARKUP, HTML, TABLE, "\ud800", "\u2028"]
ALL = "".join(HOSTILE)
ACTIVE = re.compile(r"[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u200f\u061c\ud800-\udfff]")


def test_text_is_the_same_but_for_what_acts():
    assert inert("Grüße, 世界\tनमस्ते 👩‍👩‍👧 \\u00e4\n") == "Grüße, 世界\tनमस्ते 👩‍👩‍👧 \\u00e4\n"
    assert inert("\x1b[31mred\u202e") == "\\u001b[31mred\\u202e"
    assert not ACTIVE.search(inert(ALL))
    assert "\n" not in line(ALL)
    assert json.loads(inert(json.dumps(ALL, ensure_ascii=False))) == ALL


@pytest.fixture
def terminal(monkeypatch):
    """Consoles that believe to write to a terminal; what they wrote."""
    files = {}
    for name in ("results", "errors", "remarks"):
        files[name] = io.StringIO()
        console = type(getattr(output, name))(file=files[name], force_terminal=True, width=100)
        monkeypatch.setattr(output, name, console)
    return lambda: "".join(file.getvalue() for file in files.values())


def test_nothing_reaches_the_terminal_but_our_own_styles(terminal):
    row = {"prompt": ALL, "response": ALL, "judgements": {ALL: {"verdict": "safe", "explanation": ALL}}}
    for text in [*HOSTILE, ALL]:
        output.note(text)
        output.complain(text)
        output.mind([text])
        grid = Grid(title=text, headings=(text, "n"), rows=((text, text),), caption=output.cut("x"))
        output.results.print(grid.rich())
    output.results.print(_disagreement(row, [ALL]))
    written = re.sub(r"\x1b\[[0-9;]*m", "", terminal())  # colours: ours
    assert not ACTIVE.search(written)
    assert "\\u001b[2J" in written
    assert "[bold red]x[/]" in written  # told, not obeyed


def test_a_line_of_a_megabyte_is_cut(terminal):
    output.complain("x" * 1_000_000)
    output.note("y" * 1_000_000)
    row = {"prompt": "p" * 10**6, "response": "r" * 10**6}
    row["judgements"] = {"j": {"verdict": "safe", "explanation": "e" * 10**6}}
    output.results.print(_disagreement(row, ["j"]))
    assert "(1,000,000 characters)" in terminal()
    assert len(terminal()) < 100_000


def test_json_for_machines_is_inert_and_means_the_same(capsys):
    output.print_json({ALL: [ALL]})
    printed = capsys.readouterr().out
    assert not ACTIVE.search(printed)
    assert json.loads(printed) == {ALL: [ALL]}


def test_markdown_has_no_html_links_pictures_and_no_more_columns():
    table = Grid(title="", headings=("name", "value"), rows=((ALL, "1"), ("b", ALL))).markdown()
    assert len(table.split("\n")) == 4
    for text in table.split("\n"):
        assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", text)) == 3
    assert not re.search(r"<\w", table)
    assert markdown("<0.01 %, p < 0.001") == "<0.01 %, p < 0.001"
    assert "](" not in table
    assert not ACTIVE.search(table)
    assert markdown("0.5 [0.4,0.6] a_b") == "0.5 [0.4,0.6] a_b"  # as most cells are
    assert code("a`b\nc") == "`a'b\\nc`"


def test_a_card_cannot_be_made_to_say_or_run_anything_else():
    model = f'x\nlicense: mit\n---\n`$(touch /tmp/x)` "); import os; ("{HTML}{BIDI}```\n# Another'
    part = {"source": ALL, "num_prompts": 3}
    results = {
        "provenance": {
            "model": model, "dtype": "float32", "selection": {"which": "top", "method": ALL}, "data": part,
            "retained": [part], "own_answers": False, "retain_rows": 1, "retain_kl": 1.0, "retain_weight": 1.0,
            "versions": {"torch": ALL},
        },
        "patch": {"k": 7},
        "before": measures(0.9) | {"judges": [{"judge": ALL}], "provenance": {"prompts": [part]}},
        "after": measures(0.1),
        "controls": {"random": measures(0.7) | {"learning_rate": 1e-3, "num_weights": 7}},
        "training": {"learning_rate": 1e-3, "step": 3, "share": 0.7, "back": [1], "stopped": ALL, "num_weights": 7},
        "settings": {"schedule": "linear", "steps": 3, "batch_size": 1, "accumulation": 1, "seed": 0},
        "notes": [ALL],
    }  # fmt: skip
    text = card(results)
    _, front, body = text.split("---\n", 2)
    assert list(yaml.safe_load(front)) == ["library_name", "tags", "base_model"]
    assert not ACTIVE.search(text)
    assert [title for title in body.split("\n") if title.startswith("# ")] == [body.strip().split("\n")[0]]
    assert body.count("\n```") == 4  # as many fences as there should be
    outside = re.sub(r"```.*?\n```", "", body, flags=re.DOTALL)
    assert "<script" not in re.sub(r"(?<!\\)`[^`\n]*`", "", outside)
    assert "](" not in outside
    python = re.search(r"```python\n(.*?)\n```", body, re.DOTALL)[1]
    calls = compile(python, "card", "exec").co_names
    assert set(calls) <= {"safelocus", "sl", "load", "target", "Patch", "patch", "apply", "revert"}
    assert "'" in body.split("patch apply")[1].split("\n")[0]  # one word for a shell


def test_the_page_stays_inert(tmp_path):
    folder = enhance_run(tmp_path / "run")
    row = {"set": "harmful", "prompt": ALL, "system": None, "response": ALL + "z" * 1_000_000, "refused": True}
    (folder / "after" / "responses.jsonl").write_text(json.dumps(row) + "\n")
    results = json.loads((folder / "results.json").read_text())
    results["provenance"] |= {"model": ALL, ALL: ALL}
    _write(folder, results | {"notes": [ALL]})
    named = map_run(tmp_path / "map", [(ALL.replace("\ud800", ""), make_map())])
    write_page([ReportRun.read(folder), ReportRun.read(named)], tmp_path / "page.html", responses=True)
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not ACTIVE.search(html)
    assert "<script>alert" not in html
    assert "<img" not in html
    assert "\\u001b[2J" in html


def template(source):
    tokenizer = copy.deepcopy(byte_level())
    tokenizer.chat_template = source
    return tokenizer


PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"
ENDLESS = {
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "recursion": "{% macro f(n) %}{% for i in range(9) %}{{ f(n + 1) }}{% endfor %}{% endmacro %}{{ f(0) }}",
    "words": "{{ lipsum(n=100000) }}",
    "doubling": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "many": "{{ 'a' * 100000000000 }}",
    "padding": "{{ 'a'.ljust(100000000000) }}",
    "power": "{{ 9 ** 9 ** 9 }}",
}  # fmt: skip


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS.keys())
def test_a_template_without_end_is_stopped(source, monkeypatch):
    monkeypatch.setattr(bounds, "MOST_STEPS", 100_000)
    with pytest.raises(ModelError, match=r"chat template (was stopped|takes powers)"):
        chat_format(template(PLAIN + source))


def test_a_long_conversation_and_stars_are_no_powers():
    text = PLAIN + "{%- macro f(a) %}{{ a }}{% endmacro %}{{ f(*['**bold**'], **{}) }} **{{ 3 * 2 }}**"
    assert chat_format(template(text)).render("x" * 100_000).endswith("**bold** **6**")


def test_our_own_tracing_gives_way_to_that_of_a_debugger():
    import sys

    before = sys.gettrace()
    chat_format(template(PLAIN))
    assert sys.gettrace() is before


def test_a_server_that_sends_our_key_back_does_not_spread_it(tmp_path):
    def told(script):
        with serve([script]) as server:
            judge = judge_at(server, cache=tmp_path, num_attempts=1)
            return repr(judge.judge(["request"], ["an answer"])) + repr(judge.describe())

    for script in (error(500, f"got {KEY}"), error(400, f"got {KEY}"), answer(f"Score: 1, says {KEY}")):
        assert KEY not in told(script)
    assert not any(KEY in file.read_text() for file in tmp_path.rglob("*.json"))


def test_addresses_are_kept_without_what_is_secret_in_them():
    assert without_secrets("https://user:word@host:1/v1?token=abc#x") == "https://host:1/v1"
    for text in ("organism:dense", "/a/b?c#d", "C:\\a", "http://[", "{system}\n{prompt}"):
        assert without_secrets(text) == text
