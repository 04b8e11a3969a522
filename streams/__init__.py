"""Streams and stream builders, one file each; the file name is the stream name."""
