"""What a run will take, told from its config alone: every entry of the ledger, before anything is allocated."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from offload_trainer import memory
from offload_trainer.device import ranks
from offload_trainer.device.elements import CHUNK
from offload_trainer.device.link import PROBED
from offload_trainer.forecast import footprint
from offload_trainer.forecast.footprint import OptimizerCost
from offload_trainer.forecast.ledger import Ledger, Phase
from offload_trainer.forecast.passes import Passes
from offload_trainer.forecast.sizes import Sizes
from offload_trainer.groups import Plan
from offload_trainer.groups.slicing import named_tensors
from offload_trainer.initial import standins
from offload_trainer.master.master import master_bytes
from offload_trainer.master.moments import OptimizerFactory, StateSpec, trained_dtype
from offload_trainer.master.precision import Precision

LOADING = 2**23
"""Bytes of the pieces in which stored weights are read and converted."""
GAPS, GAPS_OF_VARYING = 0.45, 0.85
"""What glibc's heap holds beside what is in use, as a share of what a step allocates there: 0.3 to 0.75 were measured,
more where each round's tensors have other sizes. With MALLOC_MMAP_THRESHOLD_=65536 in the environment there are no
gaps, and a step takes longer."""
PROOF_SHARE = 0.25
"""Of a matrix sliced on both axes, the part that a random plan of the proof keeps on average."""
PROVED_WHOLE = 2**28
"""Elements up to which the proof copies the model; the stand-in of a larger one has a quarter of that at most."""


@dataclass(frozen=True)
class Predictor:
    """All that decides what one process of a run takes, but its plans."""

    passes: Passes
    """Of its model, losses and batches."""
    state_spec: StateSpec
    """Without moments: the optimizer's state is not carried from round to round."""
    optimizer: OptimizerFactory
    process: int
    """Bytes of host memory that the process holds already: Python, libraries, data, a model that is not on meta."""
    processes: int = 1
    """Of the run; they average their gradients."""
    rehearsal: bool = False
    """Whether loss and metrics are tried on a subnet before the run."""
    proof: bool = True
    """Whether slicing is verified, on a float32 copy of the model, before it is loaded."""
    calibration: bool = False
    """Whether importance is measured on the full model."""
    stand_in: bool = False
    """Whether the kept units are made to stand in for the others after that."""
    candidates: int = 1
    """Subnets on the device at once while the result is chosen."""
    varying: bool = False
    """Whether widths differ from round to round."""
    mapped: bool = False
    """Whether the master lies in mapped files. What is resident of those counts nothing: it makes room when needed."""
    overlap: bool = False
    """Whether transfers go on while a round trains."""
    credits: bool = False
    """Whether gradients are multiplied with the weights before a step, one parameter after the other."""
    checkpoints: int = 1
    """Those on disk at once."""
    exports_full: bool = False
    """Whether the full master is exported too."""

    def ledger(self, plan: Plan, *, reference: bool, sampled: frozenset[str], ahead: bool = False) -> Ledger:
        """Of a run whose plans are as large as `plan`.

        reference: a second subnet is held beside the one that is trained. ahead: it is trained next, so that rounds
        overlap. sampled: the tensors that some plan slices.
        """
        sizes = Sizes(self.passes.model, self.state_spec, self.passes.precision, plan, sampled)
        host, held = self._host(sizes, ahead), self._held(sizes, reference)
        small = held | {"exported subnet": self.candidates * sizes.weights}
        moved = host | _if_any({"subnet in transit": 0 if self._on_host else sizes.weights})
        training = self._training(sizes, host, held)
        if ahead:
            training.append(Phase("swap", host, held | _if_any({"arriving": sizes.arriving(on_host=self._on_host)})))
        validation = self.passes.validation(plan).peak
        evaluated = Phase("subnet evaluated", moved, small | {"activations": validation})
        limit = max(phase.device_bytes for phase in (*training, evaluated))
        rows, calibration, passed = self._through_master(host, small, plan, limit)
        phases = [
            *self._before_training(host, sizes),
            *calibration,
            *training,
            evaluated,
            passed,
            Phase("checkpoint", host, held),
            Phase("export", host, small),
        ]
        disk = {"checkpoints": self.checkpoints * sum(self._master.values()), "export": sizes.weights}
        disk |= {"full master": self._master["weights"]} if self.exports_full else {}
        disk |= {"mapped master": sum(self._master.values())} if self.mapped else {}
        notes = tuple(dict.fromkeys(self.passes.failures))
        return Ledger(tuple(phases), disk, sizes.link(reference, ahead), self._on_host, notes, rows)

    def savings(self) -> dict[str, int]:
        """What each option (config key and value) would save of the master's slabs, in bytes; 0 is left out."""
        options = {
            "optimizer.state: reset": replace(self, state_spec=StateSpec({}, {}, None)),
            "memory.moments: bf16": self._at(replace(self.passes.precision, moments=torch.bfloat16)),
            "memory.weights: bf16": self._at(replace(self.passes.precision, weights=torch.bfloat16)),
            "memory.master: file": replace(self, mapped=True),
        }
        now = sum(self._in_memory.values())
        return _if_any({option: now - sum(other._in_memory.values()) for option, other in options.items()})

    def _at(self, precision: Precision) -> "Predictor":
        return replace(self, passes=replace(self.passes, precision=precision))

    # The phases

    def _before_training(self, host: dict[str, int], sizes: Sizes) -> list[Phase]:
        """Probing, proof, rehearsal, loading."""
        copied = {"process": self.process, "what is copied": (2 if self._on_host else 1) * PROBED}
        phases = [Phase("link probed", copied, {})]
        if self.proof:
            elements = [tensor.numel() for tensor in self.tensors.values()]
            share = 1.0 if sum(elements) <= PROVED_WHOLE else PROVED_WHOLE / 4 / sum(elements)
            copied = int(4 * share * sum(elements))
            # A gradient and its product with the parameter exist for one parameter at a time.
            copies = {"float32 copy": copied, "sliced copy": int(PROOF_SHARE * copied)}
            copies["one gradient"] = int(8 * share * max(elements))
            phases.append(Phase("proof", {"process": self.process, **copies}, {}))
        if self.rehearsal:
            there = {} if self._on_host else {"subnet": sizes.weights}
            there |= {"activations": self.passes.training(sizes.plan).peak}
            phases.append(Phase("rehearsal", {"process": self.process, "sliced copy": sizes.weights}, there))
        # A model that is not on meta moves into the slab tensor by tensor.
        built = [tensor.nbytes for tensor in self.tensors.values() if not tensor.is_meta]
        beside = {"model as it was built": max(built, default=0)}
        loading = {"process": host["process"], "master weights": self._in_memory["weights"], "loading": LOADING}
        phases.append(Phase("load", _if_any(loading | beside), {}))
        return phases

    def _through_master(
        self, host: dict[str, int], small: dict[str, int], plan: Plan, limit: int
    ) -> tuple[int | None, list[Phase], Phase]:
        """The most rows of a batch that may pass through the full master at once (None: all), so that the device holds
        no more than `limit`, or their activations no more than the layer that passes anyway; and the phases in which
        they pass: before training, and after."""
        layer = sum(self._passing.values())
        for rows in self.passes.rows():
            before = self._calibration(host, plan, rows)
            activations = {"activations": self.passes.master_evaluation(rows)}
            after = Phase("master evaluated", host, small | self._passing | activations)
            phases = (*before, after)
            if all(phase.device_bytes <= limit or phase.device["activations"] <= layer for phase in phases):
                break
        return rows, before, after

    def _calibration(self, host: dict[str, int], plan: Plan, rows: int | None) -> list[Phase]:
        """Importance and standing in, of batches of so many rows."""
        if not self.calibration:
            return []
        found = self.passes.master_training(rows)
        # The inputs of one layer at a time are squared in float32.
        passing = self._passing | {"activations": found.peak + 2 * found.largest}
        there, here = standins.scratch_bytes(self.passes.model, plan) if self.stand_in else (0, 0)
        return [Phase("calibration", host | _if_any({"standing in": there}), passing | _if_any({"products": here}))]

    def _training(self, sizes: Sizes, host: dict[str, int], held: dict[str, int]) -> list[Phase]:
        step = self.passes.training(sizes.plan)
        cost = self._optimizer
        own = 0 if self.state_spec.moments else int(cost.state * sizes.gradients)  # that is not carried
        held = held | _if_any({"optimizer's own state": own})
        scratch = int(cost.one * sizes.widest + cost.together * sizes.gradients)
        in_heap = sizes.gradients_below(memory.HEAP_BLOCK)
        state_in_heap = int(cost.state * in_heap)
        credit = {"gradients": sizes.gradients, "products": sizes.widest}
        message = min(sizes.gradients, ranks.BUCKET + sizes.widest)
        averaging = {"gradients": sizes.gradients, "message and its mean": 2 * message}
        return [
            Phase(
                "forward and backward",
                host | self._gaps(step.heap + state_in_heap),
                held | _if_any({"gradients": step.gradients, "activations": step.peak - step.gradients}),
            ),
            *([Phase("gradients averaged", host, held | _if_any(averaging))] if self.processes > 1 else []),
            *([Phase("credit", host, held | _if_any(credit))] if self.credits else []),
            Phase(
                "optimizer step",
                host | self._gaps(in_heap + state_in_heap),
                held | _if_any({"gradients": sizes.gradients, "optimizer's scratch": scratch}),
            ),
            Phase(
                "write-back",
                host | _if_any({"merging scratch": sizes.merging}),
                held | _if_any({"rounding scratch": sizes.rounding}),
            ),
        ]

    def _gaps(self, in_heap: int) -> dict[str, int]:
        share = GAPS_OF_VARYING if self.varying else GAPS
        return _if_any({"allocator's gaps": int(share * in_heap)}) if self._on_host else {}

    # What is held all through training

    def _host(self, sizes: Sizes, ahead: bool) -> dict[str, int]:
        staging = sizes.staging(overlap=self.overlap, ahead=ahead, on_host=self._on_host)
        master = _if_any({f"master {kind}": size for kind, size in self._in_memory.items()})
        held = {"process": self.process - self._built, **master, "transfer scratch": 3 * CHUNK}
        return held | _if_any({"staging" if self._on_host else "staging (pinned)": staging})

    def _held(self, sizes: Sizes, reference: bool) -> dict[str, int]:
        batch = sum(leaf.nbytes for leaf in tree_leaves(self.passes.batch) if isinstance(leaf, Tensor))
        held = {"subnet": sizes.weights}
        held |= {f"subnet {moment}": size for moment, size in sizes.moments.items()}
        held |= {"reference": sizes.weights if reference else 0, "batch": batch}
        return _if_any(held | {"libraries' workspace": memory.workspace_bytes(self.passes.device)})

    @cached_property
    def _master(self) -> dict[str, int]:
        return master_bytes(self.passes.model, self.state_spec, self.passes.precision)

    @property
    def _in_memory(self) -> dict[str, int]:
        """Of the master."""
        return dict.fromkeys(self._master, 0) if self.mapped else self._master

    @cached_property
    def _built(self) -> int:
        """Bytes of the model as it is now."""
        return sum(tensor.nbytes for tensor in self.tensors.values() if not tensor.is_meta)

    @cached_property
    def _optimizer(self) -> OptimizerCost:
        return footprint.optimizer_cost(self.optimizer, trained_dtype(self.passes.model), self.passes.device)

    @cached_property
    def _passing(self) -> dict[str, int]:
        """What the device holds of the full master while that passes through it: its largest layer."""
        layers = [sum(p.nbytes for p in module.parameters(recurse=False)) for module in self.passes.model.modules()]
        return {} if self._on_host else {"one layer": max(layers)}

    @property
    def _on_host(self) -> bool:
        return self.passes.device.type == "cpu"

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return named_tensors(self.passes.model)


def _if_any(entries: Mapping[str, int]) -> dict[str, int]:
    return {name: size for name, size in entries.items() if size > 0}
