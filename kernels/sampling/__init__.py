"""sampling: logits in, one seeded token a row out."""
