"""The path between parties: frames, links, identity."""
