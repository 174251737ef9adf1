"""Custom operators that cost nothing where nobody looks at operators."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class CustomOp:
    """
    A [`torch.library.custom_op`] whose plain calls go straight to its function.

    An operator is there for whoever works on operators: fake tensors, `torch.compile`, dispatch modes, functional
    transforms, and autograd, which refuses its derivative. Everything else pays about 30 us of Python for it, several
    times what a small kernel takes on a GPU.

    Args:
        function (`Callable`): what it does; annotated, positional arguments.
        name (`str`): `"namespace::name"`.
        mutates_args (`Sequence[str]`, *optional*): the arguments it writes into.

    Attributes:
        bodies (`dict`): the function of each such operator, for whoever wants to see what happens inside of it.
    """

    bodies: ClassVar[dict[Any, Callable]] = {}

    def __init__(self, function: Callable, name: str, mutates_args: Sequence[str] = ()):
        self.function, self.__doc__ = function, function.__doc__
        self.operator = torch.library.custom_op(name, function, mutates_args=mutates_args)
        self.bodies[self.operator._opoverload] = function
        self.register_fake = self.operator.register_fake

    def __call__(self, *args):
        return self.operator(*args) if _is_watched(args) else self.function(*args)


def custom_op(name: str, mutates_args: Sequence[str] = ()) -> Callable[[Callable], CustomOp]:
    """[`CustomOp`] as a decorator."""
    return lambda function: CustomOp(function, name, mutates_args)


def _is_watched(args: Iterable) -> bool:
    return (
        # first: torch.compile cannot read the others
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or any(isinstance(arg, Tensor) and type(arg) not in (Tensor, nn.Parameter) for arg in args)
    )
