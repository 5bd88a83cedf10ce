"""How far to trust draws: chain diagnostics, two-sample distances, out-of-distribution detection."""
