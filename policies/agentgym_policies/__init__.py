"""Who acts: engines, endpoint clients, scripted policies."""
