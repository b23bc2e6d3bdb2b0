"""One HTML file with pictures, from the JSON of discovery's commands; it fetches nothing."""

from __future__ import annotations

import html
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from guard.discover.errors import DiscoverError
from guard.discover.same_token import coverage

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .8rem .2rem 0; text-align: left; border-bottom: 1px solid #8884; }
figure { margin: 1.5rem 0; background: #fff; padding: .5rem; }
figure svg { max-width: 100%; height: auto; }
figcaption { color: #333; }
.verdict { font-size: 1.2rem; font-weight: 600; }
"""

NOT_SHOWN = (
    "That routing goes with a label does not show that these experts cause it. No observational number "
    "is known that predicts which experts matter (arXiv 2606.10703); only masking them does.",
    "Rates hold for prompts like those that were recorded. Other topics, languages and wrappers route "
    "differently, often by more than the label does (arXiv 2605.29708).",
    "Routing of a prompt says little about the routing of its answer (arXiv 2604.09780): the phase "
    "that was measured is the phase that this holds for.",
    "Experts that every token passes through (shared experts) and what happens inside an expert are "
    "not seen at all.",
)


def html_report(documents: Sequence[Mapping[str, Any]]) -> str:
    """Raises DiscoverError for a document that is of neither kind."""
    sections = []
    for document in documents:
        match document.get("kind"):
            case "Discovery":
                sections.append(_discovery(document))
            case "Calibration":
                sections.append(_calibration(document))
            case "CausalCheck":
                sections.append(_causal(document))
            case kind:
                raise DiscoverError(
                    f"a document of kind {kind!r}; give what `discover --out`, `calibrate --report` "
                    "and `causal --report` wrote"
                )
    limits = "".join(f"<li>{html.escape(text)}</li>" for text in NOT_SHOWN)
    body = "".join(sections)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>MoE Guard: experts and thresholds</title><style>{_STYLE}</style>"
        f"<h1>Experts and thresholds</h1>{body}<h2>What this does not show</h2>"
        f"<ul>{limits}</ul></html>\n"
    )


def _discovery(found: Mapping[str, Any]) -> str:
    prompts, choice, controls = found["prompts"], found["choice"], found["controls"]
    shuffled = controls["flaggedWithLabelsShuffled"]
    facts = [
        f"{prompts['target']} prompts of {choice['target']} beside {prompts['reference']} of "
        f"{choice['reference']}, {prompts['pairs']} pairs, {prompts['tokens']} tokens, phase "
        f"{choice['phase']}.",
        f"With labels shuffled within pairs, {len(shuffled)} times: "
        f"{sum(shuffled) / max(1, len(shuffled)):.2f} experts flagged on average.",
        f"A test that takes tokens for independent flags {controls['naiveTokenTest']} experts, and "
        f"{controls['naiveTokenTestWithLabelsShuffled']} with labels shuffled: it is not used.",
        coverage(controls["sameTokenShare"]),
    ]
    parts = [
        "<h2>Experts</h2>",
        f'<p class="verdict">{html.escape(found["verdict"])}</p>',
        *(f"<p>{html.escape(fact)}</p>" for fact in facts),
        _figure(
            _effect_map(found),
            "Difference of activation rates, target less reference. Framed: flagged.",
        ),
    ]
    if found["experts"]:
        parts.append(
            _figure(
                _effects(found),
                "Flagged experts with their 95 % intervals, their difference on the same tokens, and "
                "how far topics move them.",
            )
        )
    parts.append(
        _figure(
            _stability(found),
            "How many experts are stable, by how many count as the top of a resample.",
        )
    )
    if found["probe"] is not None and found["probe"]["aurocOfHeldOutCategory"]:
        parts.append(
            _figure(_probe(found["probe"]), "A linear probe on prompts that it was not fitted to.")
        )
    return "".join(parts)


def _calibration(found: Mapping[str, Any]) -> str:
    parts = ["<h2>Thresholds</h2>", _thresholds(found)]
    for one in found["conditions"]:
        caption = f"{one['condition']}: the furthest value of each prompt set aside."
        parts.append(_figure(_scores(one, found["text"]), caption))
    return "".join(parts)


def _thresholds(found: Mapping[str, Any]) -> str:
    rows = []
    for one in found["conditions"]:
        for budget in one["budgets"]:
            rows.append(
                [
                    one["condition"],
                    f"{budget['budget']:g}",
                    f"{budget['threshold']:g}",
                    _proportion(budget["falsePositives"]),
                    "" if budget["detected"] is None else _proportion(budget["detected"]),
                    "" if budget["tokensToDetection"] is None else f"{budget['tokensToDetection']:g}",
                ]
            )
    for budget in found["text"]["budgets"] if found["text"] else ():
        false_positives, detected = (_proportion(budget[key]) for key in ("falsePositives", "detected"))
        rows.append(
            ["the prompts' words alone", f"{budget['budget']:g}", "", false_positives, detected, "0"]
        )
    for one in found["sequential"]:
        rows.append(
            [
                f"{one['test']} of {one['set']} (Wald's bound: {_proportion(one['wald'])})",
                f"{one['budget']:g}",
                f"{one['threshold']:g}",
                _proportion(one["false_positives"]),
                _proportion(one["detected"]),
                "" if one["tokens_to_detection"] is None else f"{one['tokens_to_detection']:g}",
            ]
        )
    heads = ("condition", "budget", "threshold", "false positives", "detected", "tokens")
    head = "".join(f"<th>{text}</th>" for text in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _causal(found: Mapping[str, Any]) -> str:
    parts = [
        f"<h2>Masking {html.escape(found['set'])}</h2>",
        f'<p class="verdict">{html.escape(found["verdict"])}</p>',
    ]
    if "tasks" in found:
        tasks = found["tasks"]
        parts.append(
            f"<p>Of {tasks['prompts']} tasks with exact answers {tasks['unmasked']:.1%} were solved "
            f"without a mask, {tasks['masked']:.1%} with the set masked, {tasks['random']:.1%} with "
            "random sets.</p>"
        )
    caption = (
        f"What masking ({found['method']}) does to the loss of {found['texts']} target texts and of "
        "the reference texts: the set with its 95 % interval, and each random set of the same layers "
        "and use."
    )
    parts.append(_figure(_causal_bars(found), caption))
    return "".join(parts)


def _causal_bars(found: Mapping[str, Any]) -> Figure:
    figure, (left, right) = _axes(10, 3.2, columns=2)
    for axes, name, scale, unit in (
        (left, "target", 1.0, "target, nats a token"),
        (right, "reference", 100.0, "reference, per cent of the loss"),
    ):
        own = scale * found[f"{name}Increase"]
        low, high = (scale * end for end in found[f"{name}Interval"])
        key = "randomIncreases" if name == "target" else "randomReferenceIncreases"
        heights = [own, *(scale * one for one in found[key])]
        colours = ["C3", *["C7"] * (len(heights) - 1)]
        axes.bar(range(len(heights)), heights, color=colours)
        axes.errorbar([0], [own], yerr=[[own - low], [high - own]], color="black", capsize=3)
        axes.axhline(0, linewidth=0.8, color="black")
        axes.set_xticks([0, len(heights) / 2], [found["set"], "random sets"])
        axes.set_ylabel(unit)
    return figure


def _proportion(found: Mapping[str, Any]) -> str:
    return f"{found['hits']} of {found['total']} ({found['low']:.1%} to {found['high']:.1%})"


def _figure(figure: Figure, caption: str) -> str:
    text = io.StringIO()
    # Without a date and with ids by a fixed salt, the same numbers give the same file.
    with mpl.rc_context({"svg.hashsalt": "moe-guard", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None}, bbox_inches="tight")
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    label = html.escape(caption)
    return f'<figure role="img" aria-label="{label}">{svg}<figcaption>{label}</figcaption></figure>'


def _axes(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height))
    return figure, [figure.add_subplot(1, columns, number + 1) for number in range(columns)]


def _effect_map(found: Mapping[str, Any]) -> Figure:
    layers, experts = found["model"]["layers"], found["model"]["experts"]
    flat = np.array(found["effects"]["rate"])
    effects_LE = np.full((len(layers), experts), np.nan)
    sizes = found["model"]["expertsOfLayer"]
    for row, (start, size) in enumerate(zip(np.cumsum([0, *sizes[:-1]]), sizes, strict=True)):
        effects_LE[row, :size] = flat[start : start + size]
    figure, [axes] = _axes(9, max(2.0, 0.12 * len(layers) + 1))
    most = max(0.05, float(np.nanmax(np.abs(effects_LE))))
    image = axes.imshow(effects_LE, aspect="auto", cmap="RdBu_r", vmin=-most, vmax=most)
    figure.colorbar(image, ax=axes, label="difference of rates")
    for one in found["experts"]:
        corner = (one["expert"] - 0.5, layers.index(one["layer"]) - 0.5)
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, linewidth=1.5))
    step = max(1, len(layers) // 12)
    axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.set(xlabel="expert", ylabel="layer")
    return figure


def _effects(found: Mapping[str, Any]) -> Figure:
    rows = found["experts"][:40]
    figure, [axes] = _axes(8, 0.25 * len(rows) + 1)
    place = np.arange(len(rows))[::-1]
    effect = np.array([one["effect"] for one in rows])
    intervals = np.array([one["interval"] for one in rows]).T
    axes.errorbar(
        effect, place, xerr=np.abs(intervals - effect), fmt="o", label="target less reference"
    )
    topics = [one["topicEffect"] for one in rows]
    if None not in topics:
        axes.plot(topics, place, "x", label="largest between two topics")
    same = [one["sameTokenEffect"] for one in rows]
    if None not in same:
        axes.plot(same, place, "|", markersize=10, label="target less reference, same tokens")
    axes.axvline(0, linewidth=0.8, color="black")
    axes.set_yticks(place, [f"L{one['layer']}/E{one['expert']}" for one in rows])
    axes.set_xlabel("difference of activation rates")
    axes.legend()
    return figure


def _stability(found: Mapping[str, Any]) -> Figure:
    figure, [axes] = _axes(6, 3)
    tops = sorted((int(top), count) for top, count in found["stableByTop"].items())
    axes.plot(*zip(*tops, strict=True), "o-")
    axes.axvline(found["demands"]["top"], linestyle=":", color="black")
    share = found["demands"]["least_stability"]
    axes.set(xlabel="top", ylabel=f"experts in {share:.0%} of resamples", ylim=(0, None))
    return figure


def _probe(probe: Mapping[str, Any]) -> Figure:
    held_out = probe["aurocOfHeldOutCategory"]
    bars = {f"without {name}": auroc for name, auroc in held_out.items()}
    if probe["aurocInDomain"] is not None:
        bars = {"pairs left out": probe["aurocInDomain"], **bars}
    figure, [axes] = _axes(7, 0.35 * len(bars) + 1)
    axes.barh(list(bars)[::-1], list(bars.values())[::-1])
    axes.axvline(0.5, linestyle=":", color="black")
    axes.set(xlabel="area under the ROC curve", xlim=(0, 1))
    return figure


def _scores(one: Mapping[str, Any], text: Mapping[str, Any] | None) -> Figure:
    """The distributions with the thresholds, and the ROC curve with that of the words alone."""
    sides = {name: _numbers(one["scores"][name]) for name in ("benign", "target")}
    figure, axes = _axes(10, 3.2, columns=2 if len(sides["target"]) else 1)
    both = np.concatenate(list(sides.values()))
    bins = np.histogram_bin_edges(both[np.isfinite(both)], 30).tolist()
    for name, scores in sides.items():
        if len(scores):
            axes[0].hist(scores[np.isfinite(scores)], bins, alpha=0.6, density=True, label=name)
    for budget in one["budgets"]:
        axes[0].axvline(budget["threshold"], linestyle=":", color="black")
        axes[0].text(budget["threshold"], axes[0].get_ylim()[1], f" {budget['budget']:g}", va="top")
    axes[0].set(xlabel="furthest value of a prompt", ylabel="density")
    axes[0].legend()
    if len(axes) > 1:
        sign = 1.0 if one["direction"] == "above" else -1.0
        axes[1].plot(
            *zip(*_roc(sign * sides["benign"], sign * sides["target"]), strict=True), label="routing"
        )
        if text is not None:
            of_text = [_numbers(text["scores"][name]) for name in ("benign", "target")]
            axes[1].plot(*zip(*_roc(*of_text), strict=True), "--", label="the prompts' words alone")
        axes[1].plot([0, 1], [0, 1], linewidth=0.8, color="black")
        axes[1].set(xlabel="false positives", ylabel="detected")
        axes[1].legend()
    return figure


def _numbers(values: Sequence[float | None]) -> np.ndarray:
    """null: never known, as JSON has no NaN."""
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def _roc(benign: np.ndarray, target: np.ndarray) -> Iterator[tuple[float, float]]:
    known_benign, known_target = (np.nan_to_num(scores, nan=-np.inf) for scores in (benign, target))
    yield 0.0, 0.0
    for threshold in np.unique(np.concatenate([known_benign, known_target]))[::-1]:
        yield float((known_benign >= threshold).mean()), float((known_target >= threshold).mean())
