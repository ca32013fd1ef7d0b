"""The page without a browser: what it says is what the runs' files say, and strangers' text stays text."""

import base64
import json
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, Phi3Config, Qwen3MoeConfig

from made_maps import MAPS, make_map
from made_runs import enhance_run, map_run, measures, preserve_run, score_run
from pages import Page
from safelocus.analysis import words as text
from safelocus.analysis.density import densities
from safelocus.analysis.map import relative_depths, safety_map, thirds
from safelocus.analysis.words import summary_lines
from safelocus.errors import RunError
from safelocus.model.layout import Layout
from safelocus.report.comparison import _depth_part
from safelocus.report.grid import Span
from safelocus.report.maps import layers_chart
from safelocus.report.page import write_page
from safelocus.report.runs import ReportRun, with_parts
from safelocus.run.files import write_json
from safelocus.selection.selection import Selection
from test_map import EXPERTS, SMALL, random_scores
from tiny_models import config


@pytest.fixture
def written(tmp_path):
    def written(*folders, **options) -> tuple[str, Page]:
        write_page([ReportRun.read(folder) for folder in folders], tmp_path / "page.html", **options)
        html = (tmp_path / "page.html").read_text(encoding="utf-8")
        return html, Page(html)

    return written


@pytest.mark.parametrize("kind", list(MAPS))
def test_page_of_every_kind_of_map(kind, written, tmp_path):
    located = make_map(**MAPS[kind])
    _, page = written(map_run(tmp_path / "run", [("tiny", located)]))
    titles = [each.get("title") for each in page.data]
    assert titles.count("Concentration") == (located.concentration is not None)
    assert titles.count("Routed experts") == bool(located.experts)
    for line in summary_lines(located):
        assert line in page.words.replace("\N{NO-BREAK SPACE}", " ")


def test_every_number_of_a_map_is_that_of_the_file(written, tmp_path):
    folder = score_run(tmp_path / "run", "moe")
    _, page = written(folder)
    results = json.loads((folder / "results.json").read_text())["maps"]["tiny"]
    shown = {(row["layer"], row["component"]): row for row in page.rows("Enrichment by layer and component")}
    assert len(shown) == len(results["cells"]) + len(results["layers"]) + len(results["components"])
    regions = [
        *(((str(region["layer"]), region["component"]), region) for region in results["cells"]),
        *(((str(region["layer"]), "all"), region) for region in results["layers"]),
        *((("all", region["component"]), region) for region in results["components"]),
    ]
    for key, region in regions:
        _same(shown[key], region)
    for row, region in zip(page.rows("Routed experts"), results["experts"], strict=True):
        assert (row["layer"], row["expert"]) == (str(region["layer"]), str(region["expert"]))
        assert row["tokens"] == region["tokens"]
        _same(row, region)
        in_layer = [each["tokens"] for each in results["experts"] if each["layer"] == region["layer"]]
        assert row["load"] == pytest.approx(region["tokens"] / np.mean(in_layer), rel=1e-5)
    curve = [row for row in page.rows("Concentration") if row["curve"] == "ESI"]
    for row, point in zip(curve, results["concentration"]["points"], strict=True):
        assert (row["top"], row["share of scores"]) == pytest.approx((point["fraction"], point["mass"]), rel=1e-5)


def _same(row: dict, region: dict) -> None:
    assert row["enrichment"] == pytest.approx(region["enrichment"], rel=1e-5)
    assert row["share of selection"] == pytest.approx(region["share"], rel=1e-5)
    assert row["share of weights"] == pytest.approx(region["expected"], rel=1e-5)
    assert (row["selected"], row["weights"]) == (region["num_selected"], region["num_weights"])


def test_every_number_of_a_training_is_that_of_the_file(written, tmp_path):
    folder = enhance_run(tmp_path / "run")
    results = json.loads((folder / "results.json").read_text())
    _, page = written(folder)
    names = {text.measure_label(name): name for name in measures(0)}
    kinds = {text.kind_label(kind): results["controls"][kind] for kind in results["controls"]}
    states = {"before": results["before"], "selected weights": results["after"], **kinds}
    table = page.table("Before and after")
    assert [row["trained"] for row in table] == list(states)
    for row in table:
        for label, name in names.items():
            assert row[label] == Span(states[row["trained"]][name]).exact
    curves = [each for each in page.data if each.get("title") == "ASR"]
    assert [len(each["table"]["rows"]) for each in curves] == [3, 4, 9]  # along the training; back; learning rates
    assert [row["loss"] for row in page.rows("Training loss")] == pytest.approx([3 / n for n in range(1, 11)], rel=1e-5)
    assert "Harmful answers went from 96 % to 4 % [0, 14]." in page.words.replace("\N{NO-BREAK SPACE}", " ")
    assert "12,709" in page.words


@pytest.mark.parametrize(("make", "did"), [(enhance_run, "trained"), (preserve_run, "protected")])
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_training_shows_where_its_weights_lie(make, did, kind, written, tmp_path):
    """From the selection alone: the same places as on the page of the scores, and nothing about scores."""
    scored, trained = score_run(tmp_path / "scored", kind), make(tmp_path / "trained")
    (trained / "selection.safetensors").write_bytes((scored / "selection.safetensors").read_bytes())
    (_, before), (_, page) = written(scored), written(trained)
    for title in ("Enrichment by layer and component", *(["Routed experts"] if kind == "moe" else [])):
        known = before.rows(title)
        for row, full in zip(page.rows(title), known, strict=True):
            assert row == {name: full[name] for name in row}
            assert not {"tokens", "load", "share of all ESI"} & set(row)
        assert {"share of all ESI"} <= set(known[0])
    inside = [next(each for each in shown.data if each.get("kind") == "matrices") for shown in (before, page)]
    assert inside[0]["matrices"] == inside[1]["matrices"]
    assert f"Where the {did} weights lie" in page.words
    assert "From the selection alone: how concentrated the scores are" in page.words
    assert ("which experts got tokens" in page.words) == (kind == "moe")
    assert "Concentration" not in [each.get("title") for each in page.data]
    assert "weights lie" not in written(make(tmp_path / "without"))[1].words


def _measure(row: dict) -> dict:
    return {name: pytest.approx(row[name], abs=1e-6) for name in ("value", "low", "high", "n")}


def test_preservation_stands_beside_the_unprotected_run(written, tmp_path):
    _, page = written(preserve_run(tmp_path / "run"))
    arms = ["before", "protected", "unprotected", "random protected"]
    assert [row["arm"] for row in page.table("Before and after")] == arms
    assert {row["curve"] for row in page.rows("ASR")} == {"protected", "unprotected"}
    words = page.words.replace("\N{NO-BREAK SPACE}", " ")
    assert "without protection to 80 %" in words
    assert "Right answers in the task learned went from 30 % to 85 %" in words
    assert "127,091" in words


def test_what_is_missing_is_left_out_and_named(written, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({"before": measures(0.9), "after": measures(0.1), "sweep": 3}))
    _, page = written(folder)
    assert "results.json holds no curve, controls, losses" in page.words
    assert [row["trained"] for row in page.table("Before and after")] == ["before", "selected weights"]


def test_models_of_different_depth_stand_side_by_side(written, tmp_path):
    dense = map_run(tmp_path / "shallow", [("shallow", make_map(layers=4))])
    deep = map_run(tmp_path / "deep", [("deep", make_map(layers=80, experts=4))])
    _, page = written(dense, deep)
    rows = page.rows("Enrichment by relative depth")
    assert [row["relative depth"] for row in rows if row["model"] == "shallow"] == [0.125, 0.375, 0.625, 0.875]
    assert len([row for row in rows if row["model"] == "deep"]) == 80
    assert all(0 < row["relative depth"] < 1 for row in rows)


def test_behaviours_stand_side_by_side(written, tmp_path):
    _, page = written(enhance_run(tmp_path / "enhance"), preserve_run(tmp_path / "preserve"))
    assert "Side by side" not in written(enhance_run(tmp_path / "alone"))[1].words
    assert {row["run"] for row in page.table("How the models behave")} == {
        "enhance, before", "enhance, after", "preserve, before", "preserve, after",
    }  # fmt: skip


def test_runs_of_the_same_model_keep_names_of_their_own(written, tmp_path):
    first = map_run(tmp_path / "first", [("tiny", make_map())])
    second = map_run(tmp_path / "second", [("tiny", make_map())])
    _, page = written(first, second)
    assert set(page.table("Enrichment by component")[0]) == {"component", "first: tiny", "second: tiny"}


def test_parts_of_several_demos_keep_names_of_their_own(tmp_path):
    runs = []
    for name in ("first", "second"):
        (tmp_path / name / "dense").mkdir(parents=True)
        enhance_run(tmp_path / name / "dense" / "enhance")
        write_json(tmp_path / name / "results.json", {"claims": {}, "runs": ["dense/enhance"]})
        runs.append(ReportRun.read(tmp_path / name))
    assert [run.name for run in with_parts(runs[:1])] == ["first", "dense/enhance"]
    assert [run.name for run in with_parts(runs)] == [
        "first", "first/dense/enhance", "second", "second/dense/enhance",
    ]  # fmt: skip


def test_strangers_text_stays_text(written, tmp_path):
    attack = "<script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>'\"&{{ 7 * 7 }}"
    located = replace(make_map(experts=4, name=attack), objective=attack)
    located = replace(located, matrices=tuple(replace(row, name=attack + row.name) for row in located.matrices))
    html, page = written(map_run(tmp_path / "run", [(attack, located), ("other", located)]))
    _, harmless = written(map_run(tmp_path / "tame", [("tiny", make_map(experts=4)), ("other", make_map(experts=4))]))
    assert "<script>alert" not in html
    assert "img" not in page.tags
    assert page.scripts == harmless.scripts == 1
    assert page.words.count(attack) >= 3
    assert "{{ 7 * 7 }}" in page.words


def test_responses_are_bundled_on_request_only(written, tmp_path):
    folder = enhance_run(tmp_path / "run")
    html, _ = written(folder)
    assert "a request that is not shown" not in html
    assert "cannot help with that" not in html
    html, page = written(folder, responses=True)
    assert "<script>alert" not in html
    found = next(each for each in page.data if "answers" in str(each)[:2000] and "columns" in each)
    assert found["columns"] == ["run, before", "run, after"]
    assert len(found["rows"]) == 45
    first, second = found["rows"][0]["answers"]
    assert first == {"text": "Sure <script>alert(1)</script>", "tags": ["harmful (refusal)"]}
    assert second["tags"] == ["refused", "safe (refusal)"]


def test_page_asks_the_network_for_nothing(written, tmp_path):
    html, page = written(score_run(tmp_path / "a", "dense"), enhance_run(tmp_path / "b"))
    assert {each for each in page.addresses if not each.startswith("#")} == {"data:,"}
    assert "default-src 'none'" in page.policy
    assert "connect-src" not in page.policy
    head = html.split("<body>")[0]
    assert "url(" not in head
    assert "@import" not in head
    assert len(html) < 500_000


def test_page_says_how_to_make_the_run_again(written, tmp_path):
    folder = score_run(tmp_path / "a b", "dense")
    _, page = written(folder)
    assert f"safelocus score --config '{folder}/run.toml' -o '{folder}-again'" in page.words
    assert 'model = "tiny-dense"' in page.words
    assert "num prompts" in page.words


def test_page_is_the_same_each_time_and_replaces_the_earlier(written, tmp_path):
    folder = map_run(tmp_path / "run", [("a", make_map())])
    assert written(folder)[0] == written(folder)[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "run"]


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunError, match="no such folder"):
        ReportRun.read(tmp_path / "nowhere")
    with pytest.raises(RunError, match="holds no finished run"):
        ReportRun.read(tmp_path)
    file = tmp_path / "results.json"
    for content, message in (("{", "not valid JSON"), ("[]", "no run that can be reported"), ('{"a": 1}', "found a;")):
        file.write_text(content)
        with pytest.raises(RunError, match=message):
            ReportRun.read(tmp_path)
    file.write_text('{"maps": {"tiny": {}}}')
    with pytest.raises(RunError, match="damaged results"):
        _ = ReportRun.read(tmp_path).maps


CONFIGS = {
    "dense": lambda: LlamaConfig(**SMALL),
    "fused": lambda: Phi3Config(**SMALL, pad_token_id=0, bos_token_id=1, eos_token_id=2),
    "moe": lambda: Qwen3MoeConfig(**SMALL, **EXPERTS, head_dim=8),
}


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_densities_against_counting_in_dense_masks(kind):
    scores = random_scores(Layout.from_config(CONFIGS[kind]()))
    selection = scores.select(0.05)
    found = {entry["name"]: entry for entry in densities(selection).to_json()["matrices"]}
    counts = selection.per_matrix_counts()
    assert set(found) == {name for name, number in counts.items() if number}
    for name, tensor in selection.layout.tensors.items():
        mask = np.zeros(math.prod(tensor.shape), dtype=np.int64)
        mask[selection[name].numpy()] = 1
        for matrix, view in zip(tensor.matrices, tensor.split(torch.from_numpy(mask).view(tensor.shape)), strict=True):
            if matrix.name not in found:
                assert int(view.sum()) == 0
                continue
            entry = found[matrix.name]
            grid = np.frombuffer(base64.b64decode(entry["counts"]), dtype=f"<u{entry['bytes']}").reshape(entry["shape"])
            assert grid.sum() == entry["num_selected"] == counts[matrix.name]
            part = tensor.matrices.index(matrix) % len(tensor.parts)
            assert (entry["rows"], entry["columns"]) == (tensor.num_rows(part), tensor.num_columns(part))
            if not tensor.num_heads(part) and view.dim() == 2:
                rows = view.sum(1) if tensor.row_axes < tensor.column_axes else view.sum(0)
                edges = [-(-i * entry["rows"] // grid.shape[0]) for i in range(grid.shape[0] + 1)]
                expected = [int(rows[a:b].sum()) for a, b in pairwise(edges)]
                assert grid.sum(1).tolist() == expected


def test_no_bin_crosses_the_border_of_a_head():
    scores = random_scores(Layout.from_config(CONFIGS["dense"]()))
    entries = {entry["component"]: entry for entry in densities(scores.select(0.5)).to_json()["matrices"]}
    assert (entries["query"]["row_heads"], entries["key"]["row_heads"], entries["output"]["column_heads"]) == (4, 2, 4)
    assert entries["query"]["shape"][0] % 4 == 0
    assert entries["output"]["shape"][1] % 4 == 0
    assert (entries["up"]["row_unit"], entries["down"]["column_unit"]) == ("neuron", "neuron")


def test_a_cell_of_a_hybrid_model_opens_its_matrix():
    """Components are spelled alike in the heatmap and inside."""
    scores = random_scores(Layout.from_config(config("lfm2")))
    selection = scores.select(0.5)
    located = safety_map(scores, selection)
    inside = {matrix.component for matrix in densities(selection).matrices}
    assert "conv-x" in inside <= set(layers_chart(located).ys)


def test_a_page_reads_a_selection_once(tmp_path, monkeypatch, written):
    read = []
    load = Selection.load.__func__
    monkeypatch.setattr(Selection, "load", classmethod(lambda cls, path: read.append(path) or load(cls, path)))
    map_folder, training = score_run(tmp_path / "map", "dense"), enhance_run(tmp_path / "training")
    (training / "selection.safetensors").write_bytes((map_folder / "selection.safetensors").read_bytes())
    _, page = written(map_folder, training)
    assert len(read) == 2
    assert "method" in page.words


def test_an_evaluation_of_texts_alone_says_so(tmp_path, written):
    perplexity = {"value": 7.1, "low": 6.0, "high": 8.0, "n": 5}
    (tmp_path / "run").mkdir()
    write_json(tmp_path / "run" / "results.json", {"perplexity": perplexity, "counts": {}, "judges": []})
    assert "perplexity 7.1 [6, 8] (95" in written(tmp_path / "run")[1].words


def test_layers_of_several_stacks_are_not_added_up():
    one = make_map(layers=6)
    pair = replace(one, layers=tuple(replace(r, stack=s) for s in ("encoder", "decoder") for r in one.layers))
    part = _depth_part({"one": one, "pair": pair}, {})
    assert "with 6 and 6 + 6 layers" in part.blocks[0].note


def test_densities_keep_to_their_room():
    selection = random_scores(Layout.from_config(CONFIGS["dense"]())).select(0.5)
    found = densities(selection, max_cells=1000).to_json()
    whole = densities(selection).to_json()
    assert found["num_left_out"] == len(whole["matrices"]) - len(found["matrices"]) > 0
    fullest = sorted((entry["num_selected"] for entry in whole["matrices"]), reverse=True)
    assert sorted((e["num_selected"] for e in found["matrices"]), reverse=True) == fullest[: len(found["matrices"])]


def test_relative_depths_and_thirds():
    keys = [(None, layer) for layer in range(6)] + [(None, None)]
    assert [thirds(keys)[key] for key in keys[:6]] == ["early", "early", "middle", "middle", "late", "late"]
    assert relative_depths([("encoder", 0), ("decoder", 0), ("decoder", 1)]) == {
        ("encoder", 0): 0.5, ("decoder", 0): 0.25, ("decoder", 1): 0.75,
    }  # fmt: skip
