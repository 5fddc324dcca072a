"""Searches over jobs with Ray Tune."""
