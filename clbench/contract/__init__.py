"""The contract suite: what an outside method, stream or suite must keep, checked on real tiny runs.

For its author, from any folder, without a network for methods and suites::

    pytest --pyargs clbench.contract --method my_method.py:MyMethod
    pytest --pyargs clbench.contract --method replay:fraction=1/t --stream my_stream.py --suite pkg.mod:Suite

``plugin`` registers the options, ``test_contract`` runs the checks of ``methods``, ``streams`` and ``suites``; ``lab``
and ``watch`` are what method checks stand on. This file imports nothing: pytest loads the plugin in every run.
"""
