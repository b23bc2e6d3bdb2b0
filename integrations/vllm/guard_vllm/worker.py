"""The guard in a worker: attached when the model is loaded, armed when it has proved itself."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from guard.device.kept_evidence import KeptEvidence
from guard.device.layout import Capacity
from guard.errors import UnsupportedHostError
from guard.program.compile import compile_policies
from guard.program.configuration import EXACT_ARCHITECTURES, topology_from_config
from guard.program.program import WORD_BITS, NamedSet, Program, ProgramRule
from guard.program.topology import Topology
from guard.runtime import Guard
from guard.staged import StagedGuard
from guard_vllm.kernel_proof import kernel_faults
from guard_vllm.monolithic import guardable_kernels
from guard_vllm.parallel import agree_on_tensor_parallel_ranks, is_first_of_tensor_parallel
from guard_vllm.pipeline import hook_pipeline, layers_of_pipeline, make_stage, pipeline_size
from guard_vllm.policies import load_in_worker
from guard_vllm.prefix_evidence import KeptGroup, PrefixEvidence, kept_group, memory_share
from guard_vllm.proof import PROBE_ROWS, Proof, prove, require
from guard_vllm.recording import open_recorder
from guard_vllm.routers import RoutedLayer, attach, routed_layers, topology_of
from guard_vllm.runners import hook_runner, run_probe_rows
from guard_vllm.settings import Settings
from guard_vllm.steps import StepHooks, wrap
from guard_vllm.worker_load import LoadFacts, WorkerLoad
from guard_vllm.worker_reload import WorkerReload

logger = logging.getLogger(__name__)

STATUS_METHOD = "moe_guard_status"
SLOTS_PER_SEQUENCE = 2
"""Running requests and preempted ones: by default the scheduler resumes these before it admits others.
Where it does not, as by priority, there is room for more when they come."""


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """What a worker tells the engine core at start. All must tell the same, but for `proof`, which is
    of the worker's own layers.

    layers: the model's MoE layers, by the model's own numbers
    mask_keys: of each mask action what it does: equal ones compute the same KV
    token_epochs: generations of programs whose signals are in use
    load: what is counted of the use of experts; None: nothing
    """

    revision: str
    policies: tuple[str, ...]
    rules: tuple[ProgramRule, ...]
    sets: tuple[NamedSet, ...]
    mask_rules: tuple[int, ...]
    static_mask_rules: tuple[int, ...]
    masked_experts: dict[str, int]
    masking: bool
    proof: Proof
    kept_group: KeptGroup | None = None
    layers: tuple[int, ...] = ()
    mask_keys: tuple[str, ...] = ()
    token_epochs: tuple[int, ...] = (0,)
    load: LoadFacts | None = field(default=None, compare=False)


class WorkerGuard:
    """Hangs on one worker instance; vLLM's classes stay as they are."""

    def __init__(self, worker: Any, settings: Settings) -> None:
        self._worker = worker
        self._settings = settings
        self._hooks: StepHooks | None = None
        self._proof: Proof | None = None
        self._kept_group: KeptGroup | None = None
        self._layers: list[RoutedLayer] = []
        wrap(worker, "load_model", self._load_model)
        wrap(worker, "determine_available_memory", self._determine_available_memory)
        wrap(worker, "compile_or_warm_up_model", self._compile_or_warm_up_model)
        wrap(worker, "reload_weights", self._reload_weights)
        setattr(worker, STATUS_METHOD, self.status)

    def _load_model(self, stock: Any, *args: Any, **kwargs: Any) -> Any:
        with guardable_kernels() as taken:
            loaded = stock(*args, **kwargs)
        # Behind vLLM's memory pool for weights, which sleep mode discards, and before it measures
        # how much memory is left for the KV cache.
        runner = self._worker.model_runner
        layers = routed_layers(runner.get_model(), some=pipeline_size() == 1, taken=taken)
        architecture = self._worker.model_config.hf_config.architectures[0]
        topology = topology_of(architecture, layers)
        topology = replace(topology, layers=layers_of_pipeline(topology.layers))
        self._check_against_config(topology)
        program = compile_policies(load_in_worker(self._settings), topology)
        guard = self._make_guard(program, layers)
        attach(guard, layers)
        self._layers = layers
        agree_on_tensor_parallel_ranks(guard)
        is_v2 = bool(self._worker.use_v2_model_runner)
        self._hooks = hook_runner(runner, guard, is_v2=is_v2)
        WorkerReload(guard, self._status_of).hook(self._worker)
        WorkerLoad(guard, reads=is_first_of_tensor_parallel()).hook(self._worker)
        if isinstance(guard, StagedGuard):
            hook_pipeline(runner, guard, self._hooks)
        return loaded

    def _make_guard(self, program: Program, layers: list[RoutedLayer]) -> Guard:
        device, masking = self._worker.device, not self._settings.observe_only
        load_every = self._settings.load_every
        if pipeline_size() == 1:
            return Guard(program, self._capacity(), device, masking=masking, load_every=load_every)
        index_of_layer = program.topology.index_of_layer
        stage = make_stage([index_of_layer[layer.number] for layer in layers])
        return StagedGuard(
            program, self._capacity(), device, stage=stage, masking=masking, load_every=load_every
        )

    def _check_against_config(self, topology: Topology) -> None:
        """Layers that vLLM builds in a way of its own would be missed; then what is found is less
        than what the configuration says. How a router scores, only the loaded model tells."""
        said = topology_from_config(self._worker.model_config.hf_config.to_dict())
        if topology.architecture in EXACT_ARCHITECTURES and said.sizes != topology.sizes:
            raise UnsupportedHostError(
                f"the configuration of {topology.architecture} says that its MoE layers are (number, "
                f"experts, top-k) {said.sizes}, but in the loaded model the guard found "
                f"{topology.sizes}"
            )

    def _capacity(self) -> Capacity:
        config = self._worker.vllm_config
        scheduler, compilation = config.scheduler_config, config.compilation_config
        captured = max(compilation.cudagraph_capture_sizes or [0])
        tensor_parallel = config.parallel_config.tensor_parallel_size
        speculative = config.speculative_config
        rows = max(scheduler.max_num_batched_tokens, captured, scheduler.max_num_seqs)
        return Capacity(
            max_rows=rows + tensor_parallel,  # sequence parallelism pads to a multiple of it
            max_slots=SLOTS_PER_SEQUENCE * scheduler.max_num_seqs,
            mask_words=max(1, self._settings.mask_words),
            max_draft_tokens=0 if speculative is None else int(speculative.num_speculative_tokens or 0),
        )

    def _keeps_evidence(self) -> bool:
        assert self._hooks is not None, "the model is loaded first"
        if pipeline_size() > 1:
            return False  # a rank knows a step's signals only later: cached prefixes are unseen
        caching = self._worker.vllm_config.cache_config.enable_prefix_caching
        return bool(caching and self._settings.prefix_evidence)

    def _determine_available_memory(self, stock: Any, *args: Any, **kwargs: Any) -> Any:
        """Leaves room for the evidence beside the KV, unless the operator said how much KV there is."""
        available = stock(*args, **kwargs)
        explicit = self._worker.vllm_config.cache_config.kv_cache_memory_bytes is not None
        if explicit or self._hooks is None or not self._keeps_evidence():
            return available
        program = self._hooks.guard.program
        token_bytes = KeptEvidence.token_bytes(program.signals, program.topology)
        specs = self._worker.model_runner.get_kv_cache_spec()
        return int(available * (1.0 - memory_share(specs, token_bytes)))

    def _keep_evidence(self) -> KeptGroup | None:
        """Make room for the evidence of cached tokens, now that the KV cache has its size."""
        if self._hooks is None or not self._keeps_evidence():
            return None
        group = kept_group(self._worker.model_runner.kv_cache_config)
        if group is None:
            logger.warning(
                "No KV cache group of this model holds all tokens of a request: MoE Guard cannot keep "
                "evidence of prefixes that come from the cache and reports their tokens as unseen"
            )
            return None
        kept = self._hooks.guard.keep_evidence(group.num_blocks, group.block_size)
        self._hooks.prefixes = PrefixEvidence(self._hooks.guard, kept, group.group)
        logger.info(
            "MoE Guard keeps evidence for cached prefixes: %.1f MiB for %d blocks of %d tokens",
            kept.num_bytes / 2**20,
            group.num_blocks,
            group.block_size,
        )
        return group

    def _compile_or_warm_up_model(self, stock: Any, *args: Any, **kwargs: Any) -> Any:
        result = stock(*args, **kwargs)
        assert self._hooks is not None, "the model is loaded before it is warmed up"
        self._kept_group = self._keep_evidence()
        self._proof = self._prove(self._hooks.guard)
        if self._settings.strict:
            require(self._proof)
        self._hooks.guard.blind = not self._proof.holds
        if self._proof.holds:
            self._hooks.recorder = open_recorder(self._worker, self._hooks.guard, self._settings)
        self._hooks.armed = True
        logger.info(
            "MoE Guard is %s: %d MoE layers, %d rules, revision %s",
            "live" if self._proof.holds else "blind",
            self._proof.num_layers,
            len(self._hooks.guard.program.rules),
            self._hooks.guard.program.revision,
        )
        return result

    def _reload_weights(self, stock: Any, *args: Any, **kwargs: Any) -> Any:
        """New weights bring new gates and biases, perhaps another kernel: nothing is judged until they
        have been proved as the first ones were, and what was seen under the old ones is forgotten.
        The proof of one of several engines would wait for the others, who may have none to run."""
        assert self._hooks is not None, "weights are loaded before they are loaded again"
        hooks = self._hooks
        hooks.guard.blind = True
        result = stock(*args, **kwargs)
        if hooks.prefixes is not None:
            hooks.prefixes.lose_track()
        if self._data_parallel.data_parallel_size > 1:
            logger.error(
                "MoE Guard is blind since weights were reloaded: under data parallelism they cannot be "
                "proved while serving; every request is unjudged until the server is restarted"
            )
            return result
        hooks.armed = False  # the rows of the proof are dummy ones
        try:
            proof = self._prove(hooks.guard)
        finally:
            hooks.armed = True
        hooks.guard.blind = hooks.guard.is_split or not proof.holds
        if not proof.holds:
            logger.error(
                "MoE Guard is blind since weights were reloaded: %s; every request is unjudged until "
                "weights are reloaded under which it holds, or the server is restarted",
                "; ".join(proof.found),
            )
        return result

    def _prove(self, guard: Guard) -> Proof:
        """In each kind of step that vLLM compiles or captures on its own, whatever the kernels say: the
        ranks run their layers together."""
        faults = tuple(kernel_faults(self._layers))
        rank = self._data_parallel.data_parallel_rank
        proofs = [
            prove(guard, partial(self._run_probe_rows, uniform_decode=uniform), num_rows, shift=rank)
            for num_rows, uniform in self._probe_steps()
        ]
        proof = next((proof for proof in proofs if not proof.holds), proofs[0])
        return replace(proof, faults=faults + proof.faults)

    @property
    def _data_parallel(self) -> Any:
        return self._worker.vllm_config.parallel_config

    def _probe_steps(self) -> list[tuple[int, bool]]:
        """(rows, whether each row is a request of its own): decodes, then a batch that cannot be all
        decodes, then one that is larger than any captured graph."""
        config = self._worker.vllm_config
        scheduler = config.scheduler_config
        captured = max(config.compilation_config.cudagraph_capture_sizes or [0])
        steps = [(min(PROBE_ROWS, scheduler.max_num_seqs), True), (scheduler.max_num_seqs + 1, False)]
        if captured:
            steps.append((captured + 1, False))
        fitting = [step for step in steps if step[0] <= scheduler.max_num_batched_tokens]
        return fitting or [(scheduler.max_num_batched_tokens, False)]

    def _run_probe_rows(self, rows: int, *, uniform_decode: bool) -> None:
        run_probe_rows(
            self._worker.model_runner,
            rows,
            is_v2=bool(self._worker.use_v2_model_runner),
            uniform_decode=uniform_decode,
        )

    def status(self) -> WorkerStatus:
        assert self._hooks is not None, "asked before the model was loaded"
        assert self._proof is not None, "asked before the proof"
        return self._status_of(self._hooks.guard.program)

    def _status_of(self, program: Program) -> WorkerStatus:
        assert self._hooks is not None, "asked before the model was loaded"
        assert self._proof is not None, "asked before the proof"
        guard, masks = self._hooks.guard, program.masks
        return WorkerStatus(
            revision=program.revision,
            policies=program.policies,
            rules=program.rules,
            sets=program.sets,
            mask_rules=tuple(int(rule) for rule in masks.rule),
            static_mask_rules=tuple(int(rule) for rule in masks.rule[masks.static]),
            masked_experts=_masked_experts(program),
            masking=guard.mask is not None,
            layers=tuple(layer.number for layer in program.topology.layers),
            mask_keys=masks.keys,
            token_epochs=program.signals.token_epochs,
            proof=self._proof,
            kept_group=self._kept_group,
            load=LoadFacts.of(program, guard.load.every) if guard.load.every else None,
        )


def _masked_experts(program: Program) -> dict[str, int]:
    """How many experts the masks of each policy name, an expert of several counting once."""
    masks = program.masks
    named: dict[str, np.ndarray] = {}
    for action, rule in enumerate(masks.rule):
        word, bit = divmod(action, WORD_BITS)
        is_masked_LE = (masks.expert_bits[..., word] >> bit) & 1
        policy = program.rules[rule].policy
        named[policy] = named.get(policy, np.zeros_like(is_masked_LE)) | is_masked_LE
    return {policy: int(is_masked_LE.sum()) for policy, is_masked_LE in named.items()}
