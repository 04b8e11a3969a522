"""Merging: put the right weights of a base back into a model that was trained on.

``kernels`` are pure functions on single tensors, ``tensors`` reads and writes checkpoints, ``plan`` says which kernel
goes where, ``execute`` does it, on folders or on live weights. ``scores`` and ``select`` choose what to restore.
"""
