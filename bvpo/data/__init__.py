"""Preference data: sources, cleaning, overlap, pairing, and preference sets read and written."""
