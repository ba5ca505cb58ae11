"""text: prompts of every accepted format to token ids, and token ids to text as they come."""
