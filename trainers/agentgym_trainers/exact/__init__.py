"""Worlds so small that nothing needs to be estimated: what a method does in expectation, computed.

mdp.py          enumerable environments and their exact values           (no torch)
bigram.py       a tabular language model on the path of real ones
composition.py  what is certified: declared tables, or a file of your own
estimate.py     every group of episodes through the real pipeline
certify.py      bias, variance, hackability, and the known traps
"""
