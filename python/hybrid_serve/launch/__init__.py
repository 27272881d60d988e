"""Processes: which ones a server has, how they start, meet, and end."""
