"""For every kernel that the package exports: an energy that it walks on, and where its chains start."""

import dataclasses
import math

import torch

import gibbsian as gb
from contracts import seeded
from gibbsian.energies.directional import VonMisesFisher
from gibbsian.energies.domains import Torus
from gibbsian.energies.minibatch import MinibatchEnergy
from gibbsian.kernels.domains import Reflected, Wrapped
from gibbsian.partition.boltzmann import MachineRungs
from machines import machine

D = torch.float64
CHAINS, LANES, STEPS = 8, 4, 6


def exported_kernels():
    """Names of the settings' classes whose objects are kernels, as the package exports them."""
    parts = ("gradients", "domain", "init", "noise", "step")
    found = {name: getattr(gb, name) for name in gb.__all__}
    return {
        name
        for name, value in found.items()
        if dataclasses.is_dataclass(value) and all(hasattr(value, part) for part in parts)
    }


def crooked(x):
    return (0.25 * x.square().square() + 0.5 * x.square() - 0.3 * x).flatten(1).sum(1) + (x[:, 0] * x[:, 1]).sin()


def swinging(x):
    return -(x.cos() * torch.tensor([1.0, 0.5], dtype=D)).sum(1)


def points(*shape, seed=5):
    return torch.randn((CHAINS, *shape), generator=seeded(seed), dtype=D)


def posterior():
    rng = seeded(11)
    a = torch.randn(12, 2, generator=rng, dtype=D)
    y = a @ torch.tensor([1.0, -0.5], dtype=D) + torch.randn(12, generator=rng, dtype=D)
    prior = gb.Gaussian(loc=torch.zeros(2, dtype=D))
    return MinibatchEnergy(lambda theta, a, y: 0.5 * (theta @ a.T - y).square(), (a, y), prior)


def cases():
    """Kernel, energy and start by the kernel's name."""
    real, wide = gb.Energy.of(crooked, (2,)), gb.Gaussian(scale=torch.full((2,), 2.0, dtype=D))
    spins = gb.Ising.lattice((4, 4), 0.3, 0.1).to(D)
    bits = torch.randint(2, (CHAINS, 4, 4), generator=seeded(7)).to(D)
    rbm = machine("bernoulli", "bernoulli", scale=1.5)
    visible = torch.randint(2, (CHAINS, *rbm.event_shape), generator=seeded(8)).to(D)
    north = points(3)
    turning = gb.Energy.of(swinging, (2,), support=Torus(2 * math.pi))
    on_reals = {
        "Barker": gb.Barker(0.4),
        "DynamicHMC": gb.DynamicHMC(0.3, 1.5),
        "HMC": gb.HMC(0.3, leapfrog=3),
        "IndependentMH": gb.IndependentMH(wide),
        "Jumps": gb.Jumps(gb.MALA(0.2), wide, tries=3),
        "MALA": gb.MALA(0.2),
        "ULA": gb.ULA(0.1),
        "MCLMC": gb.MCLMC(0.2, 1.0),
        "AdjustedMCLMC": gb.AdjustedMCLMC(0.3, leapfrog=3),
        "NUTS": gb.NUTS(0.4),
        "PSGLD": gb.PSGLD(0.02),
        "RandomWalk": gb.RandomWalk(0.5),
        "SVGD": gb.SVGD(0.1),
        "TemperedTransitions": gb.TemperedTransitions(gb.MALA(0.2), [1.0, 0.5]),
        "ParallelTempering": gb.ParallelTempering(gb.MALA(0.2), [1.0, 0.6, 0.3]),
        "TransportLangevin": gb.TransportLangevin(0.2, 0.5, 0.5),
        "Underdamped": gb.Underdamped(0.3, 1.0),
    }
    found = {name: (kernel, real, points(2)) for name, kernel in on_reals.items()}
    data = posterior()
    for kernel in (gb.SGLD(0.02, 12, 3), gb.SGHMC(0.1, 2.0, 12, 3), gb.CyclicalSGLD(0.02, 5, 12, 3)):
        found[type(kernel).__name__] = (kernel, data, points(2))
    for kernel in (gb.BlockGibbs(), gb.SingleSiteGibbs(3), gb.GibbsWithGradients(), gb.DiscreteLangevin(0.4),
                   gb.PathAuxiliary(2), gb.CheckerboardGibbs()):  # fmt: skip
        found[type(kernel).__name__] = (kernel, spins, bits)
    found["RBMGibbs"] = (gb.RBMGibbs(), rbm, visible)
    found["PathTempering"] = (gb.PathTempering(gb.RBMGibbs(), (1.0, 0.5, 0.0), MachineRungs(rbm.base())), rbm, visible)
    found["SphericalHMC"] = (gb.SphericalHMC(0.3, leapfrog=2), VonMisesFisher(torch.tensor([1.0, 2.0, 2.0], dtype=D)),
                             north / north.norm(dim=1, keepdim=True))  # fmt: skip
    found["Wrapped"] = (Wrapped(gb.MALA(0.3), 2 * math.pi), turning, points(2) % (2 * math.pi))
    found["Reflected"] = (Reflected(gb.HMC(0.2, leapfrog=2), -1.0, 2.0), real, points(2).clamp(-0.9, 1.9))
    return found
