"""What a run will take in memory, time and communication, predicted from a cost model calibrated on the spot."""

from gibbsian.planning.costs import Curve, Device, Link, Network, Quantity
from gibbsian.planning.planned import INFINIBAND, NVLINK, Plan, Question, plan

__all__ = ["INFINIBAND", "NVLINK", "Curve", "Device", "Link", "Network", "Plan", "Quantity", "Question", "plan"]
