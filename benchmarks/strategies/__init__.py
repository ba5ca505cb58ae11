"""strategies: what each strategy costs on one model and set of prompts, beside transformers where it has the mode."""
