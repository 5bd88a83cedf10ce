"""How an energy is fitted: one family of objectives per file."""
