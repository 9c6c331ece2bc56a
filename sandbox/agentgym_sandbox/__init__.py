"""Where untrusted code and tools will run."""
