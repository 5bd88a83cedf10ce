r"""Guidance: move a conditional model away from the unconditional one.

.. math:: E_g(x) = E_u(x) + s\,(E_c(x) - E_u(x)), \qquad p_g(x) \propto p_u(x)^{1-s}\, p_c(x)^{s}.

**The scale** is s here, everywhere: 0 is the unconditional model, 1 the conditional one, and more than 1 moves on. It
is what programs call the guidance scale. `Classifier-free diffusion guidance (Ho & Salimans, 2022)
<https://arxiv.org/abs/2207.12598>`_ write :math:`(1 + w)\,\epsilon_c - w\,\epsilon_u` instead, which is :math:`s = 1 +
w`; `scale_from_weight` translates.

**What it draws from.** At noise level :math:`\sigma` the guided energy belongs to :math:`p_{u,\sigma}^{1-s}
p_{c,\sigma}^{s}`. That is not the guided density :math:`p_g` with noise added, but for s = 0 and s = 1: the sequence of
levels ends in the right density, but is no diffusion, and a walk along the guided score (`gibbsian.bridges.reverse`)
ends somewhere else. Chains that hold each level's density by Metropolis steps (`gibbsian.annealing.annealed_chains`)
do draw from :math:`p_g`, as far as they pass between its modes, and so do weighted particles (`compose`) where they
do not. Both can be had; plain guidance is what is usual for pictures, and its density has no formula.

Whatever has an energy given a label can be guided, with or without noise levels.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

from gibbsian.applications.terms import Window, check_window, within
from gibbsian.bridges.scores import Score
from gibbsian.energies.base import Combination, Energy, formula
from gibbsian.energies.domains import common_event_shape, common_support
from gibbsian.energies.labels import check_labels
from gibbsian.errors import ArgumentTypeError, OptionError, ShapeError
from gibbsian.kernels.base import per_chain
from gibbsian.typing import Scalar

M = TypeVar("M", Energy, Score)


def scale_from_weight(weight: float) -> float:
    """Turn Ho and Salimans' weight w into the scale s = 1 + w."""
    return 1.0 + weight


@overload
def guided(conditional: Energy, unconditional: Energy, scale: Scalar, *, window: Window | None = None) -> Energy: ...


@overload
def guided(
    conditional: Score,
    unconditional: Score,
    scale: Scalar,
    *,
    window: Window | None = None,
    rescale: float = 0.0,
) -> Score: ...


def guided(
    conditional: Any, unconditional: Any, scale: Scalar, *, window: Window | None = None, rescale: float = 0.0
) -> Any:
    r"""Guide a conditional energy or score by an unconditional one.

    Parameters
    ----------
    conditional, unconditional
        Two energies, or two scores, over the same points. Context, such as ``sigma`` or a label, may be open in either.
    scale
        s above, 0 or more; a 0-d tensor may change without recompiling.
    window
        Noise levels ``(low, high)`` within which guidance acts; outside the model is the conditional one. `Applying
        guidance in a limited interval improves sample and distribution quality in diffusion models (Kynkäänniemi et
        al., 2024) <https://arxiv.org/abs/2404.07724>`_. For energies with the context ``sigma``, and scores.
    rescale
        For scores: how far, from 0 to 1, the clean point that the guided score expects is brought back to the standard
        deviation, over its own coordinates, that the conditional one expects. `Common diffusion noise schedules and
        sample steps are flawed (Lin et al., 2023) <https://arxiv.org/abs/2305.08891>`_, whose networks predict v, at
        high noise the clean point's negative. It has no energy.

    Returns
    -------
    Energy or Score
        Of the same kind. An energy without window is the sum ``(1 - s) * unconditional + s * conditional``.

    Raises
    ------
    OptionError
        Without an unconditional branch, or if the scale is negative or not finite, the window is empty, or something is
        asked of energies that only scores can do.
    ArgumentTypeError
        If the two are of different kinds, or something else.
    ShapeError, DomainError
        If two energies live on different spaces.
    """
    if unconditional is None:
        raise OptionError(
            "Guidance needs an unconditional branch to move away from, and got none. Train one model with "
            "LabelDropping "
            "and use guided_by_label, or pass the energy of all classes together."
        )
    _check_scale(scale)
    check_window(window)
    if isinstance(conditional, Energy) and isinstance(unconditional, Energy):
        if rescale:
            raise OptionError(
                "Rescaling is for scores: the rescaled field is no gradient, so that there is no energy of it. Use "
                "guided(score_of(conditional), score_of(unconditional), scale, rescale=...)."
            )
        if window is None:
            return Combination([(1.0 - scale, unconditional), (scale, conditional)])
        return WindowedEnergy(conditional, unconditional, scale, window)
    if isinstance(conditional, Score) and isinstance(unconditional, Score):
        return GuidedScore(conditional, unconditional, scale, window, rescale)
    raise ArgumentTypeError(
        f"Guidance is between two energies or two scores; got {type(conditional).__name__} and "
        f"{type(unconditional).__name__}. score_of(energy) makes a score of a noise-conditional energy."
    )


def guided_by_label(
    model: M,
    labels: Tensor | int,
    scale: Scalar,
    *,
    classes: int,
    none: int | None = None,
    name: str = "y",
    window: Window | None = None,
    rescale: float = 0.0,
) -> M:
    """Guide one model of labels that was trained with some of them dropped: see `LabelDropping`.

    Parameters
    ----------
    model
        An energy or a score with the label in its context.
    labels
        One for all rows, or one per row ``(n,)``.
    scale, window, rescale
        As for `guided`.
    classes
        How many classes were seen in training, numbered from 0.
    none
        The label that stands for none; ``classes`` when left out.
    name
        What the model calls the label.

    Raises
    ------
    OptionError
        If the model takes no label, has no unconditional branch, or a label was not seen; and as `guided`.
    ArgumentTypeError
        If labels are no whole numbers; and as `guided`.
    """
    if not isinstance(model, (Energy, Score)):
        raise ArgumentTypeError(f"Guidance is of an energy or a score; got {type(model).__name__}.")
    if name not in model.context:
        takes = ", ".join(model.context) or "none"
        raise OptionError(f"This model takes no label named {name!r}, so that nothing can guide it; it takes: {takes}.")
    empty = classes if none is None else none
    told = getattr(model, "classes", None)
    if isinstance(told, int) and told <= empty:
        raise OptionError(
            f"This model tells {told} classes apart, so that label {empty}, which stands for none, has no branch: "
            f"there "
            f"is nothing unconditional to guide by. Build it with classes={empty + 1} and train it with "
            f"LabelDropping(objective, none={empty})."
        )
    check_labels(torch.as_tensor(labels), empty, classes)
    conditional, unconditional = model.given(**{name: labels}), model.given(**{name: empty})
    if isinstance(conditional, Energy) and isinstance(unconditional, Energy) and not rescale:
        return guided(conditional, unconditional, scale, window=window)  # pyright: ignore[reportReturnType]
    return guided(conditional, unconditional, scale, window=window, rescale=rescale)  # pyright: ignore


class WindowedEnergy(Energy):
    """A guided energy whose guidance acts between two noise levels only; see `guided`."""

    context = ("sigma",)
    scale: Tensor

    def __init__(self, conditional: Energy, unconditional: Energy, scale: Scalar, window: Window) -> None:
        super().__init__()
        for energy in (conditional, unconditional):
            if "sigma" not in energy.context:
                raise OptionError(
                    f"A window of noise levels needs energies with the context sigma; {formula(energy)} has none open."
                )
        self.conditional, self.unconditional, self.window = conditional, unconditional, window
        self.register_buffer("scale", torch.as_tensor(scale, dtype=torch.float64), persistent=False)
        self.event_shape = common_event_shape((conditional, unconditional))
        self.support = common_support((conditional, unconditional))
        self.context = tuple(dict.fromkeys((*unconditional.context, *conditional.context)))

    def forward(self, x: Tensor, **context: Tensor) -> Tensor:
        """Energy of each row at its noise level."""
        c, u = (e(x, **{k: context[k] for k in e.context}) for e in (self.conditional, self.unconditional))
        return u + _scales(self.scale, context["sigma"], self.window).to(c.dtype) * (c - u)

    def extra_repr(self) -> str:
        """The parts."""
        return f"{formula(self.conditional)}, {formula(self.unconditional)}, {float(self.scale):.4g}, {self.window}"


class GuidedScore(Score):
    """A score guided by another; see `guided`."""

    scale: Tensor

    def __init__(
        self, conditional: Score, unconditional: Score, scale: Scalar, window: Window | None, rescale: float
    ) -> None:
        super().__init__()
        if not 0.0 <= rescale <= 1.0:
            raise OptionError(f"rescale lies between 0, not at all, and 1, all the way; got {rescale}.")
        self.conditional, self.unconditional = conditional, unconditional
        self.window, self.rescale = window, rescale
        self.register_buffer("scale", torch.as_tensor(scale, dtype=torch.float64), persistent=False)
        self.context = tuple(dict.fromkeys((*unconditional.context, *conditional.context)))

    def forward(self, x: Tensor, sigma: Tensor, **context: Tensor) -> Tensor:
        """Guided scores of rows at their noise levels."""
        c, u = (s(x, sigma, **{k: context[k] for k in s.context}) for s in (self.conditional, self.unconditional))
        scale = _scales(self.scale, sigma, self.window).to(x.dtype)
        out = u + per_chain(scale, x) * (c - u)
        return out if self.rescale == 0.0 else self._rescaled(x, sigma, c, out)

    def _rescaled(self, x: Tensor, sigma: Tensor, conditional: Tensor, out: Tensor) -> Tensor:
        if x[0].numel() < 2:
            raise ShapeError(
                "Rescaling compares standard deviations over a point's coordinates, and there is only one."
            )
        variance = per_chain(sigma.square(), x)
        clean, aim = x + variance * out, x + variance * conditional
        ratio = aim.flatten(1).std(1) / clean.flatten(1).std(1)
        return (per_chain(1.0 + self.rescale * (ratio - 1.0), x) * clean - x) / variance

    def extra_repr(self) -> str:
        """Scale, window and rescaling."""
        return f"scale={float(self.scale):.4g}, window={self.window}, rescale={self.rescale}"


def _scales(scale: Tensor, sigma: Tensor, window: Window | None) -> Tensor:
    """The scale of each row: 1 where its noise level lies outside the window."""
    if window is None:
        return scale.expand(len(sigma))
    return torch.where(within(sigma, window), scale.to(sigma.dtype), 1.0)


def _check_scale(scale: Scalar) -> None:
    # A tensor is not read, which would wait for the device.
    if not isinstance(scale, Tensor) and not 0.0 <= scale < math.inf:
        raise OptionError(
            f"The guidance scale is a number from 0 (unconditional) over 1 (conditional) up; got {scale}. In the "
            "convention with a weight w it is 1 + w. To move away from a class, swap the branches."
        )
