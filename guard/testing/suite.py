"""Finds suites beside policies, reads them, and binds each to its policies and its model's shape."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from guard.policy.explain import explain
from guard.policy.fault import Fault, Location, PolicyError
from guard.policy.load import load_texts
from guard.policy.model import Baselines, PolicySet, Profile
from guard.policy.nodes import Node, ScalarNode, find, locate, plain
from guard.policy.schema import POLICY_TEST
from guard.policy.texts import (
    PolicyTexts,
    Text,
    policy_files,
    policy_text,
    read_policies,
    read_profile,
    with_profiles,
)
from guard.policy.yaml12 import read_documents
from guard.program.compile import compile_policies
from guard.program.configuration import TopologyError, topology_from_folder
from guard.program.program import Program
from guard.program.topology import MoELayer, Topology
from guard.testing.schema import ModelSpec, SuiteDocument

UNNAMED_ARCHITECTURE: Final = "AnyMoeForCausalLM"


@dataclass(frozen=True)
class Suite:
    """A suite's document, with the policies that it tests compiled for its model's shape."""

    file: str
    root: Node
    document: SuiteDocument
    policies: PolicySet
    program: Program
    baselines: Baselines | None

    @property
    def name(self) -> str:
        return self.document.metadata.name or self.file

    @property
    def topology(self) -> Topology:
        return self.program.topology

    def place(self, *path: str | int, key: bool = False) -> Location:
        return locate(self.root, path, key=key)


@dataclass(frozen=True)
class Found:
    """What lies under some paths. tested: the policy sets of those paths, for coverage."""

    suites: tuple[Suite, ...]
    faults: tuple[Fault, ...]
    tested: tuple[PolicySet, ...] = ()


@dataclass
class _Finder:
    suites: list[Suite] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    _loaded: dict[tuple[str, ...], PolicySet | None] = field(default_factory=dict)
    _seen: set[str] = field(default_factory=set)
    _suites_alone: set[str] = field(default_factory=set)

    def add(self, path: Path) -> PolicySet | None:
        """The policies there, if they load: a file of suites alone has none."""
        if not path.exists():
            self.faults.append(
                Fault(Location(str(path)), "is no file or folder; name policies or suites")
            )
            return None
        before = len(self.suites)
        for file in policy_files(path, self.faults):
            self._add_file(file)
        if path.is_dir():
            return self._load((str(path),))
        if len(self.suites) == before and str(path) not in self._seen:
            self._add_beside(path)
            return self._load((str(path),))
        return None

    def _add_beside(self, policy: Path) -> None:
        """The suites in a policy file's folder that test it."""
        others = _Finder(_loaded=self._loaded, _suites_alone=self._suites_alone)
        for file in policy_files(policy.parent, []):
            if file.parent == policy.parent:
                others._add_file(file)
        self.faults += others.faults
        for suite in others.suites:
            tested = {Path(one.location.file).resolve() for one in suite.policies.policies}
            if policy.resolve() in tested and suite.file not in self._seen:
                self.suites.append(suite)
        self._seen |= others._seen

    def _add_file(self, file: Path) -> None:
        if str(file) in self._seen:
            return
        try:
            content = file.read_bytes()
        except OSError as error:
            self.faults.append(Fault(Location(str(file)), f"cannot be read: {error.strerror}"))
            return
        if POLICY_TEST.encode() not in content:
            return
        text = policy_text(str(file), content, self.faults)
        if text is None:
            return
        roots, yaml_faults = read_documents(text, str(file))
        suites = [root for root in roots if _is_suite(root)]
        if suites:
            self._seen.add(str(file))
            self.faults += yaml_faults
        if len(suites) == len(roots) and not yaml_faults:
            self._suites_alone.add(str(file))
        for root in suites:
            self._add_suite(file, root)

    def _add_suite(self, file: Path, root: Node) -> None:
        try:
            document = SuiteDocument.model_validate(plain(root))
        except ValidationError as error:
            self.faults += explain(error, root)
            return
        self.faults += _case_name_faults(document, root)
        named = document.policies or (".",)
        paths = tuple(str(file.parent / one) for one in named)
        for index, path in enumerate(paths):
            if not Path(path).exists():
                place = locate(root, ("policies", index))
                self.faults.append(Fault(place, f"policies[{index}]: {path} is no file or folder"))
                return
        policies = self._load(paths)
        if policies is None:
            return
        if not policies.policies:
            place = locate(root, ("policies",), key=True)
            text = f"there is no policy in {', '.join(paths)}; name what to test: policies: [FILE]"
            self.faults.append(Fault(place, text))
            return
        try:
            topology = _topology(document.model, policies, file, root)
            program = compile_policies(policies, topology)
        except PolicyError as error:
            self.faults += error.faults
            return
        self.suites.append(Suite(str(file), root, document, policies, program, _baselines(policies)))

    def _load(self, paths: tuple[str, ...]) -> PolicySet | None:
        if paths not in self._loaded:
            self._loaded[paths] = None
            try:
                self._loaded[paths] = load_texts(_read_all(paths, self._suites_alone))
            except PolicyError as error:
                self.faults += error.faults
        return self._loaded[paths]


def find_suites(paths: Iterable[Path]) -> Found:
    """Every suite below the paths; of a policy file, those beside it that test it."""
    finder = _Finder()
    tested = [policies for path in paths if (policies := finder.add(path)) is not None]
    suites = sorted(finder.suites, key=lambda suite: (suite.file, suite.root.location))
    return Found(tuple(suites), tuple(sorted(set(finder.faults))), tuple(tested))


def _is_suite(root: Node) -> bool:
    match find(root, ("kind",)):
        case ScalarNode(kind):
            return kind == POLICY_TEST
    return False


def _read_all(paths: Sequence[str], suites_alone: Collection[str]) -> PolicyTexts:
    """As one policy set; a file that two paths reach is read once.

    suites_alone: files that hold no policy, which need not be parsed again
    """
    parts = [read_policies(path) for path in paths]
    texts: dict[str, Text] = {
        text.file: text for part in parts for text in part.policies if text.file not in suites_alone
    }
    faults = [fault for part in parts for fault in part.faults]
    return with_profiles(texts.values(), read_profile, faults)


def _case_name_faults(document: SuiteDocument, root: Node) -> list[Fault]:
    faults, seen = [], set()
    for index, case in enumerate(document.cases):
        if case.name in seen:
            place = locate(root, ("cases", index, "name"))
            faults.append(Fault(place, f"cases[{index}].name: a second case of this name; rename one"))
        seen.add(case.name)
    return faults


def _profiles(policies: PolicySet) -> list[Profile]:
    return [profile for policy in policies.policies for profile in policy.profiles]


def _baselines(policies: PolicySet) -> Baselines | None:
    return next((p.baselines for p in _profiles(policies) if p.baselines is not None), None)


def _topology(spec: ModelSpec | None, policies: PolicySet, file: Path, root: Node) -> Topology:
    """Raises PolicyError."""
    architecture = next(
        (
            wanted.architecture
            for policy in policies.policies
            for wanted in (policy.model, *(profile.model for profile in policy.profiles))
            if wanted is not None and wanted.architecture is not None
        ),
        UNNAMED_ARCHITECTURE,
    )
    if spec is not None and spec.path is not None:
        try:
            return topology_from_folder(file.parent / spec.path)
        except TopologyError as error:
            raise PolicyError([Fault(locate(root, ("model",), key=True), str(error))]) from error
    numbers: tuple[int, ...]
    if spec is not None:
        numbers, experts, top_k = spec.layers or (), spec.experts or 0, spec.top_k or 0
        return _uniform(spec.architecture or architecture, numbers, experts, top_k)
    for policy in policies.policies:
        for wanted in (*(profile.model for profile in policy.profiles), policy.model):
            if wanted is not None and wanted.layers and wanted.experts and wanted.top_k:
                rates = next((p.baselines.rates for p in policy.profiles if p.baselines), {})
                measured = len(rates) == wanted.layers
                numbers = tuple(sorted(rates)) if measured else tuple(range(wanted.layers))
                return _uniform(architecture, numbers, wanted.experts, wanted.top_k)
    text = (
        "for which model are the tests? Neither spec.model nor a profile of the policies says it; "
        "write model: {layers: N, experts: N, topK: N}, or model: PATH of its folder"
    )
    raise PolicyError([Fault(root.location, text)])


def _uniform(architecture: str, numbers: Iterable[int], experts: int, top_k: int) -> Topology:
    return Topology(architecture, tuple(MoELayer(number, experts, top_k) for number in numbers))
