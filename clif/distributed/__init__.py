"""Ranks and their groups: where they come from, how they meet, and every collective."""
