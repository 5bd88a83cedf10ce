"""Several processes of one job: which one this is, what they tell each other, and which chains are whose."""

from gibbsian.processes.collectives import (
    agree,
    average,
    collected,
    gathered,
    gathered_objects,
    log_mean_exp,
    log_sum_exp,
    told_by_main,
)
from gibbsian.processes.lanes import Lanes, lane_seed
from gibbsian.processes.lost import watching
from gibbsian.processes.world import World, part, processes, world

__all__ = [
    "Lanes",
    "World",
    "agree",
    "average",
    "collected",
    "gathered",
    "gathered_objects",
    "lane_seed",
    "log_mean_exp",
    "log_sum_exp",
    "part",
    "processes",
    "told_by_main",
    "watching",
    "world",
]
