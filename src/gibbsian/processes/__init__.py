"""Several processes of one job: which one this is, what they tell each other, and which chains are whose."""

from gibbsian.processes.collectives import (
    agree,
    collected,
    gathered,
    gathered_objects,
    told_by_main,
)
from gibbsian.processes.lanes import Lanes, lane_seed
from gibbsian.processes.lost import watching
from gibbsian.processes.work import alike, over_lanes, raise_together, together
from gibbsian.processes.world import World, join_processes, part, world

__all__ = [
    "Lanes",
    "World",
    "agree",
    "alike",
    "collected",
    "gathered",
    "gathered_objects",
    "join_processes",
    "lane_seed",
    "over_lanes",
    "part",
    "raise_together",
    "together",
    "told_by_main",
    "watching",
    "world",
]
