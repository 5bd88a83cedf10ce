"""Families of sequences: alignments, Potts models and machines fitted to them, and what people want out."""
