"""How fast `moe-guard test` is: policies with suites, in a process of its own, start included.

python -m benchmarks.policy_tests [--cases 1000] [--policies 20]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

POLICY = """\
apiVersion: moe-guard/v1
kind: Policy
metadata: {{name: policy-{number}}}
spec:
  mode: enforce
  experts:
    flagged:
      - {{layers: 0-11, experts: [{first}, {second}]}}
  rules:
    - name: burst
      match: {{phase: output}}
      when: {{rate: {{experts: flagged, over: 16, minTokens: 8, above: 0.12}}}}
      persist: {{hits: 2, of: 3}}
      then: {{mask: {{experts: flagged, until: 16}}}}
    - name: mass
      when: {{mass: {{experts: flagged, over: request, minTokens: 8, above: 0.30}}}}
    - name: many
      when: {{count: {{experts: flagged, over: output, atLeast: 200}}}}
      then: {{block: {{message: No.}}}}
"""
SUITE = """\
apiVersion: moe-guard/v1
kind: PolicyTest
model: {layers: 12, experts: 64, topK: 4}
cases:
"""
FIRING = """\
  - name: burst {number}
    prompt: [{{tokens: 12}}]
    output: [{{tokens: {quiet}}}, {{tokens: 16, use: flagged, rate: 0.25}}, {{tokens: 10}}]
    expect: [{{rule: burst}}, {{outcome: masked}}]
"""
SILENT = """\
  - name: quiet {number}
    prompt: [{{tokens: {quiet}}}]
    output: [{{tokens: 30}}]
    expect: nothing
"""


def write(folder: Path, num_policies: int, num_cases: int) -> None:
    """num_cases in all, half of them firing, evenly over the policies."""
    for number in range(num_policies):
        below = folder / f"policy-{number}"
        below.mkdir()
        numbers = {"number": number, "first": 2 * number % 64, "second": (2 * number + 1) % 64}
        (below / "policy.yaml").write_text(POLICY.format(**numbers))
        of_suite = range(number, num_cases, num_policies)
        cases = [
            (FIRING if case % 2 else SILENT).format(number=case, quiet=8 + case % 17)
            for case in range(len(of_suite))
        ]
        (below / "tests.yaml").write_text(SUITE + "".join(cases))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--policies", type=int, default=20)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), asked.policies, asked.cases)
        command = [sys.executable, "-c", "from guard.cli import main; main()", "test", name]
        began = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - began
    sys.stdout.write(done.stdout[-2000:] + done.stderr[-2000:])
    sys.stdout.write(f"{asked.cases} cases in {seconds:.1f} s, start included: ")
    sys.stdout.write(f"{asked.cases / seconds:.0f} cases/s\n")
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
