"""Measurement suites, one file each; the file name is the suite name."""
