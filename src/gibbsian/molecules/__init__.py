"""Molecules: physical energies, simulations, trajectories, and learned landscapes of conformations."""
