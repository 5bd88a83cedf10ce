"""What `fit` refuses: arguments that do not fit together, data that cannot be learned from, losses without a slope."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from gibbsian.energies.base import Energy
from gibbsian.energies.layers import check_independent_rows
from gibbsian.energies.neural import SpectralNorm
from gibbsian.energies.score import Score
from gibbsian.energies.tractable import require_support
from gibbsian.errors import ArgumentTypeError, DataError, OptionError, ShapeError
from gibbsian.objectives.base import Batch, Loss, Objective
from gibbsian.training.feed import Feed, MemoryFeed
from gibbsian.training.settings import TrainingSettings

REFERENCE = 1024
"""Rows that chains are compared with at the end."""


def checked(
    energy: nn.Module, data: Tensor | Batch | Feed, objective: Objective, rng: Generator, settings: TrainingSettings
) -> tuple[Energy | Score, Feed]:
    """Check the arguments of `fit`; return the energy or score, and what feeds it, on its device."""
    if not isinstance(energy, nn.Module):
        raise ArgumentTypeError(f"fit trains the parameters of a module; got {energy!r}.")
    if not isinstance(objective, Objective):
        raise ArgumentTypeError(
            f"The objective must be an Objective, such as DenoisingScoreMatching; got {objective!r}."
        )
    if isinstance(energy, Score) and not objective.fits_scores:
        raise OptionError(
            f"{type(objective).__name__} fits energies, and {type(energy).__name__} is a score, which has none; a "
            "score is fitted by MultiLevelDenoising(LogNormal(), EDMWeight())."
        )
    model = energy if isinstance(energy, Score) else Energy.of(energy)
    params = trained_parameters(model, objective)
    if not params:
        raise OptionError(
            "Neither energy nor objective has a parameter that asks for gradients; nothing can be trained."
        )
    like = next(iter(params.values()))
    objective.to(like.device)
    check_devices(model, objective, like)
    if rng.device.type != like.device.type:
        raise OptionError(
            f"The generator is on {rng.device} and the parameters are on {like.device}; "
            f"use torch.Generator({str(like.device)!r})."
        )
    check_independent_rows(model)
    check_independent_rows(objective)
    if settings.precision == "bfloat16":
        check_lowered(model, objective, like)
    if not isinstance(data, Feed):
        return model, MemoryFeed(checked_data(model, data, like), settings.batch_size, settings.lanes)
    checked_data(model, data.spread(REFERENCE), like)
    for name in ("lanes", "batch_size"):
        if (found := getattr(data, name)) != (wanted := getattr(settings, name)) and not (
            name == "batch_size" and found == data.n < wanted
        ):
            raise OptionError(f"The data come with {name}={found}, and training was asked for {name}={wanted}.")
    return model, data


def trained_parameters(energy: nn.Module, objective: nn.Module) -> dict[str, nn.Parameter]:
    """Name the parameters that ask for gradients, of the energy and of the objective, each once."""
    params: dict[nn.Parameter, str] = {}
    for owner, module in (("energy", energy), ("objective", objective)):
        for name, p in module.named_parameters():
            if p.requires_grad:
                params.setdefault(p, f"{owner}.{name}")
    return {name: p for p, name in params.items()}


def check_devices(energy: nn.Module, objective: nn.Module, like: Tensor) -> None:
    """Check that everything an energy and an objective hold is in one place; numbers (0-d) may stay on the host.

    Raises
    ------
    OptionError
        Naming the first that is elsewhere.
    """
    for owner, module in (("energy", energy), ("objective", objective)):
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.device != like.device and tensor.ndim > 0:
                raise OptionError(
                    f"The parameters are on several devices: {owner}.{name} is on {tensor.device} and the first on "
                    f"{like.device}. Move energy and objective with .to({str(like.device)!r}) before fitting."
                )


def check_lowered(energy: nn.Module, objective: nn.Module, like: Tensor) -> None:
    """Check that losses can be computed in bfloat16.

    Raises
    ------
    OptionError
        If weights are in double precision, or something takes more digits than bfloat16 has.
    """
    if like.dtype != torch.float32:
        raise OptionError(
            f"precision='bfloat16' lowers products of float32, and the weights are {str(like.dtype)[6:]}; bring them "
            "to float32 with .float(), or leave precision='float32', which computes as the weights are kept."
        )
    for part in (*objective.modules(), *energy.modules()):
        if (isinstance(part, Objective) and part.full_precision) or isinstance(part, SpectralNorm):
            why = "a power iteration" if isinstance(part, SpectralNorm) else "curvatures or close differences"
            raise OptionError(
                f"{type(part).__name__} computes {why}, for which bfloat16 has too few digits; train with "
                "precision='float32'."
            )


def dtypes_of(energy: nn.Module, objective: nn.Module, batch: Batch) -> str:
    """Say which precisions meet: of the energy, the objective and the data."""
    told = []
    for owner, module in (("energy", energy), ("objective", objective)):
        tensors = (*module.parameters(), *module.buffers())
        names = {str(t.dtype).removeprefix("torch.") for t in tensors if t.is_floating_point()}
        told.append(f"the {owner} holds {' and '.join(sorted(names)) or 'no numbers'}")
    return f"{told[0]}, {told[1]}, the data are {str(batch.x.dtype).removeprefix('torch.')}"


def checked_data(energy: Energy | Score, data: Tensor | Batch, like: Tensor) -> Batch:
    """Check the data; return them on the parameters' device, in their precision."""
    batch = Batch.of(data)
    x = batch.x
    if not isinstance(x, Tensor) or not x.is_floating_point():
        found = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise DataError(
            f"The data must be a floating-point tensor (n, *event); got {found}. Convert and scale them first."
        )
    if x.ndim < 2 or x.shape[0] < 2:
        raise DataError(f"The data must be a tensor (n, *event) with n of 2 or more; got shape {tuple(x.shape)}.")
    if energy.event_shape is not None and x.shape[1:] != energy.event_shape:
        raise ShapeError(
            f"The energy is over points of shape {tuple(energy.event_shape)}; the data's {tuple(x.shape[1:])}."
        )
    bad = int((~torch.isfinite(x).flatten(1).all(1)).sum())
    if bad:
        raise DataError(f"{bad} of {x.shape[0]} rows of data hold NaN or infinite values; drop or fill them first.")
    if isinstance(energy, Energy):
        require_support(x, energy, "data")
    if bool((x == x[:1]).all()):
        raise DataError(
            f"All {x.shape[0]} rows of the data are equal; there is no density to learn. Look for a mistake in how "
            "they were read, scaled or repeated."
        )
    context = {name: value.detach().to(like.device) for name, value in batch.context.items()}
    return Batch(x.detach().to(like.device, like.dtype), context)


def checked_loss(loss: Loss) -> Loss:
    """Refuse what cannot be differentiated."""
    if not isinstance(loss, Loss):
        raise ArgumentTypeError(f"An objective's forward returns a Loss(value, metrics); got {type(loss).__name__}.")
    if loss.value.ndim != 0 or not loss.value.requires_grad:
        raise ShapeError(
            f"A loss is a 0-d tensor that depends on the parameters; got shape {tuple(loss.value.shape)}, "
            f"requires_grad={loss.value.requires_grad}. Take the mean over rows, and do not detach it."
        )
    return loss
