"""Text from models: folders with a tokenizer, prompts, answers as they are generated, conversations."""
