"""Samplers learned from an energy, without data: flows and diffusions that are trained to draw from it."""
