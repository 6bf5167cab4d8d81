"""Preference alignment: candidates, preferences, their losses and the iterations."""
