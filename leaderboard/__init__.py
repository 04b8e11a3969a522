"""Tracks, submissions, their verification, and the builders of the static pages."""
