"""`moe-guard saliency`: the experts that no policy may mask, measured on prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from guard.cli.output import err, fail, out
from guard.errors import GuardError

if TYPE_CHECKING:
    from guard.discover.saliency import ExpertStatistics
    from guard.policy.model import Profile
    from guard.program.topology import Topology

_NAMED: Final = 8
"""How many experts of a set are named."""


def saliency(
    model: Annotated[Path, typer.Argument(help="The model's folder, as transformers loads it.")],
    prompts: Annotated[Path, typer.Option(help="JSON lines, each with `prompt` or `messages`.")],
    profile: Annotated[Path, typer.Option(help="The profile of the model.")],
    to: Annotated[
        Path | None, typer.Option("--out", help="Write the profile there, and not in its place.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write the numbers of all experts there, as JSON.")
    ] = None,
    top_saliency: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="The share of all experts that is kept by saliency.")
    ] = 0.01,
    max_tokens: Annotated[
        int,
        typer.Option("--max-tokens-of-prompt", min=1, help="Of each prompt so many count, at most."),
    ] = 2048,
    device: Annotated[
        str, typer.Option(help="A device of torch; auto: a GPU if there is one.")
    ] = "auto",
    dtype: Annotated[str, typer.Option(help="A dtype of torch; auto: that of the weights.")] = "auto",
) -> None:
    """Write a profile's neverMask list: super experts, and those of the highest saliency.

    Runs the prompts through MODEL with transformers, without vLLM, and generates nothing. Entries that
    this command made before are replaced; others stay.
    """
    try:
        import torch
        import transformers
    except ImportError:
        fail("saliency needs torch and transformers; install moe-guard[cpu] or moe-guard[gpu]")
    from guard.cli.documents import read_document, sha256, write_document, write_profile
    from guard.cli.record import read_prompts
    from guard.discover.saliency import load_model, measure, never_mask_entries, tokens_of

    transformers.utils.logging.disable_progress_bar()  # the command shows its own
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    asked = read_prompts(prompts)
    try:
        known = read_document(profile)
        before = _load(profile, known)
        topology, fingerprint = _check_model(model, before)
        with err.status("loading the model") as status:
            loaded = load_model(model, device, dtype)
            token_ids = tokens_of(loaded.tokenizer, asked, max_tokens)
            found = measure(loaded.model, _told(token_ids, status.update))
        _check_layers(found, topology)
        entries = never_mask_entries(found, top_saliency)
        facts = {
            "command": "moe-guard saliency",
            "prompts": {prompts.name: sha256(prompts)},
            "tokens": found.tokens,
            "topSaliency": top_saliency,
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "versions": {name: version(name) for name in ("moe-guard", "torch", "transformers")},
        }
        target = to or profile
        write_profile(target, _written(known, entries, facts, fingerprint))
        if report is not None:
            write_document(report, _report(found, topology, facts, fingerprint))
    except GuardError as error:
        fail(error)
    for entry in entries:
        text = f"L{entry['layer']}/E{entry['experts'][0]}: {entry['reason']}"
        out.print(text, soft_wrap=True, markup=False)
    if before.fingerprint is None and fingerprint is not None:
        _say(f"{target}: model.fingerprint added: the profile is for these weights from now on")
    for line in _remarks(found, before, entries):
        _say(line)


def _say(text: str) -> None:
    err.print(text, soft_wrap=True, markup=False)


def _load(path: Path, document: Mapping[str, Any]) -> Profile:
    """Raises PolicyError."""
    import json

    from guard.policy.fault import Location
    from guard.policy.profile import load_profile
    from guard.policy.texts import Text

    return load_profile(Text(str(path), json.dumps(document)), Location(str(path)))


def _check_model(folder: Path, profile: Profile) -> tuple[Topology, str | None]:
    """What the configuration says, and the fingerprint.

    Raises TopologyError, FingerprintError; PolicyError, DiscoverError where the profile is of another
    model.
    """
    from guard.discover.errors import DiscoverError
    from guard.policy import PolicyError
    from guard.program.configuration import topology_from_folder
    from guard.program.fingerprint import fingerprint_of_folder
    from guard.program.fit import model_faults

    topology = topology_from_folder(folder)
    path = profile.location.file
    remedy = "name this model's profile"
    if faults := model_faults(profile.model, topology, "the profile", profile.model.location, remedy):
        raise PolicyError(faults)
    fingerprint = fingerprint_of_folder(folder)
    if None not in (profile.fingerprint, fingerprint) and profile.fingerprint != fingerprint:
        raise DiscoverError(
            f"{path}: is of other weights than {folder}: its model.fingerprint is "
            f"{profile.fingerprint}, the model's is {fingerprint}; name this model's profile"
        )
    return topology, fingerprint


def _told(token_ids: Sequence[Sequence[int]], say: Any) -> Iterator[Sequence[int]]:
    for number, one in enumerate(token_ids, start=1):
        say(f"prompt {number} of {len(token_ids)}")
        yield one


def _check_layers(found: ExpertStatistics, topology: Topology) -> None:
    """An entry for a wrong layer would protect the wrong expert. Raises DiscoverError."""
    from guard.discover.errors import DiscoverError
    from guard.program.configuration import EXACT_ARCHITECTURES

    wanted = {(layer.number, id_) for layer in topology.layers for id_ in range(layer.num_experts)}
    if topology.architecture in EXACT_ARCHITECTURES and wanted != set(found.experts_X):
        raise DiscoverError(
            f"transformers has {len(found.experts_X)} experts in layers "
            f"{sorted({layer for layer, _ in found.experts_X})} of {topology.architecture}, and the "
            f"configuration says {len(wanted)} in {[layer.number for layer in topology.layers]}"
        )


def _written(
    known: Mapping[str, Any],
    entries: Sequence[Mapping[str, Any]],
    facts: Mapping[str, Any],
    fingerprint: str | None,
) -> dict[str, Any]:
    from guard.discover.saliency import is_own_entry

    provenance = known.get("provenance") or {}
    before = provenance if isinstance(provenance, dict) else {"before": provenance}
    own = {} if fingerprint is None else {"fingerprint": fingerprint}
    return {
        **known,
        "model": {**known["model"], **own},
        "neverMask": [
            *(entry for entry in known.get("neverMask", ()) if not is_own_entry(entry)),
            *entries,
        ],
        "provenance": {**before, "saliency": facts},
    }


def _report(
    found: ExpertStatistics, topology: Topology, facts: Mapping[str, Any], fingerprint: str | None
) -> dict[str, Any]:
    ranks_X, is_super_X = found.ranks_X.tolist(), found.is_super_X.tolist()
    return {
        "kind": "Saliency",
        "model": {
            "architecture": topology.architecture,
            "layers": len(topology.layers),
            "fingerprint": fingerprint,
        },
        **facts,
        "medianLargestOutput": found.median_largest,
        "experts": [
            {
                "layer": layer,
                "expert": expert,
                "tokens": int(found.tokens_X[x]),
                "saliency": float(found.saliency_X[x]),
                "rank": ranks_X[x],
                "largestOutput": float(found.largest_X[x]),
                "super": is_super_X[x],
            }
            for x, (layer, expert) in enumerate(found.experts_X)
        ],
    }


def _remarks(
    found: ExpertStatistics, profile: Profile, entries: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    """What the numbers do not cover, and what becomes of the profile's sets."""
    unseen = int((found.tokens_X == 0).sum())
    if unseen:
        yield (
            f"{unseen} of {len(found.experts_X)} experts were chosen by none of {found.tokens} tokens: "
            "nothing is known of them; give more prompts"
        )
    never = {(entry["layer"], entry["experts"][0]) for entry in entries}
    for name, expert_set in profile.sets.items():
        held = sorted(never & {(layer, id_) for layer, id_ in expert_set.weights})
        if held:
            named = ", ".join(f"L{layer}/E{id_}" for layer, id_ in held[:_NAMED])
            more = f" and {len(held) - _NAMED} more" if len(held) > _NAMED else ""
            yield (
                f"the set {name!r} holds {named}{more}, which no policy may mask from now on: one that "
                "masks the set is refused. Take what may not be masked out of the set that is masked"
            )
