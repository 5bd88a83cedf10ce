"""Fitting an energy: the loop, its checkpoints, its health and its record."""
