"""Families of models: how each is built from a recipe, fitted, drawn from and normalised; one family per file."""
