"""The reward model's training, and what its predictions are worth."""
