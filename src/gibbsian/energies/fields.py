r"""Energies made of networks that return a vector: a field f from points to points, read as one number.

A network for denoising or flow matching has a direction for every point, and a shape that suits them (a U-Net). Two
ways to make a scalar of it, whose gradient is then a field without curl, are :math:`\langle x, f(x) \rangle` and
:math:`-\tfrac{1}{2} \|f(x)\|^2`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from gibbsian.energies.base import Energy
from gibbsian.energies.tractable import shape_of
from gibbsian.errors import ArgumentTypeError, OptionError, ShapeError


class FieldEnergy(Energy):
    r"""The energy :math:`\langle x, f(x) \rangle` or :math:`-\tfrac{1}{2} \|f(x)\|^2` of a vector-valued network.

    The two explicit energies of `Equilibrium matching: generative modeling with implicit energy-based models (Wang &
    Du, 2025) <https://arxiv.org/abs/2510.02300>`_. The second is never above 0.

    Parameters
    ----------
    field
        A module from ``(n, *event)`` to ``(n, *event)``; further context is passed on to it.
    form
        ``"dot"`` or ``"square"``.
    shape
        Size or shape of one point; ``None`` for any.
    context
        Names of the conditions that the field asks for.

    Raises
    ------
    ArgumentTypeError
        If the field is no module.
    OptionError
        If the form is another.
    """

    def __init__(
        self,
        field: nn.Module,
        form: Literal["dot", "square"] = "dot",
        shape: int | Sequence[int] | None = None,
        context: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if not isinstance(field, nn.Module):
            raise ArgumentTypeError(f"A field is a module from (n, *event) to (n, *event); got {field!r}.")
        if form not in ("dot", "square"):
            raise OptionError(f"form is 'dot' for <x, f(x)> or 'square' for -|f(x)|^2 / 2; got {form!r}.")
        self.field = field
        self.form = form
        self.event_shape = None if shape is None else shape_of(shape)
        self.context = tuple(context)

    def forward(self, x: Tensor, **context: Tensor) -> Tensor:
        """Energy of each row: ``(n, *event) -> (n,)``.

        Raises
        ------
        ShapeError
            If the field returns another shape than it was given.
        """
        out = self.field(x, **context)
        if out.shape != x.shape:
            raise ShapeError(
                f"A field returns points of the shape that it is given, {tuple(x.shape)}; got {tuple(out.shape)}."
            )
        axes = tuple(range(1, x.ndim))
        return (x * out).sum(axes) if self.form == "dot" else -0.5 * out.square().sum(axes)

    def extra_repr(self) -> str:
        """The form."""
        return f"form={self.form!r}"
