"""Text generation: folders with a tokenizer, prompts, streamed answers, and conversations."""
