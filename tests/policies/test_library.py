"""The policy library: every rule is tested both ways, and audit decides as enforcement does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from guard.offline.evaluator import OfflineEvaluator, OfflineRequest
from guard.policy.model import Mode, PolicySet
from guard.program.compile import compile_policies
from guard.program.configuration import topology_from_folder
from guard.program.fit import check_against
from guard.program.verdict import Firing, Verdict
from guard.testing.cases import CaseBuilder
from guard.testing.run import run_suites
from guard.testing.suite import Suite, find_suites
from tools.policy_index import LIBRARY, folders

FOLDERS = folders()
NAMES = [folder.name for folder in FOLDERS]
DEMO_MODEL = LIBRARY.parent / "demo" / "model"


def suites_of(*paths: Path) -> tuple[Suite, ...]:
    found = find_suites(paths)
    assert found.faults == ()
    return tuple(found.suites)


def test_every_case_of_every_suite_holds_and_every_rule_fires_in_one_and_not_in_another() -> None:
    found = find_suites([LIBRARY])
    results = run_suites(found.suites, found.tested)

    assert [(case.suite, case.name, case.mismatches) for case in results.failed] == []
    assert results.faults == ()
    assert [(rule.rule, rule.missing) for rule in results.uncovered] == []


@pytest.mark.parametrize("folder", FOLDERS, ids=NAMES)
def test_it_fits_the_model_of_its_profile(folder: Path) -> None:
    (suite,) = suites_of(folder)

    assert check_against(suite.policies, topology_from_folder(DEMO_MODEL)) == []


@pytest.mark.parametrize("folder", FOLDERS, ids=NAMES)
def test_audit_and_enforcement_reach_the_same_decisions_on_the_same_routing(folder: Path) -> None:
    (suite,) = suites_of(folder)
    cases = list(CaseBuilder(suite).build())
    assert cases
    in_mode = {
        mode: _verdicts(
            _in_mode(suite.policies, mode),
            suite,
            # The policy's own mode alone makes the difference.
            [
                OfflineRequest(case.request.routing, replace(case.request.facts, enforced=frozenset()))
                for case in cases
            ],
        )
        for mode in (Mode.AUDIT, Mode.ENFORCE)
    }

    decisions = 0
    for audited, enforced in zip(in_mode[Mode.AUDIT], in_mode[Mode.ENFORCE], strict=True):
        # Behind a block there is no more routing to decide on.
        last = None if enforced.blocked is None else enforced.blocked.position
        until = [f for f in audited.firings if last is None or f.position <= last]
        assert list(map(_as_shown, enforced.firings)) == list(map(_as_shown, until))
        assert (audited.masks, audited.blocked) == ((), None)
        decisions += len(until)
    assert decisions


def _as_shown(firing: Firing) -> Firing:
    """A probability's last digit depends on how many others it is computed with."""
    shown = tuple(one._replace(value=float(f"{one.value:.12g}")) for one in firing.evidence)
    return firing._replace(evidence=shown)


def _in_mode(policies: PolicySet, mode: Mode) -> PolicySet:
    changed = tuple(replace(policy, mode=mode) for policy in policies.policies)
    return replace(policies, policies=changed)


def _verdicts(policies: PolicySet, suite: Suite, requests: list[OfflineRequest]) -> list[Verdict]:
    evaluator = OfflineEvaluator(compile_policies(policies, suite.topology))
    return [outcome.verdict for outcome in evaluator.outcomes(requests)]
