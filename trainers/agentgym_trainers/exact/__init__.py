"""Worlds so small that nothing needs to be estimated: what a method does in expectation, computed.

mdp.py          enumerable environments and their exact values           (no torch)
worlds.py       the ones that certificates are made in                   (no torch)
bigram.py       a tabular language model on the path of real ones
composition.py  what is certified: declared tables, or a file of your own
pipeline.py     one step through the pipeline of a run
estimate.py     every step, with its probability
measures.py     bias and spread
traps.py        the known traps
flow.py         where the expected step leads: hackability
certify.py      all of it, as one certificate
"""
