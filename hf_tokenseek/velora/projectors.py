"""The directions that an input's sub-tokens are projected on: how they are drawn, and what a projection is worth."""

import torch
from torch import Tensor

from tokenseek_kernels import compress, expand

from .config import VeloraConfig


class Projector:
    """
    Directions of one input, as many as `rank` in each group, orthogonal and of unit length.

    Args:
        width (`int`): features of the input.
        groups (`int`): sub-tokens it is cut into, at most; the last may be shorter than the others.
        rank (`int`): directions a group.

    Attributes:
        size (`int`): features of a sub-token.
        columns (`int`): numbers kept of a token, `groups * rank`.
        directions (`torch.Tensor` of shape `(rank, width)`, *optional*): float32 at least; `None` before a draw.
        expansion (`torch.Tensor`, *optional*): the same times the factors that make the projection unbiased.
        version (`int`): how often directions were drawn.
        overlap (`torch.Tensor` of shape `(groups,)`): cosines of the last directions with those before them.
    """

    needs_mean = False

    def __init__(self, width: int, groups: int, rank: int):
        self.width, self.rank = width, rank
        self.size = -(-width // min(groups, width))
        self.groups = -(-width // self.size)
        self.columns = self.groups * rank
        self.directions: Tensor | None = None
        self.expansion: Tensor | None = None
        self.overlap: Tensor | None = None
        self.version = 0

    def compress(self, x: Tensor) -> Tensor:
        """`(..., width)` -> `(..., columns)`, what is kept for backward."""
        return compress(x, self.directions, self.size)

    def expand(self, compressed: Tensor) -> Tensor:
        """`(out, columns)` -> `(out, width)`, the weight gradient."""
        return expand(compressed, self.expansion, self.size)

    def spread(self, numbers: Tensor) -> Tensor:
        """`(out, groups)` -> `(out, width)`: each group's number at each of its features, a new tensor."""
        return numbers.repeat_interleave(self.size, dim=1)[:, : self.width]

    def draw(self, mean: Tensor | None, generator: torch.Generator, like: Tensor) -> None:
        """
        Draws directions.

        Args:
            mean (`torch.Tensor` of shape `(width,)`, *optional*): of the input's rows, where it is needed.
            generator (`torch.Generator`): of the CPU, seeded by input and step.
            like (`torch.Tensor`): a weight that they are used with; they are float32 at least, on its device.
        """
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.load(self._draw(mean, generator).to(like.device, dtype), self.version + 1)

    def load(self, directions: Tensor, version: int) -> None:
        """Takes directions as they are."""
        if self.directions is not None:
            self.overlap = self._cut(self.directions[:1] * directions[:1])[0].sum(-1)
        self.directions, self.version = directions, version
        self.expansion = directions * self._factors().to(directions)

    def _draw(self, mean: Tensor | None, generator: torch.Generator) -> Tensor:
        raise NotImplementedError

    def _factors(self) -> Tensor:
        """One factor a direction and feature."""
        return torch.ones(self.rank, 1)

    def _sizes(self) -> Tensor:
        """Features of each group, by feature."""
        sizes = torch.full((self.width,), float(self.size))
        last = self.width % self.size
        if last:
            sizes[-last:] = last
        return sizes

    def _cut(self, rows: Tensor) -> Tensor:
        """`(rank, width)` -> `(rank, groups, size)`, filled up with zeros."""
        return torch.nn.functional.pad(rows, (0, self.groups * self.size - self.width)).unflatten(1, (-1, self.size))

    def _uncut(self, groups: Tensor) -> Tensor:
        return groups.flatten(1)[:, : self.width]

    def _exists(self, like: Tensor) -> Tensor:
        """Which of the `(groups, size)` features exist."""
        return self._cut(torch.ones_like(like[:1]))[0] > 0

    def _orthonormal(self, rows: Tensor) -> Tensor:
        """Gram and Schmidt in each group, row by row; what a short group has no room for is zero."""
        cut, exists = self._cut(rows), self._exists(rows)
        done: list[Tensor] = []
        for index, row in enumerate(cut * exists):
            for _ in range(2):  # once more, for what rounding left
                for other in done:
                    row = row - (row * other).sum(-1, keepdim=True) * other
            fits = exists.sum(-1, keepdim=True) > index
            norm = row.norm(dim=-1, keepdim=True)
            done.append(torch.where(fits & (norm > 0), row / norm.clamp(min=1e-30), torch.zeros_like(row)))
        return self._uncut(torch.stack(done))


class AverageProjector(Projector):
    """The average sub-token of a batch, over all tokens and groups, the same for each group: the paper's."""

    needs_mean = True

    def _draw(self, mean: Tensor | None, generator: torch.Generator) -> Tensor:
        return self._along(mean)

    def _along(self, mean: Tensor) -> Tensor:
        cut = self._cut(mean[None])[0]
        average = cut.mean(0)
        # an average of zero has no direction
        average = torch.where(average.norm() > 0, average, torch.ones_like(average))
        row = self._uncut(average.expand_as(cut)[None])
        alone = self._cut(row)[0].norm(dim=-1, keepdim=True) == 0
        row = self._uncut(torch.where(alone, torch.ones_like(cut), self._cut(row)[0])[None])
        return self._orthonormal(row)


class RandomProjector(Projector):
    """Random directions, uniform; times `size / rank` the projection is right on average."""

    def _draw(self, mean: Tensor | None, generator: torch.Generator) -> Tensor:
        return self._orthonormal(torch.randn(self.rank, self.width, generator=generator, dtype=torch.float64))

    def _factors(self) -> Tensor:
        sizes = self._sizes()
        return (sizes / sizes.clamp(max=self.rank)).expand(self.rank, -1)


class MixedProjector(AverageProjector):
    """The average, and random directions orthogonal to it, which are right on average for all that it leaves."""

    def _draw(self, mean: Tensor | None, generator: torch.Generator) -> Tensor:
        random = torch.randn(self.rank - 1, self.width, generator=generator, dtype=torch.float64)
        rows = torch.cat([self._along(mean.double().cpu()), random])
        return self._orthonormal(rows)

    def _factors(self) -> Tensor:
        others = self._sizes() - 1
        factor = others / others.clamp(min=1, max=self.rank - 1)
        return torch.cat([torch.ones(1, self.width), factor.expand(self.rank - 1, -1)])


_KINDS = {"average": AverageProjector, "random": RandomProjector, "mixed": MixedProjector}


def make_projector(config: VeloraConfig, width: int) -> Projector:
    """The projector that `config` asks for, for an input of this width."""
    return _KINDS[config.projector](width, config.groups, config.rank)
