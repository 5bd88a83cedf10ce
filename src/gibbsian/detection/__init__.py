"""Telling foreign rows: scores, and thresholds whose rate of false alarms is known."""
