"""serve: the OpenAI-compatible server and the inspector page."""
