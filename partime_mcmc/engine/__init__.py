"""The engine: recurrences, the loop that solves them, and what it returns."""
