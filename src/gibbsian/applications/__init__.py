"""What energies are used for."""
