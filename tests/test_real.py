"""The real chat model, end to end, where it is cached or can be had (`make test-real`)."""

import json

import pytest

from safelocus import smollm2
from safelocus.errors import ModelError

pytestmark = [pytest.mark.real, pytest.mark.slow]


@pytest.fixture(scope="module", autouse=True)
def model():
    try:
        smollm2.obtain()
    except ModelError as error:
        pytest.skip(f"the real chat model cannot be had: {error}")


def test_it_is_found_tuned_and_refuses(run, tmp_path):
    """ESI by refusal openings finds value matrices; 1 % of the weights, trained on few refusals, makes it refuse."""
    found, tuned = tmp_path / "found", tmp_path / "tuned"
    code, _, err = run(
        "score", "smollm2", "--prompts", "embedded:refusals", "--limit", 8, "--refusal", "-o", found, "--json"
    )
    assert code == 0, err
    (located,) = json.loads((found / "results.json").read_text())["maps"].values()
    components = {part["component"]: part for part in located["components"]}
    assert components["value"]["enrichment"] > 1.5
    code, out, err = run(
        "enhance", "smollm2", "--selection", found, "--data", "embedded:refusals", "--retain", "none",
        "--harmful", "organism:harmful-heldout", "--harmless", "none", "--limit", 16, "--max-new-tokens", 16,
        "--steps", 12, "--batch-size", 4, "--learning-rate", "1e-3", "--max-length", 96, "--validation", 0,
        "--judge", "refusal", "-o", tuned, "--json",
    )  # fmt: skip
    assert code == 0, err
    results = json.loads(out)
    assert results["before"]["refusal"]["value"] < 0.2
    assert results["after"]["refusal"]["value"] > results["before"]["refusal"]["high"]
