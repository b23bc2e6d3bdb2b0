"""Writes the index of the policy library, `policies/README.md`, from what its policies say.

python -m tools.policy_index           # write it
python -m tools.policy_index --check   # exit with 1 if it is not up to date
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Final

from guard.policy import load_policies
from guard.policy.model import Block, ConditionKind, Mask, Policy

LIBRARY: Final = Path(__file__).parent.parent / "policies"
INDEX: Final = LIBRARY / "README.md"

HEAD: Final = """\
<!-- Written by `python -m tools.policy_index` from the policies' metadata. -->
# The policy library

A folder for each policy: `policy.yaml`, a test suite (`tests.yaml`) and a README that says what it is
for, what it needs and what it does not see. All but `staged-rollout` are in `audit`: they count and
log, and act once you set `mode: enforce`.

They take their experts, baselines and thresholds from a profile, so that they fit any model that has
one. Here that is the profile of the demo model, `profiles/demo.json`; for yours, copy a folder and
change `spec.profile`.

    moe-guard check policies --model demo/model
    moe-guard test policies
    moe-guard serve demo/model --policies policies

"""

FOOT: Final = """
Routing is evidence, not proof of intent. Each README says what a policy can miss, and whom it can hit
wrongly. `schema/` holds the JSON Schema of policies and profiles, for editors; `profiles/` what is
known of models.
"""


def folders(library: Path = LIBRARY) -> list[Path]:
    """The folders that hold a policy, by name."""
    return sorted(path.parent for path in library.glob("*/policy.yaml"))


def index(library: Path = LIBRARY) -> str:
    rows = [
        "| policy | what it sees | signals | does | severity | maturity |",
        "|---|---|---|---|---|---|",
    ]
    for folder in folders(library):
        rows += [_row(folder.name, policy) for policy in load_policies(folder).policies]
    return HEAD + "\n".join(rows) + "\n" + FOOT


def _row(folder: str, policy: Policy) -> str:
    signals = {
        condition.kind
        for rule in policy.rules
        for condition in rule.conditions()
        if condition.kind is not ConditionKind.ALWAYS
    }
    cells = [
        f"[{policy.name}]({folder}/)",
        policy.description,
        ", ".join(f"`{kind}`" for kind in ConditionKind if kind in signals) or "none",
        _actions(policy),
        policy.severity.value,
        policy.maturity.value,
    ]
    return f"| {' | '.join(cells)} |"


def _actions(policy: Policy) -> str:
    actions = []
    for rule in policy.rules:
        match rule.then:
            case Mask(method=method):
                actions.append(f"mask ({method.value})")
            case Block():
                actions.append("block")
            case _:
                actions.append("observe")
    return ", ".join(dict.fromkeys(actions))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    text = index()
    if not options.check:
        INDEX.write_text(text, encoding="utf-8")
    elif INDEX.read_text(encoding="utf-8") != text:
        sys.exit("policies/README.md is not up to date; run: python -m tools.policy_index")


if __name__ == "__main__":
    main()
