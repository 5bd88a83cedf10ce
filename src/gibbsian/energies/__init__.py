"""What the system is: energies, their algebra, and densities with known answers."""
