"""Networks of the diffusers library as scores: a stand-in with their call, and a real one where it is installed."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from gibbsian.bridges.flow_likelihood import flow_log_prob
from gibbsian.bridges.reverse import Ancestral, Multistep, reverse
from gibbsian.bridges.scores import Score, score_of
from gibbsian.energies.schedules import Tabulated

STEPS = 1000


@dataclass
class Output:
    """What such a network returns."""

    sample: Tensor


class StandIn(nn.Module):
    """The call of `UNet2DModel`: a point, a time or one per row, and labels by name."""

    def __init__(self, num_class_embeds=None):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)
        self.time = nn.Linear(2, 8)
        self.classes = None if num_class_embeds is None else nn.Embedding(num_class_embeds, 8)

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        angle = torch.as_tensor(timestep, dtype=sample.dtype).expand(len(sample)) / STEPS
        told = self.time(torch.stack((angle.cos(), angle.sin()), 1))
        if self.classes is not None:
            told = told + self.classes(class_labels)
        out = self.last(nn.functional.silu(self.first(sample) + told[:, :, None, None]))
        return Output(out) if return_dict else (out,)


def real(**options):
    """A small one with random weights."""
    diffusers = pytest.importorskip("diffusers")
    sizes = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    return diffusers.UNet2DModel(sample_size=8, in_channels=1, out_channels=1, **sizes, **blocks, **options)


@pytest.fixture(params=[StandIn, real], ids=["stand-in", "diffusers"])
def build(request):
    def made(**options):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return request.param(**options).eval().requires_grad_(False)

    return made


def alphas_cumprod() -> Tensor:
    """As their schedulers list them."""
    return (1.0 - torch.linspace(1e-4, 0.02, STEPS)).cumprod(0)


def points(n=4) -> Tensor:
    return torch.randn((n, 1, 8, 8), generator=torch.Generator().manual_seed(1))


def adopted(network, context=()) -> Score:
    return score_of(network, Tabulated.of(alphas_cumprod()), "eps", context)


@pytest.mark.parametrize("time", [3, 400, 990])
def test_at_a_whole_time_it_is_asked_there(build, time):
    network, x_t, bar = build(), points(), alphas_cumprod()[time]
    alpha, sigma = bar.sqrt(), (1.0 - bar).sqrt()
    level = (sigma / alpha).expand(4)
    eps = network(x_t, torch.tensor(time)).sample
    score = adopted(network)
    torch.testing.assert_close(score(x_t / alpha, level), -eps / level[0], rtol=1e-3, atol=1e-4)
    clean = (x_t - sigma * eps) / alpha
    torch.testing.assert_close(
        score.denoised(x_t / alpha, level), clean, rtol=1e-3, atol=1e-3 * float(clean.abs().max())
    )


def test_it_is_walked_and_has_a_flow_likelihood(build):
    score = adopted(build())
    schedule = Tabulated.of(alphas_cumprod())
    start = schedule.sigma_max * points()
    drawn = reverse(score, start, schedule.levels(6), Multistep())
    assert drawn.shape == start.shape
    found = flow_log_prob(score, drawn, schedule.sigma_min, schedule.sigma_max, steps=3)
    assert bool(torch.isfinite(found.log_prob).all())


def test_labels_are_passed_by_their_name(build):
    network, x, level = build(num_class_embeds=3), points(), torch.full((4,), 0.7)
    score = adopted(network, ("class_labels",))
    first, second = (score.given(class_labels=torch.tensor(k))(x, level) for k in (0, 1))
    assert float((first - second).abs().max()) > 1e-3
    mixed = score(x, level, class_labels=torch.tensor([0, 1, 0, 1]))
    torch.testing.assert_close(mixed[::2], first[::2])
    torch.testing.assert_close(mixed[1::2], second[1::2])


def test_our_steps_are_those_of_their_schedulers():
    """A step of DDIM without noise, which is `Ancestral(eta=0)` in other units."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(STEPS, clip_sample=False, set_alpha_to_one=False, steps_offset=0)
    scheduler.set_timesteps(10)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = real().eval().requires_grad_(False)
    bars = scheduler.alphas_cumprod
    times = scheduler.timesteps.tolist()
    x_t = points()
    ours = x_t / bars[times[0]].sqrt()
    for time in times[:-1]:
        x_t = scheduler.step(network(x_t, time).sample, time, x_t).prev_sample
    levels = [float(((1.0 - bars[t]) / bars[t]).sqrt()) for t in times]
    score = score_of(network, Tabulated.of(bars), "eps")
    ours = reverse(score, ours, levels, Ancestral(eta=0.0)) * bars[times[-1]].sqrt()
    torch.testing.assert_close(ours, x_t, rtol=1e-3, atol=1e-3)
