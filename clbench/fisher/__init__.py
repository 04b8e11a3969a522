"""Fisher information of a language model: gradients of single sequences, and what is estimated from them.

``gradients`` takes them (one forward and one backward pass of a batch); ``estimate`` makes a diagonal or a rank-one
Fisher of them. Penalties stand in the methods, not here.
"""
