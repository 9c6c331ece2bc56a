"""Conversational shopping: find out what the user wants, search, recommend (`shopping-v0`)."""
