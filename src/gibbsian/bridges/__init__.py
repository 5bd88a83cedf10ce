"""Bridges to other families of generative models."""
