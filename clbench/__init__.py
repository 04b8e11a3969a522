"""Continual pretraining of language models, measured.

The engine lives here; content lives in ``clbench.methods``, ``clbench.streams``, ``clbench.eval`` and
``clbench.leaderboard``. Content imports the engine, never the other way round (``clbench.registry`` loads it).
"""

__version__ = "0.1.0"
