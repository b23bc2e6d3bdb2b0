"""What is wrong with a suite is told with its place, and with what to write instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.testing.suites import HEADER, run

OUTPUT = "    output: [{tokens: 8, use: flagged, rate: 0.5}]\n"

FAULTS = {
    "unknown rule": (
        "  - name: a\n    output: [{tokens: 8}]\n    expect: [{rule: brust}]\n",
        "7:21: cases[0].expect[0].rule: no policy of the suite has a rule 'brust'; "
        "did you mean 'burst'?",
    ),
    "unknown set": (
        "  - name: a\n    output: [{tokens: 8, use: flaged}]\n    expect: nothing\n",
        "6:31: cases[0].output[0].use: no policy or profile of the suite has a set 'flaged'; "
        "did you mean 'flagged'?",
    ),
    "rate that no whole number meets": (
        "  - name: a\n    output: [{tokens: 10, use: flagged, rate: 0.12}]\n    expect: nothing\n",
        "6:47: cases[0].output[0].rate: 10 tokens and 3 experts meet no rate of 0.12 exactly, but "
        "0.1 and 0.13333333333333333; take one of them, or another number of tokens",
    ),
    "rate beyond top-k": (
        "  - name: a\n    output: [{tokens: 10, use: flagged, rate: 1.5}]\n    expect: nothing\n",
        "6:47: cases[0].output[0].rate: 10 tokens can use these experts with rate from 0 to 1",
    ),
    "no expectation": (
        "  - name: a\n    output: [{tokens: 8}]\n",
        "5:5: cases[0]: what must happen? Write expect: nothing, or a list, or threshold: RULE",
    ),
    "unknown key": (
        "  - name: a\n    outputs: [{tokens: 8}]\n    expect: nothing\n",
        "6:5: cases[0].outputs: unknown key 'outputs'; did you mean 'output'?",
    ),
    "position behind the end": (
        "  - name: a\n    output: [{tokens: 8}]\n    expect: [{rule: burst, at: 9}]\n",
        "7:32: cases[0].expect[0].at: position 9 is behind the last one of the case, 8",
    ),
    "expert that is not in the model": (
        "  - name: a\n    output: [{tokens: 1, experts: {1: [8]}}]\n    expect: nothing\n",
        "6:35: cases[0].output[0].experts: layer 1 has 8 experts, and no expert 8",
    ),
    "unknown policy to enforce": (
        "  - name: a\n    request: {enforce: [brst]}\n    expect: nothing\n",
        "6:25: cases[0].request.enforce[0]: no policy of the suite is called 'brst'; "
        "did you mean 'burst'?",
    ),
    "baseline without a profile": (
        "  - name: a\n    prompt: [{tokens: 8, use: baseline}]\n    expect: nothing\n",
        "6:31: cases[0].prompt[0].use: no profile of the policies has baselines of layer 0; "
        "name one in spec.profile",
    ),
}


@pytest.mark.parametrize(("cases", "message"), FAULTS.values(), ids=list(FAULTS))
def test_a_fault_has_its_place_and_names_the_fix(tmp_path: Path, cases: str, message: str) -> None:
    results = run(tmp_path, cases)
    assert [str(fault) for fault in results.faults] == [f"{tmp_path}/tests.yaml:{message}"]
    assert results.cases == ()


def test_a_suite_whose_model_nothing_says_asks_for_it(tmp_path: Path) -> None:
    header = "\n".join(line for line in HEADER.splitlines() if "model" not in line) + "\n"
    results = run(tmp_path, f"  - name: a\n{OUTPUT}    expect: nothing\n", header=header)
    assert "for which model are the tests?" in str(results.faults[0])


def test_a_policy_that_does_not_load_is_told_once(tmp_path: Path) -> None:
    results = run(tmp_path, f"  - name: a\n{OUTPUT}    expect: nothing\n", policy="kind: Policy\n")
    assert results.suites == ()
    assert {fault.location.file for fault in results.faults} == {f"{tmp_path}/policy.yaml"}
    assert len(set(results.faults)) == len(results.faults)
