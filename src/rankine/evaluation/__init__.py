"""What a model is worth: perplexity, tasks, samples, speed, memory."""
