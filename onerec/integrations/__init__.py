"""Adapters to other people's engines."""
