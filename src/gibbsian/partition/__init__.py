"""How log Z is estimated: exactly on a grid, by annealing, and between bounds."""
