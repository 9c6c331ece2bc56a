"""Learners and the training loop."""
