"""The parties of a run: each owns stages, keys and sessions, and is a Handler to the others."""
