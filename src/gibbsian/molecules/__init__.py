"""Molecules: their physical energies, simulation, conformations and what is learned from them."""
