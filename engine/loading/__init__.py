"""loading: models and tokenizers from hubs, folders and files, in the dtype and layout that was asked for."""
