"""What is learned: small tensors beside a frozen model, and the folder in which they leave."""
