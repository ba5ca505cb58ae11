"""protocol: OpenAI's API as data: bodies read, answers and refusals in its shapes."""
