"""forward: the model's pass, from any Hugging Face causal LM to logits over our cache."""
