"""Each finding, where it is due and where it is not."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import pytest

from guard.policy import load_policies, parse_policies
from guard.policy.lint import Code, Finding, Level, ModelShape, lint
from guard.policy.lint.model_shape import LayerShape

TODAY = date(2027, 3, 1)

HEAD = """\
apiVersion: moe-guard/v1
kind: Policy
metadata: {name: NAME}
spec:
  mode: MODE
  model: {layers: 4, experts: 8, topK: 2}
  experts:
    f: [{layer: 1, experts: [1, 2, 3]}]
    g: [{layer: 1, experts: [3]}, {layer: 2, experts: [0, 1]}]
    h: [{layers: 0-1, experts: 7}]
    w: [{layer: 1, weights: {1: 0.5, 2: -0.25, 3: 1}}]
  rules:
    - {name: uses, when: {any: [USES]}}
"""
USES = ", ".join(f"{{score: {{experts: {name}, over: 7, above: 0.1}}}}" for name in "fghw")


def policy(*rules: str, name: str = "p", mode: str = "audit", more: str = "") -> str:
    head = HEAD.replace("NAME", name).replace("MODE", mode).replace("USES", USES)
    return head + "".join(f"    - {rule}\n" for rule in rules) + more


def findings(*texts: str, **options: object) -> list[Finding]:
    loaded = parse_policies("---\n".join(texts), "p.yaml")
    defaults: dict[str, object] = {"today": TODAY, "with_suite": {"p", "q"}}
    return lint(loaded, **(defaults | options))  # type: ignore[arg-type]


def codes(*texts: str, **options: object) -> list[str]:
    return [finding.code.value for finding in findings(*texts, **options)]


def rule(when: str, then: str = "observe", more: str = "", name: str = "r") -> str:
    return f"{{name: {name}, when: {{{when}}}, then: {{{then}}}{', ' + more if more else ''}}}"


def test_a_sound_policy_has_no_findings() -> None:
    text = policy(rule("rate: {experts: f, over: 16, above: 0.5}", "block: {}"), mode="enforce")

    assert findings(text) == []


NEVER = [
    ("count: {experts: f, atMost: -1}", "a count is at least 0"),
    ("count: {experts: f, over: 4, above: 8}", "0 to 8 in a window of 4 tokens"),
    ("count: {experts: f, over: token, above: 2}", "0 to 2 in one token"),
    ("rate: {experts: f, over: 4, above: 0.67}", "a token can choose 2 of its 3 experts"),
    ("rate: {experts: f, below: 0}", "a rate is 0 to"),
    ("mass: {experts: f, above: 1}", "a mass is a share, 0 to 1"),
    ("mass: {experts: f, atLeast: 1.01}", "0 to 1"),
    ("mass: {experts: f, atMost: -0.1}", "0 to 1"),
    ("score: {experts: w, above: 1.5}", "this score is -0.25 to 1.5"),
    ("score: {experts: w, bias: 1, above: 2.5}", "this score is 0.75 to 2.5"),
    ("score: {experts: w, below: -0.25}", "this score is -0.25 to 1.5"),
    ("coactivation: {experts: f, members: 3, over: 4, above: 0}", "asks for 3 experts"),
    ("coactivation: {experts: g, layers: 3, above: 0}", "asks for 3 layers and its set lies in 2"),
    ("coactivation: {experts: g, layers: 2, over: 4, above: 4}", "0 to 4"),
    ("entropy: {below: 0.9}", "effective experts are 1 to 8"),
    ("entropy: {above: 8.1}", "effective experts are 1 to 8"),
    ("concentration: {above: 4.1}", "a concentration is 0.5 to 4"),
    ("concentration: {below: 0.4}", "a concentration is 0.5 to 4"),
    ("not: {rate: {experts: f, atLeast: 0}}", "a rate is 0 to"),
    ("not: {always: {}}", "`always` is never false"),
    (
        "all: [{rate: {experts: f, above: 0.5}}, {rate: {experts: f, below: 0.2}}]",
        "no value satisfies rate above 0.5 and rate#2 below 0.2 at once",
    ),
    (
        "all: [{count: {experts: f, above: 2}}, {count: {experts: f, below: 3}}]",
        "no value satisfies count above 2 and count#2 below 3 at once",
    ),
    (
        "all: [{score: {experts: w, bias: 1, above: 1.5}}, {score: {experts: w, atMost: 0.5}}]",
        "no value satisfies",
    ),
    (
        "all: [{mass: {experts: f, above: 0.5}}, {not: {mass: {experts: f, above: 0.4}}}]",
        "no value satisfies mass above 0.5 and mass#2 atMost 0.4",
    ),
    ("any: [{mass: {experts: f, above: 1}}, {rate: {experts: f, above: 1}}]", "1 more ways"),
    ("not: {any: [{mass: {experts: f, above: 0.5}}, {mass: {experts: f, atMost: 0.5}}]}", "at once"),
]


@pytest.mark.parametrize(("when", "message"), NEVER)
def test_a_rule_that_can_never_fire(when: str, message: str) -> None:
    (found,) = findings(policy(rule(when)))

    assert (found.code, found.level) == (Code.NEVER_FIRES, Level.WARNING)
    assert found.location.line == 14
    assert message in found.message


SOUND = [
    "count: {experts: f, atMost: 0}",
    "count: {experts: f, over: 4, atLeast: 8}",
    "count: {experts: f, above: 100000}",
    "rate: {experts: f, over: 4, above: 0.66}",
    "mass: {experts: f, atLeast: 1}",
    "score: {experts: w, atLeast: 1.5}",
    "score: {experts: w, bias: 1, atMost: 0.75}",
    "coactivation: {experts: f, members: 2, over: 4, above: 3}",
    "coactivation: {experts: g, layers: 2, above: 0}",
    "entropy: {below: 1.5}",
    "concentration: {above: 3.9}",
    "concentration: {below: 0.6}",
    "all: [{rate: {experts: f, above: 0.2}}, {rate: {experts: f, below: 0.5}}]",
    "all: [{count: {experts: f, above: 2}}, {count: {experts: f, atMost: 3}}]",
    "all: [{rate: {experts: f, above: 0.5}}, {rate: {experts: f, over: output, below: 0.2}}]",
    "all: [{rate: {experts: f, above: 0.5}}, {rate: {experts: g, below: 0.2}}]",
    "any: [{mass: {experts: f, above: 0.9}}, {mass: {experts: f, below: 0.1}}]",
]


@pytest.mark.parametrize("when", SOUND)
def test_a_rule_that_can_fire_and_need_not(when: str) -> None:
    assert codes(policy(rule(when))) == []


def test_without_a_model_only_what_holds_for_every_model_is_said() -> None:
    text = policy(
        rule("rate: {experts: f, above: 0.67}", name="a"),
        rule("rate: {experts: f, above: 1}", name="b"),
        rule("entropy: {above: 10000}", name="c"),
    ).replace("  model: {layers: 4, experts: 8, topK: 2}\n", "")

    assert [found.message.split(" of ")[0] for found in findings(text)] == ["rule 'b'"]


def test_a_model_that_is_known_is_believed_layer_by_layer() -> None:
    when = rule("count: {experts: h, over: token, above: 1}")
    shape = ModelShape({0: LayerShape(8, 1), 1: LayerShape(8, 1)})
    narrow = rule("concentration: {above: 5}")

    assert codes(policy(when), shape=shape) == []
    assert codes(policy(narrow), shape=shape) == []
    assert codes(policy(narrow), shape=ModelShape({0: LayerShape(8, 2)})) == ["never-fires"]


@pytest.mark.parametrize(
    ("when", "more", "expected"),
    [
        ("rate: {experts: f, over: output, above: 0.5}", "match: {phase: prompt}", ["never-fires"]),
        ("rate: {experts: f, over: output, above: 0.5}", "match: {phase: output}", []),
        ("rate: {experts: f, over: output, above: 0.5}", "", []),
        (
            "any: [{rate: {experts: f, over: output, above: 0.5}}, {mass: {experts: f, above: 0.2}}]",
            "match: {phase: prompt}",
            ["constant-condition"],
        ),
        (
            "rate: {experts: f, over: prompt, above: 0.5}",
            "match: {phase: prompt}, persist: {hits: 2, of: 3}",
            ["never-fires"],
        ),
        (
            "entropy: {over: 8, above: 3}",
            "match: {phase: prompt}, persist: {hits: 2, of: 2}",
            ["never-fires"],
        ),
        (
            "any: [{entropy: {above: 3}}, {mass: {experts: f, over: 4, above: 0.5}}]",
            "match: {phase: prompt}, persist: {hits: 2, of: 2}",
            [],
        ),
        (
            "rate: {experts: f, over: prompt, above: 0.5}",
            "match: {phase: prompt}, persist: {hits: 1, of: 3}",
            [],
        ),
        ("rate: {experts: f, over: prompt, above: 0.5}", "persist: {hits: 2, of: 3}", []),
    ],
)
def test_what_a_phase_never_shows(when: str, more: str, expected: list[str]) -> None:
    assert codes(policy(rule(when, more=more))) == expected


@pytest.mark.parametrize(
    "when",
    [
        "rate: {experts: f, atLeast: 0}",
        "mass: {experts: f, atMost: 1}",
        "not: {count: {experts: f, below: 0}}",
        "any: [{mass: {experts: f, above: 0.5}}, {mass: {experts: f, atMost: 0.5}}]",
        "any: [{always: {}}, {mass: {experts: f, above: 0.5}}]",
        "all: [{always: {}}]",
    ],
)
def test_a_rule_that_always_fires(when: str) -> None:
    assert codes(policy(rule(when))) == ["always-fires"]


def test_always_alone_is_what_an_operator_means() -> None:
    assert codes(policy("{name: r, when: always, then: {block: {}}}")) == []


@pytest.mark.parametrize(
    ("when", "word"),
    [
        ("any: [{mass: {experts: f, above: 1}}, {mass: {experts: g, above: 0.5}}]", "never true"),
        ("all: [{mass: {experts: f, atLeast: 0}}, {mass: {experts: g, above: 0.5}}]", "never false"),
    ],
)
def test_a_condition_that_never_changes_within_a_rule_that_does(when: str, word: str) -> None:
    (found,) = findings(policy(rule(when)))

    assert found.code is Code.CONSTANT_CONDITION
    assert f"`mass` of rule 'r' is {word}" in found.message


MASK_H = "mask: {experts: h, until: clear}"


@pytest.mark.parametrize(
    ("when", "more", "expected"),
    [
        ("always: {}", "", True),
        ("count: {experts: f, above: 3}", "", True),
        ("count: {experts: f, over: output, atLeast: 3}", "", True),
        ("not: {count: {experts: f, below: 3}}", "", True),
        ("mass: {experts: f, over: prompt, above: 0.5}", "", True),
        ("mass: {experts: f, over: 8, above: 0.5}", "match: {phase: prompt}", True),
        ("count: {experts: f, over: 8, above: 3}", "", False),
        ("count: {experts: f, atMost: 3}", "", False),
        ("mass: {experts: f, above: 0.5}", "", False),
        ("mass: {experts: f, over: 8, above: 0.5}", "match: {phase: output}", False),
    ],
)
def test_a_mask_until_clear_that_nothing_clears(when: str, more: str, expected: bool) -> None:
    text = policy(rule(when, MASK_H, more))

    assert len(only(Code.UNRELEASED_MASK, text)) == expected
    assert only(Code.UNRELEASED_MASK, text.replace("until: clear", "until: request-end")) == []


def test_a_mask_that_makes_its_own_rule_turn_false() -> None:
    reads_own = policy(rule("rate: {experts: h, over: 8, above: 0.5}", MASK_H))
    reads_other = policy(rule("rate: {experts: f, over: 8, above: 0.5}", MASK_H))

    assert "self-releasing-mask" in codes(reads_own)
    assert "self-releasing-mask" not in codes(reads_own.replace("until: clear", "until: 8"))
    assert "self-releasing-mask" not in codes(
        reads_own.replace("until: clear", "until: clear, method: force")
    )
    assert "self-releasing-mask" not in codes(reads_other)


READS = rule("mass: {experts: f, over: 8, above: 0.5}", name="reads")
MASKS = rule("mass: {experts: h, over: 8, above: 0.5}", "mask: {experts: g}", name="masks")


def only(code: Code, *texts: str) -> list[Finding]:
    return [found for found in findings(*texts) if found.code is code]


def plain(*rules: str, name: str = "p", mode: str = "audit", more: str = "") -> str:
    """Without the rule that reads every set."""
    return policy(*rules, name=name, mode=mode, more=more).replace(
        f"    - {{name: uses, when: {{any: [{USES}]}}}}\n", ""
    )


def test_a_rule_that_reads_what_another_masks() -> None:
    (found,) = only(Code.READS_MASKED, plain(READS, MASKS))

    assert found.location.line == 13
    assert "`mass` of p/reads reads experts that p/masks masks" in found.message
    assert "it sees less" in found.message


@pytest.mark.parametrize(
    ("reads", "masks"),
    [
        (READS, MASKS.replace("experts: g", "experts: h")),  # other experts
        (READS, MASKS.replace("{experts: g}", "{experts: g, method: force}")),
        (READS.replace("when", "match: {phase: prompt}, when"), MASKS),  # masked in the output only
        (READS.replace("over: 8", "over: prompt"), MASKS),
        (
            READS.replace("when", "match: {labels: {t: a}}, when"),
            MASKS.replace("when", "match: {labels: {t: b}}, when"),
        ),
        (
            READS.replace("when", "match: {loraAdapters: a}, when"),
            MASKS.replace("when", "match: {loraAdapters: b}, when"),
        ),
    ],
    ids=["others", "forced", "prompt", "over-prompt", "labels", "adapters"],
)
def test_a_rule_that_no_mask_of_another_touches(reads: str, masks: str) -> None:
    assert only(Code.READS_MASKED, plain(reads, masks)) == []


def test_a_rule_of_the_prompt_is_touched_by_a_static_mask() -> None:
    static = "{name: masks, when: always, then: {mask: {experts: g}}}"
    reads = READS.replace("when", "match: {phase: prompt}, when")

    assert len(only(Code.READS_MASKED, plain(reads, static))) == 1
    later = static.replace("when", "match: {phase: output}, when")
    assert only(Code.READS_MASKED, plain(reads, later)) == []


def test_a_mask_of_another_policy_counts_where_it_is_enforced() -> None:
    reads = plain(READS)

    for mode, expected in [("enforce", 1), ("audit", 0), ("off", 0)]:
        assert len(only(Code.READS_MASKED, reads, plain(MASKS, name="q", mode=mode))) == expected


def test_how_all_experts_are_used_changes_with_any_mask() -> None:
    text = plain(rule("entropy: {over: 8, below: 2}", name="reads"), MASKS)

    (found,) = only(Code.READS_MASKED, text)

    assert "reads how all experts are used, and p/masks masks some" in found.message


def test_one_rule_forces_what_another_masks() -> None:
    forces = rule("mass: {experts: h, above: 0.5}", "mask: {experts: f, method: force}", name="forces")

    (found,) = only(Code.FORCE_MASKED, plain(forces, MASKS))

    assert "p/forces forces L1/E3 in, which p/masks masks (reroute)" in found.message
    assert only(Code.FORCE_MASKED, plain(forces.replace("experts: f", "experts: h"), MASKS)) == []
    apart = [
        one.replace("when", f"match: {{labels: {{t: {v}}}}}, when")
        for one, v in [(forces, 1), (MASKS, 2)]
    ]
    apart = [text.replace("t: 1", "t: a").replace("t: 2", "t: b") for text in apart]
    assert only(Code.FORCE_MASKED, plain(*apart)) == []


MASKED = "mass: {experts: h, over: 8, above: 0.5}"


@pytest.mark.parametrize(
    ("block_when", "more", "expected"),
    [
        (MASKED, "", True),
        (MASKED.replace("0.5", "0.4"), "", True),
        (MASKED.replace("over: 8", "over: 8, minTokens: 4"), "", True),
        (MASKED.replace("0.5", "0.6"), "", False),
        (MASKED.replace("over: 8", "over: 9"), "", False),
        (MASKED.replace("experts: h", "experts: f"), "", False),
        (MASKED, "match: {sample: 0.5}", False),
        (MASKED, "match: {phase: output}", False),
        (MASKED, "persist: {hits: 2, of: 3}", False),
    ],
)
def test_a_mask_that_a_block_always_precedes(block_when: str, more: str, expected: bool) -> None:
    masks = rule(MASKED, "mask: {experts: g}", name="masks")
    text = plain(masks, rule(block_when, "block: {}", more, name="blocks"))

    assert len(only(Code.SHADOWED_MASK, text)) == expected


def test_a_block_that_an_exception_withholds_lets_the_mask_act() -> None:
    masks = rule(MASKED, "mask: {experts: g}", name="masks")
    blocks = rule(MASKED, "block: {}", name="blocks")
    excepted = "  exceptions:\n    - {name: e, match: {labels: {t: a}}, rules: [RULE]}\n"

    for name, expected in [("blocks", 0), ("masks", 1)]:
        text = plain(masks, blocks, more=excepted.replace("RULE", name))
        assert len(only(Code.SHADOWED_MASK, text)) == expected


def test_the_same_rule_twice() -> None:
    one, two = READS, READS.replace("name: reads", "name: again")

    (found,) = only(Code.DUPLICATE_RULE, plain(one, two))

    assert found.location.line == 14
    assert "p/again says the same as p/reads at p.yaml:13:7" in found.message
    for other in ("above: 0.6", "atLeast: 0.5", "above: 0.5, minTokens: 2"):
        assert only(Code.DUPLICATE_RULE, plain(one, two.replace("above: 0.5", other))) == []
    assert only(Code.DUPLICATE_RULE, plain(one, two.replace("observe", "block"))) == []


def test_the_same_rule_under_audit_and_enforce_is_a_staged_rollout() -> None:
    both = [
        plain(READS.replace("observe", "block"), name=n, mode=m)
        for n, m in [("p", "audit"), ("q", "enforce")]
    ]

    assert only(Code.DUPLICATE_RULE, *both) == []


def test_modes_that_mean_little() -> None:
    blocks = rule(MASKED, "block: {}")

    assert codes(policy(blocks, mode="enforce"), with_suite=()) == ["untested"]
    assert codes(policy(blocks, mode="audit"), with_suite=()) == []
    assert codes(policy(mode="enforce")) == ["enforces-nothing"]
    deprecated = policy(blocks, mode="enforce").replace("{name: p}", "{name: p, maturity: deprecated}")
    assert codes(deprecated) == ["deprecated-enforced"]
    assert codes(deprecated.replace("mode: enforce", "mode: audit")) == []


def test_a_suite_is_a_document_in_the_policys_own_folder(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "p.yaml").write_text(policy(rule(MASKED, "block: {}"), mode="enforce"))
    suite = "apiVersion: moe-guard/v1\nkind: PolicyTest\nmetadata: {name: t}\n"
    loaded = load_policies(tmp_path)

    (tmp_path / "t.yaml").write_text(suite)
    assert [found.code for found in lint(loaded)] == [Code.UNTESTED]
    (tmp_path / "p" / "broken.yaml").write_text("kind: [PolicyTest")
    (tmp_path / "p" / "other.yaml").write_text("kind: ConfigMap # no PolicyTest\n")
    assert [found.code for found in lint(loaded)] == [Code.UNTESTED]
    (tmp_path / "p" / "t.yaml").write_text(suite)
    assert lint(loaded) == []


def test_a_set_that_no_rule_names() -> None:
    unused = [found.message.split("'")[3] for found in only(Code.UNUSED_SET, plain(READS, MASKS))]

    assert unused == ["w"]


def test_a_set_that_only_dormant_reads_is_used(tmp_path: Path) -> None:
    profile = {
        "apiVersion": "moe-guard/v1",
        "kind": "Profile",
        "model": {"architecture": "X"},
        "baselines": {"rates": {"1": [0.001, 0.999, 0.5, 0.5]}},
        "sets": {"s": [{"layer": 1, "experts": [0]}]},
    }
    (tmp_path / "m.json").write_text(json.dumps(profile))
    (tmp_path / "p.yaml").write_text(
        "apiVersion: moe-guard/v1\nkind: Policy\nmetadata: {name: p}\nspec:\n  profile: m.json\n"
        "  experts: {one: [{set: s}]}\n"
        "  rules: [{name: r, when: {dormant: {baselineBelow: 0.1, experts: one, atLeast: 1}}}]\n"
    )

    assert lint(load_policies(tmp_path)) == []


@pytest.mark.parametrize(
    ("until", "expected"),
    [
        ("2027-02-28", "expired-exception"),
        ("2027-03-01", "expiring-exception"),
        ("2027-03-15", "expiring-exception"),
        ("2027-03-16", None),
    ],
)
def test_an_exception_that_has_expired_or_soon_will(until: str, expected: str | None) -> None:
    more = f"  exceptions:\n    - {{name: e, match: {{labels: {{t: a}}}}, until: {until}}}\n"

    assert codes(policy(rule(MASKED, "block: {}"), more=more)) == ([expected] if expected else [])


def test_an_expired_exception_is_an_error_and_nothing_else_of_it_is() -> None:
    assert [code for code in Code if code.level is Level.ERROR] == [
        Code.EXPIRED_EXCEPTION,
        Code.MODEL_MISMATCH,
    ]


@pytest.mark.parametrize(
    ("exception", "expected"),
    [
        ("match: {labels: {t: a}}, rules: [uses]", True),
        ("match: {labels: {t: a}}, rules: [uses, r]", False),
        ("match: {labels: {t: a}}", False),
        ("match: {labels: {tier: free}}", True),  # the rule is for tier: paid
        ("match: {labels: {tier: [free, paid]}}", False),
    ],
)
def test_an_exception_that_withholds_nothing(exception: str, expected: bool) -> None:
    acts = rule(MASKED, "block: {}", "match: {labels: {tier: paid}}")
    text = policy(acts, more=f"  exceptions:\n    - {{name: e, {exception}}}\n")

    assert codes(text) == (["idle-exception"] if expected else [])


def test_a_policy_for_one_model_with_the_profile_of_another(tmp_path: Path) -> None:
    profile = {
        "apiVersion": "moe-guard/v1",
        "kind": "Profile",
        "model": {"architecture": "X", "topK": 2},
    }
    (tmp_path / "m.json").write_text(json.dumps(profile))
    text = policy().replace("  experts:\n", "  profile: m.json\n  experts:\n", 1)
    path = tmp_path / "p.yaml"

    path.write_text(text)
    assert lint(load_policies(path)) == []
    path.write_text(text.replace("topK: 2", "topK: 4"))
    (found,) = lint(load_policies(path))
    assert (found.code, found.location.line) == (Code.MODEL_MISMATCH, 7)
    assert "policy 'p' is for a model with topK: 4" in found.message


def test_a_policy_that_is_off_is_read_too_but_meets_no_other() -> None:
    dead = rule("mass: {experts: f, above: 1}", name="dead")

    assert codes(policy(dead, mode="off")) == ["never-fires"]
    assert only(Code.READS_MASKED, plain(READS, MASKS, mode="off")) == []


def test_the_list_of_codes_in_the_documentation_is_whole() -> None:
    text = (Path(__file__).parents[4] / "docs" / "policy-lint.md").read_text()

    listed = [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")]

    assert listed == [code.value for code in Code]
