"""Learning across a cut: the client's loop, and what a remote stage keeps and steps for it."""
