"""Keeping the cached hours current (`refresher`) and proving that they say what the points say (`audit`).

How an hour is recomputed is the engine's business and stands in `store.hours`; what is right is said here.
"""
