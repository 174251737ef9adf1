"""What VeLoRA did to inputs and gradients, in figures for the log."""

import torch
from torch import Tensor


class Telemetry:
    """
    Collects figures between two logs.

    Attributes:
        probing (`bool`): whether this micro-batch measures fidelity, for which the layers keep their inputs.
        in_forward (`bool`): whether the model's forward runs; inputs that come later are those of a recomputation.
    """

    def __init__(self):
        self.probing = self.in_forward = False
        self._reset()

    def begin_micro_batch(self, probing: bool) -> None:
        """A training forward begins."""
        self.probing = probing
        self._micro_batches += 1

    def observe_input(self, x: Tensor, z: Tensor) -> None:
        """An input was compressed."""
        self._saved[self.in_forward] += x.numel() * x.element_size() - z.numel() * z.element_size()
        if self.probing:
            self._energies = self._energies + torch.stack([own.detach().float().square().sum() for own in (z, x)])

    def observe_gradient(self, compressed: Tensor, exact: Tensor) -> None:
        """A weight's compressed gradient, and the exact one."""
        compressed, exact = compressed.float(), exact.float()
        products = (compressed * exact).sum(), compressed.square().sum(), exact.square().sum()
        self._products = self._products + torch.stack(products).double()

    def read(self, reset: bool = True) -> dict[str, float]:
        """
        The figures since the last call with `reset`.

        Returns:
            `dict[str, float]`: `velora/saved_mib` (a micro-batch, by the sizes of inputs and what is kept of them),
            and after a probe `velora/retained_energy` (share of the inputs' squares that z has) and
            `velora/gradient_cosine` (over all compressed weights).
        """
        found = {}
        if self._micro_batches:
            # checkpointing computes z again, or (reentrant) only then
            found["velora/saved_mib"] = max(self._saved) / self._micro_batches / 2**20
        if isinstance(self._energies, Tensor):
            kept, whole = self._energies.tolist()
            found["velora/retained_energy"] = kept / max(whole, 1e-30)
        if isinstance(self._products, Tensor):
            dot, own, exact = self._products.tolist()
            found["velora/gradient_cosine"] = dot / max((own * exact) ** 0.5, 1e-30)
        if reset:
            self._reset()
        return found

    def _reset(self) -> None:
        self._saved, self._micro_batches = [0, 0], 0
        # sums: a loop that never reads keeps no more
        self._energies: Tensor | float = 0.0
        self._products: Tensor | float = 0.0
