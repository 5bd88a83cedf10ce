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
from gibbsian.processes.world import World, join_processes, part, world

__all__ = [
    "Lanes",
    "World",
    "agree",
    "average",
    "collected",
    "gathered",
    "gathered_objects",
    "join_processes",
    "lane_seed",
    "log_mean_exp",
    "log_sum_exp",
    "part",
    "told_by_main",
    "watching",
    "world",
]
