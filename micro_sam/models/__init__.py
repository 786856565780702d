"""What a model is, where its weights are, and how they are loaded."""
